"""Runs on a seqio stream: they resume bit for bit in the middle of selection, and prepared rows of a Task train too."""

import json

import pytest
import tiny

from slm_assist.data import seqio_tasks
from slm_assist.errors import UserError

try:
    seqio_tasks.modules("these tests")
except UserError as missing:
    pytest.skip(str(missing), allow_module_level=True)

TASK = "seqio:slm_assist.pile"
STREAM = {"data__stream": True, "data__source": TASK, "data__domain_field": ""}
SALT_DS = {"assist__schedule": "step", "assist__steps": 5, "select__rows": "online", "select__pool_factor": 3}


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    """A small LM, and its corpus as the Pile's files."""
    directory = tmp_path_factory.mktemp("stream")
    tiny.run(directory, "small_lm", checkpoint__keep_fraction=0.34)
    lines = (directory / "corpus" / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
    for split, some in (("train", lines[::2]), ("val", lines[1::8])):
        text = "\n".join(line for line in some if len(json.loads(line)["text"]) > 40)
        (directory / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return directory


@pytest.fixture(autouse=True)
def pile(tmp, monkeypatch):
    monkeypatch.setenv("SLM_ASSIST_PILE", str(tmp))


@pytest.mark.slow
@pytest.mark.parametrize("selecting", [True, False])
def test_killed_and_resumed_equals_straight(tmp, selecting):
    keys = STREAM | {"assist__teacher": str(tmp / "small_lm")}
    keys |= SALT_DS if selecting else {"assist__schedule": "constant"}
    straight = tiny.run(tmp, f"straight-{selecting}", killed=(4,), **keys)
    resumed = tiny.run(tmp, f"straight-{selecting}-killed-4", **keys)
    tiny.assert_same_run(straight, resumed)
    kept = {int(path.name.split("-")[0]) for path in resumed.stream.iterdir()}
    assert kept >= {int(path.name) for path in resumed.checkpoints.iterdir()}
    rows = [row for line in tiny.records(straight) for row in line.get("rows", ())]
    assert len(set(rows)) == len(rows) == (40 if selecting else 0)


@pytest.mark.slow
def test_the_place_lost_is_read_again(tmp):
    straight = tiny.run(tmp, "lost", killed=(8,), data__vocabulary=str(tmp / "small_lm"), **STREAM)
    for file in (tmp / "lost-killed-8" / "stream").iterdir():
        file.unlink()
    tiny.assert_same_run(straight, tiny.run(tmp, "lost-killed-8", data__vocabulary=str(tmp / "small_lm"), **STREAM))


def test_a_task_as_prepared_rows(tmp):
    keys = {"data__source": TASK, "data__domain_field": "", "data__vocabulary": str(tmp / "small_lm")}
    run = tiny.run(tmp, "prepared", **keys)
    line = [line for line in tiny.records(run) if line["kind"] == "validation"][-1]
    assert line["tokens"] > 0 and run.read(run.config)["facts"]["train_rows_count"] > 100


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"data__source": "jsonl:x"}, "only seqio:NAME streams"),
        ({"data__objective": "ul2"}, "data.objective=ul2 needs prepared rows"),
        ({"data__domain_weights": "a=1"}, "needs prepared rows"),
        ({"data__source": "seqio:slm_assist.pil"}, "slm_assist.pile"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp, keys, message):
    with pytest.raises(UserError, match=message) as error:
        tiny.run(tmp, "bad", **(STREAM | {"data__vocabulary": str(tmp / "small_lm")} | keys))
    assert "\n" not in str(error.value)
    assert not (tmp / "bad").exists()

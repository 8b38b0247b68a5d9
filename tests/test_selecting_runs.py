"""Runs that choose their data: they resume bit for bit, read what they say, and refuse what does not fit."""

import shutil

import numpy as np
import pytest
import tiny
from test_train import Killed, interrupt_at, kill

from slm_assist import config as config_lib
from slm_assist import corpus, sharding
from slm_assist import experiment as experiment_lib
from slm_assist.assist import row_list
from slm_assist.assist.stages import stages
from slm_assist.errors import UserError
from slm_assist.feed import Data
from slm_assist.run_dir import RunDir

STEPS = 5  # updates that choose
SALT = {"assist__schedule": "step", "assist__steps": STEPS}
ONLINE = {"select__rows": "online", "select__pool_factor": 3, "select__k": 40, "select__statistic": "mean"}
LIST = {"select__rows": "list", "select__steps": STEPS}


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    """A directory with a trained small LM, its early checkpoint, and a list of 20 rows."""
    directory = tmp_path_factory.mktemp("runs")
    tiny.run(directory, "small_lm", checkpoint__keep_fraction=0.34, model__d_model=16)
    rows = prepared(directory).train
    chosen = np.sort(np.random.default_rng(0).permutation(len(rows))[:20])
    made = row_list.make(
        chosen, corpus=rows.fingerprint, rows=len(rows), vocabulary=rows.vocabulary.fingerprint, made={"by": "hand"}
    )
    row_list.write(directory / "list.npz", made)
    return directory


def prepared(tmp, **keys):
    config, _ = config_lib.resolve("", tiny.overrides(tmp, **keys))
    return corpus.prepare(config, say=lambda text: None)


def keys_of(tmp, name: str) -> dict:
    teacher = {"assist__teacher": str(tmp / "small_lm")}
    listed = {"select__list": str(tmp / "list.npz")}
    return {
        "salt_ds": teacher | SALT | ONLINE,
        "threshold": teacher | SALT | ONLINE | {"select__rule": "threshold", "mesh__data": 4},
        "gumbel": {"select__scorer": str(tmp / "small_lm"), "select__steps": STEPS} | ONLINE
        | {"select__rule": "gumbel", "data__domain_weights": "json=1,email=1"},
        "list": listed | LIST | {"select__then": "unseen"},
        "auto": teacher | ONLINE
        | {"assist__schedule": "auto", "assist__steps": 8, "assist__window": 2, "assist__margin": 1.0},
        "ul2": teacher | SALT | ONLINE
        | {"data__objective": "ul2", "data__sentinels": 8, "data__vocabulary": str(tmp / "ul2_lm")},
        "scorer leaves first": teacher | SALT | ONLINE | {"assist__steps": 9, "select__steps": 3},
        "teacher leaves first": teacher | SALT | ONLINE | {"assist__steps": 3, "select__steps": 9},
        "rho1": {"select__token_share": 0.6, "select__reference": str(tmp / "small_lm"), "select__fraction": 0.5,
                 "microbatches": 2},
    }[name]  # fmt: skip


RESUMED = ["salt_ds", "list", "auto"]
RESUMED += [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("threshold", "ul2", "rho1", "gumbel", "scorer leaves first", "teacher leaves first")
]


@pytest.mark.parametrize("name", RESUMED)
def test_killed_and_resumed_equals_straight(tmp, name):
    if name == "ul2":
        tiny.run(tmp, "ul2_lm", checkpoint__keep_fraction=0.34, data__sentinels=8, data__objective="ul2")
    keys = keys_of(tmp, name) | ({"assist__teacher": str(tmp / "ul2_lm")} if name == "ul2" else {})
    killed = (4, 7) if name in ("auto", "list") else (7,) if "first" in name else (4,)
    straight = tiny.run(tmp, name, killed=killed, **keys)
    for step in killed:
        tiny.assert_same_run(straight, tiny.run(tmp, f"{name}-killed-{step}", **keys))


def train_lines(run: RunDir) -> list[dict]:
    return [line for line in tiny.records(run) if line["kind"] == "train"]


def test_kept_rows_are_the_candidates_of_their_step(tmp):
    run = tiny.run(tmp, "salt_ds", **keys_of(tmp, "salt_ds"))
    lines, rows = train_lines(run), prepared(tmp).train
    assert [line["stage"] for line in lines] == ["assisted_selecting"] * STEPS + ["plain"] * (12 - STEPS)
    order = experiment_lib.feed_lib.Order(len(rows), 0)
    for n, line in enumerate(lines[:STEPS]):
        candidates = order.rows_at(np.arange(24) + 24 * n)
        assert len(set(line["rows"])) == 8 and set(line["rows"]) <= set(candidates.tolist())
        assert sum(count for count, _ in line["domains"].values()) == line["candidates"] == 24
        domain = rows.get(np.array(line["rows"]))["domain"]
        for index, name in enumerate(rows.domains):
            assert line["domains"].get(name, [0, 0])[1] == (domain == index).sum()
        assert line["score_kept_mean"] > line["score_mean"]
    assert all("rows" not in line and "score_mean" not in line for line in lines[STEPS:])


def test_a_changed_list_has_its_own_order_and_an_unchanged_one_runs_on(tmp):
    def batches(name: str, **more) -> list[np.ndarray]:
        config, _ = config_lib.resolve("", tiny.overrides(tmp, **(keys_of(tmp, name) | more)))
        rows = prepared(tmp).train
        objective = experiment_lib.objectives.make(config.data, rows.vocabulary)
        feed = Data(config, rows, objective, sharding.make_mesh(1)).feed(stages(12, assisted=0, selecting=STEPS))
        return [feed.row_ids_at(n) for n in range(12)]

    online = batches("salt_ds")
    assert [len(ids) for ids in online] == [24] * STEPS + [8] * 7
    assert len(set(np.concatenate(online).tolist())) == 24 * STEPS + 8 * 7  # no row twice
    listed = row_list.read(tmp / "list.npz").row_ids.tolist()
    unseen = batches("list")
    first = np.concatenate(unseen[:STEPS])
    assert set(first.tolist()) == set(listed) and sorted(first[:20].tolist()) == listed  # 40 rows from a list of 20
    assert not set(np.concatenate(unseen[STEPS:]).tolist()) & set(listed)
    everything = batches("list", select__then="all")
    assert np.array_equal(np.concatenate(everything[:STEPS]), first)
    order = experiment_lib.feed_lib.Order(len(prepared(tmp).train), 0)
    assert np.array_equal(np.concatenate(everything[STEPS:]), order.rows_at(np.arange(7 * 8)))


def test_list_that_is_too_short_is_said(tmp):
    messages: list[str] = []
    tiny.run(tmp, "short", messages=messages, **keys_of(tmp, "list"))
    assert any("40 rows are read from a list of 20; each is read 2.0 times" in line for line in messages)
    assert any("updates 5 to 12: 56 rows are read from a list of" in line for line in messages)
    messages.clear()
    tiny.run(tmp, "short-2", messages=messages, **(keys_of(tmp, "list") | {"select__then": "all"}))
    assert any("compiled eval, selecting, plain" in line for line in messages)


def test_auto_says_why_and_drops_the_teacher(tmp):
    run = tiny.run(tmp, "auto", **keys_of(tmp, "auto"))
    (switch,) = [line for line in tiny.records(run) if line["kind"] == "switch"]
    stages = [line["stage"] for line in train_lines(run)]
    assert stages == ["assisted_selecting"] * switch["step"] + ["plain"] * (12 - switch["step"])
    assert "accuracy" in switch["reason"]
    assert run.read(run.summary)["stages"][0]["stop"] == switch["step"]


def test_costs_are_by_helper(tmp):
    run = tiny.run(tmp, "salt_ds", **keys_of(tmp, "salt_ds"))
    flops = run.read(run.summary)["flops"]
    assert flops["scorer"] == pytest.approx(3 * flops["teacher"])
    helpers = run.read(run.config)["facts"]["helpers"]
    assert (helpers["scorer"]["step"], helpers["teacher"]["step"]) == (4, 12)


def test_stage_2_needs_no_helper(tmp, monkeypatch):
    shutil.copytree(tmp / "small_lm", tmp / "leaving")
    keys = keys_of(tmp, "salt_ds") | {"assist__teacher": str(tmp / "leaving")}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        interrupt_at(patch, 10, kill)
        tiny.run(tmp, "left", **keys)
    shutil.rmtree(tmp / "leaving")
    assert tiny.run(tmp, "left", **keys).summary.is_file()


def test_a_helper_that_changed_meanwhile_is_refused(tmp, monkeypatch):
    shutil.copytree(tmp / "small_lm", tmp / "changing")
    keys = keys_of(tmp, "salt_ds") | {"assist__teacher": str(tmp / "changing")}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        interrupt_at(patch, 4, kill)
        tiny.run(tmp, "changed", **keys)
    shutil.rmtree(tmp / "changing")
    tiny.run(tmp, "changing", checkpoint__keep_fraction=0.34, model__d_model=16, seed=1)
    with pytest.raises(UserError, match="not what .* began with"):
        tiny.run(tmp, "changed", **keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"select__rows": "online", "select__steps": 3}, "needs select.scorer"),
        ({"select__rows": "list"}, "both select.rows=list and"),
        ({"select__rows": "list", "select__list": "/nowhere/list.npz", "select__steps": 3}, "/nowhere/list.npz"),
        ({"select__rows": "online", "select__pool_factor": 1}, "at least 2"),
        ({"select__rows": "online", "select__rule": "random", "select__pool_factor": 5000}, "40,000 candidates"),
        ({"select__rows": "list", "select__list": "all"}, "select.list=all"),
        ({"select__rows": "list", "select__list": "x.npz", "select__then": "unsen"}, "did you mean unseen"),
        ({"data__domain_weights": "naturl"}, "did you mean natural"),
        ({"select__scorer": "x"}, "nothing is selected"),
        ({"select__token_share": 0.5, "select__steps": 3}, "needs select.reference"),
        ({"select__rows": "online", "select__score": "sal", "select__steps": 3}, "did you mean salt"),
        ({"select__rows": "online", "select__rule": "tops", "select__steps": 3}, "did you mean top"),
        ({"select__steps": 13, "select__rows": "online"}, "beyond the run's steps"),
        ({"data__domain_weights": "json=1"}, "email"),
        ({"data__domain_weights": "json=1,email=1,mail=1"}, "mail"),
        ({"data__objective": "spam"}, "did you mean span"),
        ({"data__objective": "ul2", "data__ul2_span": 0.5}, "add up to 1"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp, keys, message):
    with pytest.raises(UserError, match=message) as error:
        tiny.run(tmp, "bad", **keys)
    assert "\n" not in str(error.value)
    assert not (tmp / "bad").exists()


def test_k_and_top_k_beyond_the_vocabulary(tmp):
    teacher = {"assist__teacher": str(tmp / "small_lm")}
    with pytest.raises(UserError, match="select.k=385"):
        tiny.run(tmp, "bad", **(teacher | SALT | ONLINE | {"select__k": 385}))
    with pytest.raises(UserError, match="assist.top_k=385"):
        tiny.run(tmp, "bad", assist__top_k=385, **(teacher | SALT))
    assert not (tmp / "bad").exists()


def test_a_scorer_without_an_early_checkpoint_is_named(tmp):
    tiny.run(tmp, "late", steps=3)
    with pytest.raises(UserError, match="kept no early checkpoint"):
        tiny.run(tmp, "bad", assist__teacher=str(tmp / "late"), **(SALT | ONLINE))


def test_a_list_for_another_corpus_is_refused(tmp):
    with pytest.raises(UserError, match="another vocabulary|another corpus"):
        tiny.run(tmp, "bad", data__seq_len=16, **keys_of(tmp, "list"))
    assert not (tmp / "bad").exists()

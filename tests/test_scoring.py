"""`slm-assist score` and `select`: a row's score is what the pieces say, however the work was cut."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from slm_assist import config as config_lib
from slm_assist import scoring, selecting
from slm_assist.assist import helpers as helpers_lib
from slm_assist.assist import row_list, sample, score_store
from slm_assist.data.rows import open_rows
from slm_assist.errors import UserError
from slm_assist.pretrained import RunModel
from slm_assist.run_dir import RunDir

KEEP = {"checkpoint.keep_fraction": 0.5}


def config_of(tmp: Path, **more):
    """The tests' corpus, scored by `tmp / "small_lm"`; `more` as for `tiny.overrides`."""
    config = config_lib.get_config()
    given = {"select__scorer": str(tmp / "small_lm"), "select__sample": 9} | more
    for key, value in tiny.overrides(tmp, **given).items():
        config_lib.set_key(config, key, value)
    return config


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with a small LM that kept an early checkpoint, and its corpus scored in one go."""
    tmp = tmp_path_factory.mktemp("scoring")
    tiny.run(tmp, "small_lm", steps=6, **KEEP)
    scoring.score(config_of(tmp), tmp / "scores", say=lambda line: None)
    return tmp


def test_scores_are_those_of_the_pieces(home):
    """Logits of the early checkpoint, a sort and a median in float64, row by row."""
    found = score_store.open_scores(home / "scores")
    assert found.meta["helpers"]["scorer"]["step"] == 3 and found.meta["score"]["name"] == "salt"
    rows = open_rows(found.meta["rows_path"]).train
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), devices=jax.devices()[:1])
    helper = helpers_lib.find(
        "scorer", str(home / "small_lm"), step=3, vocabulary=rows.vocabulary, dtype=np.dtype("float32")
    )
    params = helper.load(mesh)[1]
    assert len(rows) == len(found.score) > 100
    some = np.r_[0:3, len(rows) // 2, len(rows) - 3 : len(rows)]
    for row in some:
        batch = rows.get(np.array([row]))
        hidden = helper.model.apply(
            params, batch["tokens"], segment_ids=batch["segment_ids"], positions=batch["positions"]
        )
        logits = np.asarray(hidden[0], np.float64) @ np.asarray(helper.model.head(params), np.float64)
        top = logits.max(axis=1, keepdims=True)
        log_p = logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
        losses, inside = [], []
        for t in np.flatnonzero(batch["mask"][0]):
            y = batch["targets"][0, t]
            losses.append(-log_p[t, y])
            inside.append(y in np.argsort(-log_p[t], kind="stable")[:10])
        expected = {
            "score": np.median(np.where(inside, losses, 0.0)),
            "loss": np.mean(losses),
            "top_k_share": np.mean(inside),
            "tokens": len(losses),
            "domain": batch["domain"][0],
        }
        for name, value in expected.items():
            np.testing.assert_allclose(found.columns[name][row], value, rtol=2e-4, atol=2e-5, err_msg=f"{name} {row}")


def assert_same(a: Path, b: Path):
    ours, theirs = score_store.open_scores(a), score_store.open_scores(b)
    for name in score_store.COLUMNS:
        np.testing.assert_array_equal(ours.columns[name], theirs.columns[name])
    assert ours.fingerprint == theirs.fingerprint


def test_two_parts_are_the_whole(home):
    lines = []
    for i in range(2):
        scoring.score(config_of(home), home / "parts", part=(i, 2), say=lines.append)
    assert any("part 0/2 is done; the other parts are not" in line for line in lines)
    assert_same(home / "parts", home / "scores")
    assert_samples_equal(home / "parts", home / "scores")


def assert_samples_equal(a: Path, b: Path):
    ours, theirs = (sample.read(path / score_store.SAMPLE) for path in (a, b))
    for name in ours._fields:
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))


def test_stopped_and_gone_on_with_another_number_of_hosts(home, monkeypatch):
    """A signal after three spans, then a torn record, then three hosts: bit for bit the same."""
    append, times = score_store.Writer.append, []

    def stop(self, first, values):
        append(self, first, values)
        times.append(first)
        if len(times) == 3:
            raise KeyboardInterrupt(15)

    monkeypatch.setattr(score_store.Writer, "append", stop)
    rows, span = (score_store.read_meta(home / "scores")[name] for name in ("rows", "span_rows"))
    with pytest.raises(scoring.Stopped, match=f"{3 * span:,} of {rows:,} rows are scored; the same") as stopped:
        scoring.score(config_of(home), home / "stopped", say=lambda line: None)
    assert stopped.value.signal == 15
    monkeypatch.undo()
    with open(home / "stopped" / "part-0-of-1.scores", "ab") as file:
        file.write(b"half a record")
    for i in range(3):
        scoring.score(config_of(home), home / "stopped", part=(i, 3), say=lambda line: None)
    assert_same(home / "stopped", home / "scores")


def test_nothing_is_scored_twice(home, monkeypatch):
    monkeypatch.setattr(scoring, "score_spans", None)
    lines = []
    scoring.score(config_of(home), home / "scores", say=lines.append)
    assert "rows have a score (salt: mean" in lines[-1]


def test_the_sample_is_made_where_it_is_missing(home):
    before = sample.read(home / "scores" / score_store.SAMPLE)
    (home / "scores" / score_store.SAMPLE).unlink()
    scoring.score(config_of(home), home / "scores", say=lambda line: None)
    after = sample.read(home / "scores" / score_store.SAMPLE)
    np.testing.assert_array_equal(before.loss, after.loss)
    found = score_store.open_scores(home / "scores")
    assert len(after.row_ids) == 9 and after.header["roles"]["scorer"]["step"] == 3
    np.testing.assert_array_equal(after.score, found.score[after.row_ids])
    assert after.score.max() == found.score.max() and after.score.min() == found.score.min()
    for i in range(9):  # what the sample says of each token gives the row's numbers again
        counted = after.mask[i] != 0
        inside = after.rank[i][counted] < 10
        np.testing.assert_allclose(after.loss[i][counted].mean(), found.columns["loss"][after.row_ids[i]], rtol=1e-5)
        np.testing.assert_allclose(inside.mean(), found.columns["top_k_share"][after.row_ids[i]], rtol=1e-6)
        np.testing.assert_allclose(np.median(after.loss[i][counted] * inside), after.score[i], rtol=1e-5, atol=1e-6)


def test_eight_devices_agree_with_one(home):
    """Split by rows; and by rows and vocabulary."""
    one = score_store.open_scores(home / "scores").columns
    for name, sizes in (("eight", {"mesh__data": 8}), ("tensor", {"mesh__data": 2, "mesh__tensor": 2})):
        scoring.score(config_of(home, **sizes), home / name, say=lambda line: None)
        many = score_store.open_scores(home / name).columns
        np.testing.assert_allclose(many["loss"], one["loss"], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(many["tokens"], one["tokens"])
        assert np.mean(np.abs(many["score"] - one["score"]) > 1e-4) < 0.02, "ranks may differ at ties only"


def test_two_models(home):
    """MiniPLM's difference of the early and the final checkpoint of one run."""
    config = config_of(home, select__score="difference", select__scorer_step=-1, select__reference_step=-2)
    scoring.score(config, home / "difference", say=lambda line: None)
    found = score_store.open_scores(home / "difference")
    assert {role: helper["step"] for role, helper in found.meta["helpers"].items()} == {"scorer": 6, "reference": 3}
    early = score_store.open_scores(home / "scores")
    np.testing.assert_allclose(found.score, early.columns["loss"] - found.columns["loss"], rtol=1e-3, atol=1e-4)


def test_the_newest_checkpoint_is_the_one_it_began_with(home, monkeypatch):
    config = config_of(home, select__scorer_step=-1)
    scoring.score(config, home / "newest", part=(0, 2), say=lambda line: None)
    monkeypatch.setattr(RunModel, "steps", lambda self: [3, 6, 9])  # it trained on
    scoring.score(config, home / "newest", part=(1, 2), say=lambda line: None)
    assert score_store.open_scores(home / "newest").meta["helpers"]["scorer"]["step"] == 6


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"select__score": "learnability"}, "select.score=learnability: it compares with the model that is being"),
        ({"select__score": "salty"}, "did you mean salt?"),
        ({"select__k": 100000}, "select.k=100000: the vocabulary has only 384 tokens"),
        ({"select__scorer": ""}, "needs select.scorer, the run directory of a trained small LM"),
        ({"select__scorer": "nowhere"}, "select.scorer=nowhere: there is no such directory"),
        ({"select__scorer_step": 5}, "step 5 was not kept; there are 3, 6"),
        ({"data__stream": True}, "data.stream=true"),
        ({"batch_rows": 9, "mesh__data": 8}, "batch_rows=9 is not divisible by the 8 parts"),
        ({"select__k": 11}, "score.k: 10 -> 11"),
        ({"batch_rows": 16}, "batch_rows: 8 -> 16"),
        ({"select__scorer_step": 6}, "helpers.scorer.step: 3 -> 6"),
        ({"data__seq_len": 16}, "seq_len: 32 -> 16"),
    ],
)
def test_refused_in_one_line(home, keys, says):
    before = {file.name: file.read_bytes() for file in (home / "scores").iterdir()}
    with pytest.raises(UserError) as error:
        scoring.score(config_of(home, **keys), home / "scores", say=lambda line: None)
    assert says in str(error.value) and "\n" not in str(error.value)
    assert before == {file.name: file.read_bytes() for file in (home / "scores").iterdir()}


@pytest.mark.parametrize("part", [(2, 2), (-1, 2), (0, 0)])
def test_no_such_part(home, part):
    with pytest.raises(UserError, match="write I/N with I from 0 to N - 1"):
        scoring.score(config_of(home), home / "x", part=part)
    assert not (home / "x").exists()


def test_a_list_of_the_highest(home):
    found, lines = score_store.open_scores(home / "scores"), []
    chosen = selecting.select(home / "scores", home / "top.npz", ratio=0.2, say=lines.append)
    count = int(0.2 * len(found.score))
    expected = np.sort(np.argsort(-found.score, kind="stable")[:count])
    np.testing.assert_array_equal(chosen.row_ids, expected)
    back = row_list.read(home / "top.npz")
    np.testing.assert_array_equal(back.row_ids, expected)
    made = back.header["made"]
    assert made["scores_fingerprint"] == found.fingerprint and made["helpers"]["scorer"]["step"] == 3
    assert made["options"]["ratio"] == 0.2 and made["kept"]["tokens"] == found.columns["tokens"][expected].sum()
    kept = {name: int((found.domain[expected] == i).sum()) for i, name in enumerate(found.meta["domains"])}
    assert {name: pair[1] for name, pair in made["kept"]["domains"].items()} == kept
    assert f"kept {count:,} of {len(found.score):,} rows" in lines[0]
    assert [line.split()[0] for line in lines[-2:]] == ["email", "json"]
    back.check(open_rows(found.meta["rows_path"]).train)


def test_ties_at_the_bar_are_told(home):
    found = score_store.open_scores(home / "scores")
    values = np.zeros(len(found.score), np.float32)
    values[:10] = 1
    tied = found._replace(columns=found.columns | {"score": values})
    lines = selecting.describe(tied, np.arange(15), ties=True)
    assert f"{len(values) - 10:,} rows have this lowest score, and 5 of them are kept" in lines[2]
    assert not any("lowest score, and" in line for line in selecting.describe(tied, np.arange(10), ties=True))


def test_a_quota_for_each_domain(home):
    found = score_store.open_scores(home / "scores")
    chosen = selecting.select(
        home / "scores", home / "q.npz", rule="gumbel", rows=20, seed=3, quotas={"email": 3, "json": 1}, say=list
    )
    names = [found.meta["domains"][d] for d in found.domain[chosen.row_ids]]
    assert (names.count("email"), names.count("json")) == (15, 5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rows": 10**6}, "there are only"),
        ({}, "how many of the"),
        ({"rows": 1, "ratio": 0.5}, "give one of them"),
        ({"ratio": 0.5, "low": 0.2}, "no meaning with rule=top"),
        ({"ratio": 0.1, "quotas": {"emial": 1}}, "did you mean email?"),
    ],
)
def test_a_list_that_cannot_be(home, options, says):
    with pytest.raises(UserError, match=says.replace("?", r"\?")):
        selecting.select(home / "scores", home / "no.npz", **options)
    assert not (home / "no.npz").exists()


def test_nan_scores_are_not_selected_on(home, tmp_path):
    found = score_store.open_scores(home / "scores")
    table = np.column_stack([found.columns[name] for name in score_store.COLUMNS])
    table[[17, 40], 0] = np.nan
    with score_store.Writer(tmp_path / "nan", found.meta) as writer:
        for first in writer.todo:
            writer.append(first, table[first : first + found.meta["span_rows"]])
    with pytest.raises(UserError, match=r"nan: 2 of \d+ scores are NaN, the first that of row 17"):
        selecting.select(tmp_path / "nan", tmp_path / "no.npz", ratio=0.5)
    assert not (tmp_path / "no.npz").exists()
    line = scoring.describe(score_store.open_scores(tmp_path / "nan"))
    assert "2 rows have no number (NaN), the first is row 17" in line


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import test_scoring
from slm_assist import scoring
scoring.score(test_scoring.config_of(Path({home!r})), {out!r}, part=({index}, {count}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_moments(home, seed):
    """kill -9, again and again, with one host or two; in the end the bits of a scoring that nobody killed."""
    rng, out = random.Random(seed), home / f"killed{seed}"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    kills = 0
    while True:
        count = rng.choice([1, 2])
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", SCRIPT.format(
                    tests=str(Path(__file__).parent), home=str(home), out=str(out), index=i, count=count
                )],
                env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
            for i in range(count)
        ]  # fmt: skip
        before, deadline = size(out), time.monotonic() + 120
        while any(p.poll() is None for p in processes) and size(out) == before and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(rng.random() ** 3 * 0.3)
        for process in processes:
            if kills < 8 and process.poll() is None:
                process.kill()
                kills += 1
        outputs = [process.communicate()[0].decode() for process in processes]
        assert all(process.returncode in (0, -9) for process in processes), outputs
        if (out / score_store.SAMPLE).is_file():
            break
    assert kills >= 3, "nothing was tested"
    assert_same(out, home / "scores")
    assert_samples_equal(out, home / "scores")


def size(out: Path) -> int:
    return sum(file.stat().st_size for file in out.glob("part-*")) if out.is_dir() else 0


def test_the_run_is_only_read(home):
    assert not (home / "small_lm" / score_store.SAMPLE).exists() and RunDir(home / "small_lm").summary.is_file()

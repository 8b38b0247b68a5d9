"""Scores on disk: nothing lost, nothing twice, whatever was killed, whoever goes on; and what is refused."""

import json
import multiprocessing
from types import SimpleNamespace

import numpy as np
import pytest

from slm_assist.assist import sample
from slm_assist.assist import score_store as store
from slm_assist.errors import UserError

ROWS, SPAN = 22, 4  # the sixth span holds two rows
SPANS = list(range(0, ROWS, SPAN))
META = {
    "vocabulary": "vvvvvvvvvvvvvvvv",
    "corpus": "cccccccccccccccc",
    "rows": ROWS,
    "seq_len": 8,
    "domains": ["a", "b"],
    "score": {"name": "salt", "k": 10, "masked": "zero", "statistic": "median"},
    "helpers": {"scorer": {"run": "/runs/small", "step": 12, "parameters": 100, "identity": "ffff"}},
    "dtype": "float32",
    "batch_rows": 2,
    "span_rows": SPAN,
}


def values(first: int) -> np.ndarray:
    """What span `first` holds: every number another one."""
    count = min(SPAN, ROWS - first)
    return (first * 5 + np.arange(count * 5, dtype=np.float32)).reshape(count, 5)


def fill(path, part=(0, 1), most=None, meta=META):
    """One process's life: scores up to `most` spans; returns those it was given."""
    with store.Writer(path, meta, part) as writer:
        todo = list(writer.todo)
        for first in todo[:most]:
            writer.append(first, values(first))
    return todo


def check(path):
    found = store.open_scores(path)
    table = np.column_stack([found.columns[name] for name in store.COLUMNS])
    np.testing.assert_array_equal(table, np.arange(ROWS * 5, dtype=np.float32).reshape(ROWS, 5))
    return found


def test_written_and_read_back(tmp_path):
    assert fill(tmp_path / "s") == SPANS
    found = check(tmp_path / "s")
    assert found.meta["score"] == META["score"] and found.score.dtype == np.float32
    assert fill(tmp_path / "s") == [], "nothing is scored twice"


@pytest.mark.parametrize("hosts", [2, 3, 7])
def test_any_number_of_hosts_gives_the_same(tmp_path, hosts):
    fill(tmp_path / "one")
    given = [fill(tmp_path / "many", (i, hosts)) for i in range(hosts)]
    assert sorted(sum(given, [])) == SPANS
    assert check(tmp_path / "many").fingerprint == check(tmp_path / "one").fingerprint


def test_cut_at_every_byte(tmp_path):
    """A kill leaves the file as long as it happened to be: what is whole stays, the rest is done again."""
    fill(tmp_path / "whole")
    name = "part-0-of-1.scores"
    data = (tmp_path / "whole" / name).read_bytes()
    sizes = [16 + 20 * min(SPAN, ROWS - first) for first in SPANS]
    for length in range(len(data)):
        path = tmp_path / "cut"
        path.mkdir(exist_ok=True)
        (path / "meta.json").write_bytes((tmp_path / "whole" / "meta.json").read_bytes())
        (path / name).write_bytes(data[:length])
        whole = sum(length >= end for end in np.cumsum(sizes))
        with pytest.raises(UserError, match=rf"{ROWS - min(ROWS, whole * SPAN):,} of {ROWS} rows have no score") as e:
            store.open_scores(path)
        if length not in (0, *np.cumsum(sizes)):
            assert f"{name}: cut short or damaged at byte {sum(sizes[:whole])} of {length}" in str(e.value)
        assert fill(path) == SPANS[whole:]
        assert (path / name).read_bytes() == data


@pytest.mark.parametrize("at", range(0, 96 * 2, 5))
def test_a_flipped_byte_is_found(tmp_path, at):
    """In a header or in a value: the records before it stay."""
    path = tmp_path / "s"
    fill(path)
    file = path / "part-0-of-1.scores"
    data = bytearray(file.read_bytes())
    data[at] ^= 0x10
    file.write_bytes(data)
    with pytest.raises(UserError, match="part-0-of-1.scores: cut short or damaged at byte"):
        store.open_scores(path)
    assert fill(path) == SPANS[at // 96 :]
    check(path)


def test_zeros_behind_the_last_record_are_no_record(tmp_path):
    """What some file systems leave after a power cut."""
    path = tmp_path / "s"
    fill(path, most=3)
    with open(path / "part-0-of-1.scores", "ab") as file:
        file.write(bytes(500))
    assert fill(path) == SPANS[3:]
    check(path)


def test_goes_on_with_another_number_of_hosts(tmp_path):
    path = tmp_path / "s"
    fill(path, (0, 2), most=2)
    fill(path, (1, 2), most=1)
    torn = path / "part-1-of-2.scores"
    torn.write_bytes(torn.read_bytes() + b"torn by a kill")
    assert sorted(sum((fill(path, (i, 3)) for i in range(3)), [])) == [
        first for first in SPANS if first not in (0, 4, 8)
    ]
    check(path)  # complete, although nobody came back to cut the torn file


def test_what_one_host_lost_another_finds(tmp_path):
    path = tmp_path / "s"
    for i in range(2):
        fill(path, (i, 2))
    file = path / "part-0-of-2.scores"
    data = bytearray(file.read_bytes())
    data[100] ^= 1  # in the second of its records
    file.write_bytes(data)
    assert fill(path) == [8, 16]
    check(path)


def hold(path, part, ready, release):
    with store.Writer(path, META, part):
        ready.set()
        release.wait(30)


@pytest.mark.parametrize(
    ("ours", "says"), [((0, 1), "another process is scoring part 0/1"), ((0, 2), "need the same number of parts")]
)
def test_two_processes_are_kept_apart(tmp_path, ours, says):
    context = multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path / "s", (0, 1), ready, release))
    other.start()
    assert ready.wait(30)
    try:
        with pytest.raises(UserError, match=says), store.Writer(tmp_path / "s", META, ours):
            pass
    finally:
        release.set()
        other.join()
    assert fill(tmp_path / "s") == SPANS


def test_a_killed_process_leaves_no_lock(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path / "s", (0, 1), ready, release))
    other.start()
    assert ready.wait(30)
    other.kill()
    other.join()
    assert fill(tmp_path / "s") == SPANS


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"vocabulary": "wwww"}, "vocabulary: vvvvvvvvvvvv -> wwww"),
        ({"corpus": "dddd"}, "corpus: cccccccccccc -> dddd"),
        ({"score": META["score"] | {"k": 20}}, "score.k: 10 -> 20"),
        ({"score": META["score"] | {"name": "perplexity"}}, "score.name: salt -> perplexity"),
        ({"helpers": {"scorer": META["helpers"]["scorer"] | {"step": 24}}}, "helpers.scorer.step: 12 -> 24"),
        (
            {"helpers": {"scorer": META["helpers"]["scorer"] | {"identity": "eeee"}}},
            "helpers.scorer.identity: ffff -> eeee",
        ),
        ({"dtype": "bfloat16"}, "dtype: float32 -> bfloat16"),
        ({"batch_rows": 4}, "batch_rows: 2 -> 4"),
    ],
)
def test_other_options_are_refused_by_name(tmp_path, change, says):
    fill(tmp_path / "s", most=2)
    before = {file.name: file.read_bytes() for file in (tmp_path / "s").iterdir()}
    with pytest.raises(UserError, match="made in another way") as e:
        fill(tmp_path / "s", meta=META | change)
    assert says in str(e.value) and str(e.value).count("->") == 1 and "\n" not in str(e.value)
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "s").iterdir()}


def test_a_run_that_was_moved_is_the_same_run(tmp_path):
    fill(tmp_path / "s", most=2)
    moved = META | {"helpers": {"scorer": META["helpers"]["scorer"] | {"run": "/elsewhere"}}}
    assert fill(tmp_path / "s", meta=moved) == SPANS[2:]


def rows(corpus=META["corpus"], vocabulary=META["vocabulary"]):
    return SimpleNamespace(fingerprint=corpus, vocabulary=SimpleNamespace(fingerprint=vocabulary))


def test_only_for_the_rows_they_were_made_of(tmp_path):
    fill(tmp_path / "s")
    store.open_scores(tmp_path / "s", rows())
    with pytest.raises(UserError, match="of another corpus"):
        store.open_scores(tmp_path / "s", rows(corpus="x"))
    with pytest.raises(UserError, match="of another vocabulary"):
        store.open_scores(tmp_path / "s", rows(corpus="x", vocabulary="y"))


def test_scored_twice_and_differently(tmp_path):
    """Only by copying files about; then nobody can say which is right."""
    fill(tmp_path / "s", (0, 2))
    fill(tmp_path / "t")
    data = (tmp_path / "t" / "part-0-of-1.scores").read_bytes()
    (tmp_path / "s" / "part-0-of-1.scores").write_bytes(data)
    check(tmp_path / "s")  # twice, but the same
    with store.Writer(tmp_path / "u", META) as writer:
        writer.append(8, values(8) + 1)
    (tmp_path / "s" / "part-1-of-3.scores").write_bytes((tmp_path / "u" / "part-0-of-1.scores").read_bytes())
    with pytest.raises(UserError, match="rows from 8 are not those in part-0-of-2.scores"):
        store.open_scores(tmp_path / "s")


def test_what_is_no_directory_of_scores(tmp_path):
    with pytest.raises(UserError, match="not a directory of scores"):
        store.open_scores(tmp_path / "nothing")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds notes.txt and no meta.json"):
        fill(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    fill(tmp_path / "s")
    for text, says in (
        ("{", "cannot be read"),
        ("[]", "format None"),
        (json.dumps(META | {"format": 99}), "format 99"),
        (json.dumps({"format": 1}), "has no 'vocabulary'"),
    ):
        (tmp_path / "s" / "meta.json").write_text(text)
        with pytest.raises(UserError, match=says):
            store.open_scores(tmp_path / "s")


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    with store.Writer(tmp_path / "s", META) as writer:
        writer.append(0, values(0))
        real, calls = store.os.write, []

        def write(descriptor, data):
            calls.append(len(data))
            if len(calls) > 1:
                raise OSError(28, "No space left on device")
            return real(descriptor, data[:7])

        monkeypatch.setattr(store.os, "write", write)
        with pytest.raises(UserError, match="No space left on device"):
            writer.append(4, values(4))
        monkeypatch.undo()
    assert fill(tmp_path / "s") == SPANS[1:]
    check(tmp_path / "s")


def make_sample(n=6, t=4):
    rng = np.random.default_rng(0)
    return sample.Sample(
        row_ids=np.arange(n) * 3,
        domain=rng.integers(0, 2, n),
        domains=["a", "b"],
        targets=rng.integers(0, 99, (n, t)),
        mask=np.ones((n, t)),
        loss=rng.random((n, t)),
        rank=rng.integers(0, 99, (n, t)),
        score=rng.random(n),
        header={"score": "salt", "k": 10, "roles": {}, "kept_share": None},
    )


def test_sample_there_and_back(tmp_path):
    written = make_sample()
    sample.write(tmp_path / "s.npz", written)
    found = sample.read(tmp_path / "s.npz")
    assert found.domains == written.domains and found.header == written.header
    for name in ("row_ids", "domain", "targets", "mask", "loss", "rank", "score"):
        np.testing.assert_array_equal(getattr(found, name), getattr(written, name).astype(getattr(found, name).dtype))
    assert [p.name for p in tmp_path.iterdir()] == ["s.npz"]


def test_damaged_samples(tmp_path):
    file = tmp_path / "s.npz"
    with pytest.raises(UserError, match="no such file"):
        sample.read(file)
    sample.write(file, make_sample())
    data = file.read_bytes()
    for length in range(0, len(data), 97):
        file.write_bytes(data[:length])
        with pytest.raises(UserError, match="not a sample of rows, or damaged"):
            sample.read(file)
    for wrong in (
        {"domain": np.array([0, 1, 2, 0, 0, 0])},
        {"loss": np.zeros((6, 5))},
        {"header": {"score": "salt"}},
    ):
        sample.write(file, make_sample()._replace(**wrong))
        with pytest.raises(UserError, match="not a sample of rows, or damaged"):
            sample.read(file)


def test_nothing_in_a_sample_is_run(tmp_path):
    np.savez(tmp_path / "s.npz", row_ids=np.array([print], object))
    with pytest.raises(UserError, match="not a sample of rows, or damaged"):
        sample.read(tmp_path / "s.npz")


def test_spread_shows_high_middle_and_low():
    score = np.array([5, 1, np.nan, 3, 2, 4, 0, 6, 8, 7, 9], np.float32)
    assert sorted(score[sample.spread(score, 6)]) == [0, 1, 4, 5, 8, 9]
    assert sorted(score[sample.spread(score, 5)]) == [0, 3, 4, 5, 9]
    assert 2 not in sample.spread(score, 100) and len(sample.spread(score, 100)) == 10
    assert (np.diff(sample.spread(score, 7)) > 0).all()

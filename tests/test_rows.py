"""Rows: what they hold, the same bytes on any number of cores, and a cache that is whole or absent."""

import errno
import hashlib
import json
import logging
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from slm_assist.data import python_source, row_store, rows, shards
from slm_assist.data.objectives import causal
from slm_assist.data.rows import open_rows, prepare
from slm_assist.data.sources import open_source
from slm_assist.data.tokenizers import train_vocabulary
from slm_assist.errors import UserError

T = 32
NAMES = ("tokens", "targets", "segment_ids", "positions", "mask")


def write_corpus(path, n=700, seed=0):
    """JSON lines: documents of 0 to 60 words in three domains."""
    rng = random.Random(seed)
    stems = "model token layer train step small large"
    words = [f"{a}{b}" for a in ("re", "un", "", "pre") for b in stems.split(" ")]
    with open(path, "w") as file:
        for i in range(n):
            text = " ".join(rng.choices(words, k=rng.randrange(60)))
            file.write(json.dumps({"text": text, "set": f"set {min(rng.randrange(6), 2)}", "i": i}) + "\n")
    return f"jsonl:{path}"


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "a.jsonl")


@pytest.fixture(scope="module")
def vocabulary(spec):
    return train_vocabulary((d.text for d in open_source(spec).documents()), 330)


def make(spec, cache_dir, **options):
    options = {"seq_len": T, "vocab_size": 330, "validation_fraction": 0.1, "progress": False} | options
    return prepare(open_source(spec, domain_field="set"), cache_dir=cache_dir, **options)


def contents(path):
    return {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}


def slow_causal(ids, starts, length):
    """The definition of segments, positions and mask, one token at a time."""
    segment, position, segments, positions = 0, 0, [], []
    for t in range(len(ids)):
        if t == 0 or starts[t]:
            segment, position = segment + 1, 0
        segments.append(segment if t < length else 0)
        positions.append(position if t < length else 0)
        position += 1
    mask = [float(a == b != 0) for a, b in zip(segments, segments[1:], strict=False)]
    return list(ids[:-1]), list(ids[1:]), segments[:-1], positions[:-1], mask


def test_causal_against_the_slow_definition():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 60_000, (50, 20)).astype(np.uint16)
    starts = rng.random((50, 20)) < 0.2
    length = rng.integers(2, 21, 50)
    starts &= np.arange(20) < length[:, None]
    got = causal(ids, starts, length)
    for name, expected in zip(NAMES, zip(*map(slow_causal, ids, starts, length), strict=True), strict=True):
        np.testing.assert_array_equal(got[name], np.array(expected))
        assert got[name].dtype == (np.float32 if name == "mask" else np.int32)


def test_get_hands_an_objective_what_is_stored_and_its_keys(spec, vocabulary, tmp_path):
    train = make(spec, tmp_path, vocabulary=vocabulary).train
    ids, keys, given = np.array([5, 0, 9]), np.array([1, 2, 2**63], np.uint64), []

    def objective(*arguments):
        given.extend(arguments)
        return causal(*arguments)

    got, plain = train.get(ids, objective, keys), train.get(ids)
    for name in (*NAMES, "domain"):
        np.testing.assert_array_equal(got[name], plain[name])
    assert given[0].shape == given[1].shape == (3, T + 1) and given[2].shape == (3,)
    np.testing.assert_array_equal(given[0][:, :-1], plain["tokens"])
    np.testing.assert_array_equal(given[3], keys)


def test_domains_without_reading_rows(spec, vocabulary, tmp_path):
    train = make(spec, tmp_path, vocabulary=vocabulary).train
    everything = train.get(np.arange(len(train)))["domain"]
    assert len(set(everything)) == 3
    np.testing.assert_array_equal(train.all_domains(), everything)
    np.testing.assert_array_equal(train.domain(np.array([7, 3, 7])), everything[[7, 3, 7]])
    assert train.all_domains() is train.all_domains() and train.domain(np.array([1])).dtype == np.int32
    with pytest.raises(ValueError, match="read-only"):
        train.all_domains()[0] = 1


def slow_rows(documents, vocabulary, shard_documents):
    """Rows as (ids, starts, domain) from (text, domain) pairs, packed with lists, shard by shard."""
    for at in range(0, len(documents), shard_documents):
        stream = []  # (id, starts a document, domain)
        for text, domain in documents[at : at + shard_documents]:
            ids = [vocabulary.bos_id, *vocabulary.encode(text), vocabulary.eos_id]
            stream += [(i, n == 0, domain) for n, i in enumerate(ids)]
        for begin in range(0, len(stream), T + 1):
            row = stream[begin : begin + T + 1]
            if len(row) >= 2:
                yield row


def test_rows_hold_every_document_in_order(spec, vocabulary, tmp_path):
    prepared = make(spec, tmp_path, vocabulary=vocabulary, shard_documents=40)
    splits = {"train": [], "validation": []}
    for d in open_source(spec, domain_field="set").documents():
        drawn = int.from_bytes(hashlib.blake2b(d.text.encode(), digest_size=8).digest(), "big") / 2**64
        splits["validation" if drawn < 0.1 else "train"].append((d.text, d.domain))
    for split, store in (("train", prepared.train), ("validation", prepared.validation)):
        expected = list(slow_rows(splits[split], vocabulary, 40))
        got = store.get(np.arange(len(store)))
        assert len(store) == len(expected) > 10
        assert any(len(row) < T + 1 for row in expected)  # there is padding to look at
        for i, row in enumerate(expected):
            ids = [id_ for id_, _, _ in row] + [vocabulary.pad_id] * (T + 1 - len(row))
            starts = [start for _, start, _ in row] + [False] * (T + 1 - len(row))
            for name, value in zip(NAMES, slow_causal(ids, starts, len(row)), strict=True):
                np.testing.assert_array_equal(got[name][i], value)
            share = Counter(domain for _, _, domain in row)
            assert share[store.domains[got["domain"][i]]] == max(share.values())
        assert store.tokens == got["mask"].sum()
        assert store.text(0) == vocabulary.decode([id_ for id_, _, _ in expected[0]])


@pytest.mark.parametrize("cores", [2, 5])
def test_rows_are_the_same_on_any_number_of_cores(spec, vocabulary, tmp_path, cores):
    for seq_len, given in ((T, None), (70, vocabulary)):  # 70: another padding; a vocabulary learnt and given
        options = {"seq_len": seq_len, "vocabulary": given, "shard_documents": 16}
        one = make(spec, tmp_path / "one", cores=1, **options)
        many = make(spec, tmp_path / "many", cores=cores, **options)
        assert one.path.name == many.path.name
        assert contents(one.path) == contents(many.path)
        assert one.train.fingerprint == many.train.fingerprint != one.validation.fingerprint


def test_a_vocabulary_of_32_bits_and_one_without_bos_and_eos(vocabulary):
    class Wide:
        bos_id, eos_id, pad_id = None, None, 70_000

    dtype = row_store.row_dtype(4, 100_000)
    documents = [np.arange(66_000, 66_007), np.array([], int), np.array([5, 6])]
    records, tokens = row_store.pack(documents, [0, 1, 2], Wide, dtype)
    assert records["ids"].tolist() == [[66_000 + i for i in range(5)], [66_005, 66_006, 5, 6, 70_000]]
    assert np.unpackbits(records["starts"], axis=1, count=5).tolist() == [[1, 0, 0, 0, 0], [0, 0, 1, 0, 0]]
    assert records["domain"].tolist() == [0, 0]
    assert tokens == 4 + 2
    one_left, _ = row_store.pack([np.arange(6)], [0], Wide, dtype)
    assert one_left["ids"].tolist() == [[0, 1, 2, 3, 4]]  # a row of a single id has no target
    assert row_store.row_dtype(4, 65_536)["ids"].base == np.uint16


def test_a_second_call_opens_what_is_there(spec, vocabulary, tmp_path, monkeypatch):
    first = make(spec, tmp_path, vocabulary=vocabulary)
    monkeypatch.setattr(rows, "write_rows", None)  # calling it would fail
    second = make(spec, tmp_path, vocabulary=vocabulary, cores=3)
    assert second.path == first.path and second.train.fingerprint == first.train.fingerprint
    assert second.vocabulary.fingerprint == vocabulary.fingerprint


def test_rows_of_a_vocabulary_learnt_before_are_made_once(spec, tmp_path, monkeypatch):
    options = {"seq_len": T, "cache_dir": tmp_path / "cache", "progress": False, "validation_fraction": 0.1}
    first = prepare(open_source(spec), vocab_size=330, **options)
    monkeypatch.setattr(rows, "write_rows", None)
    again = prepare(open_source(spec), vocabulary=first.vocabulary, **options)
    assert again.train.fingerprint == first.train.fingerprint and again.path.resolve() == first.path.resolve()


def test_the_key_follows_content_and_settings(spec, vocabulary, tmp_path):
    base = make(spec, tmp_path, vocabulary=vocabulary).path
    other = write_corpus(tmp_path / "b.jsonl", seed=1)
    held_out = open_source(write_corpus(tmp_path / "v.jsonl", n=40, seed=2), domain_field="set")
    paths = {
        base,
        make(other, tmp_path, vocabulary=vocabulary).path,
        make(spec, tmp_path, vocabulary=vocabulary, seq_len=T + 1).path,
        make(spec, tmp_path, vocabulary=vocabulary, validation_fraction=0.2).path,
        make(spec, tmp_path, vocabulary=vocabulary, validation_source=held_out).path,
        make(spec, tmp_path).path,
        make(spec, tmp_path, vocab_size=331).path,
    }
    assert len(paths) == 7


def test_a_validation_source_leaves_all_of_the_other_for_training(spec, vocabulary, tmp_path):
    held_out = open_source(write_corpus(tmp_path / "v.jsonl", n=40, seed=2), domain_field="set")
    prepared = make(spec, tmp_path, vocabulary=vocabulary, validation_source=held_out)
    n_train = sum(1 for _ in open_source(spec).documents())
    assert prepared.meta["splits"]["train"]["documents"] == n_train
    assert prepared.meta["splits"]["validation"]["documents"] == sum(1 for _ in held_out.documents())


def test_too_little_text_says_what_would_help(spec, vocabulary, tmp_path):
    small = write_corpus(tmp_path / "small.jsonl", n=12, seed=3)
    with pytest.raises(UserError, match=r"validation text is 0 tokens.*data.validation_fraction \(to 0") as caught:
        make(small, tmp_path / "c", vocabulary=vocabulary, validation_fraction=1e-6)
    fraction = float(str(caught.value).split("(to ")[1].split(",")[0])
    assert make(small, tmp_path / "c", vocabulary=vocabulary, validation_fraction=fraction).validation
    with pytest.raises(UserError, match="training text is .* tokens, too few for one row of 5001"):
        make(small, tmp_path / "c", vocabulary=vocabulary, seq_len=5000)
    with pytest.raises(UserError, match="data.validation_fraction=1.5"):
        make(small, tmp_path / "c", validation_fraction=1.5)
    assert len(list((tmp_path / "c").iterdir())) == 1


def test_a_bad_line_leaves_nothing_behind(spec, vocabulary, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(Path(spec.split(":")[1]).read_bytes() + b"[]\n")
    with pytest.raises(UserError, match="bad.jsonl, line 701"):
        make(f"jsonl:{bad}", tmp_path / "c", vocabulary=vocabulary)
    assert list((tmp_path / "c").iterdir()) == []


def test_a_full_disk_leaves_nothing_behind(spec, vocabulary, tmp_path, monkeypatch):
    def full(self, data, counts):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shards.SplitWriter, "append", full)
    with pytest.raises(UserError, match="No space left on device.*data.cache_dir"):
        make(spec, tmp_path, vocabulary=vocabulary)
    assert list(tmp_path.iterdir()) == []


def test_damage_in_a_row_is_found_when_the_row_is_read(spec, vocabulary, tmp_path):
    prepared = make(spec, tmp_path, vocabulary=vocabulary)
    file = prepared.path / "train.rows"
    size = row_store.row_dtype(T, vocabulary.size).itemsize
    data = bytearray(file.read_bytes())
    data[7 * size + size - 3] ^= 1
    file.write_bytes(data)
    train = open_rows(prepared.path).train
    assert train.get(np.array([6, 8]))["tokens"].shape == (2, T)
    with pytest.raises(UserError, match="train.rows: row 7 is damaged on disk; delete"):
        train.get(np.array([3, 7]))


@pytest.mark.parametrize("damage", ["cut", "missing", "meta", "vocabulary"])
def test_a_damaged_cache_is_made_again_and_said(spec, vocabulary, tmp_path, damage, caplog):
    prepared = make(spec, tmp_path, vocabulary=vocabulary)
    before = contents(prepared.path)
    if damage == "cut":
        (prepared.path / "validation.rows").write_bytes(before["validation.rows"][:-1])
    elif damage == "missing":
        (prepared.path / "train.rows").unlink()
    elif damage == "meta":
        (prepared.path / "meta.json").write_text("{")
    else:
        (prepared.path / "tokenizer" / "tokenizer.model").write_bytes(b"")
    with pytest.raises(UserError, match=str(prepared.path)):
        open_rows(prepared.path)
    with caplog.at_level(logging.WARNING):
        again = make(spec, tmp_path, vocabulary=vocabulary)
    assert "made again" in caplog.text
    assert contents(again.path) == before


def test_loading_runs_nothing(spec, vocabulary, tmp_path, monkeypatch):
    """No file of the cache goes through pickle or numpy's loader, which could reach it."""
    prepared = make(spec, tmp_path, vocabulary=vocabulary)

    def forbidden(*args, **kwargs):
        raise AssertionError("unpickled")

    monkeypatch.setattr("pickle.load", forbidden)
    monkeypatch.setattr("pickle.loads", forbidden)
    monkeypatch.setattr("numpy.load", forbidden)
    assert open_rows(prepared.path).train.get(np.arange(3))["tokens"].shape == (3, T)


PREPARE = """
import sys
from slm_assist.data import rows, shards
from slm_assist.data.sources import open_source
append = shards.SplitWriter.append
def slow(*args):
    append(*args)
    print("shard", flush=True)
    sys.stdin.readline()
if sys.argv[3] == "slow":
    shards.SplitWriter.append = slow
source = open_source(sys.argv[1], domain_field="set")
rows.prepare(source, cache_dir=sys.argv[2], seq_len=32, vocab_size=330, validation_fraction=0.1,
             progress=False, shard_documents=16, cores=1)
"""


def start(spec, cache, speed):
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", PREPARE, spec, str(cache), speed],
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        text=True,
    )


def directories(cache):
    return {path.name for path in cache.iterdir() if not path.is_symlink()}


def test_a_killed_prepare_leaves_no_broken_cache(spec, tmp_path):
    process = start(spec, tmp_path, "slow")
    assert process.stdout.readline() == "shard\n"
    (scratch,) = tmp_path.glob(".tmp-*")
    beside = make(spec, tmp_path, shard_documents=16)  # meanwhile: the other's directory stays
    assert scratch.exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert directories(tmp_path) == {beside.path.name, scratch.name}
    other = make(spec, tmp_path, shard_documents=17)  # afterwards: it is removed
    assert directories(tmp_path) == {beside.path.name, other.path.name}


def test_two_processes_at_once_both_end_with_a_good_cache(spec, tmp_path):
    processes = [start(spec, tmp_path, "fast") for _ in range(2)]
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    (name,) = directories(tmp_path)
    assert contents(tmp_path / name) == contents(make(spec, tmp_path / "alone", shard_documents=16).path)


def test_python_source_splits_as_it_says(tmp_path, monkeypatch):
    """The groups of the source decide, and `validation_fraction` of `prepare` has no say."""
    for group in ("a", "b", "c", "d", "e", "f"):
        (tmp_path / "lib" / group).mkdir(parents=True)
        (tmp_path / "lib" / group / "m.py").write_text("".join(f"{group}{i} = {i}\n" for i in range(200)))
    monkeypatch.setattr(python_source, "_roots", lambda: [("numpy", tmp_path / "lib")])
    source = open_source("python:", validation_fraction=0.1)
    prepared = prepare(source, cache_dir=tmp_path / "c", seq_len=T, vocab_size=330, progress=False)
    assert prepared.meta["splits"]["validation"]["documents"] == 1
    assert prepared.meta["splits"]["train"]["documents"] == 5
    assert prepared.train.domains == prepared.validation.domains == ["numpy"]

"""Token files of nanoGPT, llm.c and Megatron: written here by their formats, read back as documents."""

import struct

import numpy as np
import pytest

from slm_assist.data import pretokenised
from slm_assist.data.rows import prepare
from slm_assist.data.sources import open_source
from slm_assist.data.tokenizers import train_vocabulary
from slm_assist.errors import UserError

BOS, EOS, SIZE = 1, 2, 400


class Marks:
    """A vocabulary as far as token files ask."""

    def __init__(self, bos=BOS, eos=EOS, size=SIZE, sentinels=0):
        self.bos_id, self.eos_id, self.size = bos, eos, size + sentinels
        self.sentinel_ids = np.arange(size, size + sentinels)


def documents(n=40, seed=0, longest=50):
    """Ids of each document, without marks; none is empty."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, SIZE, rng.integers(1, longest)) for _ in range(n)]


def stream(docs, head=(), tail=()):
    return np.concatenate([part for ids in docs for part in (head, ids, tail)]).astype(np.int64)


def write_llmc(path, ids, magic=20240520, dtype="<u2", version=1):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids)
    path.write_bytes(header.tobytes() + ids.astype(dtype).tobytes())


def write_megatron(prefix, docs, dtype="<u2", code=8, sequences=1):
    """Each document in `sequences` sequences; the format's header, lengths, byte offsets, document index."""
    pieces = [np.array_split(ids, sequences) for ids in docs]
    flat = [piece for split in pieces for piece in split]
    lengths = np.array([len(piece) for piece in flat], "<i4")
    offsets = (np.cumsum(lengths, dtype=np.int64) - lengths) * np.dtype(dtype).itemsize
    index = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code)
    index += struct.pack("<Q", len(flat)) + struct.pack("<Q", len(docs) + 1)
    index += lengths.tobytes() + offsets.astype("<i8").tobytes()
    index += (np.arange(len(docs) + 1) * sequences).astype("<i8").tobytes()
    prefix.with_suffix(".idx").write_bytes(index)
    prefix.with_suffix(".bin").write_bytes(np.concatenate(flat).astype(dtype).tobytes())


def read(spec, vocabulary=None, on_bytes=lambda n: None):
    source = open_source(spec, vocabulary=vocabulary or Marks())
    assert source.pretokenised
    return [document.ids for document in source.documents(on_bytes)]


def same(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def error(spec, vocabulary=None):
    with pytest.raises(UserError) as caught:
        read(spec, vocabulary)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("block", [1 << 20, 64, 7])
@pytest.mark.parametrize(
    ("head", "tail", "vocabulary"),
    [
        ([], [EOS], Marks()),
        ([BOS], [], Marks()),
        ([BOS], [EOS], Marks()),
        ([], [EOS], Marks(bos=None)),
        ([BOS], [], Marks(eos=None)),
        ([], [5000], Marks(bos=5000, eos=5000, size=5001)),
    ],
)
def test_nanogpt_documents_end_at_their_marks(tmp_path, monkeypatch, block, head, tail, vocabulary):
    monkeypatch.setattr(pretokenised, "_BLOCK", block)  # so that documents lie across blocks
    docs = documents()
    stream(docs, head, tail).astype("<u2").tofile(tmp_path / "a.bin")
    seen = []
    got = read(f"nanogpt:{tmp_path}/a.bin", vocabulary, seen.append)
    same(got, [np.concatenate([head, ids, tail]) for ids in docs])
    assert sum(seen) == (tmp_path / "a.bin").stat().st_size


def test_a_mark_in_front_that_is_the_end_mark_only_moves(tmp_path):
    """llm.c writes GPT-2's one mark in front of each document."""
    mark = 390
    docs = [ids[ids != mark] for ids in documents(longest=20)]
    docs = [ids for ids in docs if len(ids)]
    write_llmc(tmp_path / "a.bin", stream(docs, head=[mark]))
    vocabulary = Marks(bos=None, eos=mark)
    got = read(f"nanogpt:{tmp_path}/a.bin", vocabulary)
    same([pretokenised.without_marks(ids, vocabulary) for ids in got], docs)


@pytest.mark.parametrize(("magic", "dtype"), [(20240520, "<u2"), (20240801, "<u4")])
def test_llm_c_headers(tmp_path, magic, dtype):
    docs = documents()
    docs[3][0] = SIZE + 70_000 if dtype == "<u4" else 7
    write_llmc(tmp_path / "a.bin", stream(docs, tail=[EOS]), magic, dtype)
    same(read(f"nanogpt:{tmp_path}/a.bin", Marks(size=100_000)), [[*ids, EOS] for ids in docs])


def test_without_marks_a_stream_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(pretokenised, "LONGEST", 100)
    ids = np.random.default_rng(0).integers(3, SIZE, 1030)
    ids.astype("<u2").tofile(tmp_path / "a.bin")
    got = read(f"nanogpt:{tmp_path}/a.bin", Marks(bos=None, eos=None))
    assert [len(piece) for piece in got] == [100] * 10 + [30]
    np.testing.assert_array_equal(np.concatenate(got), ids)


def test_bad_nanogpt_files(tmp_path, monkeypatch):
    monkeypatch.setattr(pretokenised, "_BLOCK", 100)
    good = stream(documents(), tail=[EOS])
    (tmp_path / "odd.bin").write_bytes(good.astype("<u2").tobytes() + b"x")
    write_llmc(tmp_path / "cut.bin", good)
    (tmp_path / "cut.bin").write_bytes((tmp_path / "cut.bin").read_bytes()[:-2])
    write_llmc(tmp_path / "new.bin", good, version=2)
    good[777] = SIZE
    good.astype("<u2").tofile(tmp_path / "foreign.bin")
    assert "no whole number" in error(f"nanogpt:{tmp_path}/odd.bin")
    assert f"its header says {len(good)} ids" in error(f"nanogpt:{tmp_path}/cut.bin")
    assert "version 2" in error(f"nanogpt:{tmp_path}/new.bin")
    assert f"foreign.bin: id {SIZE} at position 777, but data.vocabulary has {SIZE} pieces" in error(
        f"nanogpt:{tmp_path}/foreign.bin"
    )
    assert "id 400" in error(f"nanogpt:{tmp_path}/foreign.bin", Marks(sentinels=32))  # a sentinel is no piece
    with pytest.raises(UserError, match="it holds ids, not text; set data.vocabulary"):
        open_source(f"nanogpt:{tmp_path}/odd.bin")


@pytest.mark.parametrize(("dtype", "code"), [("<u1", 1), ("<i2", 3), ("<i4", 4), ("<i8", 5), ("<u2", 8)])
@pytest.mark.parametrize("sequences", [1, 3])
def test_megatron_documents(tmp_path, dtype, code, sequences):
    docs = [ids % 200 + 3 for ids in documents()]
    write_megatron(tmp_path / "a_document", docs, dtype, code, sequences)
    seen = []
    for name in ("a_document", "a_document.bin", "a_document.idx"):
        same(read(f"megatron:{tmp_path}/{name}", on_bytes=seen.append), docs)
    sizes = [(tmp_path / f"a_document.{end}").stat().st_size for end in ("bin", "idx")]
    assert sum(seen) == 3 * sum(sizes)


def test_megatron_prefixes_are_domains(tmp_path):
    for name in ("web", "code"):
        write_megatron(tmp_path / name, documents(5))
    spec = f"megatron:{tmp_path}/web,{tmp_path}/code"
    source = open_source(spec, vocabulary=Marks())
    assert [d.domain for d in source.documents()] == ["web"] * 5 + ["code"] * 5
    assert {d.domain for d in open_source(f"megatron:{tmp_path}/web", vocabulary=Marks()).documents()} == {"megatron"}
    before = source.fingerprint
    index = tmp_path / "code.idx"
    index.write_bytes(index.read_bytes()[:-8] + struct.pack("<q", 4))
    assert open_source(spec, vocabulary=Marks()).fingerprint != before  # the index is part of it


def test_bad_megatron_files(tmp_path):
    write_megatron(tmp_path / "a", documents())
    index, data = tmp_path / "a.idx", tmp_path / "a.bin"
    good, spec = index.read_bytes(), f"megatron:{tmp_path}/a"
    index.write_bytes(b"TNTIDX\x00\x00" + good)
    assert "a.idx: not a Megatron index" in error(spec)
    for size in (12, 40, len(good) - 3):
        index.write_bytes(good[:size])
        assert "a.idx: cut short" in error(spec)
    index.write_bytes(good[:9] + struct.pack("<Q", 2) + good[17:])
    assert "version 2" in error(spec)
    index.write_bytes(good[:17] + b"\x07" + good[18:])
    assert "ids of type 7" in error(spec)
    index.write_bytes(good[:-8] + struct.pack("<q", 3))
    assert "do not cover" in error(spec)
    index.write_bytes(good)
    assert "a.bin, document 0: id" in error(spec, Marks(size=5))
    data.write_bytes(data.read_bytes()[:-2])
    assert "a.bin: " in error(spec) and "get both files again" in error(spec)
    data.unlink()
    assert "no file matches" in error(spec)


@pytest.fixture(scope="module")
def vocabulary():
    words = ["model", "token", "layer", "train", "step", "small", "large", "row", "loss", "naïve"]
    rng = np.random.default_rng(0)
    return train_vocabulary((" ".join(rng.choice(words, 40)) for _ in range(300)), 330)


@pytest.mark.parametrize("marked", ["none", "both", "end"])
def test_rows_of_ids_are_the_rows_of_their_text(tmp_path, vocabulary, marked):
    """A text and the same text as ids give the same rows, whichever marks the ids have already."""
    rng = np.random.default_rng(1)
    texts = [" ".join(rng.choice(["model", "token", "naïve", "ü"], rng.integers(1, 30))) for _ in range(60)]
    docs = [vocabulary.encode_array(text) for text in texts]
    head = [vocabulary.bos_id] if marked == "both" else []
    tail = [vocabulary.eos_id] if marked != "none" else []
    write_megatron(tmp_path / "ids", [np.concatenate([head, ids, tail]) for ids in docs])
    import json

    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    held = open_source(f"jsonl:{tmp_path}/a.jsonl")
    options = {"vocabulary": vocabulary, "seq_len": 16, "cache_dir": tmp_path / "cache", "progress": False}
    options |= {"validation_source": held}
    ids = prepare(open_source(f"megatron:{tmp_path}/ids", vocabulary=vocabulary), **options)
    text = prepare(held, **options)
    every = np.arange(len(text.train))
    for name in ("tokens", "targets", "segment_ids", "mask"):
        np.testing.assert_array_equal(ids.train.get(every)[name], text.train.get(every)[name])
    a, b = (dict(prepared.meta["splits"]["train"]) for prepared in (ids, text))
    assert a.pop("domains") == ["megatron"] and b.pop("domains") == ["jsonl"]
    assert a.pop("fingerprint") != b.pop("fingerprint") and a == b  # rows, documents, ids, tokens, bytes


def test_ids_are_split_by_their_content_and_need_a_vocabulary(tmp_path, vocabulary):
    rng = np.random.default_rng(2)
    docs = [rng.integers(3, 330, 30) for _ in range(200)]
    write_megatron(tmp_path / "ids", docs + docs)
    source = open_source(f"megatron:{tmp_path}/ids", vocabulary=vocabulary)
    options = {"seq_len": 16, "cache_dir": tmp_path / "cache", "progress": False, "validation_fraction": 0.2}
    prepared = prepare(source, vocabulary=vocabulary, **options)
    held = prepared.meta["splits"]["validation"]["documents"]
    assert 40 < held < 130 and held % 2 == 0  # about a fifth, and copies are on one side
    with pytest.raises(UserError, match="set data.vocabulary"):
        prepare(source, **options)

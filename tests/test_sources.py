"""Sources: which documents come out, and one clear line for every bad file."""

import gzip
import json
import lzma
import os
import sys
import time

import pytest
import zstandard

from slm_assist.data import compressed, paths, python_source, text_files
from slm_assist.data.sources import open_source
from slm_assist.errors import UserError

RECORDS = [{"text": f"document {i}\n" * (i + 1), "meta": {"set": f"set {i % 3}"}} for i in range(40)]
JSONL = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
COMPRESS = {
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}


def texts(spec, **options):
    return [document.text for document in open_source(spec, **options).documents()]


def error(spec, **options):
    """The message of the UserError that opening or reading `spec` raises: one line."""
    with pytest.raises(UserError) as caught:
        texts(spec, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_long_text_file_is_cut_at_blank_lines_and_adds_up(tmp_path, newline):
    paragraphs = [f"Paragraph {i}: " + "naïve 🙂 words " * (i % 50) + newline for i in range(9000)]
    book = newline.join(paragraphs)
    (tmp_path / "book.txt").write_bytes(book.encode())
    pieces = texts(f"text:{tmp_path}/book.txt")
    assert len(book.encode()) > 2 * text_files.BLOCK  # so that it is read in several blocks
    assert "".join(pieces) == book
    assert max(map(len, pieces)) <= 6144
    assert min(map(len, pieces[:-1])) >= 2048
    assert all(piece.endswith(newline * 2) for piece in pieces[:-1])


def test_text_without_blank_lines_is_cut_at_newlines_and_without_newlines_anywhere(tmp_path):
    lines = "".join(f"line {i}\n" for i in range(5000))
    solid = "é" * 20_000
    (tmp_path / "a.txt").write_text(lines)
    (tmp_path / "b.txt").write_text(solid)
    cut_lines, cut_solid = texts(f"text:{tmp_path}/a.txt"), texts(f"text:{tmp_path}/b.txt")
    assert "".join(cut_lines) == lines and all(piece.endswith("\n") for piece in cut_lines)
    assert "".join(cut_solid) == solid and len(cut_solid) > 3


def test_text_domains(tmp_path):
    for name in ("x/one.txt", "x/two.txt", "y/three.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    one = open_source(f"text:{tmp_path}/x/one.txt")
    folder = open_source(f"text:{tmp_path}/x/*.txt")
    several = open_source(f"text:{tmp_path}/y/*.txt,{tmp_path}/**/*.txt")
    assert [d.domain for d in one.documents()] == ["text"]
    assert [d.domain for d in folder.documents()] == ["one", "two"]
    assert [(d.text, d.domain) for d in several.documents()] == [
        ("y/three.txt", "y"), ("x/one.txt", "x"), ("x/two.txt", "x"),
    ]  # fmt: skip


@pytest.mark.parametrize("ending", ["", ".gz", ".xz", ".zst"])
def test_jsonl_plain_and_compressed(tmp_path, ending):
    half = len(JSONL) // 2
    compress = COMPRESS.get(ending, bytes)
    (tmp_path / f"a.jsonl{ending}").write_bytes(compress(JSONL[:half]) + compress(JSONL[half:] + b"\n\n"))
    seen = []
    source = open_source(f"jsonl:{tmp_path}/*{ending}", domain_field="meta.set")
    documents = list(source.documents(seen.append))
    assert [d.text for d in documents] == [r["text"] for r in RECORDS]
    assert [d.domain for d in documents] == [r["meta"]["set"] for r in RECORDS]
    assert sum(seen) == source.total_bytes == (tmp_path / f"a.jsonl{ending}").stat().st_size
    assert {d.domain for d in open_source(f"jsonl:{tmp_path}/*{ending}").documents()} == {"jsonl"}


@pytest.mark.parametrize("ending", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "garbage"])
def test_a_broken_stream_is_named(tmp_path, ending, damage):
    whole = COMPRESS[ending](os.urandom(50_000).hex().encode() + b"\n" + JSONL)
    middle = len(whole) // 2
    broken = {
        "cut": whole[:middle],
        "flipped": whole[:middle] + bytes(b ^ 255 for b in whole[middle : middle + 64]) + whole[middle + 64 :],
        "garbage": b"not compressed at all" * 9,
    }[damage]
    file = tmp_path / f"a.jsonl{ending}"
    file.write_bytes(broken)
    with pytest.raises(UserError, match=f"a.jsonl{ending}: broken"):
        list(compressed.lines(file))


def test_zst_without_its_package_says_how_to_get_it(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl.zst").write_bytes(COMPRESS[".zst"](JSONL))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert "pip install zstandard" in error(f"jsonl:{tmp_path}/a.jsonl.zst")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"{'text': 1}", "not JSON"),
        (b'{"text": "cut', "not JSON"),
        (b'["text"]', "a JSON list, not an object"),
        (b'{"txt": "x"}', "no field 'text' (did you mean txt?)"),
        (b'{"text": 3}', "field 'text' is a int"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b"[" * 100_000, "line 3"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path, line, expected):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    message = error(f"jsonl:{tmp_path}/a.jsonl")
    assert f"{tmp_path}/a.jsonl, line 3" in message and expected in message


def test_a_missing_domain_field_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(JSONL)
    message = error(f"jsonl:{tmp_path}/a.jsonl", domain_field="meta.sets")
    assert "line 1" in message and "no field 'meta.sets' (did you mean set?)" in message


def test_bad_files_and_specs(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "latin.txt").write_bytes(b"x" * (text_files.BLOCK - 1) + "naïve".encode("latin-1"))
    (tmp_path / "cut.txt").write_bytes("naïve 🙂".encode()[:-1])
    assert "no file matches" in error(f"text:{tmp_path}/nothing*")
    assert f"use {tmp_path}/*" in error(f"text:{tmp_path}")
    assert "empty.txt: the file is empty" in error(f"text:{tmp_path}/*.txt")
    assert "blank.jsonl: no JSON line" in error(f"jsonl:{tmp_path}/*.jsonl")
    assert f"latin.txt: not UTF-8 at byte {text_files.BLOCK + 1}" in error(f"text:{tmp_path}/latin.txt")
    assert "cut.txt: not UTF-8 at byte 7" in error(f"text:{tmp_path}/cut.txt")
    assert "did you mean jsonl" in error("json:x")
    assert "write KIND:GLOB" in error("s3://bucket/a.txt")
    assert "did you mean text:book.txt" in error("book.txt")
    assert "names no files" in error("text:")


def test_fingerprint_follows_content_and_is_remembered(tmp_path, monkeypatch):
    file, cache = tmp_path / "a.txt", tmp_path / "cache"
    spec = f"text:{file}"
    file.write_text("one")
    first = open_source(spec, cache_dir=cache).fingerprint
    assert first == open_source(spec).fingerprint
    hashed = []
    digest = paths.hashlib.file_digest
    monkeypatch.setattr(paths.hashlib, "file_digest", lambda *a: hashed.append(a) or digest(*a))
    assert open_source(spec, cache_dir=cache).fingerprint == first and not hashed
    (cache / "digests.json").write_text("damaged")
    assert open_source(spec, cache_dir=cache).fingerprint == first and len(hashed) == 1
    time.sleep(0.01)
    file.write_text("two")
    assert open_source(spec, cache_dir=cache).fingerprint != first


def test_fingerprint_does_not_depend_on_where_the_files_are(tmp_path):
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jsonl").write_bytes(JSONL)
    here, there = (open_source(f"jsonl:{tmp_path}/{folder}/*").fingerprint for folder in ("here", "there"))
    assert here == there
    assert here != open_source(f"jsonl:{tmp_path}/here/*", domain_field="meta.set").fingerprint


@pytest.fixture(scope="module")
def python_files():
    return python_source.python_files(0.03)[0]


def test_python_source_leaves_out_tests_and_tables(python_files):
    stdlib = {f.name for f in python_files if f.domain == "stdlib"}
    assert {"argparse.py", "json/decoder.py", "asyncio/events.py"} <= stdlib
    directories = {part for name in stdlib for part in name.split("/")[:-1]}
    assert not directories & {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages"}
    assert {f.domain for f in python_files} == {"stdlib", "jax", "flax", "numpy", "scipy", "optax"}
    assert sum(f.size for f in python_files) > 20_000_000


def test_python_source_keeps_a_group_on_one_side(python_files):
    sides, sizes = {}, {}
    for f in python_files:
        assert sides.setdefault((f.domain, f.group), f.split) == f.split
        part = sizes.setdefault(f.domain, {"train": 0, "validation": 0})
        part[f.split] += f.size
    for domain, part in sizes.items():
        assert 0.005 < part["validation"] / sum(part.values()) < 0.1, domain


def test_python_source_does_not_import_what_it_reads(tmp_path):
    import subprocess

    code = (
        "import sys; from slm_assist.data import rows, loader, sources; s = sources.open_source('python:');"
        "next(s.documents()); print(s.describe());"
        "print([m for m in ('jax', 'scipy', 'optax', 'tensorflow') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"
    assert "not UTF-8 and left out; fingerprint" in out


def test_python_source_skips_and_counts_what_is_not_utf8(tmp_path, monkeypatch):
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "a.py").write_text("x = 1\n")
    (tmp_path / "good" / "b.py").write_bytes("# naïve\n".encode("latin-1"))
    (tmp_path / "good" / "empty.py").write_text("\n")
    monkeypatch.setattr(python_source, "_roots", lambda: [("numpy", tmp_path)])
    files, skipped = python_source.python_files(0.03)
    assert [f.name for f in files] == ["good/a.py"] and skipped == 1
    assert "1 not UTF-8" in open_source("python:").describe()


def test_pile_is_jsonl_in_the_piles_form(tmp_path):
    records = [{"text": f"text {i}", "meta": {"pile_set_name": ["ArXiv", "Github"][i % 2]}} for i in range(5)]
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    (tmp_path / "00.jsonl.zst").write_bytes(COMPRESS[".zst"](content))
    pile = open_source(f"pile:{tmp_path}/*.zst", text_field="ignored")
    assert [d.domain for d in pile.documents()] == ["ArXiv", "Github", "ArXiv", "Github", "ArXiv"]
    jsonl = open_source(f"jsonl:{tmp_path}/*.zst", domain_field="meta.pile_set_name")
    assert list(pile.documents()) == list(jsonl.documents()) and pile.fingerprint == jsonl.fingerprint


OWN = """
from slm_assist.data.sources import Document
import numpy as np
def documents():
    for i in range(20):
        yield Document(f"text {i}", ["a", "b"][i % 2], "validation" if i > 15 else "train")
documents.fingerprint, documents.splits = "one", True
def ids():
    yield Document("", "", ids=np.arange(3, 9))
ids.fingerprint, ids.pretokenised = (lambda: "two"), True
def plain():
    yield Document("text", "")
def wrong():
    yield "text"
def half():
    yield Document("\\ud800", "")
def other():
    yield Document("x", "", "test")
def fails():
    yield {}["nothing"]
def takes(path):
    yield Document("x", "")
fails.fingerprint = takes.fingerprint = wrong.fingerprint = half.fingerprint = other.fingerprint = "three"
"""


def test_a_source_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_corpus.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_corpus", raising=False)
    source = open_source("my_corpus:documents")
    documents = list(source.documents())
    assert [(d.text, d.domain) for d in documents[:2]] == [("text 0", "a"), ("text 1", "b")]
    assert source.splits and [d.split for d in documents[15:17]] == ["train", "validation"]
    assert not source.pretokenised and "my_corpus:documents" in source.describe()
    ids = open_source("my_corpus:ids")
    (document,) = ids.documents()
    assert ids.pretokenised and document.domain == "ids" and document.ids.tolist() == list(range(3, 9))
    assert ids.fingerprint != source.fingerprint
    assert "set plain.fingerprint to a string" in error("my_corpus:plain")
    assert "document 0: 'text' is no slm_assist.data.sources.Document with a text" in error("my_corpus:wrong")
    assert "half a surrogate pair" in error("my_corpus:half")
    assert "split 'test'" in error("my_corpus:other")
    assert "data.source='my_corpus:fails': the function fails: KeyError: 'nothing'" in error("my_corpus:fails")
    assert "it takes (path); write it for ()" in error("my_corpus:takes")
    assert "documens" in error("my_corpus:documens") and "no_such.module" in error("no_such.module:f")

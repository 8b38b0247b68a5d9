"""Files in buckets, through etils.epath with a folder in the bucket's place."""

import sys

import pytest
from test_columnar import write_parquet
from test_sources import COMPRESS, JSONL, RECORDS, error, texts

from slm_assist.data import paths
from slm_assist.data.rows import prepare
from slm_assist.data.sources import open_source
from slm_assist.errors import UserError


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A folder that gs://bucket/ leads to, through etils.epath's own path class."""
    pytest.importorskip("etils.epath")
    from etils.epath import backend, gpath

    class Bucket(backend._OsPathBackend):
        def _here(self, path):
            return str(path).replace("gs://bucket", str(tmp_path))

        def open(self, path, mode):
            return super().open(self._here(path), mode)

        def exists(self, path):
            return super().exists(self._here(path))

        def isdir(self, path):
            return super().isdir(self._here(path))

        def glob(self, path):
            return [name.replace(str(tmp_path), "gs://bucket") for name in super().glob(self._here(path))]

        def stat(self, path):
            return super().stat(self._here(path))

    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", Bucket())
    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda name: None)
    return tmp_path


def test_files_in_a_bucket(bucket):
    (bucket / "x").mkdir()
    (bucket / "x" / "b.jsonl.zst").write_bytes(COMPRESS[".zst"](JSONL))
    (bucket / "x" / "a.jsonl").write_bytes(JSONL[: JSONL.index(b"\n") + 1])
    (bucket / "c.txt").write_text("naïve\n" * 3000)
    write_parquet(bucket / "d.parquet", {"text": ["one", "two"]})
    seen = []
    source = open_source("pile:gs://bucket/x/*.jsonl*".replace("pile", "jsonl"), domain_field="meta.set")
    documents = list(source.documents(seen.append))
    assert [d.text for d in documents] == [RECORDS[0]["text"], *(r["text"] for r in RECORDS)]
    assert sum(seen) == source.total_bytes == sum(f.stat().st_size for f in (bucket / "x").iterdir())
    assert "".join(texts("text:gs://bucket/c.txt")) == "naïve\n" * 3000
    assert texts("parquet:gs://bucket/d.parquet") == ["one", "two"]
    before = open_source("text:gs://bucket/c.txt").fingerprint
    assert before == open_source("text:gs://bucket/c.txt").fingerprint
    (bucket / "c.txt").write_text("longer\n" * 3001)
    assert before != open_source("text:gs://bucket/c.txt").fingerprint


def test_bad_names_in_a_bucket(bucket, monkeypatch):
    (bucket / "x").mkdir()
    (bucket / "x" / "a.txt").write_text("")
    (bucket / "x" / "b.txt").write_text("text")
    assert "no file matches gs://bucket/nothing*; check the path" in error("text:gs://bucket/nothing*")
    assert "use gs://bucket/x/*" in error("text:gs://bucket/x")
    assert "gs://bucket/x/a.txt: the file is empty" in error("text:gs://bucket/x/*.txt")
    assert "** does not work in a bucket" in error("text:gs://bucket/**/*.txt")
    source = open_source("text:gs://bucket/x/b.txt")
    from etils.epath import gpath

    def forbidden(path, mode):
        raise RuntimeError("403 forbidden\nlong story")

    monkeypatch.setattr(gpath._PREFIX_TO_BACKEND["gs"], "open", forbidden)
    with pytest.raises(UserError, match=r"gs://bucket/x/b.txt: cannot be read \(403 forbidden\)"):
        list(source.documents())
    monkeypatch.setattr(gpath._PREFIX_TO_BACKEND["gs"], "glob", lambda path: forbidden(path, "r"))
    assert "cannot be looked up (403 forbidden); check the path and your credentials" in error("text:gs://bucket/x/*")
    monkeypatch.setitem(sys.modules, "etils", None)
    assert "pip install 'etils[epath]'" in error("text:gs://bucket/x/*")


def test_the_cache_must_be_on_a_disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("text " * 900)
    assert "data.cache_dir=gs://bucket/cache" in error("text:a.txt", cache_dir="gs://bucket/cache")
    with pytest.raises(UserError, match="give a folder on a disk"):
        prepare(open_source("text:a.txt"), seq_len=8, cache_dir="gs://bucket/cache")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]

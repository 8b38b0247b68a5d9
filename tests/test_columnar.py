"""Parquet and ArrayRecord files, good and bad."""

import json
import os
import sys

import pytest
from test_sources import RECORDS, error

from slm_assist.data import columnar
from slm_assist.data.sources import open_source


def write_parquet(path, table, **options):
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(table), path, **options)


def test_parquet_columns_in_batches_and_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(columnar, "_ROWS", 7)
    rows = {"text": [r["text"] for r in RECORDS], "meta": [r["meta"] for r in RECORDS], "score": list(range(40))}
    write_parquet(tmp_path / "a.parquet", rows, row_group_size=11)
    seen = []
    source = open_source(f"parquet:{tmp_path}/a.parquet", domain_field="meta.set")
    documents = list(source.documents(seen.append))
    assert [(d.text, d.domain) for d in documents] == [(r["text"], r["meta"]["set"]) for r in RECORDS]
    assert sum(seen) == source.total_bytes == (tmp_path / "a.parquet").stat().st_size
    assert {d.domain for d in open_source(f"parquet:{tmp_path}/a.parquet").documents()} == {"parquet"}
    import pyarrow

    odd = {"a.b": pyarrow.array(["x", None, "", "ü"], pyarrow.large_string()),
           "d": pyarrow.array(["p", "p", "q", "q"]).dictionary_encode()}  # fmt: skip
    write_parquet(tmp_path / "odd.parquet", odd)  # a dot in a name; null and empty texts; coded strings
    got = open_source(f"parquet:{tmp_path}/odd.parquet", text_field="a.b", domain_field="d").documents()
    assert [(d.text, d.domain) for d in got] == [("x", "p"), ("ü", "q")]


def test_bad_parquet_files(tmp_path, monkeypatch):
    rows = {"text": ["one", "two"], "meta": [{"set": "x"}, None], "n": [1, 2], "b": [b"a", b"\xff"]}
    write_parquet(tmp_path / "a.parquet", rows)
    spec = f"parquet:{tmp_path}/a.parquet"
    assert "no column 'txt' (did you mean text?)" in error(spec, text_field="txt")
    assert "no column 'meta.sets' (did you mean set?)" in error(spec, domain_field="meta.sets")
    assert "column 'n' is int64, not strings: set data.text_field" in error(spec, text_field="n")
    assert "column 'b' is binary" in error(spec, text_field="b")
    assert "a.parquet, row 1: meta.set is null" in error(spec, domain_field="meta.set")
    whole = (tmp_path / "a.parquet").read_bytes()
    for name, content in {"cut": whole[:-30], "junk": b"no parquet at all" * 9}.items():
        (tmp_path / f"{name}.parquet").write_bytes(content)
        assert f"{name}.parquet: not a Parquet file, or a damaged one" in error(f"parquet:{tmp_path}/{name}.parquet")
    write_parquet(tmp_path / "big.parquet", {"text": [os.urandom(200).hex() for _ in range(3000)]})
    big = bytearray((tmp_path / "big.parquet").read_bytes())
    big[5:45] = bytes(40)
    (tmp_path / "big.parquet").write_bytes(big)
    assert "big.parquet: not a Parquet file, or a damaged one" in error(f"parquet:{tmp_path}/big.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install pyarrow" in error(spec)


def test_a_parquet_file_without_rows(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    write_parquet(tmp_path / "none.parquet", {"text": pyarrow.array([], pyarrow.string())})
    assert "none.parquet: no rows in it" in error(f"parquet:{tmp_path}/none.parquet")


def write_array_record(path, records):
    module = pytest.importorskip("array_record.python.array_record_module")
    writer = module.ArrayRecordWriter(str(path), "group_size:3")
    for record in records:
        writer.write(record)
    writer.close()


def length_delimited(field, content):
    """A protocol buffer field, from the description of the format."""
    size, out = len(content), bytes([field << 3 | 2])
    while size > 127:
        out, size = out + bytes([size & 127 | 128]), size >> 7
    return out + bytes([size]) + content


def serialised_example(features):
    """A tf.train.Example with features of bytes."""
    entries = b""
    for name, value in features.items():
        feature = (
            length_delimited(1, length_delimited(1, value)) if value is not None else length_delimited(3, b"\x0a\x00")
        )
        entries += length_delimited(1, length_delimited(1, name.encode()) + length_delimited(2, feature))
    return length_delimited(1, entries)


@pytest.mark.parametrize("form", ["json", "example", "text"])
def test_array_record_of_three_kinds(tmp_path, monkeypatch, form):
    monkeypatch.setattr(columnar, "_ROWS", 7)
    records, options = [], {"domain_field": "meta.set"}
    for record in RECORDS:
        text, domain = record["text"], record["meta"]["set"]
        example = serialised_example({"text": text.encode(), "meta.set": domain.encode(), "image": b"\xff", "n": None})
        records.append({"json": json.dumps(record).encode(), "example": example, "text": text.encode()}[form])
    if form == "text":
        options = {}
    write_array_record(tmp_path / "a.array_record", [records[0], b"", *records[1:]])
    seen = []
    source = open_source(f"array_record:{tmp_path}/a.array_record", **options)
    documents = list(source.documents(seen.append))
    assert [d.text for d in documents] == [r["text"] for r in RECORDS]
    assert [d.domain for d in documents] == [r["meta"]["set"] if options else "array_record" for r in RECORDS]
    assert sum(seen) == source.total_bytes


# What tf.train.Example(...).SerializeToString(deterministic=True) gives.
OF_TENSORFLOW = (
    b"\n\xd7\x01\n\x08\n\x04none\x12\x00\n\x10\n\x01n\x12\x0b\x1a\t\n\x07\x01\x80\x80\x80\x80\x80 "
    b"\n\xa9\x01\n\x04text\x12\xa0\x01\n"
    b"\x9d\x01\n\x9a\x01" + "naïve ".encode() * 22 + b"\n\r\n\x01x\x12\x08\x12\x06\n\x04\x00\x00\x00?"
)


def test_the_wire_format_is_tensorflows():
    assert columnar.example(OF_TENSORFLOW) == {"none": [], "n": [1, 2**40], "text": ["naïve ".encode() * 22], "x": []}
    assert columnar.example(serialised_example({"text": b"x" * 300, "n": None})) == {"text": [b"x" * 300], "n": []}
    for broken in (OF_TENSORFLOW[:-1], OF_TENSORFLOW + b"\n", b"\x08\x01", b"\n\xff"):
        with pytest.raises(ValueError):
            columnar.example(broken)


def test_bad_array_record_files(tmp_path, monkeypatch):
    good = [json.dumps(record).encode() for record in RECORDS]

    def bad(records, **options):
        write_array_record(tmp_path / "a.array_record", records)
        return error(f"array_record:{tmp_path}/a.array_record", **options)

    assert "record 1: not JSON" in bad([good[0], b"{"])
    assert "record 1: a JSON list" in bad([good[0], b"[]"])
    assert "record 0: no field 'txt' (did you mean text?)" in bad(good, text_field="txt")
    example = serialised_example({"text": b"a", "meta": b"\xff", "n": None})
    assert "record 1: not a tf.train.Example" in bad([example, example[:-1]])
    assert "record 0: feature 'meta' is not UTF-8" in bad([example], domain_field="meta")
    assert "field 'n' is a list, not a string" in bad([example], text_field="n")
    assert "no field 'texts' (did you mean text?)" in bad([example], text_field="texts")
    assert "record 0: neither JSON nor a tf.train.Example nor UTF-8" in bad([b"\xff\xfe"])
    assert "record 1: not UTF-8 at byte 2" in bad([b"fine", b"ab\xff"])
    assert "leave data.domain_field empty" in bad([b"fine"], domain_field="x")
    write_array_record(tmp_path / "a.array_record", [os.urandom(3000) for _ in range(50)])
    whole = (tmp_path / "a.array_record").read_bytes()
    (tmp_path / "a.array_record").write_bytes(whole[: len(whole) // 2])
    assert "a.array_record: no records in it, or cut short" in error(f"array_record:{tmp_path}/*")
    (tmp_path / "a.array_record").write_bytes(whole[:70] + bytes([whole[70] ^ 255]) + whole[71:])
    assert "a.array_record: damaged" in error(f"array_record:{tmp_path}/*")
    monkeypatch.setitem(sys.modules, "array_record.python.array_record_module", None)
    assert "pip install array_record" in error(f"array_record:{tmp_path}/*")

"""Documents from Parquet and ArrayRecord files. Both need their package, which is imported when a file is read."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_assist.data.documents import Document, OnBytes
from slm_assist.data.paths import on_this_machine, size_of
from slm_assist.data.text_files import document_of
from slm_assist.errors import UserError, nearest

if TYPE_CHECKING:
    from slm_assist.data.templates import Templates

_ROWS = 1024  # read at a time


class _Progress:
    """Reports a file's bytes in proportion to the records that have been read."""

    def __init__(self, size: int, records: int, on_bytes: OnBytes):
        self._size, self._records, self._on_bytes = size, records, on_bytes
        self._done = self._reported = 0

    def add(self, records: int) -> None:
        self._done += records
        read = self._size * self._done // self._records
        self._on_bytes(read - self._reported)
        self._reported = read


def read_parquet(
    path: Path, on_bytes: OnBytes, text_field: str, domain_field: str, templates: "Templates | None" = None
) -> Iterator[Document]:
    """Rows of a Parquet file in order, a batch of the columns at a time; null and empty texts are skipped.

    Raises:
      UserError: no such column, not strings, or a damaged file; names the file and, where it can, the row.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from error
    with on_this_machine(path) as here:
        try:
            with pyarrow.parquet.ParquetFile(here) as file:
                schema = file.schema_arrow
                columns = [_column(path, schema, domain_field, "domain_field")] if domain_field else []
                if templates:
                    columns += [_way(path, schema, name, templates.key_of[name])[0] for name in templates.fields]
                else:
                    columns.insert(0, _column(path, schema, text_field, "text_field"))
                if not file.metadata.num_rows:
                    raise UserError(f"{path}: no rows in it; leave it out")
                progress = _Progress(size_of(path), file.metadata.num_rows, on_bytes)
                row = 0
                for batch in file.iter_batches(_ROWS, columns=[".".join(column) for column in columns]):
                    if templates:
                        yield from _examples(path, batch, row, domain_field, templates)
                    else:
                        yield from _texts(path, batch, row, columns, domain_field)
                    row += len(batch)
                    progress.add(len(batch))
        except (pyarrow.ArrowException, OSError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(f"{path}: not a Parquet file, or a damaged one ({reason}); get it again") from error


def _texts(path: Path, batch: Any, row: int, columns: list[list[str]], domain_field: str) -> Iterator[Document]:
    texts, *domains = (_strings(path, batch, column, row) for column in columns)
    domains = domains[0] if domains else [""] * len(texts)
    for i, (text, domain) in enumerate(zip(texts, domains, strict=True)):
        if text and domain is None:
            raise UserError(f"{path}, row {row + i}: {domain_field} is null; set data.domain_field")
        if text:
            yield Document(text, domain)


def _examples(path: Path, batch: Any, row: int, domain_field: str, templates: "Templates") -> Iterator[Document]:
    try:
        records = batch.to_pylist()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 in rows {row} to {row + len(batch) - 1}; convert the file") from error
    for number, record in enumerate(records, row):
        document = templates.document(record, domain_field, f"{path}, row {number}")
        if document.text:
            yield document


def _way(path: Path, schema: Any, name: str, key: str) -> tuple[list[str], Any]:
    """The way to a column, and its type: its name if there is one, else into structs by the dots."""
    import pyarrow.types as types

    parts = [name] if name in schema.names else name.split(".")
    kind, has = None, schema.names
    for part in parts:
        if part not in has:
            raise UserError(f"{path}: no column {name!r}{nearest(part, has)}; it has {has[:8]}: set data.{key}")
        kind = schema.field(part).type if kind is None else kind.field(part).type
        has = [kind.field(i).name for i in range(kind.num_fields)] if types.is_struct(kind) else []
    return parts, kind


def _column(path: Path, schema: Any, name: str, key: str) -> list[str]:
    """The way to a column of strings."""
    import pyarrow.types as types

    parts, kind = _way(path, schema, name, key)
    value = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(value) or types.is_large_string(value) or types.is_string_view(value)):
        raise UserError(f"{path}: column {name!r} is {kind}, not strings: set data.{key}")
    return parts


def _strings(path: Path, batch: Any, column: list[str], row: int) -> list[str | None]:
    import pyarrow.compute

    values = batch.column(column[0])
    if column[1:]:
        values = pyarrow.compute.struct_field(values, column[1:])
    try:
        return values.to_pylist()
    except UnicodeDecodeError as error:
        last = row + len(values) - 1
        raise UserError(f"{path}: not UTF-8 in {'.'.join(column)}, rows {row} to {last}; convert the file") from error


def read_array_record(
    path: Path, on_bytes: OnBytes, text_field: str, domain_field: str, templates: "Templates | None" = None
) -> Iterator[Document]:
    """Records of an ArrayRecord file in order; empty texts are skipped.

    What a record is, the first one that is not empty decides for its file: a JSON object, else a
    tf.train.Example, else text (UTF-8, the whole record), which has no domain.

    Raises:
      UserError: a record is not what the first one is, or the file is damaged; names the record.
    """
    try:
        from array_record.python.array_record_module import ArrayRecordReader
    except ImportError as error:
        raise UserError(f"{path}: reading ArrayRecord needs array_record: pip install array_record") from error
    with on_this_machine(path) as here:
        try:
            reader = ArrayRecordReader(str(here))
            total = reader.num_records()
            if not total:
                raise UserError(f"{path}: no records in it, or cut short; get it again or leave it out")
            progress, parse = _Progress(size_of(path), total, on_bytes), None
            for first in range(0, total, _ROWS):
                records = reader.read(first, min(first + _ROWS, total))
                for number, record in enumerate(records, first):
                    where = f"{path}, record {number}"
                    parse = parse or (_kind(record, where) if record else None)
                    document = parse(record, where, text_field, domain_field, templates) if record else None
                    if document and document.text:
                        yield document
                progress.add(len(records))
            reader.close()
        except (RuntimeError, IndexError) as error:
            raise UserError(f"{path}: damaged ({str(error).splitlines()[0]}); get it again") from error


def _kind(record: bytes, where: str) -> Callable[..., Document]:
    """How to read records like this one."""
    try:
        if isinstance(json.loads(record), dict):
            return _from_json
    except (ValueError, RecursionError):
        pass
    try:
        if example(record):
            return _from_example
    except ValueError:
        pass
    try:
        record.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: neither JSON nor a tf.train.Example nor UTF-8 text; convert the file") from error
    return _from_text


def _from_json(
    record: bytes, where: str, text_field: str, domain_field: str, templates: "Templates | None"
) -> Document:
    try:
        value = json.loads(record)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}), as other records are; mend the file") from error
    if not isinstance(value, dict):
        raise UserError(f"{where}: a JSON {type(value).__name__}, not an object with a {text_field!r} field")
    return document_of(value, text_field, domain_field, where, templates)


def _from_example(
    record: bytes, where: str, text_field: str, domain_field: str, templates: "Templates | None"
) -> Document:
    try:
        features: dict[str, Any] = example(record)
    except ValueError as error:
        raise UserError(f"{where}: not a tf.train.Example ({error}), as other records are; mend the file") from error
    for name in {domain_field, *(templates.fields if templates else [text_field])} & features.keys():
        values = features[name]
        try:
            if len(values) == 1 and isinstance(values[0], bytes):
                features[name] = values[0].decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: feature {name!r} is not UTF-8; convert the file") from error
    return document_of(features, text_field, domain_field, where, templates)


def _from_text(
    record: bytes, where: str, text_field: str, domain_field: str, templates: "Templates | None"
) -> Document:
    if templates:
        raise UserError(
            f"{where}: plain text, which has no fields for data.prompt; leave data.prompt and data.answer out"
        )
    if domain_field:
        raise UserError(f"{where}: plain text, which has no domain: leave data.domain_field empty")
    try:
        return Document(record.decode(), "")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start} of the record; convert the file") from error


def example(record: bytes) -> dict[str, list]:
    """The features of a serialised tf.train.Example: name -> its bytes or integers, or [] for other numbers.

    The wire format of protocol buffers (protobuf.dev/programming-guides/encoding): Example has Features as
    field 1, that has map entries (key 1, Feature 2) as field 1, and a Feature has a BytesList as field 1 or an
    Int64List, packed, as field 3.

    Raises:
      ValueError: `record` is no such message.
    """
    features = {}
    for field, content in _messages(record):
        if field != 1:
            raise ValueError(f"field {field} where only features are known")
        for entry_field, entry in _messages(content):
            pair = dict(_messages(entry))
            if entry_field != 1 or 1 not in pair:
                raise ValueError("a feature without a name")
            kinds = dict(_messages(pair.get(2, b"")))
            features[pair[1].decode()] = [v for _, v in _messages(kinds.get(1, b""))] or list(
                _integers(kinds.get(3, b""))
            )
    return features


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(field number, content) of each length-delimited field, which is all that an Example is made of."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        if tag & 7 != 2:
            raise ValueError(f"wire type {tag & 7}")
        size, at = _varint(data, at)
        if at + size > len(data):
            raise ValueError("a field longer than its message")
        yield tag >> 3, data[at : at + size]
        at += size


def _integers(numbers: bytes) -> Iterator[int]:
    """Of an Int64List: field 1, all in one or one by one."""
    at = 0
    while at < len(numbers):
        tag, at = _varint(numbers, at)
        value, behind = _varint(numbers, at)
        at, stop = (behind, behind + value) if tag & 7 == 2 else (at, behind)
        while at < stop:
            value, at = _varint(numbers, at)
            yield value - (1 << 64) if value >> 63 else value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte = data[at]
        value, at = value | (byte & 127) << shift, at + 1
        if byte < 128:
            return value, at
    raise ValueError("a broken number")

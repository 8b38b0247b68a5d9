"""Documents from text files and from JSON lines."""

import codecs
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_assist.data import compressed
from slm_assist.data.documents import Document, OnBytes
from slm_assist.errors import UserError, nearest

if TYPE_CHECKING:
    from slm_assist.data.templates import Templates

BLOCK = 1 << 20
_SHORTEST, _LONGEST = 2048, 6144  # characters in a piece of a text file that is cut into documents
_CUTS = ("\n\n", "\n\r\n", "\n")  # where to cut it, best first


def read_whole(path: Path, on_bytes: OnBytes) -> Iterator[Document]:
    """A UTF-8 file as one document."""
    content = path.read_bytes()
    on_bytes(len(content))
    yield Document(content.decode("utf-8"), "")


def read_text(path: Path, on_bytes: OnBytes) -> Iterator[Document]:
    """A UTF-8 file as pieces of 2 to 6 thousand characters (the last one shorter) that add up to it.

    Raises:
      UserError: it is not UTF-8; names the byte.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    buffer, offset, at = "", 0, 0
    with path.open("rb") as file:
        block = file.read(BLOCK)
        while block:
            following = file.read(BLOCK)
            pending = len(decoder.getstate()[0])
            try:
                buffer = buffer[at:] + decoder.decode(block, final=not following)
            except UnicodeDecodeError as error:
                where = offset - pending + error.start
                raise UserError(f"{path}: not UTF-8 at byte {where}; convert it, for example with iconv") from error
            at, offset = 0, offset + len(block)
            on_bytes(len(block))
            while len(buffer) - at > _LONGEST:
                end = _cut(buffer, at)
                yield Document(buffer[at:end], "")
                at = end
            block = following
    if at < len(buffer):
        yield Document(buffer[at:], "")


def _cut(text: str, start: int) -> int:
    """Where the piece that starts at `start` ends."""
    for mark in _CUTS:
        found = text.rfind(mark, start + _SHORTEST, start + _LONGEST)
        if found >= 0:
            return found + len(mark)
    return start + _LONGEST


def read_jsonl(
    path: Path, on_bytes: OnBytes, text_field: str, domain_field: str, templates: "Templates | None" = None
) -> Iterator[Document]:
    """One JSON object a line; blank lines and empty texts are skipped.

    Raises:
      UserError: a line is no object with the fields, or there is none; names the line.
    """
    empty = True
    for number, line in compressed.lines(path, on_bytes):
        if not line.strip():
            continue
        empty = False
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8 at byte {error.start} of the line; convert the file") from error
        except ValueError as error:
            raise UserError(f"{where}: not JSON ({error}); each line must be one JSON object") from error
        except RecursionError as error:
            raise UserError(f"{where}: JSON nested too deeply to be read; each line must be one object") from error
        if not isinstance(record, dict):
            raise UserError(f"{where}: a JSON {type(record).__name__}, not an object with a {text_field!r} field")
        document = document_of(record, text_field, domain_field, where, templates)
        if document.text:
            yield document
    if empty:
        raise UserError(f"{path}: no JSON line in it; leave it out")


def document_of(
    record: Mapping[str, Any], text_field: str, domain_field: str, where: str, templates: "Templates | None" = None
) -> Document:
    """A record as text, or by `templates` as an example; without a `domain_field` the domain is empty.

    Raises:
      UserError: the record has no such field, or no text there; `where` names it.
    """
    if templates:
        return templates.document(record, domain_field, where)
    text = field(record, text_field, where, "text_field")
    return Document(text, field(record, domain_field, where, "domain_field") if domain_field else "")


def value_at(record: Mapping[str, Any], name: str, where: str, key: str) -> Any:
    """What stands at `name`, taken literally if it is there, else dot by dot; `key` is the setting's name."""
    value: Any = record
    for part in [name] if name in record else name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            has = sorted(value)[:8] if isinstance(value, Mapping) else []
            raise UserError(f"{where}: no field {name!r}{nearest(part, has)}; it has {has}: set data.{key}")
        value = value[part]
    return value


def field(record: Mapping[str, Any], name: str, where: str, key: str) -> str:
    """The string at `name`, as `value_at` finds it."""
    value = value_at(record, name, where, key)
    if not isinstance(value, str):
        raise UserError(f"{where}: field {name!r} is a {type(value).__name__}, not a string: set data.{key}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: field {name!r} has half a surrogate pair at {error.start}; mend it") from error
    return value

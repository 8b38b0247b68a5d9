"""Where text comes from: `text:`, `jsonl:` and `python:` sources of documents."""

import codecs
import contextlib
import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from slm_assist.data import compressed
from slm_assist.data.python_source import python_files
from slm_assist.errors import UserError, nearest

KINDS = ("text", "jsonl", "python")
PYTHON_VALIDATION_FRACTION = 0.03
_BLOCK = 1 << 20
_SHORTEST, _LONGEST = 2048, 6144  # characters in a piece of a text file that is cut into documents
_CUTS = ("\n\n", "\n\r\n", "\n")  # where to cut it, best first

OnBytes = Callable[[int], Any]


class Document(NamedTuple):
    """A text, the domain it is counted under, and its split where the source decides that (else None)."""

    text: str
    domain: str
    split: str | None = None


class Source:
    """A corpus: the same documents in the same order as long as the fingerprint is the same.

    Attributes:
      spec: as the user wrote it.
      fingerprint: hex, over the contents of all files and what is made of them.
      total_bytes: size of all files (compressed, where they are), the total that `on_bytes` counts up to.
      splits: whether the source itself says which documents are for validation.
    """

    def __init__(self, spec: str, parts: list["_Part"], note: str = ""):
        self.spec = spec
        self.splits = any(part.split for part in parts)
        self.total_bytes = sum(part.size for part in parts)
        self._parts, self._note = parts, note
        digest = hashlib.blake2b(digest_size=16)
        for part in parts:
            digest.update(f"{part.digest} {part.domain} {part.split} {part.options}\n".encode())
        self.fingerprint = digest.hexdigest()

    def documents(self, on_bytes: OnBytes = lambda n: None) -> Iterator[Document]:
        """All documents, in a fixed order; `on_bytes` is called with how many more bytes have been read.

        Raises:
          UserError: a file cannot be read as what it should be; names the file and the line or byte.
        """
        for part in self._parts:
            try:
                for document in part.read(part.path, on_bytes):
                    yield Document(document.text, document.domain or part.domain, part.split)
            except OSError as error:
                raise UserError(f"{part.path}: cannot be read ({error.strerror or error})") from error

    def describe(self) -> str:
        """One line: the spec, files, size, what was left out, fingerprint."""
        files = f"{len(self._parts)} file{'s' * (len(self._parts) != 1)}"
        note = f", {self._note}" if self._note else ""
        return f"{self.spec} ({files}, {self.total_bytes / 1e6:.1f} MB{note}; fingerprint {self.fingerprint})"


class _Part(NamedTuple):
    """A file of a source and how to read it."""

    path: Path
    size: int
    digest: str
    domain: str
    read: Callable[[Path, OnBytes], Iterator[Document]]
    split: str | None = None
    options: str = ""


def open_source(
    spec: str,
    *,
    text_field: str = "text",
    domain_field: str = "",
    validation_fraction: float = PYTHON_VALIDATION_FRACTION,
    cache_dir: str | Path | None = None,
) -> Source:
    """Finds a source's files and fingerprints them.

    Args:
      spec: one of
        `text:GLOB[,GLOB...]`  UTF-8 files. A long one is cut into documents of about 4 KB, at blank lines
          where there are any; together they are the file. Domain: the folder's name if there are several
          folders, else the file's name if there are 2 to 20 files, else "text".
        `jsonl:GLOB[,GLOB...]`  one JSON object a line, plain, .gz, .xz or .zst; blank lines and empty texts
          are skipped.
        `python:`  the Python sources of the standard library, jax, flax, numpy, scipy and optax.
        `~` and `**` work in globs; the files of a glob come in sorted order.
      text_field, domain_field: of `jsonl:`, where text and domain stand; dots lead into inner objects
        (`meta.pile_set_name`). Without a `domain_field` the domain is "jsonl".
      validation_fraction: of `python:`, about which part of each domain is for validation.
      cache_dir: remembers there the hashes of files that have not changed (by size and time of change).

    Raises:
      UserError: unknown kind, no file matches, an empty file, or one that cannot be read.
    """
    kind, colon, globs = spec.partition(":")
    if not colon or kind not in KINDS:
        hint = nearest(kind, KINDS) if colon else f" (did you mean text:{spec}?)"
        raise UserError(f"source {spec!r}: write text:GLOB, jsonl:GLOB or python:{hint}")
    if kind == "python":
        return _python(spec, validation_fraction)
    paths = _find(spec, globs)
    digests = _digests(paths, cache_dir)
    if kind == "text":
        domains = _text_domains(paths)
        return Source(spec, [_Part(p, *digests[p], d, _read_text) for p, d in zip(paths, domains, strict=True)])
    read = partial(_read_jsonl, text_field=text_field, domain_field=domain_field)
    options = f"{text_field} {domain_field}"
    return Source(spec, [_Part(p, *digests[p], "jsonl", read, options=options) for p in paths])


def _python(spec: str, validation_fraction: float) -> Source:
    files, skipped = python_files(validation_fraction)
    parts = [_Part(f.path, f.size, f.digest.hex(), f.domain, _read_whole, f.split) for f in files]
    return Source(spec, parts, f"{skipped} not UTF-8 and left out")


def _find(spec: str, globs: str) -> list[Path]:
    """The files that comma-separated `globs` name, each once; in sorted order within a glob."""
    found: dict[Path, None] = {}
    for pattern in filter(None, map(str.strip, globs.split(","))):
        pattern = os.path.expanduser(pattern)
        names = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        files = [Path(name) for name in names if os.path.isfile(name)]
        if not files:
            cure = f"use {pattern.rstrip('/')}/*" if os.path.isdir(pattern) else "check the path"
            raise UserError(f"source {spec}: no file matches {pattern}; {cure}")
        found.update(dict.fromkeys(files))
    if not found:
        raise UserError(f"source {spec!r} names no files: write the paths after the colon")
    for path in found:
        if not path.stat().st_size:
            raise UserError(f"{path}: the file is empty; remove it or leave it out of {spec}")
    return list(found)


def _text_domains(paths: list[Path]) -> list[str]:
    if len({path.parent for path in paths}) > 1:
        return [path.resolve().parent.name for path in paths]
    return [path.stem if 2 <= len(paths) <= 20 else "text" for path in paths]


def _digests(paths: list[Path], cache_dir: str | Path | None) -> dict[Path, tuple[int, str]]:
    """Size and content hash of each file; hashes are kept in digests.json of `cache_dir`."""
    memo_file = Path(cache_dir).expanduser() / "digests.json" if cache_dir else None
    try:
        memo = json.loads(memo_file.read_text()) if memo_file else {}
    except (OSError, ValueError):  # missing or damaged: it only saves time
        memo = {}
    result, fresh = {}, {}
    for path in paths:
        try:
            stat = path.stat()
            key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
            if key not in memo:
                with path.open("rb") as file:
                    fresh[key] = hashlib.file_digest(file, partial(hashlib.blake2b, digest_size=16)).hexdigest()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error
        result[path] = (stat.st_size, memo.get(key) or fresh[key])
    if memo_file and fresh:
        with contextlib.suppress(OSError):
            memo_file.parent.mkdir(parents=True, exist_ok=True)
            scratch = memo_file.with_name(f"{memo_file.name}.{os.getpid()}")
            scratch.write_text(json.dumps(memo | fresh, indent=0))
            scratch.replace(memo_file)
    return result


def _read_whole(path: Path, on_bytes: OnBytes) -> Iterator[Document]:
    content = path.read_bytes()
    on_bytes(len(content))
    yield Document(content.decode("utf-8"), "")


def _read_text(path: Path, on_bytes: OnBytes) -> Iterator[Document]:
    """A UTF-8 file as pieces of 2 to 6 thousand characters (the last one shorter) that add up to it."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    buffer, offset, at = "", 0, 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            pending = len(decoder.getstate()[0])
            try:
                buffer = buffer[at:] + decoder.decode(block, final=not file.peek(1))
            except UnicodeDecodeError as error:
                where = offset - pending + error.start
                raise UserError(f"{path}: not UTF-8 at byte {where}; convert it, for example with iconv") from error
            at, offset = 0, offset + len(block)
            on_bytes(len(block))
            while len(buffer) - at > _LONGEST:
                end = _cut(buffer, at)
                yield Document(buffer[at:end], "")
                at = end
    if at < len(buffer):
        yield Document(buffer[at:], "")


def _cut(text: str, start: int) -> int:
    """Where the piece that starts at `start` ends."""
    for mark in _CUTS:
        found = text.rfind(mark, start + _SHORTEST, start + _LONGEST)
        if found >= 0:
            return found + len(mark)
    return start + _LONGEST


def _read_jsonl(path: Path, on_bytes: OnBytes, text_field: str, domain_field: str) -> Iterator[Document]:
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
        text = _field(record, text_field, where, "text_field")
        domain = _field(record, domain_field, where, "domain_field") if domain_field else ""
        if text:
            yield Document(text, domain)
    if empty:
        raise UserError(f"{path}: no JSON line in it; leave it out")


def _field(record: dict, name: str, where: str, key: str) -> str:
    """The string at `name`, taken literally if it is there, else dot by dot; `key` is the setting's name."""
    value: Any = record
    for part in [name] if name in record else name.split("."):
        if not isinstance(value, dict) or part not in value:
            has = sorted(value)[:8] if isinstance(value, dict) else []
            raise UserError(f"{where}: no field {name!r}{nearest(part, has)}; it has {has}: set data.{key}")
        value = value[part]
    if not isinstance(value, str):
        raise UserError(f"{where}: field {name!r} is a {type(value).__name__}, not a string: set data.{key}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: field {name!r} has half a surrogate pair at {error.start}; mend it") from error
    return value

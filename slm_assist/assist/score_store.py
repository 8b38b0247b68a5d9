"""A directory of scores: a few numbers for each row of a corpus, written by any number of processes.

    meta.json              what is scored, with which small LMs and how; all who write here agree on it
    part-I-of-N.scores     what process I of N wrote: one record after another
    selection_sample.npz   some rows, token by token, for a person to look at (`sample.py`)

Rows are cut into spans of fixed length, and a record is a span: its first row, how many rows, a CRC-32, and the
values of each row as float32. Records are only ever appended, so a process may be killed at any byte: what it
left behind its last whole record is cut off when it comes back. Whoever starts reads what all have written and
takes, of the spans that nobody did, those whose number is its own modulo N.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import struct
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slm_assist.data.row_store import Rows
from slm_assist.errors import UserError

FORMAT = 1
COLUMNS = ("score", "loss", "top_k_share", "tokens", "domain")
SAMPLE = "selection_sample.npz"
# Entries of meta.json that must be equal for scores to belong together; the rest is for people.
IDENTITY = ("vocabulary", "corpus", "rows", "seq_len", "score", "helpers", "dtype", "batch_rows", "span_rows")
_OF_HELPER = ("step", "parameters", "identity")  # entries of a helper that identify it, wherever its run lies
_HEADER = struct.Struct("<qII")  # first row, number of rows, CRC-32 of these two and of the values
_PART = re.compile(r"part-(\d+)-of-(\d+)\.scores")
_SYNC_SECONDS = 10.0


class Scores(NamedTuple):
    """The scores of a whole corpus.

    Attributes:
      columns: float32 [rows] each: `score`; `loss`, the mean over the row's tokens, nats; `top_k_share`, the share
        of tokens among the model's k likeliest; `tokens`, how many count; `domain`, an index into `meta["domains"]`.
        The middle two are of the role "scorer", or of the first role where there is none.
      meta: what meta.json says.
      path: the directory.
    """

    columns: dict[str, np.ndarray]
    meta: dict[str, Any]
    path: Path

    @property
    def score(self) -> np.ndarray:
        return self.columns["score"]

    @property
    def domain(self) -> np.ndarray:
        """int64 [rows]."""
        return self.columns["domain"].astype(np.int64)

    @property
    def fingerprint(self) -> str:
        """Hex, over what was scored and every value."""
        digest = hashlib.blake2b(json.dumps(_identity(self.meta), sort_keys=True).encode(), digest_size=16)
        for name in COLUMNS:
            digest.update(np.ascontiguousarray(self.columns[name], "<f4").tobytes())
        return digest.hexdigest()


def open_scores(directory: str | Path, rows: Rows | None = None) -> Scores:
    """The scores in a directory that is complete.

    Args:
      directory: where `slm-assist score` wrote.
      rows: the rows they are to be used for, to be checked against.

    Raises:
      UserError: not such a directory, of another corpus or vocabulary, incomplete, cut short or damaged.
    """
    path = Path(directory).expanduser()
    meta = read_meta(path)
    if rows is not None:
        _check_rows(path, meta, rows)
    values = np.zeros((meta["rows"], len(COLUMNS)), "<f4")
    found: dict[int, Path] = {}
    broken = []
    for file in _parts(path):
        records, end = _read(file, meta)
        for first, data in records:
            part = np.frombuffer(data, "<f4").reshape(-1, len(COLUMNS))
            if first in found and values[first : first + len(part)].tobytes() != data:
                raise UserError(
                    f"{file}: its scores of the rows from {first} are not those in {found[first].name}; delete one of "
                    "the two files, and `slm-assist score` with the same options fills the gap"
                )
            values[first : first + len(part)] = part
            found[first] = file
        if end < file.stat().st_size:
            broken.append(f"{file}: cut short or damaged at byte {end} of {file.stat().st_size}; ")
    missing = meta["rows"] - sum(_span_rows(meta, first) for first in found)
    if missing:
        where = broken[0] if broken else f"{path}: not complete; "
        raise UserError(
            f"{where}{missing:,} of {meta['rows']:,} rows have no score: `slm-assist score` with the same options and "
            f"--out={path} scores only those"
        )
    return Scores({name: values[:, i].copy() for i, name in enumerate(COLUMNS)}, meta, path)


def read_meta(path: Path) -> dict[str, Any]:
    """meta.json of a scores directory, or `UserError`."""
    file = path / "meta.json"
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{path}: not a directory of scores, it has no meta.json; `slm-assist score` makes one"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}); delete {path} and score again") from None
    found = meta.get("format") if isinstance(meta, dict) else None
    if found != FORMAT:
        raise UserError(
            f"{file}: scores of format {found!r}, this version reads {FORMAT}; delete {path} and score again"
        )
    lacking = [name for name in (*IDENTITY, "domains") if name not in meta]
    if lacking:
        raise UserError(f"{file}: has no {lacking[0]!r}; the file is damaged: delete {path} and score again")
    return meta


def _check_rows(path: Path, meta: Mapping[str, Any], rows: Rows) -> None:
    for what, stored, given in (
        ("vocabulary", meta["vocabulary"], rows.vocabulary.fingerprint),
        ("corpus", meta["corpus"], rows.fingerprint),
    ):
        if stored != given:
            raise UserError(
                f"{path}: the scores are of another {what} ({stored[:12]}, these rows have {given[:12]}); score these "
                "rows, or use the data.* keys that the scores were made with"
            )


def check_out(path: Path) -> None:
    """Raises `UserError` where a directory holds other things than scores."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: a file; choose another --out")
    strangers = sorted(entry.name for entry in path.iterdir() if entry.name[0] != ".") if path.is_dir() else []
    if strangers and not (path / "meta.json").exists():
        raise UserError(
            f"{path}: holds {strangers[0]} and no meta.json, so it is no directory of scores; choose another --out"
        )


class Writer:
    """Adds scores to a directory, as process I of N; use as a context manager.

    Attributes:
      todo: the first rows of the spans that are this process's to score, ascending.
      done: how many rows of the corpus have a score, as far as this process knows.

    Args:
      path: the directory, which is made where it is not there.
      meta: `IDENTITY`, `domains`, and whatever people shall find in meta.json beside these.
      part: (I, N). Processes that write at the same time must have the same N and different I.

    Raises (from `with`):
      UserError: the directory holds something else, or scores made in another way (says what differs); another
        process has this part, or N differs between processes; the directory cannot be written.
    """

    def __init__(self, path: str | Path, meta: Mapping[str, Any], part: tuple[int, int] = (0, 1)):
        self.path, self.part = Path(path).expanduser(), part
        self.meta = {"format": FORMAT, "columns": list(COLUMNS)} | json.loads(json.dumps(dict(meta)))
        self.file = self.path / f"part-{part[0]}-of-{part[1]}.scores"
        self._descriptor = -1
        self._synced = time.monotonic()

    def __enter__(self) -> "Writer":
        try:
            self._settle_meta()
            self._descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); choose another --out") from error
        try:
            self._lock()
            spans = self._scan()
        except BaseException:
            os.close(self._descriptor)
            raise
        everything = range(0, self.meta["rows"], self.meta["span_rows"])
        self.done = sum(_span_rows(self.meta, first) for first in spans)
        mine = (first for number, first in enumerate(everything) if number % self.part[1] == self.part[0])
        self.todo = [first for first in mine if first not in spans]
        return self

    def __exit__(self, *exc) -> None:
        with contextlib.suppress(OSError):
            os.fsync(self._descriptor)
        os.close(self._descriptor)  # and with it the lock

    def append(self, first: int, values: np.ndarray) -> None:
        """Writes the span that starts at row `first`: float32 [rows of the span, columns].

        Raises:
          UserError: the disk is full, say; what was appended before is kept.
        """
        count = _span_rows(self.meta, first)
        if values.shape != (count, len(COLUMNS)):
            raise ValueError(f"span {first} has {count} rows of {len(COLUMNS)} values, not {values.shape}")
        data = np.ascontiguousarray(values, "<f4").tobytes()
        record = memoryview(_HEADER.pack(first, count, _checksum(first, count, data)) + data)
        try:
            while record:
                record = record[os.write(self._descriptor, record) :]
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                os.fsync(self._descriptor)
                self._synced = time.monotonic()
            self.done += count
        except OSError as error:
            raise UserError(
                f"{self.file}: cannot be written ({error.strerror}); the scores before are kept: mend that, and the "
                "same command goes on"
            ) from error

    def _settle_meta(self) -> None:
        """Writes meta.json, or compares it with ours; of two processes that come at once, one writes."""
        file = self.path / "meta.json"
        self.path.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            check_out(self.path)
            temporary = self.path / f".meta-{secrets.token_hex(8)}.tmp"
            try:
                with open(temporary, "w", encoding="utf-8") as out:
                    out.write(json.dumps(self.meta, indent=1, allow_nan=False) + "\n")
                    out.flush()
                    os.fsync(out.fileno())
                with contextlib.suppress(FileExistsError):
                    os.link(temporary, file)  # unlike a rename, never over another's
            finally:
                temporary.unlink(missing_ok=True)
        changed = differences(read_meta(self.path), self.meta)
        if changed:
            raise UserError(
                f"{self.path}: holds scores made in another way ({'; '.join(changed)}); use what they were made with, "
                "or another --out"
            )

    def _lock(self) -> None:
        """Our own part first, then a look at the others: of two processes that differ in N, one sees the other."""
        index, count = self.part
        if not _try_lock(self._descriptor, fcntl.LOCK_EX):
            raise UserError(
                f"{self.file}: another process is scoring part {index}/{count} now; wait for it, stop it, or give "
                "each process a --part of its own"
            )
        for file in _parts(self.path):
            other = _PART.fullmatch(file.name)
            if int(other[2]) == count:
                continue
            with open(file, "rb") as theirs:
                if not _try_lock(theirs.fileno(), fcntl.LOCK_SH):
                    raise UserError(
                        f"{file}: another process is scoring part {other[1]}/{other[2]} now, and this is part "
                        f"{index}/{count}: processes that score together need the same number of parts"
                    )

    def _scan(self) -> set[int]:
        """First rows of the spans that are done; our own file is cut behind its last whole record."""
        done = set()
        for file in _parts(self.path):
            records, end = _read(file, self.meta)
            done.update(first for first, _ in records)
            if file == self.file:
                os.truncate(self._descriptor, end)
                os.lseek(self._descriptor, end, os.SEEK_SET)
        return done


def is_complete(path: Path, meta: Mapping[str, Any]) -> bool:
    """Whether every row has a score."""
    found = {first for file in _parts(path) for first, _ in _read(file, meta)[0]}
    return len(found) == -(-meta["rows"] // meta["span_rows"])


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`name: old -> new` for everything in which two meta.json must agree and do not."""
    old, new = _identity(old), _identity(new)
    return [
        f"{name}: {_short(old.get(name))} -> {_short(new.get(name))}"
        for name in [*old, *(name for name in new if name not in old)]
        if old.get(name) != new.get(name)
    ]


def _identity(meta: Mapping[str, Any]) -> dict[str, Any]:
    """`IDENTITY`, flat."""
    flat = {name: meta[name] for name in IDENTITY if not isinstance(meta[name], Mapping)}
    flat |= {f"score.{name}": value for name, value in meta["score"].items()}
    for role, helper in meta["helpers"].items():
        flat |= {f"helpers.{role}.{name}": helper.get(name) for name in _OF_HELPER}
    return flat


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)


def _parts(path: Path) -> list[Path]:
    return sorted(file for file in path.iterdir() if _PART.fullmatch(file.name))


def _span_rows(meta: Mapping[str, Any], first: int) -> int:
    return min(meta["span_rows"], meta["rows"] - first)


def _checksum(first: int, count: int, data: bytes) -> int:
    return zlib.crc32(data, zlib.crc32(struct.pack("<qI", first, count)))


def _read(file: Path, meta: Mapping[str, Any]) -> tuple[list[tuple[int, bytes]], int]:
    """(first row, values) of each record up to the first that is not whole, and the byte where that one begins."""
    records, end = [], 0
    with open(file, "rb") as stream:
        while len(header := stream.read(_HEADER.size)) == _HEADER.size:
            first, count, checksum = _HEADER.unpack(header)
            if not 0 <= first < meta["rows"] or first % meta["span_rows"] or count != _span_rows(meta, first):
                break
            size = count * len(COLUMNS) * 4
            data = stream.read(size)
            if len(data) < size or _checksum(first, count, data) != checksum:
                break
            records.append((first, data))
            end += len(header) + size
    return records, end


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

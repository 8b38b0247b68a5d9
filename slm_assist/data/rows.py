"""From a corpus to rows on disk, once: `prepare` makes or opens a cache that is keyed by content.

Documents are taken in order and split into train and validation; a fixed span of documents of one split is a
shard, which is tokenized and packed by itself. So any number of threads gives the same bytes, and a row id
names the same tokens for ever. (Threads, since SentencePiece works outside the interpreter's lock: they need
no start-up and no `if __name__ == "__main__"` in the caller's script.)

A cache directory appears under its final name only when it is whole:

    meta.json          format, counts, domains, fingerprints
    tokenizer/         the vocabulary
    train.rows         records, see row_store.py
    validation.rows
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import secrets
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from slm_assist.data.row_store import Rows, pack, row_dtype
from slm_assist.data.sources import Document, OnBytes, Source
from slm_assist.data.tokenizers import SAMPLE_BYTES, Vocabulary, train_vocabulary
from slm_assist.errors import UserError

__all__ = ["Prepared", "Rows", "open_rows", "prepare"]

FORMAT = 1
SPLITS = ("train", "validation")
_SHARD_CHARACTERS = 1_000_000  # a shard of long documents is closed earlier: even work, bounded memory
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """An opened cache directory: the vocabulary, the rows of both splits, and what meta.json says."""

    path: Path
    vocabulary: Vocabulary
    train: Rows
    validation: Rows
    meta: dict[str, Any]


def prepare(
    source: Source,
    *,
    vocabulary: Vocabulary | None = None,
    vocab_size: int = 2048,
    seq_len: int,
    validation_source: Source | None = None,
    validation_fraction: float = 0.01,
    cache_dir: str | Path,
    cores: int = 0,
    progress: bool = True,
    shard_documents: int = 256,
    sample_bytes: int = SAMPLE_BYTES,
) -> Prepared:
    """Tokenizes a corpus into rows of `seq_len` targets, or opens what an earlier call made of it.

    Args:
      source: the corpus. Where it does not say itself which documents are for validation,
        `validation_fraction` of them are, by a hash of their text (so that copies stay on one side).
      vocabulary: the vocabulary to use; None learns one of `vocab_size` pieces from about `sample_bytes` of
        the training documents.
      seq_len: T; a row stores T + 1 ids.
      validation_source: takes the place of a split: all of `source` is for training.
      cache_dir: holds one directory for each combination of contents and settings.
      cores: threads; 0 is all cores. The result does not depend on it.
      progress: whether to show bars.
      shard_documents: documents in a shard.

    Raises:
      UserError: the source cannot be read, a split would not fill one row, the disk is full. Nothing is left.
    """
    if seq_len < 1:
        raise UserError(f"data.seq_len={seq_len}: use at least 1")
    by_hash = not (source.splits or validation_source)
    if by_hash and not 0 < validation_fraction < 1:
        raise UserError(f"data.validation_fraction={validation_fraction}: use a number between 0 and 1, such as 0.01")
    settings = {
        "format": FORMAT,
        "source": source.fingerprint,
        "validation": validation_source.fingerprint if validation_source else None,
        "validation_fraction": validation_fraction if by_hash else None,
        "seq_len": seq_len,
        "vocabulary": vocabulary.fingerprint if vocabulary else ["bpe", vocab_size, sample_bytes],
        "shard": [shard_documents, _SHARD_CHARACTERS],
    }
    cache_dir = Path(cache_dir).expanduser()
    path = cache_dir / _key(settings)
    if path.exists():
        try:
            return open_rows(path)
        except UserError as error:
            _log.warning("the prepared rows are damaged and are made again: %s", error)
    corpus = _Corpus(source, validation_source, validation_fraction, progress)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _scratch(cache_dir) as scratch:
            vocabulary = vocabulary or train_vocabulary(corpus.training_texts(), vocab_size, sample_bytes=sample_bytes)
            vocabulary.save(scratch / "tokenizer")
            splits = _write_rows(corpus, vocabulary, scratch, seq_len, cores or os.cpu_count() or 1, shard_documents)
            _check_sizes(splits, seq_len, by_hash, validation_fraction)
            meta = {
                "format": FORMAT,
                "source": source.describe(),
                "seq_len": seq_len,
                "vocabulary": vocabulary.fingerprint,
                "splits": splits,
            }
            (scratch / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
            _sync(scratch)
            _install(scratch, path)
        # Who comes back with the vocabulary that was learnt here finds the same rows.
        with contextlib.suppress(FileExistsError):
            (cache_dir / _key(settings | {"vocabulary": vocabulary.fingerprint})).symlink_to(path.name)
    except OSError as error:
        raise UserError(
            f"rows cannot be written to {cache_dir} ({error.strerror}); make room or set data.cache_dir"
        ) from error
    return open_rows(path)


def _key(settings: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16).hexdigest()


def open_rows(path: str | Path) -> Prepared:
    """Opens a directory that `prepare` made.

    Raises:
      UserError: it is not one, or not whole; names the file.
    """
    path = Path(path)
    try:
        meta = json.loads((path / "meta.json").read_text())
        if meta["format"] != FORMAT:
            raise UserError(f"{path}: rows of format {meta['format']}, this version reads {FORMAT}; delete it")
        vocabulary = Vocabulary.load(path / "tokenizer")
        if vocabulary.fingerprint != meta["vocabulary"]:
            raise UserError(f"{path / 'tokenizer'}: not the vocabulary of these rows; delete {path}")
        rows = {s: Rows(path / f"{s}.rows", meta["splits"][s], meta["seq_len"], vocabulary) for s in SPLITS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path / 'meta.json'}: missing or damaged; delete {path}") from error
    return Prepared(path, vocabulary, rows["train"], rows["validation"], meta)


class _Corpus:
    """The documents of one or two sources, each with its split."""

    def __init__(self, source: Source, validation: Source | None, fraction: float, progress: bool):
        self._source, self._validation, self._progress = source, validation, progress
        self._threshold = int(fraction * 2**64)

    def _split(self, document: Document) -> str:
        if self._validation:
            return "train"
        if document.split:
            return document.split
        digest = hashlib.blake2b(document.text.encode(), digest_size=8).digest()
        return "validation" if int.from_bytes(digest, "big") < self._threshold else "train"

    def bar(self, label: str) -> tqdm:
        """A progress bar over the bytes of all files."""
        total = self._source.total_bytes + (self._validation.total_bytes if self._validation else 0)
        return tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=not self._progress)

    def documents(self, on_bytes: OnBytes) -> Iterator[Document]:
        for document in self._source.documents(on_bytes):
            yield document._replace(split=self._split(document))
        for document in self._validation.documents(on_bytes) if self._validation else ():
            yield document._replace(split="validation")

    def training_texts(self) -> Iterator[str]:
        with self.bar("vocabulary") as bar:
            for document in self.documents(bar.update):
                if document.split == "train":
                    yield document.text


class _Shard:
    """Documents on their way into rows; `bytes_read` is how far the files were read when it was closed."""

    def __init__(self):
        self.texts: list[str] = []
        self.domains: list[int] = []
        self.characters = 0
        self.bytes_read = 0

    def add(self, text: str, domain: int) -> None:
        self.texts.append(text)
        self.domains.append(domain)
        self.characters += len(text)


class _SplitWriter:
    """The file of one split: shards are appended in order."""

    def __init__(self, path: Path, seed: str):
        self.file = path.open("wb")
        self.shard = _Shard()
        self._digest = hashlib.blake2b(seed.encode(), digest_size=16)
        self._domains: dict[str, int] = {}
        self._counts = dict.fromkeys(("rows", "documents", "ids", "tokens", "bytes"), 0)

    def domain(self, name: str) -> int:
        """The index of a domain; domains are numbered as they come."""
        return self._domains.setdefault(name, len(self._domains))

    def append(self, shard: _Shard, records: np.ndarray, tokens: int) -> None:
        data = memoryview(records).cast("B")
        self.file.write(data)
        self._digest.update(data)
        added = {
            "rows": len(records),
            "documents": len(shard.texts),
            "ids": int(records["length"].sum()),
            "tokens": tokens,
            "bytes": sum(len(text.encode()) for text in shard.texts),
        }
        for name, value in added.items():
            self._counts[name] += value

    def finish(self) -> dict[str, Any]:
        """Closes the file; returns its entry for meta.json."""
        self.file.close()
        self._digest.update(json.dumps(list(self._domains)).encode())
        return self._counts | {"domains": list(self._domains), "fingerprint": self._digest.hexdigest()}


def _write_rows(
    corpus: _Corpus, vocabulary: Vocabulary, directory: Path, seq_len: int, cores: int, shard_documents: int
) -> dict[str, dict[str, Any]]:
    """Writes both splits' files; returns their entries for meta.json."""
    dtype = row_dtype(seq_len, vocabulary.size)
    seed = f"{FORMAT} {vocabulary.fingerprint} {seq_len}"
    pending: deque[tuple[_SplitWriter, _Shard, Future]] = deque()
    bytes_read = 0

    def count(n: int) -> None:
        nonlocal bytes_read
        bytes_read += n

    def work(shard: _Shard) -> tuple[np.ndarray, int]:
        return pack([vocabulary.encode_array(text) for text in shard.texts], shard.domains, vocabulary, dtype)

    with contextlib.ExitStack() as stack:
        pool = ThreadPoolExecutor(cores, thread_name_prefix="rows")
        stack.callback(pool.shutdown, cancel_futures=True)
        bar = stack.enter_context(corpus.bar("rows"))
        writers = {split: _SplitWriter(directory / f"{split}.rows", seed) for split in SPLITS}
        for writer in writers.values():
            stack.enter_context(writer.file)

        def submit(writer: _SplitWriter) -> None:
            shard, writer.shard = writer.shard, _Shard()
            shard.bytes_read = bytes_read
            pending.append((writer, shard, pool.submit(work, shard)))

        def write(at_most: int) -> None:
            while len(pending) > at_most:
                writer, shard, future = pending.popleft()
                writer.append(shard, *future.result())
                bar.update(shard.bytes_read - bar.n)

        for document in corpus.documents(count):
            writer = writers[document.split]
            writer.shard.add(document.text, writer.domain(document.domain))
            if len(writer.shard.texts) >= shard_documents or writer.shard.characters >= _SHARD_CHARACTERS:
                submit(writer)
                write(at_most=2 * cores)
        for writer in writers.values():
            if writer.shard.texts:
                submit(writer)
        write(at_most=0)
        return {split: writer.finish() for split, writer in writers.items()}


def _check_sizes(splits: dict[str, dict], seq_len: int, by_hash: bool, fraction: float) -> None:
    """UserError unless either split fills at least one row."""
    need = seq_len + 1
    if splits["train"]["ids"] < need:
        raise UserError(
            f"the training text is {splits['train']['ids']} tokens, too few for one row of {need}: give more "
            "text or shorten data.seq_len"
        )
    have = splits["validation"]["ids"]
    if have < need:
        ids, documents = (sum(split[count] for split in splits.values()) for count in ("ids", "documents"))
        enough = min(0.5, max(2 * fraction, 4 * need / ids, 5 / documents))  # both expectations well above 1
        cure = f"raise data.validation_fraction (to {enough:.2g}, say), " if by_hash else ""
        raise UserError(
            f"the validation text is {have} tokens, too few for one row of {need}: {cure}give "
            f"data.validation {'' if by_hash else 'more text '}or shorten data.seq_len"
        )


@contextlib.contextmanager
def _scratch(cache_dir: Path) -> Iterator[Path]:
    """A directory to write in, locked while its owner lives and removed at the end unless it was renamed.

    Removes those that a killed process left behind: their lock is free.
    """
    for left in cache_dir.glob(".tmp-*"):
        if (lock := _try_lock(left)) is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)
    while True:
        path = cache_dir / f".tmp-{secrets.token_hex(8)}"
        path.mkdir()
        lock = _try_lock(path)
        if lock is not None and path.exists():  # else another process saw it without its lock and removed it
            break
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _try_lock(directory: Path) -> int | None:
    """A file descriptor that holds the directory's lock, or None if another process has it."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _sync(directory: Path) -> None:
    """Asks the disk to hold all of `directory` before it gets its final name."""
    for path in [*directory.rglob("*"), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _install(scratch: Path, path: Path) -> None:
    """Gives `scratch` its final name, unless another process was first with the same contents."""
    if path.is_symlink() and not path.exists():
        path.unlink()  # what it led to was deleted
    if path.exists():
        try:
            open_rows(path)
            return
        except UserError:
            shutil.rmtree(path, ignore_errors=True)
    try:
        scratch.rename(path)
    except OSError:
        if not path.exists():
            raise

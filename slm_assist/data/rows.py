"""From a corpus to rows on disk, once: `prepare` makes or opens a cache that is keyed by content.

Shards of documents (see shards.py) are tokenized and packed by themselves, so any number of threads or hosts
gives the same bytes, and a row id names the same tokens for ever. A cache directory appears under its final
name only when it is whole:

    meta.json          format, counts, domains, fingerprints
    tokenizer/         the vocabulary
    train.rows         records, see row_store.py
    validation.rows

The cache must be on a disk (rows are mapped into memory); sources may be in buckets.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm_assist.data import examples, parts
from slm_assist.data.cache_dir import install, locked, scratch, sync
from slm_assist.data.documents import Source
from slm_assist.data.paths import cache_path
from slm_assist.data.row_store import Rows
from slm_assist.data.shards import FORMAT, SHARD_CHARACTERS, SPLITS, Corpus, Packer, write_rows
from slm_assist.data.tokenizers import SAMPLE_BYTES, Vocabulary, train_vocabulary
from slm_assist.errors import UserError

__all__ = ["Prepared", "Rows", "open_rows", "prepare"]

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
    part: tuple[int, int] | None = None,
    learn: str = "answer",
) -> Prepared | None:
    """Tokenizes a corpus into rows of `seq_len` targets, or opens what an earlier call made of it.

    Args:
      source: the corpus. Where it does not say itself which documents are for validation,
        `validation_fraction` of them are, by a hash of their text, of examples the prompt's (so that copies
        stay on one side).
      vocabulary: the vocabulary to use; None learns one of `vocab_size` pieces from about `sample_bytes` of
        the training documents. Ids need theirs.
      seq_len: T; a row stores T + 1 ids.
      validation_source: takes the place of a split: all of `source` is for training.
      cache_dir: holds one directory for each combination of contents and settings.
      cores: threads; 0 is all cores. The result does not depend on it.
      progress: whether to show bars.
      shard_documents: documents in a shard.
      part: (i, n) makes part i of n and nothing else, see parts.py. Who makes the last one merges them;
        otherwise, once all are there, the next call without `part` does.
      learn: which targets of examples count, see examples.py; of text all do.

    Returns:
      The rows, or None where other parts are missing.

    Raises:
      UserError: the source cannot be read, a split would not fill one row, the disk is full. Nothing is
        left but whole parts.
    """
    by_hash = not (source.splits or validation_source)
    learn = learn if source.examples else None
    _check_arguments(source, validation_source, vocabulary, seq_len, validation_fraction if by_hash else None)
    settings = {
        "format": FORMAT,
        "source": source.fingerprint,
        "validation": validation_source.fingerprint if validation_source else None,
        "validation_fraction": validation_fraction if by_hash else None,
        "seq_len": seq_len,
        "vocabulary": vocabulary.fingerprint if vocabulary else ["bpe", vocab_size, sample_bytes],
        "shard": [shard_documents, SHARD_CHARACTERS],
    } | ({"examples": [examples.FORMAT, learn]} if learn else {})
    cache_dir = cache_path(cache_dir)
    path = cache_dir / _key(settings)
    if (prepared := _open_if_whole(path)) is not None:
        return prepared
    corpus = Corpus(source, validation_source, validation_fraction, progress)

    def packer() -> tuple[Packer, Vocabulary]:
        used = vocabulary or train_vocabulary(corpus.training_texts(), vocab_size, sample_bytes=sample_bytes)
        options = {"cores": cores or os.cpu_count() or 1, "shard_documents": shard_documents, "part": part or (0, 1)}
        return Packer(corpus, used, seq_len, learn=learn, **options), used

    parts_path = path.with_name(f"{path.name}.parts")
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        if part:
            parts.write(parts_path, part, packer, seq_len)
            if not parts.complete(parts_path) and not path.exists():
                return None
        with locked(parts_path), scratch(cache_dir) as temporary:
            if path.exists():  # another process was first meanwhile
                shutil.rmtree(parts_path, ignore_errors=True)
                return open_rows(path)
            if places := parts.complete(parts_path):
                used, splits = parts.merge(places, temporary, seq_len)
            else:
                made, used = packer()
                splits = write_rows(made, temporary, used, seq_len)
            used.save(temporary / "tokenizer")
            _check_sizes(splits, seq_len, by_hash, validation_fraction, learn)
            _write_meta(temporary, source, used, seq_len, splits, learn)
            sync(temporary)
            install(temporary, path)
            shutil.rmtree(parts_path, ignore_errors=True)
        # Who comes back with the vocabulary that was learnt here finds the same rows.
        with contextlib.suppress(FileExistsError):
            (cache_dir / _key(settings | {"vocabulary": used.fingerprint})).symlink_to(path.name)
    except OSError as error:
        raise UserError(
            f"rows cannot be written to {cache_dir} ({error.strerror}); make room or set data.cache_dir"
        ) from error
    return open_rows(path)


def _check_arguments(
    source: Source, validation: Source | None, vocabulary: Vocabulary | None, seq_len: int, fraction: float | None
) -> None:
    if seq_len < 1:
        raise UserError(f"data.seq_len={seq_len}: use at least 1")
    if fraction is not None and not 0 < fraction < 1:
        raise UserError(f"data.validation_fraction={fraction}: use a number between 0 and 1, such as 0.01")
    if validation and validation.examples != source.examples:
        raise UserError(
            f"data.validation={validation.spec}: examples and text do not mix; give both or neither prompts"
        )
    for ids in (s for s in (source, validation) if s and s.pretokenised and not vocabulary):
        raise UserError(f"source {ids.spec}: it holds ids, not text; set data.vocabulary to the vocabulary they are of")


def _write_meta(
    directory: Path,
    source: Source,
    vocabulary: Vocabulary,
    seq_len: int,
    splits: dict[str, dict[str, Any]],
    learn: str | None,
) -> None:
    meta = ({"learn": learn} if learn else {}) | {
        "format": FORMAT,
        "source": source.describe(),
        "seq_len": seq_len,
        "vocabulary": vocabulary.fingerprint,
        "splits": splits,
    }
    (directory / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")


def _open_if_whole(path: Path) -> Prepared | None:
    """The rows at `path`; None if there are none, or damaged ones, which are said and removed."""
    if not path.exists():
        return None
    try:
        return open_rows(path)
    except UserError as error:
        _log.warning("the prepared rows are damaged and are made again: %s", error)
    shutil.rmtree(path.resolve(), ignore_errors=True)
    return None


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
        options = {"seq_len": meta["seq_len"], "vocabulary": vocabulary, "examples": "learn" in meta}
        rows = {split: Rows(path / f"{split}.rows", meta["splits"][split], **options) for split in SPLITS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path / 'meta.json'}: missing or damaged; delete {path}") from error
    return Prepared(path, vocabulary, rows["train"], rows["validation"], meta)


def _check_sizes(splits: dict[str, dict], seq_len: int, by_hash: bool, fraction: float, learn: str | None) -> None:
    """UserError unless either split fills at least one row, or has an example that fits one."""
    need = seq_len + 1
    for split, counts in splits.items():
        if learn is not None and not counts["rows"]:
            use = {"train": "train on", "validation": "validate on"}[split]
            why = examples.left_out(counts) or "give more, raise data.validation_fraction or set data.validation"
            raise UserError(f"no example to {use}: {why}")
    if learn is not None:
        return
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

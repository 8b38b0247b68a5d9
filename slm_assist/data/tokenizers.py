"""Vocabularies: SentencePiece models that lose nothing.

A vocabulary trained here gives back any valid UTF-8 text exactly, `decode(encode(x)) == x`, with one
exception that is SentencePiece's own: U+2581, the mark it uses for a space, comes back as a space. It learns
byte pairs (BPE) without touching the text first (identity normalisation, no added or removed spaces), learns
pieces of spaces alone, and spells what it has not seen in bytes.
"""

import functools
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import sentencepiece

from slm_assist.errors import UserError

MODEL_FILE = "tokenizer.model"
FINGERPRINT_FILE = "fingerprint.json"
SAMPLE_BYTES = 8_000_000
_SPACE = "\u2581"
_PIECE_CHARS = 16_384  # long documents are sampled in pieces of this many characters
_COVERAGE = 0.9995  # of the text, by characters with pieces of their own
_RESERVED = 259  # 256 bytes, unknown, beginning, end
SMALLEST = _RESERVED + 61  # pieces of the smallest vocabulary that is learnt


class Vocabulary:
    """A SentencePiece model: text to ids and back.

    Attributes:
      size: number of pieces.
      bos_id, eos_id: ids that begin and end a document, None where the model has none.
      pad_id: the id that fills rows; never a target, so any will do (the model's own, else 0).
      token_bytes: int32 [size], UTF-8 bytes that each id decodes to; 0 for control pieces.
      fingerprint: hex, over the pieces and how text is normalised; not over how the model was trained.
    """

    def __init__(self, model: bytes, name: str = "vocabulary"):
        """Wraps the bytes of a SentencePiece model; `name` says in errors where they are from."""
        try:
            if not model:
                raise RuntimeError("it is empty")
            processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(f"{name}: not a SentencePiece model, or a damaged one; give another file") from error
        self.model = model
        self._processor = processor
        # Newer releases hand out arrays without passing through Python lists.
        self._encode = getattr(processor, "encode_as_numpy", processor.encode)
        self.size = processor.get_piece_size()
        self.bos_id = processor.bos_id() if processor.bos_id() >= 0 else None
        self.eos_id = processor.eos_id() if processor.eos_id() >= 0 else None
        self.pad_id = max(processor.pad_id(), 0)
        self.fingerprint = _fingerprint(model)

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        return np.array([self._bytes(i) for i in range(self.size)], np.int32)

    def _bytes(self, i: int) -> int:
        p = self._processor
        if p.is_control(i) or p.is_unknown(i) or p.is_unused(i):
            return 0
        return 1 if p.is_byte(i) else len(p.id_to_piece(i).replace(_SPACE, " ").encode())

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without BOS and EOS."""
        return self._processor.encode(text)

    def encode_array(self, text: str) -> np.ndarray:
        """Ids of `text` as an integer array [n]. Safe and parallel in threads: no lock is held meanwhile."""
        return np.asarray(self._encode(text))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; control pieces vanish, broken byte sequences become U+FFFD."""
        return self._processor.decode([int(i) for i in ids])

    def pieces(self) -> list[str]:
        """The pieces in the order of their ids, as SentencePiece writes them (U+2581 is a space)."""
        return [self._processor.id_to_piece(i) for i in range(self.size)]

    def save(self, directory: str | Path) -> None:
        """Writes the model and its fingerprint into `directory`, made if missing."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / MODEL_FILE).write_bytes(self.model)
        (directory / FINGERPRINT_FILE).write_text(json.dumps({"fingerprint": self.fingerprint}) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Vocabulary":
        """Reads a SentencePiece model file, or a directory that `save` wrote.

        Raises:
          UserError: there is no such file, it is no SentencePiece model, or not the one that was saved.
        """
        path = Path(path).expanduser()
        file = path / MODEL_FILE if path.is_dir() else path
        try:
            vocabulary = cls(file.read_bytes(), str(file))
            saved = file.with_name(FINGERPRINT_FILE)
            if path.is_dir() and saved.exists():
                expected = json.loads(saved.read_text())["fingerprint"]
                if expected != vocabulary.fingerprint:
                    raise UserError(f"{file}: not the vocabulary that was saved here ({saved.name} differs)")
        except OSError as error:
            raise UserError(f"{file}: {error.strerror}; give a SentencePiece model file") from error
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise UserError(f"{saved}: damaged; delete it if {file.name} is the right vocabulary") from error
        return vocabulary


def compare(a: Vocabulary, b: Vocabulary) -> str | None:
    """None if ids mean the same in both vocabularies, else where they first differ.

    Pieces are compared, not sizes: two vocabularies of one size are seldom the same.
    """
    for i, (x, y) in enumerate(zip(a.pieces(), b.pieces(), strict=False)):
        if x != y:
            return f"piece {i} is {x!r} in one and {y!r} in the other"
    if a.size != b.size:
        return f"one has {a.size} pieces and the other {b.size}"
    if (a.bos_id, a.eos_id) != (b.bos_id, b.eos_id):
        return f"BOS and EOS are {a.bos_id}, {a.eos_id} in one and {b.bos_id}, {b.eos_id} in the other"
    return None


def train_vocabulary(texts: Iterable[str], size: int, *, sample_bytes: int = SAMPLE_BYTES) -> Vocabulary:
    """Learns a BPE vocabulary of `size` pieces from about `sample_bytes` of `texts`, spread evenly over them.

    The same texts give the same model, byte for byte, on any machine with the same SentencePiece.

    Raises:
      UserError: `size` is too small for an alphabet, or more than the text can fill (says what would do).
    """
    if size < SMALLEST:
        raise UserError(f"data.vocab_size={size}: use at least {SMALLEST} (256 pieces are the bytes)")
    sample = _even_sample(texts, sample_bytes)
    if not sample:
        raise UserError("there is no text to learn a vocabulary from")
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(_known_letters(sample, (size - _RESERVED) // 2)),
            model_writer=out,
            model_type="bpe",
            vocab_size=size,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            byte_fallback=True,
            allow_whitespace_only_pieces=True,
            character_coverage=1.0,
            max_sentence_length=8 * _PIECE_CHARS,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=2,  # written into the model: a fixed number keeps its bytes the same everywhere
            minloglevel=2,
        )
    except RuntimeError as error:
        limit = re.search(r"value <= (\d+)", str(error))
        if not limit:
            raise
        cure = f"use {limit[1]} or less, or more text" if int(limit[1]) >= SMALLEST else "give more text"
        raise UserError(f"data.vocab_size={size} is more than the training text can fill: {cure}") from error
    return Vocabulary(out.getvalue())


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for start in range(0, len(text), _PIECE_CHARS):
            yield text[start : start + _PIECE_CHARS]


def _even_sample(texts: Iterable[str], sample_bytes: int) -> list[str]:
    """Every k-th piece of `texts`, k the least power of two that keeps at most `sample_bytes`. One pass."""
    kept: list[tuple[int, str]] = []
    total, step = 0, 1
    for index, piece in enumerate(_pieces(texts)):
        if index % step:
            continue
        kept.append((index, piece))
        total += len(piece.encode())
        while total > sample_bytes and len(kept) > 1:
            step *= 2
            kept = [(i, p) for i, p in kept if i % step == 0]
            total = sum(len(p.encode()) for _, p in kept)
    return [p for _, p in kept]


def _known_letters(sample: list[str], letters: int) -> list[str]:
    """`sample` without, and cut at, the characters that get no piece of their own; bytes will spell them.

    Those are all beyond the most frequent that make up 99.95 % of the text, and beyond the first `letters`:
    scripts with thousands of characters would not fit a small vocabulary. (SentencePiece has an option for
    the share, with 98 % its least.) U+2585 always goes: SentencePiece skips every sentence that has it.
    """
    characters = np.frombuffer("".join(sample).encode("utf-32-le"), np.uint32)
    counts = np.bincount(characters)
    by_count = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    covered = np.cumsum(counts[by_count]) / len(characters)
    rare = by_count[min(letters, int(np.searchsorted(covered, _COVERAGE)) + 1) :]
    pattern = re.compile("[\u2585" + "".join(re.escape(chr(c)) for c in rare) + "]+")
    return [part for text in sample for part in pattern.split(text) if part]


def _fingerprint(model: bytes) -> str:
    """Hash of all top-level fields of the model's protobuf but number 2, the record of its training."""
    digest = hashlib.blake2b(digest_size=16)
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = model[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(model):
        start = at
        tag = varint()
        if tag & 7 == 2:
            length = varint()
            at += length
        else:
            varint()
        if tag >> 3 != 2:
            digest.update(model[start:at])
    return digest.hexdigest()

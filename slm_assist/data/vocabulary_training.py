"""Learning a vocabulary: byte pairs that lose nothing.

A vocabulary trained here gives back any valid UTF-8 text exactly, `decode(encode(x)) == x`, with one
exception that is SentencePiece's own: U+2581, the mark it uses for a space, comes back as a space. It learns
byte pairs (BPE) without touching the text first (identity normalisation, no added or removed spaces), learns
pieces of spaces alone, and spells what it has not seen in bytes.
"""

import io
import re
from collections.abc import Iterable, Iterator

import numpy as np
import sentencepiece

from slm_assist.errors import UserError

SAMPLE_BYTES = 8_000_000
_PIECE_CHARS = 16_384  # long documents are sampled in pieces of this many characters
_COVERAGE = 0.9995  # of the text, by characters with pieces of their own
_RESERVED = 259  # 256 bytes, unknown, beginning, end
SMALLEST = _RESERVED + 61  # pieces of the smallest vocabulary that is learnt


def train_model(texts: Iterable[str], size: int, *, sample_bytes: int = SAMPLE_BYTES) -> bytes:
    """The SentencePiece model of `size` pieces, learnt from about `sample_bytes` of `texts`, evenly spread.

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
    return out.getvalue()


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

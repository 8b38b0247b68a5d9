"""A SentencePiece model as a tokenizer.json.

The file is written so that the ids are the model's. What the package tokenizers cannot do shows where texts are
compared (tokenizer_files.py); what it does differently in a text of many thousands, `rare_differences` says. Models
that are trained here have neither.
"""

import base64
import struct
from typing import Any, NamedTuple

from slm_assist.data import protobuf
from slm_assist.errors import UserError

_SPACE = "\u2581"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6  # kinds of pieces
_UNIGRAM, _BPE, _CHAR = 1, 2, 4  # kinds of models


class Piece(NamedTuple):
    text: str
    score: float
    kind: int


class Model(NamedTuple):
    """What a model's file says about encoding; fields and defaults are those of sentencepiece_model.proto."""

    pieces: list[Piece]
    kind: int
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool


def parse(model: bytes) -> Model:
    """Reads a SentencePiece model's protobuf."""
    pieces, trainer, normalizer = [], {}, {}
    for number, value, _ in protobuf.fields(model):
        if number == 1:
            said = protobuf.mapping(value)
            (score,) = struct.unpack("<f", said.get(2, bytes(4)))
            pieces.append(Piece(said[1].decode(), score, said.get(3, _NORMAL)))
        elif number == 2:
            trainer |= protobuf.mapping(value)
        elif number == 3:
            normalizer |= protobuf.mapping(value)
    return Model(
        pieces, trainer.get(3, _UNIGRAM), normalizer.get(2, b""), bool(normalizer.get(3, 1)), bool(normalizer.get(4, 1))
    )


def convert(model: bytes, name: str) -> dict[str, Any]:
    """The contents of a tokenizer.json that encodes as a SentencePiece model does; it adds no BOS.

    Raises:
      UserError: a kind of model that such a file cannot express; `name` says in it where the model is from.
    """
    parsed = parse(model)
    if parsed.kind not in (_UNIGRAM, _BPE, _CHAR):
        raise UserError(f"{name}: a SentencePiece model of words has no tokenizer.json; use a BPE or unigram model")
    unigram = parsed.kind == _UNIGRAM
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = {_UNKNOWN: True, _CONTROL: True, _USER_DEFINED: False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": piece.text} | flags | {"special": added[piece.kind]}
            for i, piece in enumerate(parsed.pieces)
            if piece.kind in added
        ],
        "normalizer": _normalizer(parsed),
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": _decoder(parsed),
        "model": _unigram(parsed.pieces) if unigram else _byte_pairs(parsed.pieces, parsed.kind == _BPE),
    }


def rare_differences(model: bytes) -> str:
    """In which texts the package tokenizers is known to differ from such a model; empty if in none."""
    parsed = parse(model)
    where = []
    if parsed.charsmap:
        where.append("where a character that the model normalises (①) stands right before a combining mark")
    if parsed.kind == _UNIGRAM:
        where.append("where two ways to cut a word have the same score")
    return " and ".join(where)


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _normalizer(model: Model) -> dict[str, Any]:
    """SentencePiece's steps in their order: only U+0020 is a space to it, and U+2581 at the end one that goes."""
    steps = []
    if model.charsmap:
        charsmap = base64.b64encode(model.charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if model.remove_extra_whitespaces:
        steps += [_replace({"Regex": r"\A +| +\z"}, ""), _replace({"Regex": " {2,}"}, " ")]
    if model.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": _SPACE})
    steps.append(_replace({"String": " "}, _SPACE))
    if model.remove_extra_whitespaces:
        steps.append(_replace({"Regex": _SPACE + r"+\z"}, ""))
    return {"type": "Sequence", "normalizers": steps}


def _decoder(model: Model) -> dict[str, Any]:
    steps = [_replace({"String": _SPACE}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    if model.add_dummy_prefix or model.remove_extra_whitespaces:
        most = 2**31 if model.remove_extra_whitespaces else 1  # of the spaces in front
        steps.append({"type": "Strip", "content": " ", "start": most, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _byte_pairs(pieces: list[Piece], merging: bool) -> dict[str, Any]:
    """SentencePiece merges any two neighbours that make a piece, that of the highest score first."""
    texts = {p.text for p in pieces if p.kind not in (_UNKNOWN, _CONTROL, _BYTE)}
    merges = []
    # The scores of a trained model all differ; sorting keeps the order of ids among equals.
    for piece in sorted(pieces, key=lambda p: -p.score) if merging else []:
        if piece.text in texts and piece.kind != _USER_DEFINED:
            cuts = [(piece.text[:i], piece.text[i:]) for i in range(1, len(piece.text))]
            merges += [[left, right] for left, right in cuts if left in texts and right in texts]
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": next(p.text for p in pieces if p.kind == _UNKNOWN),
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": any(p.kind == _BYTE for p in pieces),
        "ignore_merges": False,
        "vocab": {p.text: i for i, p in enumerate(pieces)},
        "merges": merges,
    }


def _unigram(pieces: list[Piece]) -> dict[str, Any]:
    """Pieces that no text consists of, bytes above all, get a score that no path takes: there they are all alike."""
    never = min(p.score for p in pieces) - 1000
    in_text = (_NORMAL, _USER_DEFINED)
    return {
        "type": "Unigram",
        "unk_id": next(i for i, p in enumerate(pieces) if p.kind == _UNKNOWN),
        "vocab": [[p.text, p.score if p.kind in in_text else never] for p in pieces],
        "byte_fallback": any(p.kind == _BYTE for p in pieces),
    }

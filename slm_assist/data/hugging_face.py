"""Hugging Face's tokenizer.json as the inside of a `Vocabulary` (see tokenizers.py for what each attribute means).

What a tokenizer.json does to a text is its own affair; it need not give the text back exactly. Three things of
it are left out, so that a text has one encoding whatever its length: truncation, padding and BPE dropout.

BOS and EOS are found by name, among the tokens the file declares special: BOS is <s>, <bos> or
<|begin_of_text|>; EOS is </s>, <eos>, <|end_of_text|> or <|endoftext|>; the first that is there. <|endoftext|>
is never taken for BOS too (it would stand twice between documents), and [CLS] and [SEP], which frame BERT's
inputs, for neither. A text that spells a special token is encoded as any other text, not as that token.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from slm_assist.errors import UserError

BOS_NAMES = ("<s>", "<bos>", "<|begin_of_text|>")
EOS_NAMES = ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>")
PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>")
_SPACE = "\u2581"
_BYTE = re.compile("<0x[0-9A-F]{2}>")


class HuggingFaceModel:
    """The bytes of a tokenizer.json, and what they say."""

    file_name = "tokenizer.json"

    def __init__(self, model: bytes, name: str):
        """Raises `UserError` where the bytes are no tokenizer.json; `name` says where they are from."""
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise UserError(f"{name}: reading a tokenizer.json needs tokenizers: pip install tokenizers") from error
        self.model = model
        try:
            self._json = without_chance(json.loads(model))
            self._tokenizer = Tokenizer.from_str(json.dumps(self._json))
            ids = self._tokenizer.get_vocab(with_added_tokens=True)
            if not ids:
                raise ValueError("it has no tokens")
        except Exception as error:  # the package raises plain exceptions
            raise UserError(
                f"{name}: not a tokenizer.json of the tokenizers package, or a damaged one; give another file"
            ) from error
        self._tokenizer.encode_special_tokens = True
        self._added = self._tokenizer.get_added_tokens_decoder()
        self.size: int = max(ids.values()) + 1  # ids may have gaps
        special = {token.content: i for i, token in self._added.items() if token.special}
        self.bos_id = _first(BOS_NAMES, special)
        self.eos_id = _first(EOS_NAMES, special)
        self.pad_id = _first(PAD_NAMES, special) or 0
        core = self._json["model"]
        self.unk_id = core["unk_id"] if "unk_id" in core else ids.get(core.get("unk_token"))
        framing = [name for name, i in special.items() if i != self.unk_id and len(name) > 1]
        self._special_ids = {special[name] for name in framing}
        insides = [f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})" for name in framing]
        self._inside_special = re.compile("|".join(insides) or "(?!)")  # behind the first letter of each
        self.fingerprint = _fingerprint(self._json)

    def encode(self, text: str) -> list[int]:
        return self._apart(text, self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_array(self, text: str) -> np.ndarray:
        # The batch form works outside the interpreter's lock, the other does not.
        (encoded,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return np.array(self._apart(text, encoded.ids), np.int32)

    def encode_with_spans(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        encoded = self._tokenizer.encode(text, add_special_tokens=False)
        ids, spans = list(encoded.ids), list(encoded.offsets)
        if not self._special_ids.isdisjoint(ids):  # as `_apart`
            ids, spans, at = [], [], 0
            for part in self._inside_special.split(text):
                encoded = self._tokenizer.encode(part, add_special_tokens=False)
                ids += encoded.ids
                spans += [(at + start, at + stop) for start, stop in encoded.offsets]
                at += len(part)
        return np.array(ids, np.int32), np.array(spans, np.int64).reshape(-1, 2)

    def _apart(self, text: str, ids: list[int]) -> list[int]:
        """`ids`, unless the model itself found a special token in the text: then it is spelt in two parts."""
        if self._special_ids.isdisjoint(ids):
            return ids
        parts = self._inside_special.split(text)
        return [i for part in parts for i in self._tokenizer.encode(part, add_special_tokens=False).ids]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def pieces(self) -> list[str]:
        return [self._tokenizer.id_to_token(i) or "" for i in range(self.size)]

    def token_bytes(self) -> list[int]:
        """Bytes of each piece in running text: by the decoder, or else what the piece decodes to by itself."""
        decoders = {step["type"]: step for step in _steps(self._json.get("decoder"))}
        metaspace = "Metaspace" in decoders or any(
            step["type"] == "Replace" and step.get("pattern") == {"String": _SPACE} for step in decoders.values()
        )
        letters = set()
        if "ByteLevel" in decoders:
            from tokenizers import pre_tokenizers

            letters = set(pre_tokenizers.ByteLevel.alphabet())

        def count(i: int, piece: str) -> int:
            if i in self._added and (self._added[i].special or "ByteLevel" in decoders):
                return 0 if self._added[i].special else len(piece.encode())
            if "ByteLevel" in decoders:  # each letter stands for a byte
                return len(piece) if letters.issuperset(piece) else len(piece.encode())
            if "ByteFallback" in decoders and _BYTE.fullmatch(piece):
                return 1
            if metaspace:
                return len(piece.replace(_SPACE, " ").encode())
            return len(self.decode([i]).encode()) if piece else 0

        return [count(i, piece) for i, piece in enumerate(self.pieces())]


def _first(names: tuple[str, ...], special: dict[str, int]) -> int | None:
    return next((special[name] for name in names if name in special), None)


def _steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A decoder's parts, those of sequences in sequences too."""
    if not decoder:
        return []
    if decoder["type"] == "Sequence":
        return [step for part in decoder["decoders"] for step in _steps(part)]
    return [decoder]


def without_chance(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """The file's contents without truncation, padding and BPE dropout."""
    model = tokenizer["model"] | {"dropout": None} if "dropout" in tokenizer["model"] else tokenizer["model"]
    return tokenizer | {"model": model, "truncation": None, "padding": None}


def _fingerprint(tokenizer: dict[str, Any]) -> str:
    """Hash of the contents, whatever the order of keys and the form of merges ("a b" before tokenizers 0.20)."""
    model = tokenizer["model"]
    if model.get("merges") and isinstance(model["merges"][0], str):
        model = model | {"merges": [merge.split(" ", 1) for merge in model["merges"]]}
    canonical = json.dumps(tokenizer | {"model": model}, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()


def byte_tokenizer() -> bytes:
    """A tokenizer.json for ByT5's ids (arXiv 2105.13626): padding 0, EOS 1, unknown 2, byte b is b + 3."""
    special = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": [{"id": i, "content": name} | flags for name, i in special.items()],
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": None,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "vocab": special | {letter: byte + 3 for byte, letter in enumerate(_byte_letters())},
                "merges": [],
            },
        }
    ).encode()


def _byte_letters() -> list[str]:
    """GPT-2's letter for each byte: itself where it prints, else the next free one from U+0100."""
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    free = iter(range(0x100, 0x200))
    return [chr(byte if byte in printing else next(free)) for byte in range(256)]

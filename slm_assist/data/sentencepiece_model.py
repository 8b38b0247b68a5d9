"""SentencePiece models as the inside of a `Vocabulary` (see tokenizers.py for what each attribute means)."""

import hashlib
from collections.abc import Iterable

import numpy as np
import sentencepiece

from slm_assist.errors import UserError

_SPACE = "\u2581"


class SentencePieceModel:
    """The bytes of a SentencePiece model, and what they say."""

    file_name = "tokenizer.model"

    def __init__(self, model: bytes, name: str):
        """Raises `UserError` where the bytes are no model; `name` says where they are from."""
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
        self.size: int = processor.get_piece_size()
        self.bos_id = _known(processor.bos_id())
        self.eos_id = _known(processor.eos_id())
        self.unk_id = _known(processor.unk_id())
        self.pad_id = max(processor.pad_id(), 0)
        self.fingerprint = _fingerprint(model)

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def encode_array(self, text: str) -> np.ndarray:
        return np.asarray(self._encode(text))

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode([int(i) for i in ids])

    def pieces(self) -> list[str]:
        return [self._processor.id_to_piece(i) for i in range(self.size)]

    def token_bytes(self) -> list[int]:
        return [self._bytes(i) for i in range(self.size)]

    def _bytes(self, i: int) -> int:
        p = self._processor
        if p.is_control(i) or p.is_unknown(i) or p.is_unused(i):
            return 0
        return 1 if p.is_byte(i) else len(p.id_to_piece(i).replace(_SPACE, " ").encode())


def _known(i: int) -> int | None:
    return i if i >= 0 else None


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

"""SentencePiece models as the inside of a `Vocabulary` (see tokenizers.py for what each attribute means)."""

import hashlib
from collections.abc import Iterable

import numpy as np
import sentencepiece

from slm_assist.data import protobuf
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

    def encode_with_spans(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        pieces = _pieces(self._processor.encode(text, out_type="serialized_proto"))
        found = np.array(pieces, np.int64).reshape(-1, 3)
        # Characters that begin before each byte of the text.
        is_first = (np.frombuffer(text.encode(), np.uint8) & 0xC0) != 0x80
        return found[:, 0], np.append(0, np.cumsum(is_first))[found[:, 1:]]

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


def _pieces(message: bytes) -> list[tuple[int, int, int]]:
    """(id, first byte, end byte in the text) of each piece of a serialised SentencePieceText: its fields 2, of which
    2, 4 and 5 say that. (Objects of 0.2.1 are gone in 0.2.2.)"""
    pieces = []
    for field in protobuf.fields(message):
        if field.number == 2:
            said = protobuf.mapping(field.value)
            pieces.append((said.get(2, 0), said.get(4, 0), said.get(5, 0)))
    return pieces


def _fingerprint(model: bytes) -> str:
    """Hash of all top-level fields of the model's protobuf but number 2, the record of its training."""
    digest = hashlib.blake2b(digest_size=16)
    for field in protobuf.fields(model):
        if field.number != 2:
            digest.update(field.raw)
    return digest.hexdigest()

"""Vocabularies: from text to ids and back, whoever made them.

SentencePiece models (sentencepiece_model.py) and Hugging Face's tokenizer.json (hugging_face.py, which says how
BOS and EOS are found) serve alike; `train_vocabulary` learns one of the former. Behind its pieces a vocabulary
may have *sentinels*, ids that no text encodes to: they stand for corrupted spans (objectives.py).
"""

import functools
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from slm_assist.data.hugging_face import HuggingFaceModel
from slm_assist.data.paths import is_remote, remote
from slm_assist.data.sentencepiece_model import SentencePieceModel
from slm_assist.data.vocabulary_training import SAMPLE_BYTES, train_model
from slm_assist.errors import UserError

MODEL_FILE = SentencePieceModel.file_name
FINGERPRINT_FILE = "fingerprint.json"


class Vocabulary:
    """Text to ids and back.

    Attributes:
      size: number of ids, sentinels included.
      bos_id, eos_id: ids that begin and end a document, None where there are none.
      unk_id: the id of what has no pieces, None where there is none.
      pad_id: the id that fills rows; never a target, so any will do (the vocabulary's own, else 0).
      sentinel_ids: int32 [n], the id of sentinel 0, of sentinel 1, ...
      token_bytes: int32 [size], UTF-8 bytes that each id decodes to; 0 for control pieces and sentinels.
      fingerprint: hex, over the pieces and how text is normalised; not over how the model was trained.
      model: the bytes of its file.
    """

    def __init__(self, model: bytes, name: str = "vocabulary"):
        """Wraps the bytes of a SentencePiece model or a tokenizer.json; `name` says in errors where they are from.

        Raises:
          UserError: they are neither; or the package tokenizers is missing.
        """
        is_json = name.endswith(".json") or model.lstrip()[:1] == b"{"
        self._inside = (HuggingFaceModel if is_json else SentencePieceModel)(model, name)
        self.model = model
        self.bos_id, self.eos_id = self._inside.bos_id, self._inside.eos_id
        self.unk_id, self.pad_id = self._inside.unk_id, self._inside.pad_id
        self._ends: dict[str, int | None] = {}
        self._set_sentinels(0, descending=False)

    def _set_sentinels(self, n: int, descending: bool) -> None:
        base = self._inside.size
        ids = np.arange(base, base + n, dtype=np.int32)
        self.size = base + n
        self.sentinel_ids = ids[::-1] if descending else ids
        self._sentinels = {"sentinels": n, "descending": descending} if n else {}
        self._set_fingerprint()

    def _set_fingerprint(self) -> None:
        self.fingerprint = self._inside.fingerprint
        if self._sentinels or self._ends:  # with neither it is what it was before there were any
            said = f"{self.fingerprint} {json.dumps(self._sentinels | self._ends, sort_keys=True)}"
            self.fingerprint = hashlib.blake2b(said.encode(), digest_size=16).hexdigest()

    def with_sentinels(self, n: int, *, descending: bool = False) -> "Vocabulary":
        """This vocabulary with exactly `n` sentinels, instead of those it has.

        Args:
          n: how many; their ids follow those of the pieces.
          descending: sentinel 0 has the last id and not the first behind the pieces, as T5 counts.

        Raises:
          UserError: `n` is negative.
        """
        if n < 0:
            raise UserError(f"data.sentinels={n}: must be at least 0")
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.__dict__.pop("token_bytes", None)
        other._set_sentinels(n, descending and n > 0)
        return other

    def with_ends(self, bos_id: int | None, eos_id: int | None) -> "Vocabulary":
        """This vocabulary with these ids for BOS and EOS, None for none, whatever its file calls them.

        Raises:
          UserError: there is no such id.
        """
        for key, i in (("bos_id", bos_id), ("eos_id", eos_id)):
            if i is not None and not 0 <= i < self._inside.size:
                raise UserError(f"{key}={i}: the vocabulary has the ids 0 to {self._inside.size - 1}")
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.bos_id, other.eos_id = bos_id, eos_id
        own = (bos_id, eos_id) == (self._inside.bos_id, self._inside.eos_id)
        other._ends = {} if own else {"bos_id": bos_id, "eos_id": eos_id}
        other._set_fingerprint()
        return other

    @property
    def file_name(self) -> str:
        """What `save` calls the file: tokenizer.model (SentencePiece) or tokenizer.json."""
        return self._inside.file_name

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        return np.array(self._inside.token_bytes() + [0] * len(self.sentinel_ids), np.int32)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without BOS and EOS."""
        return self._inside.encode(text)

    def encode_array(self, text: str) -> np.ndarray:
        """Ids of `text` as an integer array [n]. Safe and parallel in threads: no lock is held meanwhile."""
        return self._inside.encode_array(text)

    def encode_with_spans(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """`encode_array(text)`, and which characters of `text` each id stands for.

        Returns:
          ids: int [n]; spans: int64 [n, 2], from and up to, not with, which character. A span is empty where an id
            is a byte of a character that a later id ends, or where it stands for nothing in the text.
        """
        return self._inside.encode_with_spans(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; control pieces and sentinels vanish, broken byte sequences become U+FFFD."""
        return self._inside.decode(i for i in ids if not self._inside.size <= i < self.size)

    def pieces(self) -> list[str]:
        """The pieces in the order of their ids, as their file writes them, then <extra_id_0> and so on."""
        names = {int(i): f"<extra_id_{n}>" for n, i in enumerate(self.sentinel_ids)}
        return self._inside.pieces() + [names[i] for i in sorted(names)]

    def save(self, directory: str | Path) -> None:
        """Writes the model and its fingerprint, with its sentinels and ends, into `directory`, made if missing."""
        directory = _path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        facts = {"fingerprint": self.fingerprint} | self._sentinels | self._ends
        _write(directory / self.file_name, self.model)
        _write(directory / FINGERPRINT_FILE, (json.dumps(facts) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> "Vocabulary":
        """Reads a SentencePiece model, a tokenizer.json, or a directory that `save` wrote (or that has either).

        A file has no sentinels, a saved directory has those it was saved with.

        Raises:
          UserError: there is no such file, it is no vocabulary, or not the one that was saved.
        """
        path = _path(path)
        is_directory = path.is_dir()
        file = _file_in(path) if is_directory else path
        saved = file.with_name(FINGERPRINT_FILE)
        try:
            vocabulary = cls(file.read_bytes(), str(file))
            if is_directory and saved.exists():
                facts = json.loads(saved.read_text())
                vocabulary = vocabulary._with_saved(facts)
                if facts["fingerprint"] != vocabulary.fingerprint:
                    raise UserError(f"{file}: not the vocabulary that was saved here ({saved.name} differs)")
        except OSError as error:
            said = error.strerror or error
            raise UserError(f"{file}: {said}; give a SentencePiece model or a tokenizer.json") from error
        except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise UserError(f"{saved}: damaged; delete it if {file.name} is the right vocabulary") from error
        return vocabulary

    def _with_saved(self, facts: dict[str, Any]) -> "Vocabulary":
        n = facts.get("sentinels", 0)
        if not isinstance(n, int) or n < 0:
            raise TypeError
        other = self.with_sentinels(n, descending=facts.get("descending", False)) if n else self
        return other.with_ends(facts["bos_id"], facts["eos_id"]) if "bos_id" in facts else other


def _path(path: str | Path) -> Any:
    """A path here, or one of etils.epath where it leads off this machine (gs://)."""
    return remote(str(path)) if is_remote(path) else Path(path).expanduser()


def _file_in(directory: Any) -> Any:
    """The vocabulary's file in a directory; of two, the SentencePiece model."""
    model, tokenizer = (directory / kind.file_name for kind in (SentencePieceModel, HuggingFaceModel))
    return tokenizer if tokenizer.exists() and not model.exists() else model


def _write(path: Any, content: bytes) -> None:
    """The whole file or none of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)


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

    The same texts give the same model, byte for byte, on any machine with the same SentencePiece. It loses
    nothing of a text (see vocabulary_training.py).

    Raises:
      UserError: `size` is too small for an alphabet, or more than the text can fill (says what would do).
    """
    return Vocabulary(train_model(texts, size, sample_bytes=sample_bytes))

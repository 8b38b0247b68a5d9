"""Our vocabularies as seqio's, and seqio's as ours. Loads seqio, and with it TensorFlow, when it is called.

seqio pads with id 0. SentencePiece models have a control or unknown piece there; in a tokenizer.json it may be an
ordinary token, which seqio's feature converters then give no loss: a warning says so.
"""

import contextlib
import functools
import logging
from typing import Any

import numpy as np

from slm_assist.data.hugging_face import byte_tokenizer
from slm_assist.data.tokenizers import Vocabulary
from slm_assist.errors import UserError

_log = logging.getLogger(__name__)


def _load() -> tuple[Any, Any]:
    """The modules seqio and tensorflow, the latter told to leave GPUs alone."""
    try:
        import tensorflow as tf

        with contextlib.suppress(RuntimeError):  # already in use: whoever did that has decided
            tf.config.set_visible_devices([], "GPU")
        import seqio
    except ImportError as error:
        raise UserError(f"a seqio vocabulary needs {error.name or error}: pip install seqio") from error
    except Exception as error:  # protobuf has an exception of its own for code that is newer than itself
        reason = str(error).split(". ")[0].splitlines()[0]
        raise UserError(f"seqio cannot be imported ({reason}): pip install 'sentencepiece<0.2.3'") from error
    return seqio, tf


def seqio_vocabulary(vocabulary: Vocabulary) -> Any:
    """A `seqio.Vocabulary` with the ids of `vocabulary`, for the features of seqio Tasks.

    Its extra ids are the sentinels. (T5's preprocessors take the last id for the first sentinel whatever the
    ids are called; for ours to agree, make them with `with_sentinels(n, descending=True)`.) Two of them are equal
    if their fingerprints are. As a graph operation it runs Python, so it stays on the host it was made on.

    Raises:
      UserError: seqio is missing.
    """
    if vocabulary.token_bytes[0]:
        _log.warning(
            "id 0 of this vocabulary is the token %r, which seqio takes for padding: it gets no loss from seqio's "
            "feature converters",
            vocabulary.pieces()[0],
        )
    return _class()(vocabulary)


@functools.cache
def _class() -> type:
    seqio, tf = _load()

    class OurVocabulary(seqio.Vocabulary):
        """See `seqio_vocabulary`; `vocabulary` is ours."""

        def __init__(self, vocabulary: Vocabulary):
            super().__init__(extra_ids=len(vocabulary.sentinel_ids))
            self.vocabulary = vocabulary

        @property
        def bos_id(self) -> int | None:
            return self.vocabulary.bos_id

        @property
        def eos_id(self) -> int | None:
            return self.vocabulary.eos_id

        @property
        def unk_id(self) -> int | None:
            return self.vocabulary.unk_id

        @property
        def _base_vocab_size(self) -> int:
            return self.vocabulary.size - len(self.vocabulary.sentinel_ids)

        def _encode(self, s: str) -> list[int]:
            return self.vocabulary.encode(s)

        def _decode(self, ids: Any) -> str:
            padding = {self.pad_id} if not self.vocabulary.token_bytes[self.pad_id] else set()
            return self.vocabulary.decode(i for i in map(int, ids) if i not in padding)

        def _encode_tf(self, s: Any) -> Any:
            def encode(text: Any) -> np.ndarray:  # bytes in a graph, an array of no dimensions outside of one
                return self.vocabulary.encode_array(np.asarray(text, object).item().decode()).astype(np.int32)

            ids = tf.numpy_function(encode, [s], tf.int32, stateful=False)
            ids.set_shape([None])
            return ids

        def _decode_tf(self, ids: Any) -> Any:
            def decode(array: np.ndarray) -> np.ndarray:
                rows = array.reshape(int(np.prod(array.shape[:-1])), array.shape[-1])
                return np.array([self.decode(row).encode() for row in rows.tolist()], object).reshape(array.shape[:-1])

            texts = tf.numpy_function(decode, [ids], tf.string, stateful=False)
            texts.set_shape(ids.shape[:-1])
            return texts

        def __eq__(self, other: object) -> bool:
            return isinstance(other, OurVocabulary) and self.vocabulary.fingerprint == other.vocabulary.fingerprint

        def __hash__(self) -> int:
            return hash(self.vocabulary.fingerprint)

        def __str__(self) -> str:
            return f"seqio_vocabulary({self.vocabulary.fingerprint}, size={self.vocab_size})"

    return OurVocabulary


def from_seqio(vocabulary: Any) -> Vocabulary:
    """Ours with the ids of a `seqio.SentencePieceVocabulary` or `seqio.ByteVocabulary`, or of `seqio_vocabulary`.

    Its extra ids become sentinels with their ids: seqio names them <extra_id_0>, ... from the last id downwards
    (unless `reverse_extra_ids=False`; bytes upwards, but T5's preprocessors take the last one first there too),
    so sentinel 0 is the last id. Unlike there, a text that spells <extra_id_0> is encoded as any other text.

    Raises:
      UserError: another kind of vocabulary, or a SentencePiece model that is changed on the way or not there.
    """
    seqio, tf = _load()
    if isinstance(vocabulary, _class()):
        return vocabulary.vocabulary
    if isinstance(vocabulary, seqio.ByteVocabulary):
        return Vocabulary(byte_tokenizer(), "byte vocabulary").with_sentinels(vocabulary.extra_ids, descending=True)
    if not isinstance(vocabulary, seqio.SentencePieceVocabulary):
        raise UserError(
            f"a seqio vocabulary of class {type(vocabulary).__name__} has no counterpart here; give the Task's feature "
            "a SentencePieceVocabulary, a ByteVocabulary or seqio_vocabulary(ours)"
        )
    file = vocabulary.sentencepiece_model_file
    if vocabulary._normalizer_spec_overrides:
        raise UserError(f"{file}: a seqio vocabulary with normalizer_spec_overrides; put them into the model itself")
    try:
        with tf.io.gfile.GFile(file, "rb") as opened:
            model = opened.read()
    except tf.errors.OpError as error:
        raise UserError(f"{file}: the SentencePiece model of a seqio vocabulary cannot be read: {error}") from error
    return Vocabulary(model, str(file)).with_sentinels(vocabulary.extra_ids, descending=vocabulary._reverse_extra_ids)

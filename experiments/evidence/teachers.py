"""A 5-gram that has read as much text as the small LM, and none of it the student's.

`slm_assist.assist.ngram:five_gram` is counted on the training rows, so it knows their next tokens nearly by heart.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import corpus
import jax
import numpy as np

from slm_assist.assist import ngram
from slm_assist.data.tokenizers import Vocabulary

reads: dict[str, Any] = {"folder": "", "tokens": 0}  # the corpus, and how much of its part `other`; work.py sets them


class OtherRows:
    """Documents of the part `other`, in its order, as `ngram.count` reads rows."""

    def __init__(self, folder: str, vocabulary: Vocabulary, tokens: int):
        self.folder, self.vocabulary, self.tokens = folder, vocabulary, tokens

    def all_ids(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        left = self.tokens
        ends = [[] if end is None else [end] for end in (self.vocabulary.bos_id, self.vocabulary.eos_id)]
        for _, _, text in corpus.documents(Path(self.folder), corpus.OTHER):
            if left <= 0:
                return
            ids = np.array([*ends[0], *self.vocabulary.encode(text), *ends[1]], np.int32)[:left]
            starts = np.zeros(len(ids), bool)
            starts[:1] = True
            left -= len(ids)
            yield ids, starts


def five_gram_of_others(tokens: jax.Array, batch: dict[str, jax.Array], params: dict[str, Any]) -> tuple:
    """As `ngram.five_gram`, of other text."""
    return ngram.five_gram(tokens, batch, params)


five_gram_of_others.prepare = lambda rows, vocabulary: ngram.count(
    OtherRows(reads["folder"], vocabulary, reads["tokens"]), vocabulary, 5
)

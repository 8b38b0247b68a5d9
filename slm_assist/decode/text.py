"""The text of a row while its tokens come: whole characters only, cut before a stop string."""

import os
from collections.abc import Callable, Sequence

from slm_assist.data.tokenizers import Vocabulary

BROKEN = "\N{REPLACEMENT CHARACTER}"
CONTEXT = 16  # tokens of the prompt that are decoded along: a first piece alone would lose its space


class Text:
    """What follows one prompt.

    Attributes:
      ids: the new tokens; with a stop string, up to the one that completes it.
      stopped: whether a stop string has come.
    """

    def __init__(
        self, vocabulary: Vocabulary, prompt: Sequence[int], stop: Sequence[str], emit: Callable[[str], None] | None
    ):
        self.ids: list[int] = []
        self.stopped = False
        self._vocabulary, self._stop, self._emit = vocabulary, [word for word in stop if word], emit
        self._context = list(prompt[-CONTEXT:])
        self._before = self._decode([]).rstrip(BROKEN)
        self._emitted = 0

    @property
    def text(self) -> str:
        """The text so far, cut before the first stop string."""
        text = self._after(self.ids)
        starts = [text.find(word) for word in self._stop if word in text]
        return text[: min(starts)] if starts else text

    def add(self, ids: Sequence[int]) -> None:
        """Takes the next tokens; those behind a stop string are left out."""
        before, self.ids = len(self.ids), [*self.ids, *ids]
        if self._stop and self._stops_at(len(self.ids)):
            # Token by token, so that the result does not depend on how many came at a time.
            end = next(end for end in range(before + 1, len(self.ids) + 1) if self._stops_at(end))
            self.ids, self.stopped = self.ids[:end], True
        elif self._emit:
            self._say(self._settled(self._after(self.ids)))

    def finish(self) -> None:
        """Emits what was held back; there will be no more tokens."""
        if self._emit:
            self._say(self.text)

    def _stops_at(self, end: int) -> bool:
        text = self._after(self.ids[:end])
        return any(word in text for word in self._stop)

    def _settled(self, text: str) -> str:
        """Without the end that may still become another character, or a stop string."""
        text = text.rstrip(BROKEN)
        sizes = ((word, size) for word in self._stop for size in range(1, len(word)))
        begun = [size for word, size in sizes if text.endswith(word[:size])]
        return text[: len(text) - max(begun, default=0)]

    def _say(self, text: str) -> None:
        piece = text[self._emitted :]
        if piece:
            self._emitted = len(text)
            self._emit(piece)

    def _after(self, ids: Sequence[int]) -> str:
        text = self._decode(ids)
        return text[len(os.path.commonprefix([self._before, text])) :]

    def _decode(self, ids: Sequence[int]) -> str:
        """A model may have more ids than its vocabulary; those have no text."""
        return self._vocabulary.decode(i for i in (*self._context, *ids) if i < self._vocabulary.size)

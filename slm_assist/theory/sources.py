"""Sources of rows whose conditional law d(. | context) is known exactly, and with it every expectation.

A row is a context c_1 and T tokens: x_t ~ d(. | c_t), c_{t+1} = follow(c_t, x_t). Contexts are numbered 0 .. C - 1; an
order-k Markov source over V symbols has C = V^k, and sources whose contexts never meet (documents of different kinds)
are blocks of one larger source. All arrays are float64.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from slm_assist.errors import UserError


class Rows(NamedTuple):
    """Rows drawn from a source: `context_NxT` and the tokens that followed them, `token_NxT`, both int."""

    context_NxT: np.ndarray
    token_NxT: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """A law of rows.

    Attributes:
      law_CxV: d(v | c), each row sums to 1; all entries positive, so that log d is bounded.
      follow_CxV: int, the context after token v in context c.
      start_C: the law of the first context.
      length: T, tokens a row.
      bucket_C: int, which bucket each context belongs to.
      buckets: names of the buckets.

    Raises:
      UserError: a law that is not one, or shapes that do not fit.
    """

    law_CxV: np.ndarray
    follow_CxV: np.ndarray
    start_C: np.ndarray
    length: int
    bucket_C: np.ndarray
    buckets: tuple[str, ...] = ("all",)

    def __post_init__(self):
        check_law("law_CxV", self.law_CxV)
        check_law("start_C", self.start_C, positive=False)
        contexts = len(self.law_CxV)
        if self.follow_CxV.shape != self.law_CxV.shape or not len(self.start_C) == len(self.bucket_C) == contexts:
            raise UserError(f"a source of {contexts} contexts: law, follow, start and bucket do not have as many")
        if self.follow_CxV.min() < 0 or self.follow_CxV.max() >= contexts:
            raise UserError(f"follow_CxV: contexts are numbered 0 to {contexts - 1}")
        if self.length < 1:
            raise UserError(f"length={self.length}: a row has at least one token")
        if self.bucket_C.min() < 0 or self.bucket_C.max() >= len(self.buckets):
            raise UserError(f"bucket_C: {len(self.buckets)} buckets are numbered 0 to {len(self.buckets) - 1}")

    @property
    def vocab(self) -> int:
        return self.law_CxV.shape[1]

    @functools.cached_property
    def position_TxC(self) -> np.ndarray:
        """The exact law of the context at each position of a row."""
        law, out = self.start_C, np.empty((self.length, len(self.start_C)))
        for t in range(self.length):
            out[t] = law
            law = np.bincount(self.follow_CxV.ravel(), (law[:, None] * self.law_CxV).ravel(), minlength=len(law))
        return out

    @functools.cached_property
    def occupation_C(self) -> np.ndarray:
        """The mean of `position_TxC` over positions: the law of the context of a token of the corpus."""
        return self.position_TxC.mean(axis=0)

    def with_length(self, length: int) -> "Source":
        """The same source with rows of `length` tokens."""
        return dataclasses.replace(self, length=length)

    def sample(self, rows: int, seed: int | np.random.Generator) -> Rows:
        """`rows` independent rows; the same seed gives the same rows."""
        rng = np.random.default_rng(seed)
        cumulative = np.cumsum(self.law_CxV, axis=1)[:, :-1]  # the last symbol takes what rounding leaves
        start = np.cumsum(self.start_C)[:-1]
        context, token = np.empty((rows, self.length), np.int32), np.empty((rows, self.length), np.int32)
        now = np.searchsorted(start, rng.random(rows), side="right")
        for t in range(self.length):
            context[:, t] = now
            token[:, t] = (rng.random(rows)[:, None] >= cumulative[now]).sum(axis=1)
            now = self.follow_CxV[now, token[:, t]]
        return Rows(context, token)

    def counts(self, rows: Rows) -> np.ndarray:
        """How often each token followed each context in each row, float64 [N, C, V]."""
        n, (contexts, vocab) = len(rows.token_NxT), self.law_CxV.shape
        pair = rows.context_NxT.astype(np.int64) * vocab + rows.token_NxT
        pair += np.arange(n)[:, None] * (contexts * vocab)
        return np.bincount(pair.ravel(), minlength=n * contexts * vocab).reshape(n, contexts, vocab).astype(float)


def check_law(name: str, law: np.ndarray, positive: bool = True) -> None:
    """Raises `UserError` unless the last axis of `law` sums to 1 and has no entry that is (0 or) negative."""
    low = law.min()
    if not np.allclose(law.sum(axis=-1), 1.0, rtol=0, atol=1e-9) or low < 0 or (positive and low <= 0):
        raise UserError(f"{name}: probabilities are {'positive' if positive else 'not negative'} and sum to 1")


def random_law(
    contexts: int, vocab: int, *, sharpness: float | np.ndarray = 1.0, floor: float = 0.01, seed: int = 0
) -> np.ndarray:
    """floor + (1 - V floor) softmax(sharpness * normal), [C, V]: no probability is below `floor`.

    Args:
      sharpness: a number or one a context; 0 is uniform, 3 and more is nearly certain of one symbol.

    Raises:
      UserError: `floor` is not in (0, 1/V).
    """
    if not 0 < floor * vocab < 1:
        raise UserError(f"floor={floor}: with {vocab} symbols it must be above 0 and below {1 / vocab:g}")
    z = np.random.default_rng(seed).normal(size=(contexts, vocab)) * np.reshape(sharpness, (-1, 1))
    p = np.exp(z - z.max(axis=1, keepdims=True))
    return floor + (1 - vocab * floor) * p / p.sum(axis=1, keepdims=True)


def markov(law_CxV: np.ndarray, *, length: int, order: int = 1, bucket_C: np.ndarray | None = None,
           buckets: Sequence[str] = ("all",)) -> Source:  # fmt: skip
    """An order-k Markov source that starts in its stationary law, so that all positions are alike.

    Args:
      law_CxV: C = V^order; context c is the number whose digits in base V are the last `order` tokens, oldest first.

    Raises:
      UserError: the law has not V^order rows.
    """
    contexts, vocab = law_CxV.shape
    if contexts != vocab**order:
        raise UserError(f"an order-{order} source over {vocab} symbols has {vocab**order} contexts, not {contexts}")
    follow = (np.arange(contexts)[:, None] * vocab + np.arange(vocab)) % contexts
    bucket = np.zeros(contexts, int) if bucket_C is None else np.asarray(bucket_C)
    return Source(law_CxV, follow, stationary(law_CxV, follow), length, bucket, tuple(buckets))


def stationary(law_CxV: np.ndarray, follow_CxV: np.ndarray) -> np.ndarray:
    """The law of the context that one step does not change, [C]; unique where every context reaches every other."""
    contexts, vocab = law_CxV.shape
    step = np.zeros((contexts, contexts))
    np.add.at(step, (np.repeat(np.arange(contexts), vocab), follow_CxV.ravel()), law_CxV.ravel())
    equations = np.vstack([step.T - np.eye(contexts), np.ones(contexts)])
    law = np.linalg.lstsq(equations, np.append(np.zeros(contexts), 1.0), rcond=None)[0]
    return np.clip(law, 0, None) / np.clip(law, 0, None).sum()


def easy_and_hard(
    vocab: int, *, length: int, easy: float = 3.0, hard: float = 0.7, floor: float = 0.01, seed: int = 0
) -> Source:
    """Order 1; after the first half of the symbols the next token is easy to guess, after the others hard.

    Args:
      easy, hard: sharpness of the law in either bucket, as in `random_law`.
    """
    bucket = (np.arange(vocab) >= vocab // 2).astype(int)
    law = random_law(vocab, vocab, sharpness=np.where(bucket == 0, easy, hard), floor=floor, seed=seed)
    return markov(law, length=length, bucket_C=bucket, buckets=("easy", "hard"))


def mixture(sources: Mapping[str, Source], shares: Sequence[float]) -> Source:
    """Each row is from one of `sources` from its first token to its last: contexts that never meet.

    Buckets are the sources' names. What kind a row is stays decided for its whole length, so the influence of its first
    context does not decay.

    Raises:
      UserError: other shares than sources, or sources of different vocabularies or lengths.
    """
    parts = list(sources.values())
    if len(shares) != len(parts) or len({(s.vocab, s.length) for s in parts}) != 1:
        raise UserError("mixture: one share for each source, and sources of one vocabulary and one length")
    first = np.cumsum([0] + [len(s.law_CxV) for s in parts])
    return Source(
        np.concatenate([s.law_CxV for s in parts]),
        np.concatenate([s.follow_CxV + at for s, at in zip(parts, first, strict=False)]),
        np.concatenate([share * s.start_C for s, share in zip(parts, shares, strict=True)]),
        parts[0].length,
        np.repeat(np.arange(len(parts)), np.diff(first)),
        tuple(sources),
    )

"""Teachers without a network: what is left of soft labels when the teacher knows counts, or nothing.

Each is named as `assist.teacher="slm_assist.assist.ngram:NAME"`:

- `uniform`: every token is as likely as any other. This is label smoothing (arXiv 1512.00567, section 7); w is its
  strength.
- `unigram`: the relative frequencies of the targets of the training rows.
- `five_gram`: the four tokens before, by interpolated absolute discounting (Ney, Essen and Kneser, "On structuring
  probabilistic dependences in stochastic language modelling", Computer Speech and Language 8, 1994). `teacher(3)`,
  in a module of your own, is a trigram.

With c the counts of the training rows, c v a context and the token after it, c' the context without its first token:

    p_k(v|c) = max(c(c v) - D_k, 0) / c(c) + D_k * types(c) / c(c) * p_{k-1}(v|c')
    p_k(v|c) = p_{k-1}(v|c')                                                           if c(c) = 0

where c(c) is the sum of c(c v) over v, types(c) the number of v with c(c v) > 0, p_0 the uniform law, and D_k = n1 /
(n1 + 2 n2) of the numbers of k-grams that occur once and twice (1/2 if none occurs once, so that every token keeps some
probability). Nothing is left out of the counts. What stands before a document's or a row's start is not a context of
what follows it, and the first token of either, which is no target, counts as a context only. Of examples (`data.learn`)
prompts count like answers.

**It has seen the rows that it teaches**, each target among them: on 31 million tokens of prose and code, V = 512,
`five_gram` has 1.05 nats a token on the rows that it was counted on and 2.10 on held-out ones (`unigram`: 5.14 and
5.12). A small LM, which does not know its rows by heart, differs in that too.

**The tables** are a tree of the n-grams. A sequence of n tokens has a number: for n = 1 the token's id, for longer ones
the place among all such sequences in the order of (number of the sequence without its last token, last token). So the
tokens that follow a sequence are neighbours in the next level, and the number of the context of n tokens at position t
is found from that of n - 1 tokens at t - 1 by a binary search among them. The numbers of the contexts are the `hidden`
that the teacher gives; its head adds up the levels.

**Cost.** Memory, on every device: 6 bytes for each different n-gram of 2 to `order` tokens (8 where V > 65536) and 4
for each different context. Finding the contexts: order - 2 searches of log2 V steps a token. The head, for one token:
order multiplications of V floats of 4 bytes, read and written, and for each token that followed one of its contexts 10
bytes read and a float added. With those 31 million tokens, on one core of a busy CPU: tables of 85 MB, counted in 47 to
57 s within 2.3 GB; 12 to 20 ms for the head of 16 x 128 tokens, 0.1 ms for their contexts. The same text at V = 8192,
15 million tokens: 184 MB, 44 s, 210 ms; 1.03 nats a token on the rows counted, 3.86 on held-out ones.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slm_assist.errors import UserError

BLOCK = 32  # successors of one context that are read together


class Level(NamedTuple):
    """The sequences of n tokens, n > 1, by (number of the first n - 1, last token).

    Attributes:
      tokens: last tokens, uint16 or int32 [sequences + 1]; the last entry is no sequence.
      before: int32 [sequences + 1], how many occurrences the sequences before this one have together: differences are
        counts, and also sums of counts.
      start: int32 [sequences of n - 1 tokens + 1]; those that begin with sequence i are start[i] to start[i + 1] - 1.
    """

    tokens: Any
    before: Any
    start: Any


def uniform(tokens_BxT: jax.Array, params: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    """The same probability for all V tokens: hidden states float32 [B, T, 1] and a head [1, V], zeros."""
    return jnp.zeros((*tokens_BxT.shape, 1)), params["head"]


uniform.prepare = lambda rows, vocabulary: {"head": np.zeros((1, vocabulary.size), np.float32)}


def teacher(order: int) -> Callable[..., tuple[jax.Array, Callable[[jax.Array], jax.Array]]]:
    """A teacher that knows the counts of `order` tokens in a row, with its `.prepare`; see the head of this file.

    A function of (tokens [B, T], batch, params) that gives the contexts' numbers, int32 [B, T, max(order - 1, 1)], -1
    where the training rows lack one, and a head from such [N, max(order - 1, 1)] to log-probabilities, float32 [N, V],
    nats. The context of n tokens ends with the position's own token and lies in its segment.

    Args:
      order: tokens of a context and 1, so 1 has no context; it is smoothed by one count of every token, not as above.

    Raises:
      UserError: `order` is no positive integer.
    """
    if not isinstance(order, int) or order < 1:
        raise UserError(f"ngram.teacher({order!r}): give a positive integer, as 5 for contexts of four tokens")

    def ngram(
        tokens: jax.Array, batch: dict[str, jax.Array], params: dict[str, Any]
    ) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
        return contexts(params, tokens, batch["positions"]), jax.tree_util.Partial(log_probabilities, params)

    ngram.prepare = lambda rows, vocabulary: count(rows, vocabulary, order)
    return ngram


# Counting.


def count(rows: Any, vocabulary: Any, order: int) -> dict[str, Any]:
    """The tables of `teacher(order)`, of all rows.

    Args:
      rows: a `data.row_store.Rows`, or what has its `all_ids`.
      vocabulary: its `size` is V.

    Returns:
      unigram: p_1, float32 [V]; discount: D_2 to D_order, float32 [order - 1]; levels: of 2 to `order` tokens.

    Raises:
      UserError: there are 2^31 ids or more, which the tables' integers cannot count.
    """
    ids, starts = map(np.concatenate, zip(*rows.all_ids(), strict=True))
    if len(ids) >= 2**31:
        raise UserError(f"ngram: the training rows have {len(ids):,} tokens; counts go to {2**31 - 1:,}, use fewer")
    levels, discount = [], []
    for level in _levels(ids, starts, vocabulary.size, order):
        levels.append(level)
        discount.append(_discount(np.diff(level.before)))
    count_V = np.bincount(ids[~starts], minlength=vocabulary.size)
    unigram = _add_one(count_V) if order == 1 else _smoothed_by_uniform(count_V)
    return {"unigram": unigram.astype(np.float32), "discount": np.array(discount, np.float32), "levels": levels}


def _levels(ids: np.ndarray, starts: np.ndarray, vocab: int, order: int) -> Iterator[Level]:
    """Those of 2 to `order` tokens.

    Args:
      ids: int32 [n]; starts: bool [n], True where a piece begins; sequences lie within one.
    """
    number, sequences = ids, vocab  # of the sequence of n - 1 tokens that ends at each place, -1: there is none
    for n in range(2, order + 1):
        at = np.flatnonzero((number[:-1] >= 0) & ~starts[1:]) + 1
        pairs = number[at - 1].astype(np.int64) * vocab + ids[at]
        number = np.full(len(ids) if n < order else 0, -1, np.int32)
        if n < order:
            pairs, number[at], counts = np.unique(pairs, return_inverse=True, return_counts=True)
        else:
            pairs, counts = np.unique(pairs, return_counts=True)
        tokens = np.zeros(len(pairs) + 1, np.uint16 if vocab <= 2**16 else np.int32)
        tokens[:-1] = pairs % vocab
        before = np.zeros(len(pairs) + 1, np.int32)
        np.cumsum(counts, out=before[1:])
        yield Level(tokens, before, np.searchsorted(pairs, np.arange(sequences + 1) * vocab).astype(np.int32))
        sequences = len(pairs)


def _discount(counts: np.ndarray) -> float:
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    return once / (once + 2 * twice) if once else 0.5


def _add_one(count_V: np.ndarray) -> np.ndarray:
    return (count_V + 1.0) / (count_V.sum() + len(count_V))


def _smoothed_by_uniform(count_V: np.ndarray) -> np.ndarray:
    """p_1, float64 [V]."""
    total, discount = count_V.sum(), _discount(count_V)
    if not total:
        return np.full(len(count_V), 1 / len(count_V))
    return np.maximum(count_V - discount, 0) / total + discount * (count_V > 0).sum() / total / len(count_V)


# On the device.


def contexts(params: dict[str, Any], tokens_BxT: jax.Array, position_BxT: jax.Array) -> jax.Array:
    """Numbers of the contexts of 1, 2, ... tokens that end at each position, int32 [B, T, max(order - 1, 1)]; -1: none.

    Args:
      params: from `count`.
      position_BxT: how many tokens stand before each in its segment.
    """
    number, found = tokens_BxT, [tokens_BxT]
    for n, level in enumerate(params["levels"][:-1], start=2):
        before = jnp.pad(number[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
        number = _followed_by(level, before, tokens_BxT, len(params["unigram"]))
        number = jnp.where(position_BxT >= n - 1, number, -1)
        found.append(number)
    return jnp.stack(found, axis=-1)


def _followed_by(level: Level, number: jax.Array, token: jax.Array, vocab: int) -> jax.Array:
    """The number of each sequence with `token` behind it, int32; -1 where it is -1 or no such one is known."""
    low = level.start[jnp.maximum(number, 0)]
    end = level.start[jnp.maximum(number, 0) + 1]

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        less, open_ = level.tokens[middle] < token, low < high
        return jnp.where(open_ & less, middle + 1, low), jnp.where(open_ & ~less, middle, high)

    at, _ = jax.lax.fori_loop(0, vocab.bit_length(), halve, (low, end))
    return jnp.where((number >= 0) & (at < end) & (level.tokens[at] == token), at, -1)


def log_probabilities(params: dict[str, Any], context_NxK: jax.Array) -> jax.Array:
    """log p, nats, float32 [N, V], after contexts that `contexts` found.

    Args:
      params: from `count`.
      context_NxK: int32, column n - 1 has the numbers of the contexts of n tokens, -1 where one is unknown.
    """
    p_NxV = jnp.broadcast_to(params["unigram"], (len(context_NxK), len(params["unigram"])))
    for level, discount, number_N in zip(params["levels"], params["discount"], context_NxK.T, strict=False):
        p_NxV = _interpolated(level, discount, number_N, p_NxV)
    return jnp.log(jnp.maximum(p_NxV, jnp.finfo(jnp.float32).tiny))


def _interpolated(level: Level, discount: jax.Array, number_N: jax.Array, p_NxV: jax.Array) -> jax.Array:
    """p_k from p_{k-1}. The successors of all contexts are one list of blocks, of which each turn takes N."""
    known = number_N >= 0
    start, end = (level.start[jnp.where(known, number_N + more, 0)] for more in (0, 1))
    types, total = end - start, level.before[end] - level.before[start]
    total = jnp.maximum(total, 1).astype(jnp.float32)
    p_NxV = p_NxV * jnp.where(types > 0, discount * types / total, 1.0)[:, None]
    blocks = -(-types // BLOCK)
    last = jnp.cumsum(blocks)
    turn, lane = jnp.arange(len(number_N)), jnp.arange(BLOCK)

    def add(state):
        first, p_NxV = state
        row = jnp.searchsorted(last, first + turn, side="right")
        inside = jnp.minimum(row, len(turn) - 1)  # row N: no block is left
        place = ((first + turn - (last - blocks)[inside]) * BLOCK)[:, None] + lane
        exists = (row < len(turn))[:, None] & (place < types[inside][:, None])
        at = jnp.where(exists, start[inside][:, None] + place, 0)
        counts = level.before[at + 1] - level.before[at]
        mass = (counts - discount) / total[inside][:, None]
        # Places outside for what does not exist, each its own: they are dropped.
        row = jnp.where(exists, row[:, None], len(turn) + turn[:, None])
        column = jnp.where(exists, level.tokens[at].astype(jnp.int32), lane)
        return first + len(turn), p_NxV.at[row, column].add(mass, mode="drop", unique_indices=True)

    return jax.lax.while_loop(lambda state: state[0] < last[-1], add, (0, p_NxV))[1]


unigram = teacher(1)
five_gram = teacher(5)

"""softmax of a tile of logits, of which a device may hold only a part of the vocabulary."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

RUN = 512  # entries that are summed one after the other; the longer, the larger the rounding error


@dataclasses.dataclass(frozen=True)
class Span:
    """The entries [start, start + V) of the vocabulary, of which this device holds the logits.

    Attributes:
      start: 0 or a traced int32.
      axis: the mesh axis that the vocabulary is split over inside a `shard_map`, None if it is whole.
    """

    start: jax.Array | int = 0
    axis: str | None = None

    def ids(self, x_NxV: jax.Array) -> jax.Array:
        """Of the entries of x, int32 [V]."""
        return self.start + jnp.arange(x_NxV.shape[-1], dtype=jnp.int32)

    def sum(self, x_NxV: jax.Array) -> jax.Array:
        """Over the whole vocabulary."""
        return self.join(jnp.sum(x_NxV, axis=-1))

    def sums(self, *arrays_NxV: jax.Array) -> list[jax.Array]:
        """`sum` of each array, all in one pass, which on CPUs costs as much as for one of them."""
        n, size = arrays_NxV[0].shape
        whole = size // RUN * RUN
        sums = [jnp.sum(x[:, whole:], axis=-1) for x in arrays_NxV]
        if whole:
            runs = _sum_last([x[:, :whole].reshape(n, whole // RUN, RUN) for x in arrays_NxV])
            sums = [jnp.sum(x, axis=-1) + rest for x, rest in zip(runs, sums, strict=True)]
        return [self.join(x) for x in sums]

    def max(self, x_NxV: jax.Array) -> jax.Array:
        top = jnp.max(x_NxV, axis=-1)
        return top if self.axis is None else jax.lax.pmax(top, self.axis)

    def join(self, partial_sum: jax.Array) -> jax.Array:
        return partial_sum if self.axis is None else jax.lax.psum(partial_sum, self.axis)


def _sum_last(arrays: Sequence[jax.Array]) -> Sequence[jax.Array]:
    """Sums over the last axis by one reduction of them all."""
    add = lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True))  # noqa: E731
    return jax.lax.reduce(tuple(arrays), tuple(jnp.zeros((), x.dtype) for x in arrays), add, (arrays[0].ndim - 1,))


class Softmax:
    """softmax(z) for a tile of N tokens, or, given `inside`, its restriction to those entries, renormalised.

    Everything that is exponentiated is relative to the largest logit, and the exponentials are shared.
    """

    def __init__(self, logits_NxV: jax.Array, top_N: jax.Array, span: Span, inside_NxV: jax.Array | None = None):
        self.logits, self.top, self.span, self.inside = logits_NxV, top_N, span, inside_NxV
        self.shifted = logits_NxV - top_N[:, None]
        self.exp = self._inside(jnp.exp(self.shifted))

    @functools.cached_property
    def sum_exp(self) -> jax.Array:
        return self.span.sum(self.exp)

    @property
    def log_sum(self) -> jax.Array:
        """logsumexp(z) - max(z), [N]."""
        return jnp.log(self.sum_exp)

    @property
    def logsumexp(self) -> jax.Array:
        return self.top + self.log_sum

    def means(self, *arrays_NxV: jax.Array) -> list[jax.Array]:
        """<p, x> of each array, [N]; what x is outside `inside` does not count."""
        return [x / self.sum_exp for x in self.span.sums(*(self._inside(self.exp * x) for x in arrays_NxV))]

    @property
    def entropy(self) -> jax.Array:
        return self.log_sum - self.means(self.shifted)[0]

    def tempered(self, temperature: float, top_k: int) -> "Softmax":
        """softmax(z / temperature) over the `top_k` largest entries (0: all), equal ones by rising id."""
        if temperature == 1.0 and not top_k:
            return self
        inside = None
        if top_k:
            z = without_negative_zeros(self.logits)
            last, last_id = (x[:, None] for x in kth_largest(z, top_k, self.span))
            inside = (z > last) | ((z == last) & (self.span.ids(z) <= last_id))
        return Softmax(self.logits / temperature, self.top / temperature, self.span, inside)

    def _inside(self, x_NxV: jax.Array) -> jax.Array:
        return x_NxV if self.inside is None else jnp.where(self.inside, x_NxV, 0.0)


class Distribution(Softmax):
    """softmax(z), and how it sees the targets y; computed as it is asked for."""

    def __init__(self, logits_NxV: jax.Array, target_N: jax.Array, span: Span):
        super().__init__(logits_NxV, span.max(logits_NxV), span)
        self.target = target_N

    def is_target(self) -> jax.Array:
        """One-hot y, bool [N, V]."""
        return self.span.ids(self.logits) == self.target[:, None]

    @functools.cached_property
    def target_logit(self) -> jax.Array:
        """z_y, [N], as the matmul gave it; NaN where y is no token of the vocabulary."""
        size = self.logits.shape[-1]
        local = self.target - self.span.start
        here = (local >= 0) & (local < size)
        z_y = jnp.take_along_axis(self.logits, jnp.where(here, local, 0)[:, None], axis=-1)[:, 0]
        found = self.span.join(here.astype(jnp.int32))
        return jnp.where(found > 0, self.span.join(jnp.where(here, z_y, 0.0)), jnp.nan)

    @property
    def loss(self) -> jax.Array:
        """-log p_y, [N]."""
        return self.log_sum - (self.target_logit - self.top)

    @property
    def sum_exp(self) -> jax.Array:
        return self._counts[0]

    @property
    def rank(self) -> jax.Array:
        """#{v != y: z_v > z_y} + #{v < y: z_v = z_y}, int32 [N]; V where z_y is NaN, so never "correct"."""
        return self._counts[1]

    @functools.cached_property
    def _counts(self) -> list[jax.Array]:
        """The normaliser and the rank: whoever wants one wants the other, and one pass gives both."""
        z, z_y = self.logits, self.target_logit[:, None]
        behind = (z < z_y) | ((z == z_y) & (self.span.ids(z) >= self.target[:, None]))
        return self.span.sums(self.exp, (~behind).astype(jnp.int32))

    @property
    def top_probability(self) -> jax.Array:
        return 1.0 / self.sum_exp


GROUP = 32  # entries; of 8 to 64 the fastest or near it, for V from 2048 to 262144


def kth_largest(x_NxV: jax.Array, k: int, span: Span = Span()) -> tuple[jax.Array, jax.Array]:  # noqa: B008
    """(value, id), [N] each, of the entry that is k-th by falling value, equal values by rising id.

    Args:
      x_NxV: the part of the vocabulary that `span` tells of, without negative zeros.
      k: at most the size of the whole vocabulary.
    """
    values, ids = _top_k(x_NxV, min(k, x_NxV.shape[-1]))
    if span.axis is not None:
        # Shard after shard, each in order: of equal values the one with the lower id still comes first.
        values, ids = (jax.lax.all_gather(a, span.axis, axis=1, tiled=True) for a in (values, ids + span.start))
        values, at = _plain_top_k(values, k)
        ids = jnp.take_along_axis(ids, at, axis=1)
    return values[:, -1], ids[:, -1]


def without_negative_zeros(x: jax.Array) -> jax.Array:
    """`jax.lax.top_k` puts 0 before -0; with this its order is that of <, > and ==."""
    return jnp.where(x == 0, 0.0, x)


def _top_k(x_NxV: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """`jax.lax.top_k`; for small k of the few groups of entries that can hold one of them.

    A group that k others go before, by their largest entries (equal ones by place), has no entry of the top k.
    """
    (n, size), groups = x_NxV.shape, x_NxV.shape[-1] // GROUP
    if groups < 4 * k:
        return _plain_top_k(x_NxV, k)
    grouped = x_NxV[:, : groups * GROUP].reshape(n, groups, GROUP)
    # In the vocabulary's order, so that among equal candidates the first is the one with the lowest id.
    best = jnp.sort(_plain_top_k(jnp.max(grouped, axis=-1), k)[1], axis=-1)[..., None]
    ids = (best * GROUP + jnp.arange(GROUP, dtype=jnp.int32)).reshape(n, -1)
    rest = jnp.broadcast_to(jnp.arange(groups * GROUP, size, dtype=jnp.int32), (n, size - groups * GROUP))
    candidates = jnp.take_along_axis(grouped, best, axis=1).reshape(n, -1)
    values, at = _plain_top_k(jnp.concatenate([candidates, x_NxV[:, groups * GROUP :]], axis=1), k)
    return values, jnp.take_along_axis(jnp.concatenate([ids, rest], axis=1), at, axis=1)


def _plain_top_k(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    # Without barriers XLA merges a slice of the results into it and, on CPUs, sorts everything: 50 times slower. One
    # each, for one around both takes the partitioner down.
    values, ids = jax.lax.top_k(x, k)
    return jax.lax.optimization_barrier(values), jax.lax.optimization_barrier(ids)

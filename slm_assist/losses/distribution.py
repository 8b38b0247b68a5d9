"""softmax of a tile of logits, of which a device may hold only a part of the vocabulary."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

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

    def join(self, partial_sums: Any) -> Any:
        """A tree of [N] arrays, each summed over the devices that share the vocabulary: one message for all.

        Counts travel as float32, which is exact below 2^24.
        """
        leaves, tree = jax.tree.flatten(partial_sums)
        if self.axis is None or not leaves:
            return partial_sums
        sums = jax.lax.psum(jnp.stack([x.astype(jnp.float32) for x in leaves]), self.axis)
        return tree.unflatten([total.astype(x.dtype) for total, x in zip(sums, leaves, strict=True)])


def sums(*arrays_NxV: jax.Array) -> list[jax.Array]:
    """Over the last axis, all in one pass, which on CPUs costs as much as for one of them."""
    n, size = arrays_NxV[0].shape
    run = next((run for run in (RUN, RUN // 2, RUN // 4) if size % run == 0), RUN)  # rather none left over
    whole = size // run * run
    totals = [jnp.sum(x[:, whole:], axis=-1) for x in arrays_NxV]
    if whole:
        runs = _sum_last([x[:, :whole].reshape(n, whole // run, run) for x in arrays_NxV])
        totals = [jnp.sum(x, axis=-1) + rest for x, rest in zip(runs, totals, strict=True)]
    return totals


def _sum_last(arrays: Sequence[jax.Array]) -> Sequence[jax.Array]:
    """Sums over the last axis by one reduction of them all."""
    add = lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True))  # noqa: E731
    return jax.lax.reduce(tuple(arrays), tuple(jnp.zeros((), x.dtype) for x in arrays), add, (arrays[0].ndim - 1,))


class Softmax:
    """softmax(z) for a tile of N tokens, or, given `inside`, its restriction to those entries, renormalised.

    Everything that is exponentiated is relative to the largest logit, and the exponentials are shared. Sums are those
    over this device's part of the vocabulary, for `Span.join`.
    """

    def __init__(self, logits_NxV: jax.Array, top_N: jax.Array, span: Span, inside_NxV: jax.Array | None = None):
        self.logits, self.top, self.span, self.inside = logits_NxV, top_N, span, inside_NxV
        self.shifted = logits_NxV - top_N[:, None]
        self.exp = self._inside(jnp.exp(self.shifted))

    def products(self, *arrays_NxV: jax.Array) -> list[jax.Array]:
        """The normaliser and <exp, x> of each array, [N]; what x is outside `inside` does not count."""
        return sums(self.exp, *(self._inside(self.exp * x) for x in arrays_NxV))

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
    """softmax(z), and how it sees the targets y; z_y [N] is NaN where y is no token of the vocabulary."""

    def __init__(self, logits_NxV, top_N, span: Span, target_N: jax.Array, target_logit_N: jax.Array):
        super().__init__(logits_NxV, top_N, span)
        self.target, self.target_logit = target_N, target_logit_N

    def is_target(self) -> jax.Array:
        """One-hot y, bool [N, V]."""
        return self.span.ids(self.logits) == self.target[:, None]

    def counts(self) -> list[jax.Array]:
        """The normaliser and the rank, [N] each: whoever wants one wants the other, and one pass gives both."""
        z, z_y = self.logits, self.target_logit[:, None]
        behind = (z < z_y) | ((z == z_y) & (self.span.ids(z) >= self.target[:, None]))
        return sums(self.exp, (~behind).astype(jnp.int32))

    def seen(self, sum_exp_N: jax.Array, rank_N: jax.Array) -> "Seen":
        """Given the joined `counts`."""
        return Seen(self.top, self.target_logit, sum_exp_N, rank_N)


class Seen(NamedTuple):
    """What a distribution says of its tokens, [N] each.

    Attributes:
      top: the largest logit.
      target_logit: as the matmul gave it.
      sum_exp: the normaliser, relative to `top`.
      rank: #{v != y: z_v > z_y} + #{v < y : z_v = z_y}, int32; V where z_y is NaN, so never "correct".
    """

    top: jax.Array
    target_logit: jax.Array
    sum_exp: jax.Array
    rank: jax.Array

    @property
    def log_sum(self) -> jax.Array:
        """logsumexp(z) - max(z)."""
        return jnp.log(self.sum_exp)

    @property
    def logsumexp(self) -> jax.Array:
        return self.top + self.log_sum

    @property
    def loss(self) -> jax.Array:
        """-log p_y."""
        return self.log_sum - (self.target_logit - self.top)

    @property
    def top_probability(self) -> jax.Array:
        return 1.0 / self.sum_exp

    def entropy(self, product_N: jax.Array) -> jax.Array:
        """Given the joined <exp, shifted>."""
        return self.log_sum - product_N / self.sum_exp


def distributions(logits_NxV: Sequence[jax.Array], target_N: jax.Array, span: Span) -> list[Distribution]:
    """One for each model; where devices share the vocabulary, what they must tell each other first is one message."""
    size = logits_NxV[0].shape[-1]
    local = target_N - span.start
    here = (local >= 0) & (local < size)
    known = here
    at = jnp.where(here, local, 0)[:, None]
    told = [jnp.max(z, axis=-1) for z in logits_NxV]
    told += [jnp.take_along_axis(z, at, axis=-1)[:, 0] for z in logits_NxV]
    if span.axis is not None:
        known = (target_N >= 0) & (target_N < size * jax.lax.axis_size(span.axis))
        told = [jnp.where(here, x, 0.0) if i >= len(logits_NxV) else x for i, x in enumerate(told)]
        # Gathered rather than reduced: largest logits and targets' logits in one go, and a NaN stays one.
        everyone = jax.lax.all_gather(jnp.stack(told), span.axis, axis=1)
        tops, targets = jnp.split(everyone, 2)
        told = [*jnp.max(tops, axis=1), *jnp.sum(targets, axis=1)]
    tops, targets = told[: len(logits_NxV)], told[len(logits_NxV) :]
    return [
        Distribution(z, top, span, target_N, jnp.where(known, z_y, jnp.nan))
        for z, top, z_y in zip(logits_NxV, tops, targets, strict=True)
    ]


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
        both = jnp.stack([jax.lax.bitcast_convert_type(values, jnp.int32), ids + span.start])
        values, ids = jax.lax.all_gather(both, span.axis, axis=2, tiled=True)
        values = jax.lax.bitcast_convert_type(values, jnp.float32)
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

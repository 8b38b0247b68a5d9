"""What the losses return, and what a weight function is given."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Loss(NamedTuple):
    """Sums over the unmasked tokens of the whole batch, in nats and float32; a pytree.

    Sums rather than means, so that microbatches and hosts add up with the right weights. With
    `per_token=True` every field holds its [B, T] terms instead, each already multiplied by the mask.

    Attributes:
      total: sum of mask * [(1 - w) CE + w CE(q, p) + z_loss * lse^2], the only field with a gradient.
      weight: sum of the mask.
      parts: sums of mask * x without z-loss: `cross_entropy` and `correct` (the target has rank 0: it is the
        argmax, ties going to the lower index); with a teacher also `distillation_kl` (of the student from
        the tempered teacher), `teacher_cross_entropy` and `teacher_correct` (both at temperature 1).
    """

    total: jax.Array
    weight: jax.Array
    parts: dict[str, jax.Array]

    @property
    def mean(self) -> jax.Array:
        """Nats a token, []: total / weight, and 0 with a zero gradient where every token is masked."""
        total, weight = jnp.sum(self.total), jnp.sum(self.weight)
        return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1.0), 0.0)


class TokenStats(NamedTuple):
    """How a model sees each target.

    Attributes:
      loss: -log p(target), float32 [B, T], nats.
      rank: how many tokens are likelier than the target, ties counted if their index is lower, int32 [B, T]:
        the target is in the top k of `jax.lax.top_k` iff rank < k.
    """

    loss: jax.Array
    rank: jax.Array


class TokenInfo(NamedTuple):
    """What both models say about each token; every field has one entry a token, all at temperature 1.

    A weight function `fn(info) -> w` must treat tokens one by one: it sees the tokens of one tile (of any
    shape), not of the batch. No gradient passes through it.

    Attributes:
      loss: -log p(target), nats. `teacher_loss`: the same for the teacher, and so below.
      entropy: of the model's distribution, nats.
      top_probability: of its likeliest token.
      rank: of the target, 0 for the likeliest, int32.
    """

    loss: jax.Array
    entropy: jax.Array
    top_probability: jax.Array
    rank: jax.Array
    teacher_loss: jax.Array
    teacher_entropy: jax.Array
    teacher_top_probability: jax.Array
    teacher_rank: jax.Array


Weight = float | jax.Array | Callable[[TokenInfo], jax.Array]


def collect(total: jax.Array, parts: dict[str, Any], mask: jax.Array, per_token: bool) -> Loss:
    """A `Loss` from terms of each token, [B, T]; those at masked positions do not count.

    Args:
      mask: [B, T], bool or float.
    """
    mask = jax.lax.stop_gradient(mask.astype(jnp.float32))
    terms = Loss(total, jnp.ones_like(total), {k: jax.lax.stop_gradient(v) for k, v in parts.items()})
    terms = jax.tree.map(lambda x: jnp.where(mask != 0, mask * x.astype(jnp.float32), 0.0), terms)
    return terms if per_token else jax.tree.map(jnp.sum, terms)


@dataclasses.dataclass(frozen=True)
class Span:
    """The entries [start, start + V) of the vocabulary, of which this device holds the logits.

    Attributes:
      start: 0 or a traced int32.
      axis: the mesh axis that the vocabulary is split over inside a `shard_map`, None if it is whole.
    """

    start: jax.Array | int = 0
    axis: str | None = None

    def sum(self, x_NxV: jax.Array) -> jax.Array:
        """Over the whole vocabulary."""
        return self.join(jnp.sum(x_NxV, axis=-1))

    def max(self, x_NxV: jax.Array) -> jax.Array:
        top = jnp.max(x_NxV, axis=-1)
        return top if self.axis is None else jax.lax.pmax(top, self.axis)

    def join(self, partial_sum: jax.Array) -> jax.Array:
        return partial_sum if self.axis is None else jax.lax.psum(partial_sum, self.axis)


class Distribution:
    """softmax(z) for a tile of N tokens, and how it sees their targets y; computed as it is asked for.

    Everything that is exponentiated is relative to the largest logit, and the exponentials are shared.
    """

    def __init__(self, logits_NxV: jax.Array, target_N: jax.Array, span: Span):
        self.logits, self.target, self.span = logits_NxV, target_N, span
        self.top = span.max(logits_NxV)
        self.shifted = logits_NxV - self.top[:, None]
        self.exp = jnp.exp(self.shifted)
        self.sum_exp = span.sum(self.exp)

    @property
    def log_sum(self) -> jax.Array:
        """logsumexp(z) - max(z), [N]."""
        return jnp.log(self.sum_exp)

    @property
    def logsumexp(self) -> jax.Array:
        return self.top + self.log_sum

    def mean(self, x_NxV: jax.Array) -> jax.Array:
        """<p, x>, [N]."""
        return self.span.sum(self.exp * x_NxV) / self.sum_exp

    def is_target(self) -> jax.Array:
        """One-hot y, bool [N, V]."""
        return self._ids() == self.target[:, None]

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
    def rank(self) -> jax.Array:
        """#{v != y: z_v > z_y} + #{v < y: z_v = z_y}, int32 [N]; V where z_y is NaN, so never "correct"."""
        z, z_y = self.logits, self.target_logit[:, None]
        behind = (z < z_y) | ((z == z_y) & (self._ids() >= self.target[:, None]))
        return self.span.sum((~behind).astype(jnp.int32))

    @property
    def entropy(self) -> jax.Array:
        return self.log_sum - self.mean(self.shifted)

    @property
    def top_probability(self) -> jax.Array:
        return 1.0 / self.sum_exp

    def _ids(self) -> jax.Array:
        return self.span.start + jnp.arange(self.logits.shape[-1], dtype=jnp.int32)

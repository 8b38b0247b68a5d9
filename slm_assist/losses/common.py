"""What the losses return, and what a weight function is given."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from slm_assist.errors import UserError


class Loss(NamedTuple):
    """Sums over the unmasked tokens of the whole batch, in nats and float32; a pytree.

    Sums rather than means, so that microbatches and hosts add up with the right weights. With
    `per_token=True` every field holds its [B, T] terms instead, each already multiplied by the mask.

    Attributes:
      total: sum of mask * [(1 - w) CE + w CE(q, p) + z_loss * lse^2], the only field with a gradient.
      weight: sum of the mask.
      parts: sums of mask * x without z-loss: `cross_entropy` and `correct` (the target has rank 0: it is the
        argmax, ties going to the lower index); with a teacher also `distillation_kl` (of the student from
        the tempered, perhaps truncated teacher), `teacher_cross_entropy` and `teacher_correct` (both at temperature 1).
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


def check_top_k(top_k: int, vocab: int) -> int:
    """`top_k` as the losses use it: 0 where it leaves nothing out.

    Raises:
      UserError: it is negative, or larger than the vocabulary.
    """
    if not 0 <= top_k <= vocab:
        raise UserError(
            f"assist.top_k={top_k}: the teacher's vocabulary has {vocab} tokens; use 1 to {vocab}, or 0 for all of them"
        )
    return 0 if top_k == vocab else int(top_k)

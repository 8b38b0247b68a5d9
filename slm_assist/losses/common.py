"""What the losses return, and what a weight function is given."""

import math
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
        the tempered, perhaps truncated teacher), `teacher_cross_entropy` and `teacher_correct` (both at temperature 1);
        where a function gives the weights also `token_weight`, w.
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
Head = jax.Array | Callable[[jax.Array], jax.Array]  # [E, V], or from hidden [N, E] to logits [N, V]
NO_PROBABILITY = -1e30  # what a logit of -inf is taken for, so that 0 * -inf is 0


def collect(total: jax.Array, parts: dict[str, Any], mask: jax.Array, per_token: bool) -> Loss:
    """A `Loss` from terms of each token, [B, T]; those at masked positions do not count.

    Args:
      mask: [B, T], bool or float.
    """
    mask = jax.lax.stop_gradient(mask.astype(jnp.float32))
    terms = Loss(total, jnp.ones_like(total), {k: jax.lax.stop_gradient(v) for k, v in parts.items()})
    terms = jax.tree.map(lambda x: jnp.where(mask != 0, mask * x.astype(jnp.float32), 0.0), terms)
    return terms if per_token else jax.tree.map(jnp.sum, terms)


def split_head(head: Head) -> tuple[Callable[[Any, jax.Array], jax.Array] | None, Any]:
    """(None, a matrix), or a function of (arrays, hidden) and the arrays that `jax.tree_util.Partial` bound to it."""
    if not callable(head):
        return None, head
    if not isinstance(head, jax.tree_util.Partial):
        return lambda _, hidden: head(hidden), ()
    arrays, tree = jax.tree.flatten(head)
    return lambda arrays, hidden: tree.unflatten(arrays)(hidden), tuple(arrays)


def check_answers(head: Callable, hidden_BxTxE: jax.Array, arrays: Any, tokens: tuple[int, int], vocab: int) -> None:
    """Raises `UserError` unless the function `head` makes logits [N, V] of arrays and hidden states [N, E]."""
    if hidden_BxTxE.shape[:2] != tokens:
        raise UserError(f"teacher_hidden {hidden_BxTxE.shape} does not fit targets {tokens}: pass [B, T, E], [B, T]")
    count = math.prod(tokens)
    flat = jax.ShapeDtypeStruct((count, *hidden_BxTxE.shape[2:]), hidden_BxTxE.dtype)
    found = jax.tree.map(jnp.shape, jax.eval_shape(head, arrays, flat))
    if found != (count, vocab):
        raise UserError(f"teacher_head: of hidden states {flat.shape} it makes logits {found}, not {(count, vocab)}")


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

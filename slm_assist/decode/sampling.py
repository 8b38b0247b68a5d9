"""From logits to the next tokens."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from slm_assist.errors import UserError

LEAST_TEMPERATURE = 1e-6  # below it float32 has no use for a quotient of logits


class Sampling(NamedTuple):
    """How the next token is drawn.

    Attributes:
      temperature: divides the logits; 0: the likeliest token, and of equals the one with the lower id.
      top_k: only among the k likeliest tokens; 0: among all.
      top_p: only among the fewest likeliest tokens that together have this probability, at least one (nucleus
        sampling, 1904.09751); 1: among all. With `top_k` too, of what that leaves.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def check(self) -> None:
        """Raises `UserError` for a value that means nothing."""
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature={self.temperature}: use 0 (the likeliest token) or a positive number")
        if self.top_k < 0:
            raise UserError(f"top_k={self.top_k}: use 0 (all tokens) or a positive number")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}: use a number above 0 and up to 1 (all tokens)")


def sample(logits_BxV: jax.Array, key_B: jax.Array, sampling: Sampling) -> jax.Array:
    """The next token of each row, int32 [B].

    A row's token depends on its own logits and key only.

    Args:
      logits_BxV: of any float dtype; what follows is float32.
      key_B: a key of `jax.random` for each row; not used where the temperature is 0.
      sampling: known when this is traced.
    """
    logits_BxV = logits_BxV.astype(jnp.float32)
    if sampling.temperature == 0:
        return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
    logits_BxV = logits_BxV - jnp.max(logits_BxV, axis=-1, keepdims=True)
    logits_BxV = logits_BxV / max(sampling.temperature, LEAST_TEMPERATURE)
    size = logits_BxV.shape[-1]
    draw = jax.vmap(jax.random.categorical)
    if not 0 < sampling.top_k < size and sampling.top_p == 1:
        return draw(key_B, logits_BxV).astype(jnp.int32)
    logits_BxK, token_BxK = jax.lax.top_k(logits_BxV, min(sampling.top_k or size, size))
    if sampling.top_p < 1:
        probability_BxK = jax.nn.softmax(logits_BxK, axis=-1)
        before_BxK = jnp.cumsum(probability_BxK, axis=-1) - probability_BxK  # of the likelier ones
        logits_BxK = jnp.where(before_BxK < sampling.top_p, logits_BxK, -jnp.inf)
    drawn_B = draw(key_B, logits_BxK)
    return jnp.take_along_axis(token_BxK, drawn_B[:, None], axis=-1)[:, 0].astype(jnp.int32)

"""What runs on the device: prompts into the cache of keys and values, and the loop that makes token after token."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from slm_assist.decode.sampling import Sampling, sample
from slm_assist.models import Transformer
from slm_assist.models.attention.reference import capped
from slm_assist.models.transformer import Params

NOTHING = -1  # in place of a token: the row had ended


class State(NamedTuple):
    """What the loop carries from token to token.

    Attributes:
      cache: keys and values.
      token_B: the last token of each row, not yet in the cache; `done_B`: whether the row has ended.
      pad_B: slots in front of the row; `row_B`: its number among the prompts; `seed`: these make its randomness.
      slot: where the next token goes in all rows; `count`: tokens made so far.
    """

    cache: Params
    token_B: jax.Array
    done_B: jax.Array
    pad_B: jax.Array
    row_B: jax.Array
    seed: jax.Array
    slot: jax.Array
    count: jax.Array


def prefill(
    params: Params, cache: Params, tokens_BxT: jax.Array, start: jax.Array, pad_B: jax.Array, *, model: Transformer
) -> Params:
    """The cache with T more tokens, at the slots from `start`. Slots below `pad_B` are padding."""
    positions_BxT = jnp.maximum(start + jnp.arange(tokens_BxT.shape[1]) - pad_B[:, None], 0)
    where = {"start": start, "segment_ids": _segments(cache, pad_B), "positions": positions_BxT}
    return model.apply_cached(params, cache, tokens_BxT, **where)[1]


def decode(
    params: Params,
    state: State,
    limit: jax.Array,
    *,
    model: Transformer,
    sampling: Sampling,
    ends: tuple[int, ...],
    burst: int,
) -> tuple[State, jax.Array]:
    """Up to `limit` tokens of each row that is not done: (state, tokens [B, burst]).

    Returns:
      The tokens, `NOTHING` from where a row has ended; a row ends with one of `ends`, which is not among its tokens.
    """
    segment_ids_BxS = _segments(state.cache, state.pad_B)
    key_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(state.seed, impl="threefry2x32"), state.row_B)

    def goes_on(carry: tuple[State, jax.Array, jax.Array]) -> jax.Array:
        state, _, made = carry
        return (made < limit) & ~jnp.all(state.done_B)

    def one(carry: tuple[State, jax.Array, jax.Array]) -> tuple[State, jax.Array, jax.Array]:
        state, tokens_BxK, made = carry
        where = {"start": state.slot, "segment_ids": segment_ids_BxS}
        positions_Bx1 = (state.slot - state.pad_B)[:, None]
        hidden_Bx1xD, cache = model.apply_cached(
            params, state.cache, state.token_B[:, None], positions=positions_Bx1, **where
        )
        logits_BxV = logits_of(model, params, hidden_Bx1xD[:, 0])
        token_B = sample(logits_BxV, jax.vmap(jax.random.fold_in, (0, None))(key_B, state.count), sampling)
        done_B = state.done_B | jnp.isin(token_B, jnp.array(ends, jnp.int32))
        tokens_BxK = jax.lax.dynamic_update_slice(
            tokens_BxK, jnp.where(done_B, NOTHING, token_B)[:, None], (jnp.int32(0), made)
        )
        state = state._replace(cache=cache, token_B=token_B, done_B=done_B, slot=state.slot + 1, count=state.count + 1)
        return state, tokens_BxK, made + 1

    nothing_BxK = jnp.full((state.token_B.shape[0], burst), NOTHING, jnp.int32)
    state, tokens_BxK, _ = jax.lax.while_loop(goes_on, one, (state, nothing_BxK, jnp.int32(0)))
    return state, tokens_BxK


def logits_of(model: Transformer, params: Params, hidden_NxD: jax.Array) -> jax.Array:
    """softcap(logit_scale * hidden @ head), float32 [N, V]."""
    head_DxV = model.head(params).astype(hidden_NxD.dtype)
    product_NxV = jnp.dot(hidden_NxD, head_DxV, preferred_element_type=jnp.float32)
    return capped(model.config.logit_scale * product_NxV, model.config.logit_softcap)


def _segments(cache: Params, pad_B: jax.Array) -> jax.Array:
    """int32 [B, S]: 0 for the padding in front, 1 for text, before it is written too."""
    slots = jax.tree.leaves(cache)[0].shape[-2]
    return (jnp.arange(slots) >= pad_B[:, None]).astype(jnp.int32)

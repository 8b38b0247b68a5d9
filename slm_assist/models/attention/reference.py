"""Attention over packed rows in plain XLA: the definition that the kernels have to match."""

import jax
import jax.numpy as jnp

MASKED = -1e30
# Queries are taken in at most MAX_BLOCKS blocks, of MIN_BLOCK or more, each against only the keys it can see.
MIN_BLOCK, MAX_BLOCKS = 64, 8


def mask_for(
    length: int,
    *,
    segment_ids: jax.Array | None = None,
    prefix_mask: jax.Array | None = None,
    window: int = 0,
    queries: slice = slice(None),
    keys: slice = slice(None),
) -> jax.Array:
    """Which keys each query sees.

    A query sees a key that stands at or before it in the row, or anywhere if both are in the prefix; only
    within its own segment; and, with a `window`, only at a distance below it. Padding (segment 0) sees
    padding, so every query sees at least itself and no row of the softmax is empty.

    Args:
      length: T.
      segment_ids: int [B, T], or None where each row is one document.
      prefix_mask: bool [B, T], the tokens of a bidirectional prefix, or None.
      window: width of a sliding window; 0 for none.
      queries, keys: the part of the mask that is wanted.

    Returns:
      bool [B, T, T] (query, key); [1, T, T] where it is the same for all rows.
    """
    query = jnp.arange(length)[queries, None]
    key = jnp.arange(length)[None, keys]
    seen_BxTxT = (key <= query)[None]
    if prefix_mask is not None:
        prefix_mask = prefix_mask.astype(bool)
        seen_BxTxT |= prefix_mask[:, queries, None] & prefix_mask[:, None, keys]
    if window:
        seen_BxTxT &= abs(query - key) < window
    if segment_ids is not None:
        seen_BxTxT &= segment_ids[:, queries, None] == segment_ids[:, None, keys]
    return seen_BxTxT


def attend(
    query_BxTxNxH: jax.Array,
    key_BxTxKxH: jax.Array,
    value_BxTxKxH: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    prefix_mask: jax.Array | None = None,
    window: int = 0,
    softcap: float = 0.0,
) -> jax.Array:
    """Softmax attention, scaled by 1 / sqrt(H); `mask_for` says who sees whom.

    Query head n reads key and value head n // (N / K), which are not repeated in memory. Logits and softmax
    are float32 whatever the inputs.

    Returns:
      [B, T, N, H] in the dtype of `value_BxTxKxH`.
    """
    B, T, N, H = query_BxTxNxH.shape
    K = key_BxTxKxH.shape[2]
    G = N // K
    query_BxKxTGxH = (query_BxTxNxH * H**-0.5).reshape(B, T, K, G, H).transpose(0, 2, 1, 3, 4)
    query_BxKxTGxH = query_BxKxTGxH.reshape(B, K, T * G, H)
    key_BxKxTxH, value_BxKxTxH = (x.transpose(0, 2, 1, 3) for x in (key_BxTxKxH, value_BxTxKxH))
    size = max(MIN_BLOCK, -(-T // MAX_BLOCKS))
    blocks = []
    for start in range(0, T, size):
        queries = slice(start, min(start + size, T))
        keys = visible(queries, T, prefix_mask is not None, window)
        seen_BxTxT = mask_for(
            T, segment_ids=segment_ids, prefix_mask=prefix_mask, window=window, queries=queries, keys=keys
        )
        # One batch of plain matmuls, and the large array in the order in which both want it: no copies.
        logits_BxKxTGxT = jnp.einsum(
            "bkqh,bksh->bkqs",
            query_BxKxTGxH[:, :, queries.start * G : queries.stop * G],
            key_BxKxTxH[:, :, keys],
            preferred_element_type=jnp.float32,
        )
        logits_BxKxTGxT = capped(logits_BxKxTGxT, softcap)
        seen_BxTGxT = jnp.repeat(seen_BxTxT, G, axis=1)
        weights_BxKxTGxT = masked_softmax(logits_BxKxTGxT, seen_BxTGxT[:, None]).astype(value_BxTxKxH.dtype)
        blocks.append(jnp.einsum("bkqs,bksh->bkqh", weights_BxKxTGxT, value_BxKxTxH[:, :, keys]))
    mixed_BxKxTxGxH = jnp.concatenate(blocks, axis=2).reshape(B, K, T, G, H)
    return mixed_BxKxTxGxH.transpose(0, 2, 1, 3, 4).reshape(B, T, N, H)


def capped(logits: jax.Array, softcap: float) -> jax.Array:
    """softcap * tanh(logits / softcap) (Gemma 2, 2408.00118); 0 for none."""
    return softcap * jnp.tanh(logits / softcap) if softcap else logits


def attend_cached(
    query_BxTxNxH: jax.Array,
    key_BxKxSxH: jax.Array,
    value_BxKxSxH: jax.Array,
    *,
    start: jax.Array,
    segment_ids: jax.Array,
    window: int = 0,
    softcap: float = 0.0,
) -> jax.Array:
    """`attend` of T tokens that stand at the slots start, start + 1, ... among S slots of keys and values.

    Args:
      start: int32 [], the slot of the first token, the same in all rows.
      segment_ids: int32 [B, S], of all slots: a token sees those of its segment, up to its own slot.

    Returns:
      [B, T, N, H] in the dtype of `value_BxKxSxH`.
    """
    B, T, N, H = query_BxTxNxH.shape
    K, S = key_BxKxSxH.shape[1:3]
    query = start + jnp.arange(T)[:, None]
    key = jnp.arange(S)[None]
    seen_TxS = key <= query
    if window:
        seen_TxS &= query - key < window
    own_BxT = jax.lax.dynamic_slice_in_dim(segment_ids, start, T, axis=1)
    seen_BxTxS = seen_TxS & (own_BxT[:, :, None] == segment_ids[:, None, :])
    G = N // K
    query_BxKxTGxH = (query_BxTxNxH * H**-0.5).reshape(B, T, K, G, H).transpose(0, 2, 1, 3, 4).reshape(B, K, T * G, H)
    # The large arrays in the order in which the matmuls want them: no copies.
    logits_BxKxTGxS = jnp.einsum("bkqh,bksh->bkqs", query_BxKxTGxH, key_BxKxSxH, preferred_element_type=jnp.float32)
    seen_BxTGxS = jnp.repeat(seen_BxTxS, G, axis=1)
    weights_BxKxTGxS = masked_softmax(capped(logits_BxKxTGxS, softcap), seen_BxTGxS[:, None])
    mixed_BxKxTGxH = jnp.einsum("bkqs,bksh->bkqh", weights_BxKxTGxS.astype(value_BxKxSxH.dtype), value_BxKxSxH)
    return mixed_BxKxTGxH.reshape(B, K, T, G, H).transpose(0, 2, 1, 3, 4).reshape(B, T, N, H)


def visible(queries: slice, length: int, prefix: bool, window: int) -> slice:
    """The shortest span with every key that some query of a span can see."""
    reach = window - 1 if window else length
    stop = queries.stop + reach if prefix else queries.stop
    return slice(max(0, queries.start - reach), min(length, stop))


@jax.custom_jvp
def masked_softmax(logits: jax.Array, seen: jax.Array) -> jax.Array:
    """Softmax over the last axis of the logits that are `seen`; 0 elsewhere."""
    logits = jnp.where(seen, logits, MASKED)
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    return weights / jnp.sum(weights, axis=-1, keepdims=True)


@masked_softmax.defjvp
def _masked_softmax_jvp(primals, tangents):
    # From the weights alone, which are 0 where masked: the mask and the exponential are not kept or redone.
    weights = masked_softmax(*primals)
    product = weights * tangents[0]
    return weights, product - weights * jnp.sum(product, axis=-1, keepdims=True)

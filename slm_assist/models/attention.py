"""Attention over packed rows: the definition, in plain XLA, that faster backends have to match."""

import jax
import jax.numpy as jnp

MASKED = -1e30


def mask_for(
    length: int,
    *,
    segment_ids: jax.Array | None = None,
    prefix_mask: jax.Array | None = None,
    window: int = 0,
) -> jax.Array:
    """Which keys each query sees.

    A query sees a key that stands at or before it in the row, or anywhere if both are in the prefix; only
    within its own segment; and, with a `window`, only at a distance below it. Padding (segment 0) sees
    padding, so that every query sees at least itself and no row of the softmax is empty.

    Args:
      length: T.
      segment_ids: int [B, T], or None where each row is one document.
      prefix_mask: bool [B, T], the tokens of a bidirectional prefix.
      window: width of a sliding window; 0 for none.

    Returns:
      bool [B, T, T] (query, key); [1, T, T] where it is the same for all rows.
    """
    query, key = jnp.arange(length)[:, None], jnp.arange(length)[None, :]
    seen_BxTxT = (key <= query)[None]
    if prefix_mask is not None:
        prefix_mask = prefix_mask.astype(bool)
        seen_BxTxT |= prefix_mask[:, :, None] & prefix_mask[:, None, :]
    if window:
        seen_BxTxT &= abs(query - key) < window
    if segment_ids is not None:
        seen_BxTxT &= segment_ids[:, :, None] == segment_ids[:, None, :]
    return seen_BxTxT


def attend(
    query_BxTxNxH: jax.Array,
    key_BxTxKxH: jax.Array,
    value_BxTxKxH: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    prefix_mask: jax.Array | None = None,
    window: int = 0,
) -> jax.Array:
    """Softmax attention, scaled by 1 / sqrt(H); `mask_for` says who sees whom.

    Query head n reads key and value head n // (N / K), which are not repeated in memory. Logits and softmax
    are float32 whatever the inputs.

    Returns:
      [B, T, N, H] in the dtype of `value_BxTxKxH`.
    """
    B, T, N, H = query_BxTxNxH.shape
    K = key_BxTxKxH.shape[2]
    query_BxTxKxGxH = query_BxTxNxH.reshape(B, T, K, N // K, H) * H**-0.5
    seen_BxTxT = mask_for(T, segment_ids=segment_ids, prefix_mask=prefix_mask, window=window)
    # Dimensions of the large array in the order the matmul gives them, so that it is never transposed.
    logits_BxKxTxGxT = jnp.einsum(
        "btkgh,bskh->bktgs", query_BxTxKxGxH, key_BxTxKxH, preferred_element_type=jnp.float32
    )
    logits_BxKxTxGxT = jnp.where(seen_BxTxT[:, None, :, None, :], logits_BxKxTxGxT, MASKED)
    weights_BxKxTxGxT = jax.nn.softmax(logits_BxKxTxGxT, axis=-1).astype(value_BxTxKxH.dtype)
    mixed_BxTxKxGxH = jnp.einsum("bktgs,bskh->btkgh", weights_BxKxTxGxT, value_BxTxKxH)
    return mixed_BxTxKxGxH.reshape(B, T, N, H)

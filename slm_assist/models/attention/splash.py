"""Splash attention, JAX's Pallas kernel for TPUs (jax.experimental.pallas.ops.tpu.splash_attention).

Causal rows and windows are functions that the kernel evaluates, and blocks that they empty are never loaded;
segments are compared inside the kernel. A prefix differs from row to row: its mask [T, T] is then built for each row,
one byte a pair, and the kernel runs row after row, leaving out the blocks that this row empties.
"""

from typing import Any

import jax
import jax.numpy as jnp

from slm_assist.models.attention.reference import mask_for

LANES = 128
BLOCKS = (512, 256, LANES)


def attend(
    query_BxTxNxH: jax.Array,
    key_BxTxKxH: jax.Array,
    value_BxTxKxH: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    prefix_mask: jax.Array | None = None,
    window: int = 0,
    softcap: float = 0.0,
    interpret: bool = False,
) -> jax.Array:
    """`reference.attend` by splash, on one device's arrays, where `refusal` has nothing against them.

    With `interpret` it runs on any device, slowly: for tests.
    """
    T, N, H = query_BxTxNxH.shape[1:]
    # The kernel does not scale, and wants the heads first.
    heads_first = [x.transpose(0, 2, 1, 3) for x in (query_BxTxNxH * H**-0.5, key_BxTxKxH, value_BxTxKxH)]
    if prefix_mask is None:
        mixed_BxNxTxH = _static(*heads_first, segment_ids, _kernel(T, N, window, softcap, interpret))
    else:
        seen_BxTxT = mask_for(T, segment_ids=segment_ids, prefix_mask=prefix_mask, window=window)
        mixed_BxNxTxH = jax.vmap(lambda *row: _dynamic_kernel(row[3], softcap, interpret)(*row[:3]))(
            *heads_first, seen_BxTxT
        )
    return mixed_BxNxTxH.transpose(0, 2, 1, 3).astype(value_BxTxKxH.dtype)


def _static(query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array | None, kernel: Any):
    """[B, N, T, H] of rows that share one mask but for their segments."""
    from jax.experimental.pallas.ops.tpu import splash_attention

    if segment_ids is None:
        return jax.vmap(kernel)(query, key, value)
    segments = splash_attention.SegmentIds(q=segment_ids, kv=segment_ids)
    return jax.vmap(kernel)(query, key, value, segments)


def _kernel(length: int, heads: int, window: int, softcap: float, interpret: bool) -> Any:
    """The kernel of causal rows, with a window or without."""
    from jax.experimental.pallas.ops.tpu import splash_attention

    shape = (length, length)
    if window:
        mask = splash_attention.LocalMask(shape, (window - 1, 0), offset=0)
    else:
        mask = splash_attention.CausalMask(shape)
    return _made(splash_attention.MultiHeadMask([mask] * heads), length, False, softcap, interpret)


def _dynamic_kernel(seen_TxT: jax.Array, softcap: float, interpret: bool) -> Any:
    """The kernel of one row and its own mask, which all heads share."""
    return _made(seen_TxT[None], len(seen_TxT), True, softcap, interpret)


def _made(mask: Any, length: int, dynamic: bool, softcap: float, interpret: bool) -> Any:
    from jax.experimental.pallas.ops.tpu import splash_attention

    kernel = splash_attention.make_splash_mha(
        mask,
        block_sizes=_block_sizes(length),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap or None,
        interpret=interpret,
    )
    # JAX has made an array of this flag, and branches on it, which a trace cannot. (Its advice, to make the kernel
    # at compile time, fails on a mesh of devices that are only compiled for.)
    kernel.fwd_mask_info = kernel.fwd_mask_info._replace(is_dynamic_mask=dynamic)
    return kernel


def _block_sizes(length: int) -> Any:
    from jax.experimental.pallas.ops.tpu import splash_attention

    size = next(block for block in BLOCKS if length % block == 0)
    names = ("block_q", "block_kv", "block_kv_compute")
    names += ("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq", "block_kv_dq")
    return splash_attention.BlockSizes(**dict.fromkeys(names, size))


def refusal(head_dim: int, length: int, dtype: Any, softcap: float = 0.0) -> str:
    """Why splash does not take rows of `length` tokens with heads of `head_dim`, as a clause; empty if it does."""
    del head_dim, softcap  # any: a block holds whole heads
    if jnp.dtype(dtype) not in (jnp.dtype("bfloat16"), jnp.dtype("float32")):
        return f"it takes bfloat16 and float32, not {jnp.dtype(dtype).name}"
    if length % LANES:
        return f"it takes rows of a multiple of {LANES} tokens, not {length}"
    return ""


def unavailable(device: jax.Device, head_dim: int, length: int, dtype: Any, softcap: float = 0.0) -> str:
    """Why splash does not take such rows on `device`, as a clause; empty if it does."""
    if device.platform != "tpu":
        return f"it needs a TPU, and the device is {device.device_kind}"
    return refusal(head_dim, length, dtype, softcap)

"""cuDNN's flash attention, through `jax.nn.dot_product_attention`.

A causal row of one document needs no mask in memory. Segments and prefixes reach cuDNN as a bias [B, 1, T, T], read
in the forward and in the backward pass, where its gradient is computed too and thrown away; what that costs,
`experiments/benchmarks/attention.py` measures. cuDNN also has a layout with offsets for packed rows, without a bias;
JAX has it in a private module only, needs the number of segments at compile time, and strides keys by the number of
query heads, which is wrong with fewer key heads: it is not used.
"""

from typing import Any

import jax
import jax.numpy as jnp

from slm_assist.models.attention.reference import mask_for

IMPLEMENTATION = "cudnn"
DTYPES = (jnp.dtype("bfloat16"), jnp.dtype("float16"))


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
    """`reference.attend` by cuDNN, on one device's arrays, where `refusal` has nothing against them."""
    del softcap  # it is 0: others are refused
    options: dict[str, Any] = {"is_causal": prefix_mask is None}
    if segment_ids is None and prefix_mask is None:
        if window:  # counted as the keys before the query's own
            options["local_window_size"] = (window - 1, 0)
    else:
        # The window too: cuDNN takes no window beside a bias.
        rows = {"segment_ids": segment_ids, "prefix_mask": prefix_mask, "window": window}
        options["mask"] = mask_for(query_BxTxNxH.shape[1], **rows)[:, None]
    return jax.nn.dot_product_attention(
        query_BxTxNxH, key_BxTxKxH, value_BxTxKxH, implementation=IMPLEMENTATION, **options
    )


def refusal(head_dim: int, length: int, dtype: Any, softcap: float = 0.0) -> str:
    """Why cuDNN does not take rows of `length` tokens with heads of `head_dim`, as a clause; empty if it does."""
    if softcap:
        return "it has no soft cap on its logits (model.attention_softcap)"
    if jnp.dtype(dtype) not in DTYPES:
        return f"it takes bfloat16 and float16, not {jnp.dtype(dtype).name}"
    if head_dim % 8 or head_dim > 256:
        return f"it takes head_dim up to 256 in steps of 8, not {head_dim}"
    if length % 2:
        return f"its backward pass takes rows of an even length, not {length}"
    return ""


def unavailable(device: jax.Device, head_dim: int, length: int, dtype: Any, softcap: float = 0.0) -> str:
    """Why cuDNN does not take such rows on `device`, as a clause; empty if it does."""
    if device.platform not in ("gpu", "cuda") or "rocm" in getattr(device.client, "platform_version", ""):
        return f"it needs an NVIDIA GPU, and the device is {device.device_kind}"
    if reason := refusal(head_dim, length, dtype, softcap):
        return reason
    capability = float(getattr(device, "compute_capability", 0) or 0)
    if capability < 8:
        return f"it needs compute capability 8.0 or more, and {device.device_kind} has {capability}"
    if head_dim > 128 and capability < 9:
        return f"it takes head_dim {head_dim} from compute capability 9.0 on, and {device.device_kind} has {capability}"
    return _installation_refusal(head_dim, length, dtype)


def _installation_refusal(head_dim: int, length: int, dtype: Any) -> str:
    """What JAX itself says against this cuDNN, by tracing a packed row forward and backward."""
    row = jax.ShapeDtypeStruct((1, length, 1, head_dim), dtype)
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def total(query: jax.Array, segment_ids: jax.Array) -> jax.Array:
        return attend(query, query, query, segment_ids=segment_ids).astype(jnp.float32).sum()

    try:
        jax.eval_shape(jax.grad(total), row, ids)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        return "JAX says: " + " ".join(str(error).split())
    return ""

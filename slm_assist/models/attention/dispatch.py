"""Which backend computes attention, and how it runs on a mesh."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from slm_assist import sharding
from slm_assist.errors import UserError, one_of
from slm_assist.models.attention import cudnn, reference, splash
from slm_assist.models.config import ModelConfig

KERNELS = {"cudnn": cudnn, "splash": splash}
BACKENDS = ("xla", *KERNELS)
KEY = "compute.attention"


def attend(
    query_BxTxNxH: jax.Array,
    key_BxTxKxH: jax.Array,
    value_BxTxKxH: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    prefix_mask: jax.Array | None = None,
    window: int = 0,
    softcap: float = 0.0,
    backend: str = "xla",
) -> jax.Array:
    """Softmax attention, scaled by 1 / sqrt(H); `mask_for` says who sees whom.

    Query head n reads key and value head n // (N / K). Logits and softmax are float32 whatever the inputs. All
    backends give the same, gradients included, to rounding; a call with shapes that a kernel does not take (an
    evaluation on rows of an odd length) is computed by "xla".

    Args:
      query_BxTxNxH, key_BxTxKxH, value_BxTxKxH: of one dtype.
      segment_ids: int32 [B, T], or None where each row is one document.
      prefix_mask: bool [B, T], the tokens of a bidirectional prefix, or None.
      window: width of a sliding window; 0 for none.
      softcap: c in c * tanh(logits / c); 0 for none.
      backend: one of `BACKENDS`, from `choose`. A kernel must be on a device that has it.

    Returns:
      [B, T, N, H] in the dtype of `value_BxTxKxH`.
    """
    length, head_dim = query_BxTxNxH.shape[1], query_BxTxNxH.shape[3]
    rows, form = {"segment_ids": segment_ids, "prefix_mask": prefix_mask}, {"window": window, "softcap": softcap}
    if backend == "xla" or KERNELS[backend].refusal(head_dim, length, query_BxTxNxH.dtype, softcap):
        return reference.attend(query_BxTxNxH, key_BxTxKxH, value_BxTxKxH, **rows, **form)
    kernel = functools.partial(KERNELS[backend].attend, **form)
    return _per_shard(kernel, query_BxTxNxH, key_BxTxKxH, value_BxTxKxH, rows)


def _per_shard(
    kernel: Callable[..., jax.Array],
    query_BxTxNxH: jax.Array,
    key_BxTxKxH: jax.Array,
    value_BxTxKxH: jax.Array,
    rows: dict[str, jax.Array | None],
) -> jax.Array:
    """`kernel` on every device's rows and heads: XLA cannot split one, and would gather all of them."""
    mesh = sharding.ambient_mesh()
    if mesh is None or mesh.size == 1:
        return kernel(query_BxTxNxH, key_BxTxKxH, value_BxTxKxH, **rows)
    query_spec = sharding.spec(("batch", "length", "heads", "head_dim"), query_BxTxNxH.shape, mesh)
    key_spec = sharding.spec(("batch", "length", "kv_heads", "head_dim"), key_BxTxKxH.shape, mesh)
    query_axes, key_axes = query_spec[2], key_spec[2]
    group = query_BxTxNxH.shape[2] // key_BxTxKxH.shape[2]

    def run(query: jax.Array, key: jax.Array, value: jax.Array, rows: dict[str, jax.Array | None]) -> jax.Array:
        if query_axes != key_axes:  # too few key heads to split them: every device has all
            first = jax.lax.axis_index(query_axes) * query.shape[2]
            key, value = (_heads_read(x, first, query.shape[2], group) for x in (key, value))
        return kernel(query, key, value, **rows)

    specs = (query_spec, key_spec, key_spec, P(query_spec[0]))
    spread = jax.shard_map(run, in_specs=specs, out_specs=query_spec, check_vma=False)
    return spread(query_BxTxNxH, key_BxTxKxH, value_BxTxKxH, rows)


def _heads_read(x_BxTxKxH: jax.Array, first: jax.Array, count: int, group: int) -> jax.Array:
    """Those heads of keys or values that the `count` query heads from `first` on read, `group` of them each."""
    if group % count == 0:
        return jax.lax.dynamic_slice_in_dim(x_BxTxKxH, first // group, 1, axis=2)
    return jnp.take(x_BxTxKxH, (first + jnp.arange(count)) // group, axis=2)


def choose(name: str, device: jax.Device, config: ModelConfig, seq_len: int, dtype: Any) -> str:
    """The backend that `compute.attention` asks for, one of `BACKENDS`.

    Args:
      name: "auto" or one of `BACKENDS`. "auto" is the kernel of the device if it takes these rows, else "xla".
      device: where it will run; one of a topology that is compiled for will do.
      config: the model's shape.
      seq_len: T.
      dtype: compute dtype.

    Raises:
      UserError: there is no such backend, or the one that is named does not run there or does not take such rows.
    """
    one_of(KEY, name, ("auto", *BACKENDS))
    reasons = {
        kernel: module.unavailable(device, config.head_dim, seq_len, dtype, config.attention_softcap)
        for kernel, module in KERNELS.items()
        if name in ("auto", kernel)
    }
    if name == "auto":
        return next((kernel for kernel, reason in reasons.items() if not reason), "xla")
    if reasons.get(name):
        raise UserError(f"{KEY}={name}: {reasons[name]}; use {KEY}=auto")
    return name

"""What a decoder is made of: norms, attention, MLP, and the layer that joins them, as its config says."""

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from slm_assist.models import rope
from slm_assist.models.attention import attend, attend_cached
from slm_assist.models.config import ModelConfig
from slm_assist.sharding import constrain

ACTIVATIONS = {
    "gelu": jax.nn.gelu,
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}


class Context(NamedTuple):
    """What every layer needs to know of the row beside the hidden states.

    Attributes:
      rotary: sin and cos [B, T, dim / 2] of "global" layers, None where positions are learnt; `local_rotary`: of
        "local" ones.
      segment_ids, prefix_mask: as in `Transformer.apply`; segment_ids [B, S] of all slots where there is a cache.
      start: int32 [], the slot of the first token in the cache of keys and values; None without one.
      group: int32 [], which part of the cache is this layer's, where one array has that of several; else None.
    """

    rotary: tuple[jax.Array, jax.Array] | None
    local_rotary: tuple[jax.Array, jax.Array] | None
    segment_ids: jax.Array | None
    prefix_mask: jax.Array | None
    start: jax.Array | None = None
    group: jax.Array | None = None


def project(x: jax.Array, kernel: jax.Array, inputs: int = 1) -> jax.Array:
    """Contracts the last `inputs` dimensions of x [B, T, ...] with the first ones of `kernel`.

    As one matmul of two matrices: on CPUs the gradient of a batched one takes twice the time, because XLA
    transposes an activation for it.
    """
    lead, features = x.shape[: x.ndim - inputs], kernel.shape[inputs:]
    rows = x.reshape(math.prod(lead), -1)
    return (rows @ kernel.reshape(rows.shape[1], -1)).reshape(*lead, *features)


class Norm(nn.Module):
    """Over the last dimension, which is called `dim`, with float32 statistics, as `config.norm` says:

    "rms": x / rms(x) * scale (1910.07467). "rms_offset": the same with 1 + scale. "layer": (x - mean) / std * scale +
    bias (1607.06450).
    """

    config: ModelConfig
    dtype: Any
    dim: str = "embed"

    @nn.compact
    def __call__(self, x):
        kind, eps, shape = self.config.norm, self.config.norm_eps, (x.shape[-1],)
        init = nn.initializers.zeros if kind == "rms_offset" else nn.initializers.ones
        scale = self.param("scale", named(init, self.dim), shape).astype(jnp.float32)
        x = x.astype(jnp.float32)
        if kind == "layer":
            bias = self.param("bias", named(nn.initializers.zeros, self.dim), shape)
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
        if kind == "layer":
            return (x * inverse_rms * scale + bias.astype(jnp.float32)).astype(self.dtype)
        return (x * inverse_rms * (1 + scale if kind == "rms_offset" else scale)).astype(self.dtype)


class Attention(nn.Module):
    """Grouped-query self-attention."""

    config: ModelConfig
    dtype: Any
    backend: str
    kind: str

    @nn.compact
    def __call__(self, x_BxTxD, context: Context):
        c = self.config
        rotary = context.local_rotary if self.kind == "local" else context.rotary

        def heads(name, dim, count):
            kernel_DxNxH = self.param(name, named(fan_in(1), "embed", dim, "head_dim"), (c.d_model, count, c.head_dim))
            x_BxTxNxH = project(x_BxTxD, kernel_DxNxH.astype(self.dtype))
            if c.attention_bias:
                x_BxTxNxH += self.zeros(f"{name}_bias", (dim, "head_dim"), (count, c.head_dim))
            return constrain(x_BxTxNxH, "batch", "length", dim, "head_dim")

        def placed(name, dim, count):
            x_BxTxNxH = heads(name, dim, count)
            if c.qk_norm:
                x_BxTxNxH = Norm(c, self.dtype, "head_dim", name=f"{name}_norm")(x_BxTxNxH)
            return x_BxTxNxH if rotary is None else rope.rotate(x_BxTxNxH, rotary)

        query_BxTxNxH = placed("query", "heads", c.num_heads)
        if c.attention_scale:  # `attend` scales by 1 / sqrt(H)
            query_BxTxNxH *= jnp.asarray(c.attention_scale * math.sqrt(c.head_dim), self.dtype)
        key_BxTxKxH, value_BxTxKxH = (
            placed("key", "kv_heads", c.num_kv_heads),
            heads("value", "kv_heads", c.num_kv_heads),
        )
        mixed_BxTxNxH = self.mix(query_BxTxNxH, key_BxTxKxH, value_BxTxKxH, context)
        mixed_BxTxNxH = constrain(mixed_BxTxNxH, "batch", "length", "heads", "head_dim")
        write = named(fan_in(2, 1 / (2 * c.num_layers)), "heads", "head_dim", "embed")
        out_NxHxD = self.param("out", write, (c.num_heads, c.head_dim, c.d_model))
        out_BxTxD = project(mixed_BxTxNxH, out_NxHxD.astype(self.dtype), inputs=2)
        return out_BxTxD + self.zeros("out_bias", ("embed",), (c.d_model,)) if c.attention_out_bias else out_BxTxD

    def zeros(self, name, dims, shape):
        """A bias, in the compute dtype."""
        return self.param(name, named(nn.initializers.zeros, *dims), shape).astype(self.dtype)

    def mix(self, query_BxTxNxH, key_BxTxKxH, value_BxTxKxH, context: Context):
        """Attention, to what this call has or to all that the cache has, which then holds this call's too."""
        form = {"window": self.config.window if self.kind == "local" else 0, "softcap": self.config.attention_softcap}
        if context.start is None:
            rows = {"segment_ids": context.segment_ids, "prefix_mask": context.prefix_mask}
            return attend(query_BxTxNxH, key_BxTxKxH, value_BxTxKxH, backend=self.backend, **rows, **form)

        def stored(name, new_BxTxKxH):
            slots = self.variable("cache", name, lambda: None)
            new, place = new_BxTxKxH.transpose(0, 2, 1, 3), (0, 0, context.start, 0)
            if context.group is None:
                slots.value = jax.lax.dynamic_update_slice(slots.value, new, place)
                return slots.value
            slots.value = jax.lax.dynamic_update_slice(slots.value, new[None], (context.group, *place))
            return jax.lax.dynamic_index_in_dim(slots.value, context.group, keepdims=False)

        key_BxKxSxH, value_BxKxSxH = stored("key", key_BxTxKxH), stored("value", value_BxTxKxH)
        slots = {"start": context.start, "segment_ids": context.segment_ids}
        return attend_cached(query_BxTxNxH, key_BxKxSxH, value_BxKxSxH, **slots, **form)


class Mlp(nn.Module):
    """down(act(up(x))), or gated: down(act(gate(x)) * up(x)) (2002.05202)."""

    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self, x_BxTxD):
        c = self.config

        def biased(x_BxTxE, name, dim):
            if not c.mlp_bias:
                return x_BxTxE
            bias_E = self.param(f"{name}_bias", named(nn.initializers.zeros, dim), x_BxTxE.shape[-1:])
            return x_BxTxE + bias_E.astype(self.dtype)

        def widen(name):
            kernel_DxF = self.param(name, named(fan_in(1), "embed", "mlp"), (c.d_model, c.d_ff))
            x_BxTxF = biased(project(x_BxTxD, kernel_DxF.astype(self.dtype)), name, "mlp")
            return constrain(x_BxTxF, "batch", "length", "mlp")

        activation = ACTIVATIONS[c.activation]
        hidden_BxTxF = activation(widen("gate")) * widen("up") if c.gated_mlp else activation(widen("up"))
        write = named(fan_in(1, 1 / (2 * c.num_layers)), "mlp", "embed")
        down_FxD = self.param("down", write, (c.d_ff, c.d_model))
        return biased(project(hidden_BxTxF, down_FxD.astype(self.dtype)), "down", "embed")


class Layer(nn.Module):
    """Attention and MLP, each reading a normalised copy of the residual stream and adding to it.

    One after the other or, with `config.parallel_residual`, both reading what comes in; with `config.post_norms` what
    they add is normalised too.
    """

    config: ModelConfig
    dtype: Any
    backend: str
    kind: str

    @nn.compact
    def __call__(self, x_BxTxD, context: Context):
        c = self.config

        def norm(x_BxTxD, name):
            return Norm(c, self.dtype, name=name)(x_BxTxD)

        def added(y_BxTxD, name):
            return norm(y_BxTxD, f"{name}_post_norm") if c.post_norms else y_BxTxD

        attention, mlp = (
            Attention(c, self.dtype, self.backend, self.kind, name="attention"),
            Mlp(c, self.dtype, name="mlp"),
        )
        mixed_BxTxD = added(attention(norm(x_BxTxD, "attention_norm"), context), "attention")
        if c.parallel_residual:
            x_BxTxD = x_BxTxD + mixed_BxTxD + added(mlp(norm(x_BxTxD, "mlp_norm")), "mlp")
        else:
            x_BxTxD = constrain(x_BxTxD + mixed_BxTxD, "batch", "length", "act_embed")
            x_BxTxD += added(mlp(norm(x_BxTxD, "mlp_norm")), "mlp")
        return constrain(x_BxTxD, "batch", "length", "act_embed")


def named(init, *names: str):
    """An initialiser whose parameter carries the `names` of its dimensions (`sharding.RULES`)."""
    return nn.with_logical_partitioning(init, names)


def fan_in(inputs: int, variance: float = 1.0):
    """Truncated normal of variance `variance / fan_in`; the first `inputs` dimensions are the inputs."""

    def init(key, shape, dtype=jnp.float32):
        return nn.initializers.variance_scaling(
            variance,
            "fan_in",
            "truncated_normal",
            in_axis=tuple(range(inputs)),
            out_axis=tuple(range(inputs, len(shape))),
        )(key, shape, dtype)

    return init

"""The decoder: a Linen module, and the pure functions that the rest of the code calls."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from slm_assist.errors import UserError, one_of
from slm_assist.models.attention import BACKENDS, attend
from slm_assist.models.config import ModelConfig
from slm_assist.sharding import constrain

Params = dict[str, Any]

ACTIVATIONS = {"gelu": jax.nn.gelu, "silu": jax.nn.silu, "relu": jax.nn.relu}
REMAT = ("none", "full", "dots")

# Logits at the start have about this standard deviation, so that the first loss is ln V + 0.03.
INITIAL_LOGITS = 0.25


class Context(NamedTuple):
    """What every layer needs to know of the row beside the hidden states."""

    sin_BxTxH: jax.Array
    cos_BxTxH: jax.Array
    segment_ids: jax.Array | None
    prefix_mask: jax.Array | None


def rope_tables(positions_BxT: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """sin and cos [B, T, head_dim / 2] of the rotary angles (RoFormer, 2104.09864), float32."""
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle_BxTxH = positions_BxT[..., None].astype(jnp.float32) * frequency
    return jnp.sin(angle_BxTxH), jnp.cos(angle_BxTxH)


def rotate(x_BxTxNxH: jax.Array, context: Context) -> jax.Array:
    """Rotates the pairs (i, i + H/2) of every head by the angles of its position."""
    sin, cos = context.sin_BxTxH[:, :, None], context.cos_BxTxH[:, :, None]
    first, second = jnp.split(x_BxTxNxH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BxTxNxH.dtype)


def project(x: jax.Array, kernel: jax.Array, inputs: int = 1) -> jax.Array:
    """Contracts the last `inputs` dimensions of x [B, T, ...] with the first ones of `kernel`.

    As one matmul of two matrices: on CPUs the gradient of a batched one takes twice the time, because XLA
    transposes an activation for it.
    """
    lead, features = x.shape[: x.ndim - inputs], kernel.shape[inputs:]
    rows = x.reshape(math.prod(lead), -1)
    return (rows @ kernel.reshape(rows.shape[1], -1)).reshape(*lead, *features)


class RMSNorm(nn.Module):
    """x / rms(x) * scale, with float32 statistics (1910.07467)."""

    eps: float
    dtype: Any

    @nn.compact
    def __call__(self, x_BxTxD):
        scale_D = self.param("scale", named(nn.initializers.ones, "embed"), (x_BxTxD.shape[-1],))
        x_BxTxD = x_BxTxD.astype(jnp.float32)
        inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x_BxTxD), axis=-1, keepdims=True) + self.eps)
        return (x_BxTxD * inverse_rms * scale_D.astype(jnp.float32)).astype(self.dtype)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    config: ModelConfig
    dtype: Any
    backend: str
    window: int

    @nn.compact
    def __call__(self, x_BxTxD, context: Context):
        c = self.config

        def heads(name, dim, count):
            kernel_DxNxH = self.param(name, named(fan_in(1), "embed", dim, "head_dim"), (c.d_model, count, c.head_dim))
            x_BxTxNxH = project(x_BxTxD, kernel_DxNxH.astype(self.dtype))
            return constrain(x_BxTxNxH, "batch", "length", dim, "head_dim")

        mixed_BxTxNxH = attend(
            rotate(heads("query", "heads", c.num_heads), context),
            rotate(heads("key", "kv_heads", c.num_kv_heads), context),
            heads("value", "kv_heads", c.num_kv_heads),
            segment_ids=context.segment_ids,
            prefix_mask=context.prefix_mask,
            window=self.window,
            backend=self.backend,
        )
        mixed_BxTxNxH = constrain(mixed_BxTxNxH, "batch", "length", "heads", "head_dim")
        write = named(fan_in(2, 1 / (2 * c.num_layers)), "heads", "head_dim", "embed")
        out_NxHxD = self.param("out", write, (c.num_heads, c.head_dim, c.d_model))
        return project(mixed_BxTxNxH, out_NxHxD.astype(self.dtype), inputs=2)


class Mlp(nn.Module):
    """down(act(up(x))), or gated: down(act(gate(x)) * up(x)) (2002.05202)."""

    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self, x_BxTxD):
        c = self.config

        def widen(name):
            kernel_DxF = self.param(name, named(fan_in(1), "embed", "mlp"), (c.d_model, c.d_ff))
            return constrain(project(x_BxTxD, kernel_DxF.astype(self.dtype)), "batch", "length", "mlp")

        activation = ACTIVATIONS[c.activation]
        hidden_BxTxF = activation(widen("gate")) * widen("up") if c.gated_mlp else activation(widen("up"))
        write = named(fan_in(1, 1 / (2 * c.num_layers)), "mlp", "embed")
        down_FxD = self.param("down", write, (c.d_ff, c.d_model))
        return project(hidden_BxTxF, down_FxD.astype(self.dtype))


class Layer(nn.Module):
    """Attention and MLP, each reading a normalised copy of the residual stream and adding to it."""

    config: ModelConfig
    dtype: Any
    backend: str
    kind: str

    @nn.compact
    def __call__(self, x_BxTxD, context: Context):
        c = self.config
        norm = functools.partial(RMSNorm, c.norm_eps, self.dtype)
        window = c.window if self.kind == "local" else 0
        y_BxTxD = norm(name="attention_norm")(x_BxTxD)
        x_BxTxD += Attention(c, self.dtype, self.backend, window, name="attention")(y_BxTxD, context)
        x_BxTxD = constrain(x_BxTxD, "batch", "length", "act_embed")
        y_BxTxD = norm(name="mlp_norm")(x_BxTxD)
        x_BxTxD += Mlp(c, self.dtype, name="mlp")(y_BxTxD)
        return constrain(x_BxTxD, "batch", "length", "act_embed")


class Group(nn.Module):
    """One repetition of the pattern of layer kinds: the body of the scan.

    It carries the hidden states, the number of the repetition, and the hidden states after the layers `taps` once they
    have passed: kept in the carry there is one of each, where a result of the scan would be one for every repetition.
    """

    config: ModelConfig
    dtype: Any
    backend: str
    remat: str
    taps: tuple[int, ...]

    @nn.compact
    def __call__(self, carry, context: Context):
        x_BxTxD, index, tapped = carry
        size = len(self.config.pattern)
        for position, kind in enumerate(self.config.pattern):
            layer = rematerialised(Layer, self.remat, in_scan=True)
            x_BxTxD = layer(self.config, self.dtype, self.backend, kind, name=f"layer_{position}")(x_BxTxD, context)
            for tap in self.taps:
                if tap % size == position:
                    tapped = tapped | {tap: jnp.where(index == tap // size, x_BxTxD, tapped[tap])}
        return (x_BxTxD, index + 1 if tapped else index, tapped), None


class Decoder(nn.Module):
    """Tokens to hidden states. Use it through `Transformer`."""

    config: ModelConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    backend: str = "xla"

    @nn.compact
    def __call__(self, tokens_BxT, segment_ids, positions_BxT, prefix_mask, taps):
        c = self.config
        rows = nn.initializers.variance_scaling(INITIAL_LOGITS**2, "fan_in", "truncated_normal", in_axis=1, out_axis=0)
        embedding_VxD = self.param("embedding", named(rows, "vocab", "embed"), (c.vocab_size, c.d_model))
        if not c.tie_embeddings:  # `Transformer.head` reads it
            columns = fan_in(1, INITIAL_LOGITS**2)
            self.param("head", named(columns, "embed", "vocab"), (c.d_model, c.vocab_size))
        # Whole rows on every device before the look-up: else XLA replicates what was looked up.
        table_VxD = constrain(embedding_VxD.astype(self.dtype), "vocab", "act_embed")
        # A token outside the vocabulary gives NaN, which stops a run; clamping would hide it.
        x_BxTxD = jnp.take(table_VxD, tokens_BxT, axis=0, mode="fill")
        if c.embed_scale:
            x_BxTxD *= jnp.asarray(c.d_model**0.5, self.dtype)
        x_BxTxD = constrain(x_BxTxD, "batch", "length", "act_embed")
        tables = rope_tables(positions_BxT, c.head_dim, c.rope_theta)
        context = Context(*tables, segment_ids, prefix_mask)
        layers = self.scanned if c.scan_layers else self.unrolled
        x_BxTxD, tapped = layers(x_BxTxD, context, taps)
        return RMSNorm(c.norm_eps, self.dtype, name="final_norm")(x_BxTxD), tapped

    def scanned(self, x_BxTxD, context, taps):
        """All layers as a scan over groups of parameters stacked along "layers"."""
        c = self.config
        scan = nn.scan(
            Group,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=c.num_groups,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        start = (x_BxTxD, jnp.int32(0) if taps else None, {tap: jnp.zeros_like(x_BxTxD) for tap in taps})
        (x_BxTxD, _, tapped), _ = scan(c, self.dtype, self.backend, self.remat, taps, name="groups")(start, context)
        return x_BxTxD, tapped

    def unrolled(self, x_BxTxD, context, taps):
        """All layers one after the other, each with its own parameters."""
        c, tapped = self.config, {}
        for index in range(c.num_layers):
            layer = rematerialised(Layer, self.remat, in_scan=False)
            kind = c.pattern[index % len(c.pattern)]
            x_BxTxD = layer(c, self.dtype, self.backend, kind, name=f"layer_{index}")(x_BxTxD, context)
            if index in taps:
                tapped[index] = x_BxTxD
        return x_BxTxD, tapped


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


def rematerialised(module: type[nn.Module], remat: str, *, in_scan: bool) -> type[nn.Module]:
    """`module` with its activations kept ("none"), recomputed ("full") or, "dots", all recomputed but the
    results of matmuls with parameters."""
    if remat == "none":
        return module
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
    return nn.remat(module, policy=policy, prevent_cse=not in_scan)


@dataclasses.dataclass(frozen=True)
class Transformer:
    """A decoder as pure functions of its parameters, a nested dict of float32 arrays.

    Attributes:
      config: the shape.
      dtype: compute dtype; parameters are created in float32 and cast where they are used.
      remat: "none", "full" or "dots", see `rematerialised`.
      attention: the backend of attention, as `attention.choose` gives it.
    """

    config: ModelConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    attention: str = "xla"

    def __post_init__(self):
        one_of("remat", self.remat, REMAT)
        one_of("attention", self.attention, BACKENDS)

    @property
    def module(self) -> Decoder:
        return Decoder(self.config, self.dtype, self.remat, self.attention)

    def init(self, key: jax.Array) -> Params:
        """New parameters; a pure function of `key` that can be jitted or shape-evaluated."""
        return nn.meta.unbox(self._boxed(key))

    def _boxed(self, key: jax.Array) -> Any:
        token = jnp.zeros((1, 1), jnp.int32)
        # The parameters do not depend on how attention is computed, and one token is no row for a kernel.
        plain = dataclasses.replace(self, attention="xla").module
        return plain.init(key, token, None, token, None, ())["params"]

    def apply(
        self,
        params: Params,
        tokens: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        prefix_mask: jax.Array | None = None,
        taps: tuple[int, ...] = (),
    ) -> jax.Array | tuple[jax.Array, dict[int, jax.Array]]:
        """Hidden states [B, T, D] after the final norm, in the compute dtype.

        Args:
          params: as `init` returns them, in float32 or bfloat16.
          tokens: int32 [B, T].
          segment_ids: int32 [B, T], 0 for padding: a token attends only within its segment.
          positions: int32 [B, T] for the rotary embedding, by default 0, 1, ... along the row.
          prefix_mask: bool [B, T], tokens that see each other both ways within their segment.
          taps: layers, counted from 0, whose output (the residual stream, not normalised) is also wanted.

        Returns:
          hidden, or (hidden, {layer: [B, T, D]}) where `taps` are given.

        Raises:
          UserError: an argument has the wrong shape, or a tap names a layer that does not exist.
        """
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise UserError(f"tokens are {tokens.dtype}{list(tokens.shape)}: give integers of shape [B, T]")
        rows = {"segment_ids": segment_ids, "positions": positions, "prefix_mask": prefix_mask}
        for name, value in rows.items():
            if value is not None and value.shape != tokens.shape:
                raise UserError(f"{name} {list(value.shape)} and tokens {list(tokens.shape)} differ in shape")
        for tap in taps:
            if not 0 <= tap < self.config.num_layers:
                raise UserError(f"taps={tuple(taps)}: the layers are 0 to {self.config.num_layers - 1}")
        if positions is None:
            positions = jnp.arange(tokens.shape[1])[None]
        hidden, tapped = self.module.apply({"params": params}, tokens, segment_ids, positions, prefix_mask, tuple(taps))
        return (hidden, tapped) if taps else hidden

    def head(self, params: Params) -> jax.Array:
        """The output projection [d, V]; logits are softcap(logit_scale * hidden @ head)."""
        return params["embedding"].T if self.config.tie_embeddings else params["head"]

    def shapes(self) -> Params:
        """`init` as a tree of shapes; allocates nothing."""
        return nn.meta.unbox(_boxed_shapes(self.config))

    def logical_axes(self) -> Params:
        """A tree like the parameters with the tuple of dimension names of each (`sharding.RULES`)."""

        def is_box(x):
            return isinstance(x, nn.meta.AxisMetadata)

        return jax.tree.map(lambda box: box.names, _boxed_shapes(self.config), is_leaf=is_box)

    def num_params(self) -> int:
        return sum(x.size for x in jax.tree.leaves(self.shapes()))


@functools.lru_cache
def _boxed_shapes(config: ModelConfig) -> Any:
    """Shapes and dimension names of the parameters; a run asks for them many times, and tracing takes a while."""
    model = Transformer(config)
    return jax.eval_shape(model._boxed, jax.random.key(0))


def unstack(params: Params, config: ModelConfig) -> Params:
    """Parameters of a scanned model -> those of the same model with `scan_layers=False`."""
    rest = {name: value for name, value in params.items() if name != "groups"}
    size = len(config.pattern)
    for index in range(config.num_layers):
        stacked = params["groups"][f"layer_{index % size}"]
        rest[f"layer_{index}"] = jax.tree.map(lambda x, at=index // size: x[at], stacked)
    return rest


def stack(params: Params, config: ModelConfig) -> Params:
    """The inverse of `unstack`."""
    layers = [params[f"layer_{index}"] for index in range(config.num_layers)]
    rest = {name: value for name, value in params.items() if not name.startswith("layer_")}
    size = len(config.pattern)
    groups = {
        f"layer_{position}": jax.tree.map(lambda *xs: jnp.stack(xs), *layers[position::size])
        for position in range(size)
    }
    return {**rest, "groups": groups}

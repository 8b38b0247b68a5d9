"""The decoder: a Linen module, and the pure functions that the rest of the code calls."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from slm_assist.errors import UserError, one_of
from slm_assist.models import rope
from slm_assist.models.attention import BACKENDS
from slm_assist.models.config import ModelConfig
from slm_assist.models.layers import Context, Layer, Norm, fan_in, named
from slm_assist.sharding import constrain

Params = dict[str, Any]

REMAT = ("none", "full", "dots")

# Logits at the start have about this standard deviation, so that the first loss is ln V + 0.03.
INITIAL_LOGITS = 0.25


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
        size, context = len(self.config.pattern), context._replace(group=index)
        for position, kind in enumerate(self.config.pattern):
            layer = rematerialised(Layer, self.remat, in_scan=True)
            x_BxTxD = layer(self.config, self.dtype, self.backend, kind, name=f"layer_{position}")(x_BxTxD, context)
            for tap in self.taps:
                if tap % size == position:
                    tapped = tapped | {tap: jnp.where(index == tap // size, x_BxTxD, tapped[tap])}
        return (x_BxTxD, None if index is None else index + 1, tapped), None


class Decoder(nn.Module):
    """Tokens to hidden states. Use it through `Transformer`."""

    config: ModelConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    backend: str = "xla"

    @nn.compact
    def __call__(self, tokens_BxT, segment_ids, positions_BxT, prefix_mask, taps, start=None):
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
        if c.positions == "learned":
            table_PxD = self.param("positions", named(rows, "positions", "embed"), (c.max_positions, c.d_model))
            x_BxTxD += jnp.take(table_PxD.astype(self.dtype), positions_BxT, axis=0, mode="fill")
        x_BxTxD = constrain(x_BxTxD, "batch", "length", "act_embed")
        context = Context(*self.rotary(positions_BxT), segment_ids, prefix_mask, start)
        layers = self.scanned if c.scan_layers else self.unrolled
        x_BxTxD, tapped = layers(x_BxTxD, context, taps)
        return Norm(c, self.dtype, name="final_norm")(x_BxTxD), tapped

    def rotary(self, positions_BxT):
        """sin and cos for "global" and for "local" layers; None where positions are learnt."""
        c = self.config
        if c.positions == "learned":
            return None, None
        dim = c.rotary_dim or c.head_dim
        table = rope.tables(positions_BxT, dim, c.rope_theta, c.rope_scaling)
        return table, rope.tables(positions_BxT, dim, c.local_rope_theta) if c.local_rope_theta else table

    def scanned(self, x_BxTxD, context, taps):
        """All layers as a scan over groups of parameters stacked along "layers"."""
        c = self.config
        scan = nn.scan(
            Group,
            variable_axes={"params": 0},
            variable_carry="cache",  # each group writes its part: sliced and put together, all of it would be copied
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=c.num_groups,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        counted = taps or context.start is not None
        start = (x_BxTxD, jnp.int32(0) if counted else None, {tap: jnp.zeros_like(x_BxTxD) for tap in taps})
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
          positions: int32 [B, T], places in the document, by default 0, 1, ... along the row.
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

    def init_cache(self, rows: int, slots: int) -> Params:
        """Empty keys and values of `slots` tokens in each of `rows` rows, in the compute dtype, for `apply_cached`."""
        c = self.config
        shape = (rows, c.num_kv_heads, slots, c.head_dim)
        stacked = (c.num_groups, *shape) if c.scan_layers else shape

        def layer() -> Params:  # arrays of its own, so that the cache can be donated
            return {"attention": {name: jnp.zeros(stacked, self.dtype) for name in ("key", "value")}}

        if c.scan_layers:
            return {"groups": {f"layer_{position}": layer() for position in range(len(c.pattern))}}
        return {f"layer_{index}": layer() for index in range(c.num_layers)}

    def apply_cached(
        self,
        params: Params,
        cache: Params,
        tokens: jax.Array,
        *,
        start: jax.Array,
        segment_ids: jax.Array,
        positions: jax.Array,
    ) -> tuple[jax.Array, Params]:
        """`apply` of T tokens that follow those in the cache: (hidden [B, T, D], the cache with theirs).

        Args:
          cache: as `init_cache` or an earlier call gave it, of S slots.
          tokens: int32 [B, T].
          start: int32 [], the slot of the first of them, the same in all rows.
          segment_ids: int32 [B, S], of all slots: a token sees those of its own segment up to its own slot. So prompts
            of different lengths end at one slot, with another segment in front.
          positions: int32 [B, T], places of these tokens in the document.
        """
        variables = {"params": params, "cache": cache}
        (hidden, _), changed = self.module.apply(
            variables, tokens, segment_ids, positions, None, (), start, mutable=["cache"]
        )
        return hidden, changed["cache"]

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

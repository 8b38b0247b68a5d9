"""A student that starts from a small LM's weights: its parameters, cloned to another width and depth.

One rule for all tensors, by the names of their dimensions (`Transformer.logical_axes()`): a kernel consumes its first
dimension and produces the others. Every index of a grown dimension is a clone of an index of the parent's. A producer
is copied to the clones, a consumer is copied and divided by their number, and sums over the dimension stay what they
were (Net2Net, HyperCloning 2409.12903, LEMON 2310.07999):

| dimension | clones |
|---|---|
| mlp | in turn: i -> i mod F |
| kv_heads | in turn; attention reads them, so nothing is divided |
| heads | the query heads of a kv head are dealt in turn to all query heads that read its clones |
| embed | of the residual stream, in turn: k whole copies. The rest stays zero in it: zero producers, new consumers |
| layers | repeats of the pattern: "interleave", "stack" (G_stack, 2405.15319), or "zero", with outputs of zero |

The stream is scaled so that its mean square is the parent's, which keeps RMSNorm's epsilon in proportion; what that
and the copies change is mended in the scales of the norms, and in the final one for a tied head.

Clones get equal gradients and would stay equal for ever. Unequal shares of a consumer are not enough: they scale the
gradients of the clones, and Adam ignores the scale of a gradient. So consumers get noise of their own in every element,
whose sum over the clones of an index is zero.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slm_assist import sharding
from slm_assist.errors import UserError, one_of
from slm_assist.models import ModelConfig, Transformer, stack, unstack
from slm_assist.models.transformer import Params

DEPTHS = ("zero", "stack", "interleave")

# Fields that change the function whatever the parameters are.
SAME = (
    "vocab_size", "head_dim", "activation", "gated_mlp", "rope_theta", "norm_eps", "logit_softcap", "pattern", "window",
    "norm", "attention_bias", "attention_out_bias", "mlp_bias", "qk_norm", "post_norms", "parallel_residual",
    "positions", "max_positions", "rotary_dim", "rope_scaling", "local_rope_theta", "attention_scale",
    "attention_softcap",
)  # fmt: skip
GROWING = ("num_layers", "d_model", "d_ff", "num_heads", "num_kv_heads")
CURES = {  # by default the size says it
    "vocab_size": "give both one data.vocabulary",
    "head_dim": "set model.head_dim={old}",
}


def check(old: ModelConfig, new: ModelConfig, *, depth: str, noise: float) -> str:
    """What is to be said of growing a model of the shape `new` from one of the shape `old`.

    Args:
      old, new: the parent's (`grow.helper`) and the student's shape.
      depth, noise: as in `grow`.

    Returns:
      "" where the student's logits are the parent's, else a sentence on why they are not.

    Raises:
      UserError: it cannot be grown.
    """
    one_of("grow.depth", depth, DEPTHS)
    if not (math.isfinite(noise) and noise >= 0):
        raise UserError(f"grow.noise={noise}: it multiplies the rms of a weight, use 0 (none) or more")
    for name in SAME:
        ours, theirs = getattr(new, name), getattr(old, name)
        if ours != theirs:
            cure = CURES.get(name, "choose a model.size with {name}={old}").format(name=name, old=theirs)
            raise UserError(
                f"model: {name}={ours} and grow.helper has {theirs}: its weights would compute something else; "
                f"{cure}, or another grow.helper"
            )
    if new.tie_embeddings and not old.tie_embeddings:
        raise UserError(
            "model: tie_embeddings=True and grow.helper has a head of its own: one matrix cannot be both; "
            "choose a model.size with tie_embeddings=False, or another grow.helper"
        )
    for name in GROWING:
        ours, theirs = getattr(new, name), getattr(old, name)
        if ours < theirs:
            raise UserError(
                f"model.{name}={ours} is below grow.helper's {theirs}: weights would be lost; "
                f"use {theirs} or more, or a smaller grow.helper"
            )
    if new.norm == "layer" and new.d_model % old.d_model:
        raise UserError(
            f"model.d_model={new.d_model} is no multiple of grow.helper's {old.d_model}: its norms take a mean over "
            "the stream, which dimensions that stay zero would move; use "
            f"model.d_model={-(-new.d_model // old.d_model) * old.d_model}"
        )
    _check_heads(old, new)
    if depth == "zero" or new.num_groups == old.num_groups:
        return ""
    return (
        f"the student's logits are not those of grow.helper: grow.depth={depth!r} runs its layers more than once, "
        "and each run changes the hidden states again"
    )


def _check_heads(old: ModelConfig, new: ModelConfig) -> None:
    """A kv head's clones, taken together, must be read by as many query heads as the parent's."""
    group, readers = old.num_heads // old.num_kv_heads, new.num_heads // new.num_kv_heads
    clones = new.num_kv_heads // old.num_kv_heads  # of the kv head that has fewest
    if clones * readers < group:
        least = -(-group // clones) * new.num_kv_heads
        raise UserError(
            f"model.num_heads={new.num_heads} with model.num_kv_heads={new.num_kv_heads} leaves a kv head of "
            f"grow.helper {clones * readers} of the {group} query heads that read it: weights would be lost; "
            f"use model.num_heads={least} or more, or model.num_kv_heads={old.num_kv_heads}"
        )


class Dimension(NamedTuple):
    """How a dimension of length n grows, by index of the grown one.

    Attributes:
      source: int [n], the parent's index that it is a clone of.
      copies: int [n], how many clones that index has.
      next: int [n], the next clone of the same index, the first after the last.
      fresh: bool [n], whether it is no clone but new.
    """

    source: np.ndarray
    copies: np.ndarray
    next: np.ndarray
    fresh: np.ndarray

    @classmethod
    def of(cls, source: np.ndarray, fresh: np.ndarray | None = None) -> "Dimension":
        fresh = np.zeros(len(source), bool) if fresh is None else fresh
        kind = np.where(fresh, source.max() + 1 + np.arange(len(source)), source)
        order = np.argsort(kind, kind="stable")
        _, first, inverse, counts = np.unique(kind[order], return_index=True, return_inverse=True, return_counts=True)
        place = np.arange(len(source))
        after = np.where(place + 1 < first[inverse] + counts[inverse], place + 1, first[inverse])
        copies, following = np.empty_like(place), np.empty_like(place)
        copies[order], following[order] = counts[inverse], order[after]
        return cls(source, copies, following, fresh)


def dimensions(old: ModelConfig, new: ModelConfig, depth: str) -> dict[str, Dimension]:
    """How the named dimensions grow; those that are not named stay as they are."""
    kv_heads = np.arange(new.num_kv_heads) % old.num_kv_heads
    group = old.num_heads // old.num_kv_heads
    read = np.repeat(kv_heads, new.num_heads // new.num_kv_heads)
    heads = np.empty_like(read)
    for kv_head in range(old.num_kv_heads):
        (readers,) = np.nonzero(read == kv_head)
        heads[readers] = kv_head * group + np.arange(len(readers)) % group
    embed = np.arange(new.d_model)
    groups = np.arange(new.num_groups)
    return {
        "mlp": Dimension.of(np.arange(new.d_ff) % old.d_ff),
        "kv_heads": Dimension.of(kv_heads),
        "heads": Dimension.of(heads),
        "embed": Dimension.of(embed % old.d_model, embed >= new.d_model // old.d_model * old.d_model),
        "layers": Dimension.of(
            groups % old.num_groups if depth == "stack" else groups * old.num_groups // new.num_groups
        ),
    }


@functools.partial(jax.jit, static_argnames=("old", "new", "depth", "noise"))
def grow(
    params: Params,
    old: ModelConfig,
    new: ModelConfig,
    *,
    depth: str = "zero",
    noise: float = 1.0,
    key: jax.Array,
) -> Params:
    """Parameters of `Transformer(new)` from those of `Transformer(old)`; jitted, and fit to be within another `jit`
    whose `out_shardings` lay the result out.

    Args:
      params: the parent's, of any float dtype.
      depth: where the layers go that the student has beyond the parent's, by repeats of the pattern. "zero": after the
        one they repeat, writing nothing at first; "interleave": there, as full copies; "stack": the parent's layers
        over and over.
      noise: standard deviation of what tells clones apart, as a part of the rms of the matrix it is added to (per
        layer). At 0 clones stay equal, and the student learns no more than the parent can; at 0.01 they part so slowly
        that a run of 20 tokens a parameter ends behind one without help (experiments/evidence/).
      key: for the noise and for new weights.

    Returns:
      float32 arrays, laid out as `new.scan_layers` says.

    Raises:
      UserError: as `check`.
    """
    check(old, new, depth=depth, noise=noise)
    if not old.scan_layers:
        params = stack(params, old)
    if old.tie_embeddings and not new.tie_embeddings:
        params = {**params, "head": params["embedding"].T}
    model = Transformer(dataclasses.replace(new, scan_layers=True))
    growth = Growth(dimensions(old, new, depth), stream_scale(old, new), depth == "zero", noise, new.post_norms)
    init_key, noise_key = jax.random.split(key)
    fresh = model.init(init_key) if growth.dims["embed"].fresh.any() else model.shapes()
    structure = jax.tree.structure(fresh)
    keys = jax.tree.unflatten(structure, list(jax.random.split(noise_key, (structure.num_leaves, new.num_groups))))
    params = _norms(params, old, 1.0)

    def widened(path, names, *arrays):
        return widen(growth, _part(path), names, *arrays)

    axes = model.logical_axes()
    grown = jax.tree_util.tree_map_with_path(widened, axes, params, fresh, keys, is_leaf=sharding.is_names)
    embedding, final_norm = ends(old, new)
    grown["embedding"] *= embedding
    grown["final_norm"] = jax.tree.map(lambda x: x * final_norm, grown["final_norm"])
    grown = _norms(grown, new, -1.0)
    return grown if new.scan_layers else unstack(grown, new)


def _norms(params: Params, config: ModelConfig, sign: float) -> Params:
    """Parameters whose norms say their scale, where the model's say how much it is above 1 (and back, with -1)."""
    if config.norm != "rms_offset":
        return params

    def one(path, x):
        return x.astype(jnp.float32) + sign if _part(path) in (NORM, POST_NORM) else x

    return jax.tree_util.tree_map_with_path(one, params)


MATRIX, BIAS, NORM, POST_NORM = "matrix", "bias", "norm", "post_norm"
INSIDE = "inside"  # what stands between normalised values or inside a head, and is only cloned


def _part(path: Any) -> str:
    """What a parameter is, by its name."""
    *_, owner, name = ("", *(key.key for key in path))
    if owner.endswith("_norm"):
        inside = name == "bias" or owner in ("query_norm", "key_norm")
        return INSIDE if inside else POST_NORM if "post" in owner else NORM
    return BIAS if name.endswith("bias") else MATRIX


def stream_scale(old: ModelConfig, new: ModelConfig) -> float:
    """Factor on the residual stream beside which the dimensions that stay zero leave its mean square as it was."""
    return math.sqrt(new.d_model / (new.d_model // old.d_model * old.d_model))


def ends(old: ModelConfig, new: ModelConfig) -> tuple[float, float]:
    """Factors on the embedding and on the final norm, where the two configs scale embeddings or logits otherwise.

    The embedding e becomes e * stream_scale * embedding. A tied head reads k copies of that from the final norm's
    output, which has to make up for it; a head of its own has been divided already.
    """
    scales = [math.sqrt(c.d_model) if c.embed_scale else 1.0 for c in (old, new)]
    embedding, final_norm = scales[0] / scales[1], old.logit_scale / new.logit_scale
    if new.tie_embeddings:
        final_norm /= new.d_model // old.d_model * stream_scale(old, new) * embedding
    return embedding, final_norm


class Growth(NamedTuple):
    """What `widen` needs to know of all parameters.

    Attributes:
      dims: `dimensions`.
      stream: `stream_scale`.
      silent: what a layer that repeats the one before it writes to the stream is zero.
      noise: as in `grow`.
      post_norms: what a layer writes is normalised: then it is silent by the norm's scale, and not by its matrices,
        which could not learn from zero.
    """

    dims: dict[str, Dimension]
    stream: float
    silent: bool
    noise: float
    post_norms: bool


def widen(
    growth: Growth, part: str, names: sharding.Axes, x: jax.Array, new_x: jax.Array, keys: jax.Array
) -> jax.Array:
    """A parameter with the dimensions `names`, grown along those of them that grow.

    Args:
      part: what it is, `_part`.
      new_x: a new parameter of the grown shape; looked at only where a dimension that it consumes has fresh indices.
      keys: for the noise, one a layer.
    """
    if "layers" not in names:
        return widen_one(growth, part, names, x.astype(jnp.float32), new_x, keys[0], True)
    source = growth.dims["layers"].source
    speaks = np.diff(source, prepend=-1) != 0 if growth.silent else np.ones(len(source), bool)

    def layer(at):
        source, index, key, speaks = at
        new_layer = new_x[index] if growth.dims["embed"].fresh.any() else None
        return widen_one(growth, part, names[1:], x[source].astype(jnp.float32), new_layer, key, speaks)

    # One after the other: what is gathered from other devices on the way is a layer's.
    return jax.lax.map(layer, (source, np.arange(len(source)), keys, speaks))


def widen_one(
    growth: Growth,
    part: str,
    names: sharding.Axes,
    x: jax.Array,
    new_x: jax.Array | None,
    key: jax.Array,
    speaks: jax.Array | bool,
) -> jax.Array:
    """`widen` of a matrix or vector, of one layer where it is in layers.

    Args:
      speaks: whether it may write to the stream, beside noise that sums to zero.
      Others: as in `widen`.
    """
    dims = growth.dims
    for axis, name in enumerate(names):
        if name in dims and not np.array_equal(dims[name].source, np.arange(x.shape[axis])):
            x = jnp.take(x, dims[name].source, axis=axis, mode="clip")
    x = sharding.constrain(x, *names)
    if part == NORM:  # undoes the stream's scale
        return x / growth.stream
    if part == POST_NORM:  # of what is written to the stream
        return x * speaks
    if part == INSIDE:
        return x
    consumed, *produced = ("", *names) if part == BIAS else names
    written = _along(~dims["embed"].fresh, names, "embed") if "embed" in produced else True
    speaks = speaks | growth.post_norms
    if part == BIAS:
        return x * growth.stream * written * speaks if "embed" in produced else x
    if "embed" in produced:
        x = x * growth.stream * written
    if consumed not in dims:
        return x
    dim = dims[consumed]
    x = x / _along(dim.copies, names, consumed)
    if dim.fresh.any():
        x = jnp.where(_along(dim.fresh, names, consumed), new_x, x)
    noise = growth.noise * jnp.sqrt(jnp.mean(jnp.square(x)))
    if "embed" in produced:
        x = x * speaks
    if growth.noise and dim.copies.max() > 1:
        # Differences around the ring of an index's clones sum to zero. Layers that write nothing get them too: clones
        # that meet in these layers only would stay equal.
        normal = functools.partial(_normal, key, names, x.shape)
        own, following = jax.vmap(normal)(np.stack([np.arange(len(dim.next)), dim.next]))
        x = x + noise * math.sqrt(0.5) * (own - following) * written
    return sharding.constrain(x, *names)


def _normal(key: jax.Array, names: sharding.Axes, shape: tuple[int, ...], index: jax.Array) -> jax.Array:
    """Normal numbers whose row i depends on the key and index[i] alone: a device draws those that others hold, too.

    The index is added to the key: to hash both, as `fold_in` does, takes longer to compile than to draw the numbers.
    """
    words = jax.random.key_data(key)
    words = jnp.tile(words, (shape[0], 1)).at[:, -1].add(index.astype(words.dtype))
    keys = jax.random.wrap_key_data(words, impl=jax.random.key_impl(key))
    return sharding.constrain(jax.vmap(lambda key: jax.random.normal(key, shape[1:]))(keys), *names)


def _along(values: np.ndarray, names: sharding.Axes, name: str) -> np.ndarray:
    """`values` as an array that broadcasts along the dimension called `name`."""
    return values.reshape([-1 if other == name else 1 for other in names])

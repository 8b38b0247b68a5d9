"""Learning-rate schedules and optimizers: optax transformations that know the names of the dimensions.

The names (`Transformer.logical_axes()`) say what shapes cannot: a scanned norm scale [layers, d] is not a
matrix, a kernel [d, heads, head_dim] is one, and "layers" is a stack of parameters, whose statistics are
kept apart.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax.sharding import Mesh

from slm_assist import sharding
from slm_assist.errors import UserError, one_of

SCHEDULES = ("constant", "cosine", "wsd")
OPTIMIZERS = ("adafactor", "adamw", "muon")
MUON_RMS = 0.2  # of an update by Muon: about that of one by AdamW, so that one learning rate serves both (2502.16982)


def learning_rate(
    kind: str,
    *,
    peak: float,
    steps: int,
    warmup_steps: int = 0,
    final_fraction: float = 0.1,
    decay_fraction: float = 0.2,
) -> optax.Schedule:
    """The learning rate of update n -> n + 1 as a function of n.

    All kinds rise linearly over the first `warmup_steps` updates, from peak / (warmup_steps + 1), and are at
    `peak` at n = warmup_steps. Then:
      "constant": stays there.
      "cosine": half a cosine, to final_fraction * peak at n = steps (SGDR, 1608.03983).
      "wsd": stays there, and falls linearly to final_fraction * peak over the last decay_fraction of the
        steps (warmup-stable-decay, MiniCPM, 2404.06395; linear as in 2405.18392).

    Raises:
      UserError: a value is out of its range, or warm-up and decay do not fit into the run.
    """
    one_of("optimizer.schedule", kind, SCHEDULES)
    decay_steps = round(decay_fraction * steps) if kind == "wsd" else steps - warmup_steps
    if peak <= 0 or steps < 1:
        raise UserError(f"learning rate peak={peak}, steps={steps}: both must be positive")
    for name, value in {"final_fraction": final_fraction, "decay_fraction": decay_fraction}.items():
        if not 0 <= value <= 1:
            raise UserError(f"{name}={value}: use a fraction from 0 to 1")
    if warmup_steps < 0 or warmup_steps + max(decay_steps, 0) > steps or warmup_steps >= steps:
        raise UserError(
            f"warmup_steps={warmup_steps} does not fit into {steps} steps"
            + (f" of which the last {decay_steps} decay" if kind == "wsd" else "")
            + ": shorten the warm-up"
        )

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        warmup = jnp.minimum((step + 1) / (warmup_steps + 1), 1)
        left = jnp.clip((steps - step) / max(decay_steps, 1), 0, 1)  # 1 before the decay, 0 at its end
        if kind == "constant":
            left = 1.0
        elif kind == "cosine":
            left = 0.5 * (1 - jnp.cos(jnp.pi * left))
        return peak * warmup * (final_fraction + (1 - final_fraction) * left)

    return schedule


def make_optimizer(
    name: str,
    schedule: optax.Schedule,
    *,
    axes: Any,
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    clip_norm: float = 1.0,
    muon_momentum: float = 0.95,
    muon_steps: int = 5,
) -> optax.GradientTransformation:
    """Clipping by the global norm, one of `OPTIMIZERS`, decoupled weight decay on matrices, learning rate.

    Args:
      name: "adamw" (1711.05101), "adafactor" (`scale_by_adafactor`, without momentum) or "muon" (`scale_by_muon`).
      schedule: learning rate from the number of updates done (int32, in the state).
      axes: the dimension names of the parameters, `Transformer.logical_axes()`.
      weight_decay: times the learning rate and the parameter is subtracted from matrices (`decay_mask`).
      b1, b2, eps: AdamW's, also of the parameters that Muon leaves to it.
      clip_norm: gradients are scaled down to this global norm; 0 for no clipping.
      muon_momentum, muon_steps: of the matrices that Muon updates, and its Newton-Schulz iterations.

    Raises:
      UserError: the name is unknown, or a value is out of its range.
    """
    one_of("optimizer.name", name, OPTIMIZERS)
    for key, value in {"weight_decay": weight_decay, "clip_norm": clip_norm}.items():
        if value < 0:
            raise UserError(f"optimizer.{key}={value}: use 0 (none) or more")
    scale = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    if name == "adafactor":
        scale = scale_by_adafactor(axes)
    elif name == "muon":
        scale = scale_by_muon(axes, otherwise=scale, momentum=muon_momentum, steps=muon_steps)
    return optax.chain(
        optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
        scale,
        optax.add_decayed_weights(weight_decay, mask=decay_mask(axes)) if weight_decay else optax.identity(),
        optax.scale_by_learning_rate(schedule),
    )


def is_matrix(names: sharding.Axes) -> bool:
    """Whether `names` are those of a matrix in each layer: "embed" on one side, the rest on the other.

    So [embed, heads, head_dim] is the matrix embed x (heads * head_dim) that multiplies a hidden state.
    """
    return "embed" in names and len(set(names) - {"embed", "layers"}) > 0


def decay_mask(axes: Any) -> Any:
    """A tree of bools: True for the parameters that weight decay acts on, which are the matrices."""
    return jax.tree.map(is_matrix, axes, is_leaf=sharding.is_names)


def scale_by_muon(
    axes: Any, *, otherwise: optax.GradientTransformation, momentum: float = 0.95, steps: int = 5
) -> optax.GradientTransformation:
    """Muon (`optax.contrib.muon`'s numbers) for the matrices of the layers, `otherwise` for all other parameters.

    A matrix is what multiplies a hidden state: [embed, heads, head_dim] is embed x (heads * head_dim), and each layer
    of a stack is one of its own. Embeddings, output head and norms are not orthogonalised. Updates of any shape have
    an RMS of about `MUON_RMS` (2502.16982), as AdamW's do.

    Args:
      axes: the dimension names of the parameters.
      momentum: of the gradients, with Nesterov's look ahead, before they are orthogonalised.
      steps: Newton-Schulz iterations.

    Raises:
      UserError: a value out of its range.
    """
    if not 0 <= momentum < 1:
        raise UserError(f"optimizer.muon_momentum={momentum}: use a number from 0 to below 1")
    if steps < 1:
        raise UserError(f"optimizer.muon_steps={steps}: Muon needs at least 1 Newton-Schulz iteration; 5 is usual")
    dims = jax.tree.map(lambda names: _matrix_dims(names) or optax.MaskedNode(), axes, is_leaf=sharding.is_names)
    kinds = jax.tree.map(lambda names: "muon" if _matrix_dims(names) else "other", axes, is_leaf=sharding.is_names)

    newton_schulz = optax.contrib.scale_by_muon(
        ns_steps=steps, beta=0.0, nesterov=False, weight_dimension_numbers=dims
    )  # without a momentum of its own, so that what it is given can be dealt out

    def init(params):
        return MuonState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params, dtype=jnp.float32))

    def update(grads, state, params):
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(grads, state.mu, momentum, 1)
        ahead = jax.tree.map(
            lambda m, g: momentum * m + (1 - momentum) * g,
            optax.tree.bias_correction(mu, momentum, optax.safe_increment(count)),
            optax.tree.bias_correction(grads, momentum, count),
        )
        ahead = jax.tree.map(_deal_out, ahead, dims)
        updates = newton_schulz.update(ahead, newton_schulz.init(ahead))[0]
        return jax.tree.map(scaled, updates, dims), MuonState(count, mu)

    def scaled(update: jax.Array, sides: optax.contrib.MuonDimensionNumbers) -> jax.Array:
        larger = max(math.prod(update.shape[dim] for dim in side) for side in sides)
        # An orthogonal matrix has an RMS of 1 / sqrt(larger).
        return MUON_RMS * math.sqrt(larger) * _deal_out(update, sides, back=True)

    muon = optax.GradientTransformation(init, update)
    return optax.partition({"muon": muon, "other": otherwise}, kinds)


def _matrix_dims(names: sharding.Axes) -> optax.contrib.MuonDimensionNumbers | None:
    """The dimensions on the two sides of a layer's matrix, in their order; None for what Muon leaves alone."""
    if not is_matrix(names) or {"vocab", "positions"} & set(names):
        return None
    embed = tuple(dim for dim, name in enumerate(names) if name == "embed")
    others = tuple(dim for dim, name in enumerate(names) if name not in ("embed", "layers"))
    return optax.contrib.MuonDimensionNumbers(*sorted((embed, others)))


class MuonState(NamedTuple):
    """The matrices' momentum, float32."""

    count: jax.Array
    mu: Any


def _deal_out(x: jax.Array, sides: optax.contrib.MuonDimensionNumbers, back: bool = False) -> jax.Array:
    """The layers of a stack over all devices: each has whole matrices to work on, and no two work on the same."""
    stacked = set(range(x.ndim)) - {*sides.reduction_axis, *sides.output_axis}
    return sharding.deal_out(x, *stacked, back=back) if stacked else x


class AdafactorState(NamedTuple):
    """Second moments, as trees like the parameters in which a reduced dimension has size 1.

    `row` keeps "embed", `column` the other dimensions of a factored matrix; of a parameter that is not
    factored `row` is all of it and `column` unused. So both are laid out by the parameter's own names.
    """

    count: jax.Array
    row: Any
    column: Any


def scale_by_adafactor(
    axes: Any,
    *,
    min_factored: int = 128,
    decay_power: float = 0.8,
    clip_rms: float = 1.0,
    eps: float = 1e-30,
    min_scale: float = 1e-3,
) -> optax.GradientTransformation:
    """Adafactor (1804.04235) with every statistic per layer of a stack and per named matrix.

    The numbers of `optax.adafactor` on a two-dimensional parameter. There, though, a stack [layers, d, f]
    is one parameter, with one RMS for clipping and scale, and a kernel [d, heads, head_dim] is factored over
    its two largest dimensions; here a layer's update depends on that layer only, and the kernel is factored
    as the matrix it is (`is_matrix`).

    Args:
      axes: the dimension names of the parameters.
      min_factored: matrices with a side below this keep their full second moment.
      decay_power: at update t = 1, 2, ... the second moment decays by 1 - t ** -decay_power.
      clip_rms: a layer's update is scaled down to this RMS, before the next factor.
      eps: added to the squared gradient.
      min_scale: updates are multiplied by the RMS of the layer's parameter, at least this.
    """

    def init(params):
        def zeros(names, param, side):
            reduced = _sides(names, param.shape, min_factored)[side]
            return jnp.zeros([1 if dim in reduced else n for dim, n in enumerate(param.shape)], jnp.float32)

        row, column = (_map_named(functools.partial(zeros, side=side), axes, params) for side in (1, 0))
        return AdafactorState(jnp.zeros((), jnp.int32), row, column)

    def update(grads, state, params):
        count = optax.safe_increment(state.count)
        decay = 1 - count.astype(jnp.float32) ** -decay_power

        def moment(names, grad, old, side):
            reduced = _sides(names, grad.shape, min_factored)[side]
            square = jnp.square(grad.astype(jnp.float32)) + eps
            return decay * old + (1 - decay) * jnp.mean(square, axis=reduced, keepdims=True)

        def scaled(names, grad, row, column, param):
            embed, others = _sides(names, grad.shape, min_factored)
            factor = jax.lax.rsqrt(row)
            if others:
                mean = jnp.mean(row, axis=embed, keepdims=True)
                factor = jax.lax.rsqrt(row / mean) * jax.lax.rsqrt(column)
            step = grad.astype(jnp.float32) * factor
            step /= jnp.maximum(_layer_rms(names, step) / clip_rms, 1)
            return step * jnp.maximum(_layer_rms(names, param), min_scale)

        row = _map_named(functools.partial(moment, side=1), axes, grads, state.row)
        column = _map_named(functools.partial(moment, side=0), axes, grads, state.column)
        return _map_named(scaled, axes, grads, row, column, params), AdafactorState(count, row, column)

    return optax.GradientTransformation(init, update)


def _sides(names, shape, min_factored) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The dimensions on the two sides of a factored matrix; if it is not factored, (all of a layer's, ())."""
    embed = tuple(dim for dim, name in enumerate(names) if name == "embed")
    others = tuple(dim for dim, name in enumerate(names) if name not in ("embed", "layers"))
    smaller = min(math.prod(shape[dim] for dim in side) for side in (embed, others))
    if is_matrix(names) and smaller >= min_factored:
        return embed, others
    return tuple(sorted(embed + others)), ()


def _layer_rms(names, x) -> jax.Array:
    """Root mean square of each layer of a stack, or of all of `x`, with the dimensions kept."""
    dims = tuple(dim for dim, name in enumerate(names) if name != "layers")
    return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), axis=dims, keepdims=True))


def _map_named(function, axes, *trees):
    """`jax.tree.map` with the dimension names as the first argument."""
    return jax.tree.map(function, axes, *trees, is_leaf=sharding.is_names)


def state_shardings(optimizer: optax.GradientTransformation, params: Any, axes: Any, mesh: Mesh) -> Any:
    """A tree of `NamedSharding` for `optimizer.init(params)`.

    Whatever in the state is a tree like the parameters, or like a part of them (`optax.MaskedNode` for the others),
    lies as they do; counters are on every device.

    Args:
      params: the parameters or their shapes.
      axes: the dimension names of the parameters.
    """
    structure = jax.tree.structure(params)

    def is_masked(node):
        return isinstance(node, optax.MaskedNode)

    def like_params(node):
        return jax.tree.structure(node, is_leaf=is_masked) == structure

    def place(node):
        if not like_params(node):
            return sharding.replicated(mesh)
        return _map_named(lambda names, x: x if is_masked(x) else sharding.sharding(names, x, mesh), axes, node)

    return jax.tree.map(place, jax.eval_shape(optimizer.init, params), is_leaf=like_params)

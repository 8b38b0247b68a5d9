"""What a run is at one instant. Everything that must survive a kill is in here, and no helper is."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from slm_assist import optim, sharding
from slm_assist.models import Transformer


class TrainState(NamedTuple):
    """A pytree; `step` updates are done.

    `assist` holds what the gifts have come to so far, under its own name in the checkpoint: `stage1_steps` (-1: not
    decided yet), what the rule of selection remembers, and the `map` between representations.
    """

    step: jax.Array  # int32
    params: Any  # float32
    opt_state: Any
    assist: dict[str, Any]


def init(model: Transformer, optimizer: optax.GradientTransformation, seed: int, assist: dict[str, Any]) -> TrainState:
    """The state before the first update; jit it with `state_shardings` as `out_shardings`."""
    return begin(model.init(jax.random.key(seed)), optimizer, assist)


def begin(params: Any, optimizer: optax.GradientTransformation, assist: dict[str, Any]) -> TrainState:
    """The state before the first update of given parameters."""
    return TrainState(step=jnp.int32(0), params=params, opt_state=optimizer.init(params), assist=assist)


def state_shardings(
    model: Transformer, optimizer: optax.GradientTransformation, assist: dict[str, Any], mesh: jax.sharding.Mesh
) -> TrainState:
    """A `TrainState` of `NamedSharding`: optimizer statistics lie where their parameters lie."""
    shapes, axes = model.shapes(), model.logical_axes()
    whole = sharding.replicated(mesh)
    return TrainState(
        step=whole,
        params=sharding.shardings(axes, shapes, mesh),
        opt_state=optim.state_shardings(optimizer, shapes, axes, mesh),
        assist=jax.tree.map(lambda _: whole, assist),
    )

"""What a run begins with: its newest checkpoint, or else random parameters, a model that exists, a grown
small LM, or another run's state.

A branch goes on from a checkpoint of another run, its trunk: parameters, optimizer, place in the data and totals are
the trunk's, and what follows is its own. So one trunk whose learning rate stays up has as many fully decayed ends as
it has branches (warmup-stable-decay, 2404.06395).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from slm_assist import checkpoint as checkpoint_lib
from slm_assist import config as config_lib
from slm_assist import config_rules, pretrained
from slm_assist import state as state_lib
from slm_assist.assist import helpers as helpers_lib
from slm_assist.assist import weights
from slm_assist.assist.helpers import Helper, Placement
from slm_assist.assist.stages import Stage
from slm_assist.checkpoint import Checkpoints
from slm_assist.errors import UserError
from slm_assist.experiment import SAME_ON_RESUME, Experiment, Say, facts, make_learning_rate
from slm_assist.log import Log
from slm_assist.models import Transformer, stack, unstack
from slm_assist.run_dir import RunDir
from slm_assist.state import TrainState


class Begun(NamedTuple):
    """The state to train on from, what its checkpoint knew, and facts of the small LMs that helped it so far."""

    state: TrainState
    meta: dict[str, Any]
    helpers: dict[str, Any]


def begin(experiment: Experiment, run: RunDir, checkpoints: Checkpoints, parent: Helper | None, say: Say) -> Begun:
    """The newest state that can be restored, or a new one.

    Args:
      parent: the small LM of `grow.helper`, checked; None where nothing is grown.

    Raises:
      UserError: no checkpoint of the run can be restored, or the parent's or the trunk's cannot be read or do not fit.
    """
    layout, like = shapes(experiment)
    if restored := checkpoints.restore_newest(like, say):
        say(f"{run}: going on from step {int(restored[0].step)}")
        return Begun(*restored, {})
    if experiment.config.branch.run:
        return _branch(experiment, like, say)
    if parent is not None:
        return _grown(experiment, layout, parent, say)
    if experiment.config.init.model:
        return _initial(experiment, layout, say)
    return Begun(jax.jit(functools.partial(new_state, experiment), out_shardings=layout)(), Log.NEW, {})


def new_state(experiment: Experiment) -> TrainState:
    """Random parameters; to be jitted with `shapes`' layout as `out_shardings`."""
    student = experiment.student
    return state_lib.init(student.model, student.optimizer, experiment.config.seed, experiment.first_assist())


def shapes(experiment: Experiment) -> tuple[TrainState, TrainState]:
    """The state's layout on the experiment's mesh, and its shapes with that layout; allocates nothing."""
    student, assist = experiment.student, jax.eval_shape(experiment.first_assist)
    layout = state_lib.state_shardings(student.model, student.optimizer, assist, experiment.mesh)
    made = jax.eval_shape(functools.partial(new_state, experiment))
    like = jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), made, layout)
    return layout, like


def _initial(experiment: Experiment, layout: TrainState, say: Say) -> Begun:
    """Another model's parameters, read straight onto the devices as the student's lie there."""
    config, student = experiment.config, experiment.student
    source = pretrained.open_model(config.init.model, "init.model", config.init.step)
    theirs, ours = source.shape(), student.model.config
    like = pretrained.like_student(Transformer(theirs), experiment.mesh, jnp.float32)
    params, step = source.params(like, step=config.init.step, say=say)

    def begun(params: Any) -> TrainState:
        if theirs.scan_layers != ours.scan_layers:
            params = stack(params, ours) if ours.scan_layers else unstack(params, theirs)
        return state_lib.begin(params, student.optimizer, experiment.first_assist())

    # What is stacked anew cannot stay where it lies.
    donated = (0,) if theirs.scan_layers == ours.scan_layers else ()
    state = jax.jit(begun, out_shardings=layout, donate_argnums=donated)(params)
    say(f"begins as {source} at step {step}, {student.model.num_params():,} parameters")
    known = {"run": source.location, "step": step, "identity": source.identity, "train_flops": source.flops_at(step)}
    known |= {"parameters": student.model.num_params(), "max_positions": source.max_positions}
    return Begun(state, Log.NEW, {"initial": known})


def _grown(experiment: Experiment, layout: TrainState, parent: Helper, say: Say) -> Begun:
    """Its parameters are read in parts, straight onto the devices: no host holds a whole copy."""
    config, student = experiment.config, experiment.student
    old, new = parent.model.config, student.model.config
    options = {"depth": config.grow.depth, "noise": config.grow.noise}
    changed = weights.check(old, new, **options)
    in_parts = parent.with_dtype(jnp.float32, Placement("fsdp"))
    parent, params = in_parts.load(experiment.mesh, say)

    def grown(params: Any) -> TrainState:
        key = jax.random.fold_in(jax.random.key(config.seed), GROWTH)
        params = weights.grow(params, old, new, key=key, **options)
        return state_lib.begin(params, student.optimizer, experiment.first_assist())

    state = jax.jit(grown, out_shardings=layout)(params)
    kept = f"its logits are not the small LM's: {changed}" if changed else "its logits are the small LM's"
    say(f"grown from {parent.run} at step {parent.step}, {parent.model.num_params():,} parameters; {kept}")
    return Begun(state, Log.NEW, {"parent": parent.facts()})


GROWTH = 0x67726F77  # keeps the noise of growth apart from other draws of the seed


def _branch(experiment: Experiment, like: TrainState, say: Say) -> Begun:
    config = experiment.config
    trunk = helpers_lib.open_trunk(config.branch.run, config.branch.step)
    stored = trunk.read(trunk.config)
    check_branch(experiment, trunk, stored)
    step = max(checkpoint_lib.whole_steps(trunk.checkpoints)) if config.branch.step == -1 else config.branch.step
    if not 0 < step < config.steps:
        raise UserError(f"branch.run={trunk}: its checkpoint {step} leaves nothing of steps={config.steps}; raise it")
    _check_stages(experiment, trunk, stored, step)
    state, meta = checkpoint_lib.restore_state(trunk.checkpoints, step, like)
    if experiment.schedule.stage1_steps is not None:  # else `auto` goes on as it was
        state = experiment.switched(state, int(experiment.first_assist()["stage1_steps"]))
    say(f"branches off from {trunk} at step {step}")
    rates = [float(make_learning_rate(c)(step)) for c in (config_lib.from_dict(stored["config"]), config)]
    if abs(rates[1] / rates[0] - 1) > 1e-3:
        say(
            f"the learning rate changes where it branches, from {rates[0]:.3g} to {rates[1]:.3g}; to decay from a "
            "plateau give both optimizer.schedule=wsd, and branch before the trunk's own decay"
        )
    return Begun(state, meta | {"offset": 0}, stored["facts"]["helpers"])


def check_branch(experiment: Experiment, trunk: RunDir, stored: dict[str, Any]) -> None:
    """Raises `UserError` where model, data, gifts or seed are not the trunk's."""
    changed = config_lib.changed_keys(
        stored["config"], config_lib.to_dict(experiment.config), config_lib.MAY_CHANGE_ON_BRANCH
    )
    found = facts(experiment, {})
    changed += [name for name in SAME_ON_RESUME if name in CARRIED and stored["facts"].get(name) != found[name]]
    optimizers = [kept["optimizer"]["name"] for kept in (stored["config"], config_lib.to_dict(experiment.config))]
    if optimizers[0] != optimizers[1]:
        changed.append(f"optimizer.name: {optimizers[0]!r} -> {optimizers[1]!r}")
    if changed:
        raise UserError(
            f"branch.run={trunk}: a branch has its trunk's model, data, gifts and seed; these differ: "
            f"{'; '.join(changed)}; use the trunk's values"
        )


CARRIED = ("vocabulary", "train_rows", "objective", "parameters", "dtype")  # facts that a trunk's state depends on


def _check_stages(experiment: Experiment, trunk: RunDir, stored: dict[str, Any], step: int) -> None:
    """Shares of a run's steps are others in a branch: up to its first update it must have had what its trunk had."""
    theirs = _until(config_rules.plan(config_lib.from_dict(stored["config"])), step)
    ours = _until(experiment.plan(), step)
    if ours != theirs:
        described = [", ".join(f"{stage.name} to {stage.stop}" for stage in plan) for plan in (theirs, ours)]
        raise UserError(
            f"branch.run={trunk}: up to step {step} it was {described[0]}, and this run would be {described[1]}; give "
            "assist.steps, select.steps and represent.steps, in updates, as the trunk had them"
        )


def _until(plan: tuple[Stage, ...], step: int) -> list[Stage]:
    return [dataclasses.replace(stage, stop=min(stage.stop, step)) for stage in plan if stage.start < step]

"""The compiled steps of a run: one for each kind of stage, and the validation step, all before the first update."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from slm_assist import roles, sharding, steps
from slm_assist.assist import online
from slm_assist.assist.helpers import Helper
from slm_assist.assist.stages import Stage
from slm_assist.experiment import Experiment, Say
from slm_assist.state import TrainState

INTEGERS = ("tokens", "targets", "segment_ids", "positions")


def compile_all(
    experiment: Experiment, state: TrainState, helpers: dict[str, Helper], params_of: dict[str, Any], say: Say
) -> dict[str, Callable]:
    """`eval` and every stage's step that is still to run, by name: a lack of memory shows here."""
    student, began = experiment.student, time.perf_counter()
    layout = jax.tree.map(lambda x: x.sharding, state)
    whole = sharding.replicated(experiment.mesh)
    functions: dict[str, tuple[Callable, tuple, dict[str, Any]]] = {
        "eval": (
            functools.partial(steps.eval_step, model=student.model, block_bytes=student.block_bytes),
            (state.params, _rows(experiment, experiment.config.batch_rows)),
            {"out_shardings": whole},
        )
    }
    kinds = experiment.kinds(int(state.step), int(state.assist["stage1_steps"]))
    same: dict[tuple, str] = {}  # a list of rows changes what is read, not the step
    for stage in kinds:
        if same.setdefault(_program(experiment, stage), stage.name) != stage.name:
            continue
        arguments = (state, batch_shapes(experiment, stage), params_in(stage, params_of))
        function = stage_step(experiment, stage, helpers)
        functions[stage.name] = (function, arguments, {"out_shardings": (layout, whole), "donate_argnums": 0})
    device = experiment.mesh.devices.flat[0]
    deterministic = experiment.config.compute.deterministic and device.platform == "gpu"
    options = {"xla_gpu_deterministic_ops": True} if deterministic else None
    compiled = {
        name: jax.jit(function, **jit).lower(*arguments).compile(compiler_options=options)
        for name, (function, arguments, jit) in functions.items()
    }
    compiled |= {stage.name: compiled[same[_program(experiment, stage)]] for stage in kinds}
    say(
        f"compiled {', '.join(compiled)} in {time.perf_counter() - began:.0f} s; "
        f"{student.model.num_params():,} parameters, computing in {experiment.dtype} "
        f"({experiment.config.compute.dtype}) on {experiment.mesh.size} x {device.device_kind}"
    )
    _say_costs(experiment, kinds, helpers, say)
    return compiled


def _program(experiment: Experiment, stage: Stage) -> tuple:
    """What tells the steps of two stages apart."""
    select = experiment.config.select
    return stage.soft_labels, stage.selecting and (select.rows == "online" or select.token_share < 1)


def params_in(stage: Stage, params_of: dict[str, Any]) -> dict[str, Any]:
    """The helpers' parameters that a stage's step takes."""
    return {role: params for role, params in params_of.items() if roles.in_stage(role, stage)}


def stage_step(experiment: Experiment, stage: Stage, helpers: dict[str, Helper]) -> Callable:
    """(state, batch, helpers' parameters) -> (state, metrics), with all that is static bound."""
    config, student = experiment.config, experiment.student
    models = {role: helper.model for role, helper in helpers.items()}
    focus = None
    if stage.selecting and config.select.token_share < 1:
        focus = steps.Focus(models["reference"], config.select.token_share)
    step = functools.partial(steps.plain_step, student=student, focus=focus)
    if stage.soft_labels:
        step = functools.partial(
            steps.assisted_step,
            student=student,
            teacher=models["teacher"],
            schedule=experiment.schedule,
            temperature=config.assist.temperature,
            top_k=config.assist.top_k,
            focus=focus,
        )
    if stage.selecting and config.select.rows == "online":
        chooser = make_filter(experiment, models, experiment.shares_teacher(helpers, stage))
        step = functools.partial(steps.choosing_step, chooser=chooser, then=step)
    return step


def make_filter(experiment: Experiment, models: dict[str, Any], share_teacher: bool = False) -> online.Filter:
    """The config's choice among candidates."""
    config, select = experiment.config, experiment.config.select
    return online.Filter(
        score=experiment.score,
        models=models | {"learner": experiment.student.model},
        keep=config.batch_rows,
        parts=select.pool_factor * config.microbatches,
        rule=select.rule,
        band=select.band,
        noise=select.noise,
        decay=select.threshold_decay,
        share_teacher=share_teacher,
        domains=len(experiment.domains),
        seed=config.seed,
        block_bytes=experiment.student.block_bytes,
    )


def batch_shapes(experiment: Experiment, stage: Stage) -> dict[str, jax.ShapeDtypeStruct]:
    """What the loader hands to the step of a stage."""
    config, objective = experiment.config, experiment.objective
    choosing = stage.selecting and config.select.rows == "online"
    rows = config.batch_rows * (config.select.pool_factor if choosing else 1)
    batch = _rows(experiment, rows)
    if choosing and objective.name != "causal":
        batch |= {online.CAUSAL + name: shape for name, shape in batch.items()}
    if choosing:
        batch["domain"] = _array(experiment, (rows,), np.int32)
    if objective.has_prefix:
        batch["prefix_mask"] = _array(experiment, (rows, config.data.seq_len), bool)
    return batch


def _rows(experiment: Experiment, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    shape = (rows, experiment.config.data.seq_len)
    arrays = {name: _array(experiment, shape, np.int32) for name in INTEGERS}
    return arrays | {"mask": _array(experiment, shape, np.float32)}


def _array(experiment: Experiment, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(experiment.mesh))


def _say_costs(experiment: Experiment, kinds: tuple[Stage, ...], helpers: dict[str, Helper], say: Say) -> None:
    """Memory of every helper, and what each stage's step costs beside a plain one."""
    seen: dict[str, Helper] = {}
    for role, helper in helpers.items():
        twin = next((other for other in seen if seen[other].same(helper)), None)
        memory = f"{helper.bytes() / 1e6:,.1f} MB on every device" if twin is None else f"the same in memory as {twin}"
        say(f"{role}: {helper.run} at step {helper.step}, {helper.model.num_params():,} parameters, {memory}")
        seen[role] = helper
    for stage in kinds:
        cost = experiment.step_flops(helpers, stage)
        shares = [f"{name} {cost[name] / cost['student']:.2f}" for name in ("teacher", "scorer") if cost[name]]
        if shares:
            say(f"FLOPs of an update in {stage.name}, by a plain one's: 1 + {' + '.join(shares)}")

"""The compiled steps of a run: one for each kind of stage, and the validation step, all before the first update."""

import contextlib
import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from jax.experimental.compilation_cache import compilation_cache as compilation_cache_lib

from slm_assist import aligning, look, roles, sharding, steps
from slm_assist.assist import online, token_weight
from slm_assist.assist.helpers import Helper
from slm_assist.assist.stages import Stage
from slm_assist.errors import UserError
from slm_assist.evals import token_metrics
from slm_assist.experiment import Experiment, Say
from slm_assist.state import TrainState

INTEGERS = ("tokens", "targets", "segment_ids", "positions")
SAMPLE = "sample"  # the program of `look`


def compile_all(
    experiment: Experiment, state: TrainState, helpers: dict[str, Helper], params_of: dict[str, Any], say: Say
) -> dict[str, Callable]:
    """`eval`, every stage's step that is still to run, and `SAMPLE` in a new run that chooses, by name.

    A lack of memory shows here, and nothing is compiled later. A step takes over the memory of its state; a batch is
    not donated, as no result is like it.
    """
    began = time.perf_counter()
    kinds = experiment.kinds(int(jax.device_get(state.step)), int(jax.device_get(state.assist["stage1_steps"])))
    same: dict[tuple, str] = {}  # a list of rows changes what is read, not the step
    for stage in kinds:
        same.setdefault(_program(experiment, stage), stage.name)
    different = [stage for stage in kinds if same[_program(experiment, stage)] == stage.name]
    built = {
        name: build(experiment.config, experiment.mesh, function, *arguments, **jit)
        for name, (function, arguments, jit) in _functions(experiment, state, different, helpers, params_of).items()
    }
    compiled = {name: program.call for name, program in built.items()}
    compiled |= {stage.name: compiled[same[_program(experiment, stage)]] for stage in kinds}
    say(
        f"compiled {', '.join(compiled)} in {time.perf_counter() - began:.0f} s; "
        f"{experiment.student.model.num_params():,} parameters, computing in {experiment.dtype} "
        f"({experiment.config.compute.dtype}) on {experiment.mesh.size} x {experiment.mesh.devices.flat[0].device_kind}"
    )
    say(f"compiling took {'; '.join(f'{name} {program.costs()}' for name, program in built.items())}")
    _say_costs(experiment, kinds, helpers, say)
    return compiled


def _functions(
    experiment: Experiment,
    state: TrainState,
    stages: list[Stage],
    helpers: dict[str, Helper],
    params_of: dict[str, Any],
) -> dict[str, tuple[Callable, tuple, dict[str, Any]]]:
    """What is to be compiled: function, arguments and options of `jax.jit`, by name."""
    student = experiment.student
    layout, whole = jax.tree.map(lambda x: x.sharding, state), sharding.replicated(experiment.mesh)
    rows = _rows(experiment, experiment.config.batch_rows)
    metrics = token_metrics.find(experiment.config.validation.metric)
    evaluate = functools.partial(steps.eval_step, model=student.model, block_bytes=student.block_bytes, metrics=metrics)
    functions = {"eval": (evaluate, (state.params, rows), {"out_shardings": whole})}
    for stage in stages:
        arguments = (state, batch_shapes(experiment, stage), params_in(stage, params_of))
        options = {"out_shardings": (layout, whole), "donate_argnums": 0}
        functions[stage.name] = (stage_step(experiment, stage, helpers), arguments, options)
    if look.is_wanted(experiment) and not int(jax.device_get(state.step)):
        arguments = (look.params_in(experiment, params_of, state.params), rows)
        functions[SAMPLE] = (look.scored(experiment, helpers), arguments, {"out_shardings": whole})
    return functions


class Built(NamedTuple):
    """A compiled program, and how long it took."""

    call: jax.stages.Compiled
    tracing: float  # seconds, to StableHLO
    xla: float  # seconds
    cached: bool  # found in the compilation cache, so that XLA did not run

    def costs(self) -> str:
        found = "from the cache" if self.cached else "in XLA"
        return f"{self.tracing:.1f} s to trace + {self.xla:.1f} s {found}"


def build(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh, function: Callable, *arguments, **jit) -> Built:
    """`jax.jit(function, **jit)` compiled for `arguments`, by the config's options for the mesh's devices."""
    deterministic = config.compute.deterministic and mesh.devices.flat[0].platform == "gpu"
    options = {"xla_gpu_deterministic_ops": True} if deterministic else None
    began = time.perf_counter()
    lowered = jax.jit(function, **jit).lower(*arguments)
    traced = time.perf_counter()
    with _cache_hits() as hits:
        call = lowered.compile(compiler_options=options)
    return Built(call, traced - began, time.perf_counter() - traced, bool(hits))


@contextlib.contextmanager
def _cache_hits() -> Iterator[list[str]]:
    """A list that grows with every program that JAX finds in its compilation cache."""
    hits: list[str] = []

    def listener(event: str, **_) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            hits.append(event)

    jax.monitoring.register_event_listener(listener)
    try:
        yield hits
    finally:
        jax.monitoring.unregister_event_listener(listener)


@contextlib.contextmanager
def compilation_cache(directory: str) -> Iterator[None]:
    """Within it compiled programs, small ones too, are kept in `directory` and taken from there.

    The environment goes first: with JAX_COMPILATION_CACHE_DIR set, or an empty `directory`, nothing changes. A program
    from the cache is the one that was compiled, so a run that goes on computes the same bits; on GPUs the more so, as
    XLA chooses kernels by timing them.

    Raises:
      UserError: the directory cannot be written.
    """
    if not directory or jax.config.jax_compilation_cache_dir:
        yield
        return
    path = directory if "://" in directory else str(Path(directory).expanduser())
    try:
        if "://" not in path:
            Path(path).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):  # what JAX cannot write it only warns of, once a program
                pass
    except OSError as error:
        raise UserError(
            f"compute.cache_dir={directory}: {error.strerror}; name a directory that can be written, or leave it empty"
        ) from None
    before = {name: getattr(jax.config, name) for name in KEEP_ALL}
    _set_cache(KEEP_ALL | {"jax_compilation_cache_dir": path})
    try:
        yield
    finally:
        _set_cache(before)


KEEP_ALL = {
    "jax_compilation_cache_dir": None,
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


def _set_cache(options: dict[str, Any]) -> None:
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache_lib.reset_cache()  # JAX opens a directory once


def _program(experiment: Experiment, stage: Stage) -> tuple:
    """What tells the steps of two stages apart."""
    select = experiment.config.select
    return stage.soft_labels, stage.aligning, stage.selecting and (select.rows == "online" or select.token_share < 1)


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
    gifts = {"focus": focus, "align": aligning.align(config, student, helpers, stage)}
    step = functools.partial(steps.plain_step, student=student, **gifts)
    if stage.soft_labels:
        step = functools.partial(
            steps.assisted_step,
            student=student,
            teacher=models["teacher"],
            schedule=experiment.schedule,
            temperature=config.assist.temperature,
            top_k=config.assist.top_k,
            weigh=token_weight.find(config.assist.token_weight),
            **gifts,
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
        memory = helper.where(experiment.mesh) if twin is None else f"the same in memory as {twin}"
        step = f" at step {helper.step}" if helper.step >= 0 else ""
        say(f"{role}: {helper.run}{step}, {helper.model.num_params():,} parameters, {memory}")
        seen[role] = helper
    for stage in kinds:
        cost = experiment.step_flops(helpers, stage)
        shares = [f"{name} {cost[name] / cost['student']:.2f}" for name in ("teacher", "scorer", "guide") if cost[name]]
        if shares:
            say(f"FLOPs of an update in {stage.name}, by a plain one's: 1 + {' + '.join(shares)}")

"""The training loop: reads from top to bottom once.

`train(config, run_dir)` starts a run or goes on with it. A run that is killed at any instant and started again
with the same command ends where an uninterrupted one does, bit for bit.
"""

import contextlib
import functools
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_collections
import numpy as np
from tqdm import tqdm

from slm_assist import config as config_lib
from slm_assist import experiment as experiment_lib
from slm_assist import metrics, sharding, steps, validation
from slm_assist import state as state_lib
from slm_assist.assist import helpers as helpers_lib
from slm_assist.checkpoint import Checkpoints, whole_steps
from slm_assist.data.loader import Loader, Prefetcher
from slm_assist.data.order import Order
from slm_assist.errors import UserError
from slm_assist.experiment import Experiment, Say
from slm_assist.log import Clock, Log
from slm_assist.run_dir import RunDir
from slm_assist.state import TrainState


class Stopped(Exception):
    """SIGTERM or Ctrl-C: the run was saved and left; the same command goes on. `signal` is its number."""

    def __init__(self, step: int, signal_number: int):
        super().__init__(f"stopped and saved at step {step}; the same command goes on from there")
        self.step, self.signal = step, signal_number


def train(config: ml_collections.ConfigDict, run_dir: str, *, fresh: bool = False, say: Say = tqdm.write) -> RunDir:
    """Trains to `config.steps` and returns the run's directory.

    Args:
      config: from `config.resolve`.
      run_dir: a new directory, or one where the same config was trained before: then the run goes on.
      fresh: start over, in a new directory beside `run_dir` if that one exists.
      say: where messages for people go.

    Raises:
      UserError: something in the config, the data, the helper or on the disk does not fit; the run so far is kept.
      Stopped: a signal asked to stop.
    """
    run = RunDir(run_dir).beside() if fresh else RunDir(run_dir)
    with run.lock():
        experiment_lib.check_config(run, config)
        if run.summary.is_file():
            say(f"{run}: finished before; nothing to do (--fresh starts over beside it)")
            return run
        experiment = experiment_lib.build(config, run, say)
        try:
            with jax.set_mesh(experiment.mesh):
                _run(experiment, run, say)
        except OSError as error:
            raise UserError(
                f"{run}: {error.strerror or error}; what is saved is kept: mend that, and the same command goes on"
            ) from error
    return run


def _run(experiment: Experiment, run: RunDir, say: Say) -> None:
    config, mesh = experiment.config, experiment.mesh
    clock = Clock()
    stored = experiment_lib.check_resume(run, experiment)
    saved = max(whole_steps(run.checkpoints), default=0)
    helpers = _find_helpers(experiment, saved, stored)

    state, meta, checkpoints = _start(experiment, run, say)
    first = int(state.step)
    helpers = helpers or _find_helpers(experiment, first, stored)
    loaded = {role: helper.load(mesh, say) for role, helper in helpers.items()}
    helpers = {role: helper for role, (helper, _) in loaded.items()}
    params_of = {role: params for role, (_, params) in loaded.items()}
    del loaded
    facts = stored or experiment_lib.facts(experiment, helpers)
    compiled = _compile(experiment, state, helpers, params_of, say)
    validate = validation.validator(experiment, run, compiled["eval"], say)
    clock.restore(meta["seconds"])
    clock.lap("compile")
    if stored is None:
        _write_identity(experiment, run, facts)

    loader = Loader(
        experiment.prepared.train,
        Order(len(experiment.prepared.train), config.seed if config.data.order_seed < 0 else config.data.order_seed),
        config.batch_rows,
    )
    log = Log(experiment, run, helpers, meta, first, clock)
    kept = config_lib.kept_steps(config)
    put = functools.partial(validation.put, sharding=sharding.batch_sharding(mesh))
    with checkpoints, log, Prefetcher(loader, first) as batches, _signals() as stop:
        for n in range(first, config.steps + 1):
            # The order is fixed: evaluate, save, batch, step. What a checkpoint N holds comes before it.
            if _due(n, config.validation.every, config.steps) and n > first:
                log.flush()
                log.validation(n, validate(n, state.params))
            if n > first and (stop or n in kept or _due(n, config.checkpoint.every, config.steps)):
                log.flush()
                checkpoints.save(state, log.meta())
                clock.lap("save")
            if n == config.steps:
                break
            if stop:
                checkpoints.wait()
                raise Stopped(n, stop[0])
            stage = next(stage for stage in experiment.stages if stage.start <= n < stage.stop)
            if stage.name == "plain":
                helpers_lib.drop(params_of)
            batch = put(batches.batch_at(n))
            state, pairs = compiled[stage.name](state, batch, *([params_of] if stage.name == "assisted" else []))
            log.step(n + 1, stage.name, pairs)  # reads the metrics of the step before, while this one runs
            checkpoints.check()
        checkpoints.wait()
        clock.lap("save")
        metrics.write_json(run.summary, log.summary())


def _due(n: int, every: int, steps: int) -> bool:
    return n == steps or (every > 0 and n > 0 and n % every == 0)


def _find_helpers(experiment: Experiment, step: int, stored: dict[str, Any] | None) -> dict[str, helpers_lib.Helper]:
    """The helpers that a run at `step` still needs; their own step is the one the run began with."""
    if not any(stage.name == "assisted" and step < stage.stop for stage in experiment.stages):
        return {}
    at = stored["helpers"]["teacher"]["step"] if stored else experiment.config.assist.teacher_step
    return {"teacher": experiment_lib.find_teacher(experiment, at)}


def _start(experiment: Experiment, run: RunDir, say: Say) -> tuple[TrainState, dict[str, Any], Checkpoints]:
    """The newest state that can be restored, or a new one; with what its checkpoint knew."""
    config, student = experiment.config, experiment.student
    layout = state_lib.state_shardings(student.model, student.optimizer, experiment.mesh)
    stage1_steps = sum(stage.stop - stage.start for stage in experiment.stages if stage.name == "assisted")
    init = functools.partial(state_lib.init, student.model, student.optimizer, config.seed, stage1_steps)
    like = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), jax.eval_shape(init), layout
    )
    checkpoints = Checkpoints(
        run.checkpoints, keep_last=config.checkpoint.keep_last, keep=config_lib.kept_steps(config)
    )
    restored = checkpoints.restore_newest(like, say)
    if restored:
        state, meta = restored
        say(f"{run}: going on from step {int(state.step)}")
        return state, meta, checkpoints
    new = {"offset": 0, "tokens": 0.0, "flops": 0.0, "teacher_flops": 0.0, "seconds": {}}
    return jax.jit(init, out_shardings=layout)(), new, checkpoints


def _compile(
    experiment: Experiment, state: TrainState, helpers: dict[str, helpers_lib.Helper], params_of: Any, say: Say
) -> dict[str, Callable]:
    """Every stage's step that is still to run, and the validation step, compiled: a lack of memory shows here."""
    config, student = experiment.config, experiment.student
    began = time.perf_counter()
    batch = _batch_shapes(experiment)
    layout = jax.tree.map(lambda x: x.sharding, state)
    whole = sharding.replicated(experiment.mesh)
    functions: dict[str, tuple[Callable, tuple, dict[str, Any]]] = {
        "eval": (
            functools.partial(steps.eval_step, model=student.model, block_bytes=student.block_bytes),
            (state.params, batch),
            {"out_shardings": whole},
        )
    }
    after_step = {"out_shardings": (layout, whole), "donate_argnums": 0}
    if int(state.step) < experiment.stages[-1].stop and experiment.stages[-1].name == "plain":
        functions["plain"] = (functools.partial(steps.plain_step, student=student), (state, batch), after_step)
    if helpers:
        assisted = functools.partial(
            steps.assisted_step,
            student=student,
            teacher=helpers["teacher"].model,
            schedule=experiment.schedule,
            temperature=config.assist.temperature,
        )
        functions["assisted"] = (assisted, (state, batch, params_of), after_step)
    on_gpu = experiment.mesh.devices.flat[0].platform == "gpu"
    options = {"xla_gpu_deterministic_ops": True} if config.compute.deterministic and on_gpu else None
    compiled = {
        name: jax.jit(function, **jit).lower(*arguments).compile(compiler_options=options)
        for name, (function, arguments, jit) in functions.items()
    }
    say(
        f"compiled {', '.join(compiled)} in {time.perf_counter() - began:.0f} s; "
        f"{student.model.num_params():,} parameters, computing in {experiment.dtype} "
        f"({config.compute.dtype}) on {experiment.mesh.size} x {experiment.mesh.devices.flat[0].device_kind}"
    )
    return compiled


def _batch_shapes(experiment: Experiment) -> dict[str, jax.ShapeDtypeStruct]:
    shape = (experiment.config.batch_rows, experiment.config.data.seq_len)
    where = sharding.batch_sharding(experiment.mesh)
    dtypes = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), np.int32) | {"mask": np.float32}
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=where) for name, dtype in dtypes.items()}


def _write_identity(experiment: Experiment, run: RunDir, facts: dict[str, Any]) -> None:
    """model.json, tokenizer/ and, last, config.json: with it the run can be gone on with."""
    metrics.write_json(run.model, experiment.student.model.config.to_json())
    experiment.prepared.vocabulary.save(run.tokenizer)
    metrics.write_json(run.config, {"config": config_lib.to_dict(experiment.config), "facts": facts})


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that receives the number of SIGTERM or SIGINT; a second one stops at once."""
    caught: list[int] = []

    def handler(number: int, _) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    try:
        before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread: signals are somebody else's
        yield caught
        return
    try:
        yield caught
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)

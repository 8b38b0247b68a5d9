"""The training loop: reads from top to bottom once.

`train(config, run_dir)` starts a run or goes on with it. A run that is killed at any instant and started again
with the same command ends where an uninterrupted one does, bit for bit.
"""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections
from tqdm import tqdm

from slm_assist import config as config_lib
from slm_assist import config_rules, distributed, look, metrics, programs, roles, samples, start, validation
from slm_assist import experiment as experiment_lib
from slm_assist.assist import auto as auto_lib
from slm_assist.assist import helpers as helpers_lib
from slm_assist.assist.stages import stage_at
from slm_assist.checkpoint import Checkpoints, whole_steps
from slm_assist.distributed import Group
from slm_assist.errors import UserError
from slm_assist.experiment import Experiment, Say
from slm_assist.feed import Batches
from slm_assist.log import Clock, Log, Profile
from slm_assist.run_dir import RunDir


class Stopped(distributed.Agreed):
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
    clock = Clock()
    with distributed.together() as group, _held(group, run_dir, fresh) as run:
        config, say = _as_one(group, config, say)
        profile = Profile(config.log.profile, run.profile, say)
        experiment_lib.check_config(run, config)
        if run.summary.is_file():
            say(f"{run}: finished before; nothing to do (--fresh starts over beside it)")
            return run
        with programs.compilation_cache(config.compute.cache_dir):
            experiment = experiment_lib.build(config, run, say, group)
            try:
                with jax.set_mesh(experiment.mesh), profile:
                    _run(experiment, run, say, group, clock, profile)
            except OSError as error:
                raise UserError(
                    f"{run}: {error.strerror or error}; what is saved is kept: mend that, and the same command goes on"
                ) from error
    return run


def _run(experiment: Experiment, run: RunDir, say: Say, group: Group, clock: Clock, profile: Profile) -> None:
    config, mesh = experiment.config, experiment.mesh
    stored = experiment_lib.check_resume(run, experiment)
    chosen = stored and {role: helper["step"] for role, helper in stored["helpers"].items()}
    new = not (whole_steps(run.checkpoints) or config.branch.run)
    helpers = experiment_lib.find_helpers(experiment, chosen) if new else {}
    experiment_lib.check_helpers(run, stored["helpers"] if stored else {}, helpers)

    checkpoints = Checkpoints(
        run.checkpoints, keep_last=config.checkpoint.keep_last, keep=config_rules.kept_steps(config), group=group
    )
    state, meta, helped = start.begin(experiment, run, checkpoints, helpers.pop("parent", None), say)
    first, assisted = int(state.step), int(state.assist["stage1_steps"])  # -1: `auto` has not decided
    plan = experiment.plan(assisted)
    needed = roles.needed(config, plan, first)
    if not new:
        known = stored["helpers"] if stored else helped
        helpers = experiment_lib.find_helpers(experiment, {role: fact["step"] for role, fact in known.items()}, needed)
        experiment_lib.check_helpers(run, known, helpers)
    experiment.data.feed(plan)  # what does not fit in the lists shows here
    helpers, params_of = helpers_lib.load_all(helpers, mesh, say)
    facts = stored or experiment_lib.facts(experiment, helpers, helped)
    group.same("run", {"step": first} | facts)  # and nobody reads the directory as it was after this
    clock.restore(meta["seconds"])
    clock.lap("start")
    compiled = programs.compile_all(experiment, state, helpers, params_of, say)
    validate = validation.validator(experiment, run, compiled["eval"], say, group)
    clock.lap("compile")
    if stored is None and group.index == 0:
        _write_identity(experiment, run, facts)
        experiment.data.say_lists(plan, say)
    if first == 0:
        look.write_sample(experiment, run, helpers, params_of, state.params, plan, compiled.get(programs.SAMPLE))

    auto = auto_lib.Auto.restore(config_rules.auto_options(config), meta["auto"]) if assisted < 0 else None
    log = Log(experiment, run, helpers, meta, first, clock, auto)
    kept = config_rules.kept_steps(config)
    with (
        checkpoints,
        log,
        Batches(experiment.data, plan, first, run, mesh) as batches,
        _signals(group),
        group.failing_together(),
    ):
        for n in range(first, config.steps + 1):
            # The order is fixed: evaluate, save, switch, batch, step. What a checkpoint N holds comes before it.
            stop = group.stopping(n)
            if _due(n, config.validation.every, config.steps) and n > first:
                log.flush()
                log.validation(n, validate(n, state.params))
            if n > first and (stop or n in kept or _due(n, config.checkpoint.every, config.steps)):
                log.flush()
                batches.save_place(n)
                checkpoints.save(state, log.meta())
                clock.lap("save")
            if n == config.steps:
                break
            if stop:
                checkpoints.wait()
                raise Stopped(n, stop)
            if auto and auto.is_asked(n) and (ended := group.agreed("auto", auto.decide(n), _first)):
                auto, plan = None, experiment.plan(n)
                state = experiment.switched(state, n)
                log.switch(n, auto_lib.Decision(*ended).reason)
                batches.follow(plan, n)
                experiment.data.say_lists(plan, say)
            stage = stage_at(plan, n)
            helpers_lib.drop(params_of, params_of.keys() - roles.needed(config, plan, n))
            batch = batches.batch_at(n, programs.batch_shapes(experiment, stage))
            with profile.update(n + 1), jax.transfer_guard("disallow"):
                state, pairs = compiled[stage.name](state, batch.arrays, programs.params_in(stage, params_of))
            log.step(n + 1, stage, pairs, batch)  # reads the metrics of the step before, while this one runs
            profile.after(n + 1, log.flush)
            checkpoints.check()
        checkpoints.wait()
        clock.lap("save")
        summary = log.summary(plan)
        samples.write(experiment, run, state.params, say)
        if group.index == 0:
            metrics.write_json(run.summary, summary)
        group.wait("end")


def _first(values: list[Any]) -> Any:
    return values[0]


def _due(n: int, every: int, steps: int) -> bool:
    return n == steps or (every > 0 and n > 0 and n % every == 0)


# Keys that the processes of a run may have each to themselves: places on their own disks.
OWN = ("data.cache_dir", "data.cores", "compute.cache_dir")


@contextlib.contextmanager
def _held(group: Group, run_dir: str, fresh: bool) -> Iterator[RunDir]:
    """The run's directory; process 0 keeps other runs out, and the others see that they share it."""
    run = RunDir(run_dir)
    run = RunDir(group.first("run_dir", lambda: str(run.beside() if fresh else run)))
    with run.lock() if group.index == 0 else contextlib.nullcontext():
        word = group.first("lock", lambda: run.sign() if group.count > 1 else "")
        if group.index:
            run.check_signed(word)
        yield run


def _as_one(group: Group, config: ml_collections.ConfigDict, say: Say) -> tuple[ml_collections.ConfigDict, Say]:
    """Config and messages of this process: all have one config, and process 0 speaks for all."""
    flat = config_rules.flatten(config_lib.to_dict(config))
    group.same("config", {key: value for key, value in flat.items() if key not in OWN})
    if group.index == 0:
        return config, say
    config = config.copy_and_resolve_references()
    config.log.progress = config.log.tensorboard = False
    return config, lambda line: None


def _write_identity(experiment: Experiment, run: RunDir, facts: dict[str, Any]) -> None:
    """model.json, tokenizer/ and, last, config.json: with it the run can be gone on with."""
    metrics.write_json(run.model, experiment.student.model.config.to_json())
    experiment.prepared.vocabulary.save(run.tokenizer)
    metrics.write_json(run.config, {"config": config_lib.to_dict(experiment.config), "facts": facts})


@contextlib.contextmanager
def _signals(group: Group) -> Iterator[None]:
    """`group.caught` receives the number of SIGTERM or SIGINT; a second one stops at once."""

    def handler(number: int, _) -> None:
        if group.caught:
            raise KeyboardInterrupt
        group.caught.append(number)

    try:
        before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread: signals are somebody else's
        yield
        return
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)

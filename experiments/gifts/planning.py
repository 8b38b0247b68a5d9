"""Which runs the measurement consists of: pure, so that it can be looked at and tested without training.

Every method has, for each seed, one warmup-stable-decay trunk, and a branch that decays on its own for every other
budget: a compared model is always one whose learning rate has fallen all the way. All methods have the same schedule,
peak, warm-up, budgets and rows; a seed has a small LM, an initialisation and an order of the data of its own.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slm_assist import config, flops, shapes
from slm_assist.errors import UserError, one_of

FILES = Path(__file__).parents[1]
HELPER, BASELINE = "small_lm", "baseline"
METHODS = (BASELINE, "salt", "salt_ds", "grow", "grow_salt", "let")  # files of experiments/
BUDGETS = (0.5, 0.7, 1.0)  # parts of the steps at which models are compared
DECAY = 0.2  # part of each budget over which the learning rate falls
STAGE_1 = 0.173  # of the whole budget, for soft labels, selection and representations alike: the paper's 36K of 208K
LEAST_STEPS = 20
HELPER_KEYS = ("assist.teacher", "grow.helper", "represent.helper")
STAGE_KEYS = {"assist.schedule": "assist.steps", "represent.schedule": "represent.steps"}

SHARED = {
    "model.scan_layers": "false",
    "batch_rows": 16,
    "data.seq_len": 256,
    "data.vocab_size": 2048,
    "data.domain_field": "meta.pile_set_name",
    "validation.every": 0,  # at the end only: nothing else is compared
    "validation.rows": 512,
    "checkpoint.keep_last": 1,
    "mesh.data": 1,
    "log.tensorboard": False,
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the command line says.

    Attributes:
      data, validation: sources; out: directory of all runs.
      seeds: how many, from 0; steps: the whole budget of a method, and of the small LM.
      small, large: named sizes.
      methods: names of files of experiments/, BASELINE among them.
      given: further config keys, for all runs.
    """

    data: str
    validation: str
    out: str
    seeds: int = 3
    steps: int = 500
    small: str = "laptop-small"
    large: str = "laptop-large"
    methods: tuple[str, ...] = METHODS
    given: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """One run: `steps` updates by `method` with `seed`, of which it trains those from `first` on.

    Attributes:
      path: its directory; file: its experiment file; overrides: what is set on top of that.
      needs: directories of the runs that must have ended before: the small LM, and the trunk it leaves.
    """

    method: str
    seed: int
    steps: int
    path: str
    file: str
    overrides: Mapping[str, Any]
    first: int = 0
    needs: tuple[str, ...] = ()

    @property
    def updates(self) -> int:
        return self.steps - self.first

    @property
    def trunk(self) -> str:
        """The run that it leaves; empty for one that starts at 0."""
        return self.overrides.get("branch.run", "")


@dataclasses.dataclass(frozen=True)
class Plan:
    """All runs, each behind those it needs.

    Attributes:
      budgets: steps at which every method is compared.
      longer: steps of BASELINE with the FLOPs of the small LM's training on top.
      longest: with those of the dearest method's soft labels and scores too, so that no method's cost, the small LM
        counted in full, lies beyond what BASELINE was measured at.
      relative: FLOPs of an update of the small LM over those of the large one.
    """

    runs: tuple[PlannedRun, ...]
    budgets: tuple[int, ...]
    longer: int
    longest: int
    stage_1: int
    relative: float

    def students(self) -> list[PlannedRun]:
        return [run for run in self.runs if run.method != HELPER]


def plan(settings: Settings) -> Plan:
    """All runs of the measurement.

    Raises:
      UserError: too few steps or seeds, an unknown method, no BASELINE, or a key that the plan itself sets.
    """
    check(settings)
    budgets = tuple(round(part * settings.steps) for part in BUDGETS)
    stage_1, relative = round(STAGE_1 * settings.steps), _relative_cost(settings)
    passes = 1 + int(_override(settings, "salt_ds", "select.pool_factor"))  # of a row: for soft labels, as candidates
    longer = settings.steps + math.ceil(relative * settings.steps)
    longest = settings.steps + math.ceil(relative * (settings.steps + stage_1 * passes / 3))
    ends = dict.fromkeys(settings.methods, budgets) | {BASELINE: tuple(sorted({*budgets, longer, longest}))}
    runs: list[PlannedRun] = []
    for seed in range(settings.seeds):
        helper = _trunk(settings, HELPER, seed, (settings.steps,), stage_1, "")
        runs.append(helper)
        for method in settings.methods:
            trunk = _trunk(settings, method, seed, ends[method], stage_1, helper.path)
            runs += [trunk, *(_branch(trunk, steps) for steps in ends[method][:-1])]
    return Plan(tuple(runs), budgets, longer, longest, stage_1, relative)


def leaves(steps: int) -> int:
    """Where the learning rate of a run of so many steps begins to fall, as `optim.learning_rate` rounds it."""
    return steps - round(DECAY * steps)


def check(settings: Settings) -> None:
    """Raises `UserError` where no plan can be made of the settings."""
    if settings.seeds < 1 or settings.steps < LEAST_STEPS:
        raise UserError(f"--seeds must be at least 1 and --steps at least {LEAST_STEPS}")
    if BASELINE not in settings.methods or len(set(settings.methods)) < len(settings.methods):
        raise UserError(f"--methods={','.join(settings.methods)}: name {BASELINE} and others, each once")
    known = sorted(path.stem for path in FILES.glob("*.py"))
    for method in settings.methods:
        one_of("--methods", method, known)
    own = _own(settings, BASELINE, 0, settings.steps) | dict.fromkeys(("checkpoint.keep", *STAGE_KEYS.values()))
    for key in settings.given:
        if key in own or key in HELPER_KEYS or key.startswith("branch."):
            raise UserError(f"--{key}: the plan sets it, for each run its own; use the options that --help lists")


def _own(settings: Settings, method: str, seed: int, steps: int) -> dict[str, Any]:
    """Keys that no run may have otherwise."""
    return {
        "name": f"{_override(settings, method, 'name')} at {steps} steps",
        "seed": seed,
        "data.order_seed": seed,
        "data.source": settings.data,
        "data.validation": settings.validation,
        "steps": steps,
        "model.size": settings.small if method == HELPER else settings.large,
        "optimizer.schedule": "wsd",
        "optimizer.decay_fraction": DECAY,
        "optimizer.warmup_steps": settings.steps // 10,
        "checkpoint.every": max(1, settings.steps // 4),
    }


def _trunk(settings: Settings, method: str, seed: int, ends: Sequence[int], stage_1: int, helper: str) -> PlannedRun:
    """The run to the last of `ends`, which keeps the checkpoints where branches to the others leave."""
    file, directory = FILES / f"{method}.py", Path(settings.out) / f"seed-{seed}"
    set_there = config.read_experiment(str(file))
    overrides = SHARED | dict(settings.given) | _own(settings, method, seed, ends[-1])
    overrides["checkpoint.keep"] = tuple(sorted({leaves(steps) for steps in ends[:-1]}))
    helped = {key: helper for key in HELPER_KEYS if key in set_there}
    overrides |= helped | {steps: stage_1 for schedule, steps in STAGE_KEYS.items() if schedule in set_there}
    if set_there.get("select.rows") == "online":
        overrides["select.scorer_step"] = -1  # after 12 % of so few updates too little is in the top 10 to choose by
    return PlannedRun(
        method, seed, ends[-1], str(directory / f"{method}-{ends[-1]}"), str(file), overrides,
        needs=(helper,) if helped else (),
    )  # fmt: skip


def _branch(trunk: PlannedRun, steps: int) -> PlannedRun:
    """The same run to `steps` only: it leaves the trunk where its own learning rate begins to fall."""
    first = leaves(steps)
    name = trunk.overrides["name"].replace(f"at {trunk.steps} steps", f"at {steps} steps")
    branched = {"name": name, "steps": steps, "checkpoint.keep": (), "branch.run": trunk.path, "branch.step": first}
    path = str(Path(trunk.path).with_name(f"{trunk.method}-{steps}"))
    return dataclasses.replace(
        trunk, steps=steps, path=path, first=first, overrides={**trunk.overrides, **branched},
        needs=(*trunk.needs, trunk.path),
    )  # fmt: skip


def _override(settings: Settings, method: str, key: str) -> Any:
    return settings.given.get(key, _file(method)[key])


@functools.cache
def _file(method: str) -> Mapping[str, Any]:
    return config.read_experiment(str(FILES / f"{method}.py"))


def _relative_cost(settings: Settings) -> float:
    """FLOPs of an update of the small LM over those of one of the large LM."""
    costs = []
    for method in (HELPER, BASELINE):
        overrides = SHARED | dict(settings.given) | _own(settings, method, 0, settings.steps)
        resolved, _ = config.resolve(str(FILES / f"{method}.py"), overrides)
        shape = shapes.model_config(resolved, resolved.data.vocab_size)
        costs.append(flops.plain(shape, resolved.data.seq_len))
    return costs[0] / costs[1]


def describe(planned: Plan) -> str:
    """A line a run, and how much there is to train."""
    lines = [f"{run.path}: {run.updates} updates" + (f", from {run.first} of {run.trunk}" if run.first else "")
             for run in planned.runs]  # fmt: skip
    small = sum(run.updates for run in planned.runs if run.method == HELPER)
    large = sum(run.updates for run in planned.students())
    equal = large + planned.relative * small
    return "\n".join([
        *lines,
        f"{len(planned.runs)} runs: {large:,} updates of the large LM and {small:,} of the small one, which together "
        f"cost as much as {equal:,.0f} of the large one, help not counted: "
        f"{equal / 600:.1f} minutes for every 0.1 s that an update of the large LM takes, by one process.",
    ])  # fmt: skip

"""From the matrix to jobs: pure, so that what is going to be trained can be looked at and tested without training.

Every row has, for each seed, one warmup-stable-decay trunk, and a branch that decays on its own for every other end: a
compared model is always one whose learning rate has fallen all the way. A seed has a small LM, an initialisation and an
order of the data of its own, and all rows of a seed share them.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import corpus
import jax
import matrix
from matrix import BASELINE, Row
from tiers import Tier

from slm_assist import config, flops, shapes
from slm_assist.errors import UserError
from slm_assist.models import Transformer

FILES = Path(__file__).parents[1]
DECAY = 0.2  # part of each end's steps over which the learning rate falls
POOL = 0.2  # part of the rows that is kept where a list is chosen beforehand: the paper's
LONGEST = 2.0  # BASELINE goes on to so many times the steps, so that no method costs more than it was measured at
TRAIN, SCORE, LIST, ENTROPY = "train", "score", "list", "entropy"
PLACEHOLDER = re.compile(r"^\{(?:(\w+):)?(\w+)\}$")

SHARED = {
    "data.domain_field": corpus.DOMAIN_FIELD,
    "validation.every": 0,
    "validation.rows": 64,  # a look only: what is compared is measured document by document
    "checkpoint.keep_last": 1,
    "mesh.data": 1,
    "log.tensorboard": False,
    "log.samples": 0,
    "log.progress": False,
    "optimizer.schedule": "wsd",
    "optimizer.decay_fraction": DECAY,
}


@dataclasses.dataclass(frozen=True)
class Number:
    """Stands for a number that a job has written into a file."""

    path: str


@dataclasses.dataclass(frozen=True)
class Job:
    """One thing to do: to train a run, score a corpus, choose a list of rows, or measure an entropy.

    Attributes:
      path: what it makes; needs: paths of what must be there before.
      row: the matrix's, None for small LMs; key: its, or the small LM's.
      file, overrides: the experiment file and what is set on top.
      steps, first: it trains the updates from `first` to `steps`, of which `stage_1` have help.
      full: updates of the row's whole run; cost: FLOPs, about.
    """

    kind: str
    path: str
    key: str
    seed: int
    ratio: int
    file: str = ""
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    needs: tuple[str, ...] = ()
    row: Row | None = None
    steps: int = 0
    first: int = 0
    full: int = 0
    cost: float = 0.0

    @property
    def trunk(self) -> str:
        return self.overrides.get("branch.run", "")


@dataclasses.dataclass(frozen=True)
class Setting:
    """Where everything is: the directory of all runs, a tier, and the config keys given for all runs."""

    out: str
    tier: Tier
    given: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tuning: str = ""  # directory with train.jsonl and test.jsonl to fine-tune on
    seeds_from: int = 0  # added to all seeds

    def data(self, part: str) -> str:
        return f"jsonl:{corpus.part_file(Path(self.out) / 'corpus', part)}"

    def directory(self, ratio: int, seed: int) -> Path:
        return Path(self.out) / f"ratio-{ratio}" / f"seed-{seed}"

    @functools.cached_property
    def sizes(self) -> "Sizes":
        return _sizes(self)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What follows from the shapes: the student's parameters, tokens an update, and training FLOPs a token."""

    parameters: int
    tokens: int
    student: float
    helpers: Mapping[str, float]


@functools.cache
def read_file(name: str) -> Mapping[str, Any]:
    return config.read_experiment(str(FILES / f"{name}.py"))


def plan(setting: Setting, rows: Sequence[Row] | None = None) -> list[Job]:
    """All jobs of the matrix, ranked, each behind those it needs, each once; most curves behind all that is final."""
    found: dict[str, Job] = {}
    for row in matrix.rows(setting.tier, bool(setting.tuning)) if rows is None else rows:
        for seed in range(row.first_seed + setting.seeds_from, row.first_seed + row.seeds + setting.seeds_from):
            for job in of_row(setting, dataclasses.replace(row, ratio=row.ratio or setting.tier.ratios[0]), seed):
                found.setdefault(job.path, job)
    return sorted(found.values(), key=lambda job: bool(job.trunk) and not matrix.curve_at_once(job.row))


def of_row(setting: Setting, row: Row, seed: int) -> list[Job]:
    """The jobs of one row and seed: what it needs, its trunk, its branches."""
    full = steps_of(setting, row.ratio)
    values = read_file(row.file) | dict(row.overrides)
    shape = {} if "init.model" in row.overrides else setting.tier.student
    overrides = _own(setting, row.ratio, seed) | dict(shape) | dict(row.overrides)
    overrides |= {step_key: stage_1(row, full) for key, step_key in matrix.STEP_KEYS.items()
                  if values.get(key, "none") not in ("none", "constant")}  # fmt: skip
    if values.get("select.rows", "all") != "all" and values.get("select.fraction") != 1.0:
        overrides["select.steps"] = stage_1(row, full)
    needed: dict[str, Job | None] = {}
    for key, value in overrides.items():
        overrides[key] = _put_in(setting, row.ratio, seed, value, needed)
    ends = ends_of(setting, row, full) if "steps" not in row.overrides else [row.overrides["steps"]]
    directory = setting.directory(row.ratio, seed)
    trunk = Job(
        TRAIN, str(directory / f"{row.key}-{ends[-1]}"), row.key, seed, row.ratio, row.file, overrides,
        tuple(needed), row, ends[-1], full=full,
    )  # fmt: skip
    later = {round(part * full) for part in matrix.ENDS}  # also those not planned: they may be, once it is trained
    keep = tuple(sorted({leaves(steps) for steps in {*ends, *later} if steps < ends[-1]}))
    trunk = _named(dataclasses.replace(trunk, overrides=overrides | {"steps": ends[-1], "checkpoint.keep": keep}))
    jobs = [*filter(None, needed.values()), trunk, *(_branch(trunk, steps) for steps in ends[:-1])]
    return [dataclasses.replace(job, cost=_cost(setting, job)) for job in jobs]


def steps_of(setting: Setting, ratio: int) -> int:
    """Updates in which a student reads `ratio` tokens a parameter."""
    return round(ratio * setting.sizes.parameters / setting.sizes.tokens)


def stage_1(row: Row, full: int) -> int:
    return round(row.stage_1 * full)


def ends_of(setting: Setting, row: Row, full: int) -> list[int]:
    """Steps of the fully decayed models; BASELINE's go on, so that every method's FLOPs lie between two of them."""
    ends = {round(part * full) for part in row.ends}
    if row.key == BASELINE:
        ends |= {longer(setting, full), round(1.5 * full), round(LONGEST * full)}
    return sorted(ends)


def longer(setting: Setting, full: int) -> int:
    """Steps of BASELINE with the FLOPs of training the small LM on top."""
    return full + math.ceil(relative(setting, "small") * full)


def relative(setting: Setting, helper: str) -> float:
    """FLOPs of an update of a small LM over those of the student's."""
    return setting.sizes.helpers[helper] / setting.sizes.student


def leaves(steps: int) -> int:
    """Where the learning rate of a run of so many steps begins to fall, as `optim.learning_rate` rounds it."""
    return steps - round(DECAY * steps)


def _own(setting: Setting, ratio: int, seed: int) -> dict[str, Any]:
    tier = setting.tier
    return {
        **SHARED, **tier.shared, **setting.given,
        "seed": seed,
        "data.order_seed": seed,
        "data.source": setting.data(corpus.TRAIN),
        "data.validation": setting.data(corpus.VALIDATION),
        "optimizer.peak_learning_rate": tier.peak,
        "optimizer.weight_decay": tier.weight_decay,
        "checkpoint.every": max(1, steps_of(setting, ratio) // 4),
    }  # fmt: skip


def _put_in(setting: Setting, ratio: int, seed: int, value: Any, needed: dict[str, Job | None]) -> Any:
    """A value with its placeholder filled in; what makes it joins `needed`, None for a run of another row."""
    match = PLACEHOLDER.match(value) if isinstance(value, str) else None
    if not match:
        return value
    kind, name = match.groups()
    if name == corpus.OTHER:
        return setting.data(corpus.OTHER)
    if kind == "tuning":
        return f"jsonl:{Path(setting.tuning) / name}.jsonl"
    if kind == "run":
        path = str(setting.directory(ratio, seed) / f"{name}-{steps_of(setting, ratio)}")
        needed[path] = None
        return path
    make = {None: _helper, "list": _list, "entropy": _entropy}[kind]
    jobs = make(setting, ratio, seed, name)
    needed.update({job.path: job for job in jobs})
    return Number(jobs[-1].path) if kind == "entropy" else jobs[-1].path


def _helper(setting: Setting, ratio: int, seed: int, name: str) -> list[Job]:
    """A small LM, behind what it needs itself."""
    keys, full = dict(matrix.HELPER_KEYS[name]), steps_of(setting, ratio)
    part = keys.pop("steps", 1.0)
    steps = part if isinstance(part, int) else round(part * full)
    overrides = _own(setting, ratio, seed) | dict(_shape_of(setting, name)) | keys
    needed: dict[str, Job] = {}
    overrides = {key: _put_in(setting, ratio, seed, value, needed) for key, value in overrides.items()}
    path = str(setting.directory(ratio, seed) / f"helper-{name}")
    job = Job(TRAIN, path, f"helper-{name}", seed, ratio, "small_lm", overrides | {"steps": steps}, tuple(needed),
              steps=steps, full=full)  # fmt: skip
    return [*needed.values(), dataclasses.replace(_named(job), cost=_cost(setting, job))]


def _list(setting: Setting, ratio: int, seed: int, name: str) -> list[Job]:
    """A list of rows: `top`, the best by SALT's score; `share`, random ones with its share of each domain; `few`."""
    path = setting.directory(ratio, seed) / "lists" / f"{name}.npz"
    helpers = _helper(setting, ratio, seed, "small")
    if name == "few":
        resolved = {**_own(setting, ratio, seed), **setting.tier.student}
        rows = round(matrix.FEW * steps_of(setting, ratio) * int(resolved["batch_rows"]))  # a given one is text
        job = Job(LIST, str(path), name, seed, ratio, BASELINE, resolved, (helpers[-1].path,), steps=rows)
        return [*helpers, job]
    scores = _scores(setting, ratio, seed, helpers[-1].path)
    top = Job(LIST, str(path.with_name("top.npz")), "top", seed, ratio, needs=(scores.path,))
    found = [*helpers, scores, top]
    if name == "share":
        found.append(Job(LIST, str(path), name, seed, ratio, needs=(scores.path, top.path)))
    return found


def _scores(setting: Setting, ratio: int, seed: int, helper: str) -> Job:
    path = str(setting.directory(ratio, seed) / "lists" / "scores")
    overrides = _own(setting, ratio, seed) | dict(setting.tier.student) | {"assist.teacher": helper}
    return Job(SCORE, path, "scores", seed, ratio, "salt_ds_offline", overrides, (helper,))


def _entropy(setting: Setting, ratio: int, seed: int, name: str) -> list[Job]:
    helpers = _helper(setting, ratio, seed, name)
    path = str(setting.directory(ratio, seed) / f"entropy-{name}.json")
    return [*helpers, Job(ENTROPY, path, name, seed, ratio, needs=(helpers[-1].path,))]


def _branch(trunk: Job, steps: int) -> Job:
    """The same run to `steps` only: it leaves the trunk where its own learning rate begins to fall."""
    first = leaves(steps)
    branched = {"steps": steps, "checkpoint.keep": (), "branch.run": trunk.path, "branch.step": first}
    path = str(Path(trunk.path).with_name(f"{trunk.key}-{steps}"))
    return _named(dataclasses.replace(
        trunk, steps=steps, path=path, first=first, overrides={**trunk.overrides, **branched},
        needs=(*trunk.needs, trunk.path),
    ))  # fmt: skip


def _named(job: Job) -> Job:
    title = job.row.title if job.row else job.key
    return dataclasses.replace(job, overrides={**job.overrides, "name": f"{title}, {job.steps} steps"})


def _shape_of(setting: Setting, helper: str) -> Mapping[str, Any]:
    return setting.tier.helpers.get(helper, setting.tier.helpers["small"])


def _sizes(setting: Setting) -> Sizes:
    def of(shape: Mapping[str, Any]) -> tuple[Any, Any, float]:
        keys = {**SHARED, **setting.tier.shared, **setting.given, **shape}
        resolved, _ = config.resolve(str(FILES / f"{BASELINE}.py"), keys)
        size = shapes.model_config(resolved, resolved.data.vocab_size)
        return resolved, size, flops.plain(size, resolved.data.seq_len)

    resolved, size, student = of(setting.tier.student)
    params = jax.eval_shape(Transformer(size).init, jax.random.key(0))
    return Sizes(
        sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)),
        resolved.batch_rows * resolved.data.seq_len,
        student,
        {name: of(_shape_of(setting, name))[2] for name in matrix.HELPER_KEYS},
    )


def _cost(setting: Setting, job: Job) -> float:
    """FLOPs of a training job, about: help is charged by the passes that its file makes."""
    if job.kind != TRAIN:
        return 0.0
    sizes = setting.sizes
    if not job.row:
        return sizes.tokens * job.steps * sizes.helpers[job.key.removeprefix("helper-")]
    values = read_file(job.file) | dict(job.overrides)
    passes = (values.get("assist.schedule", "none") != "none") + (values.get("represent.schedule", "none") != "none")
    passes += values.get("select.pool_factor", 5) if values.get("select.rows") == "online" else 0
    helped = max(0, min(job.steps, stage_1(job.row, job.full)) - job.first)
    own = (job.steps - job.first) * sizes.student
    return sizes.tokens * (own + helped * passes * sizes.helpers["small"] / 3)


def check(setting: Setting) -> None:
    """Raises `UserError` where a key is given that the plan sets itself."""
    own = _own(dataclasses.replace(setting, given={}), setting.tier.ratios[0], 0) | dict(setting.tier.student)
    own |= dict.fromkeys(("name", "steps", "checkpoint.keep"))
    may = {"data.cache_dir", "compute.cache_dir", "data.cores", *setting.tier.shared}
    for key in setting.given:
        if key in own.keys() - may or key.startswith(("branch.", "assist.", "select.", "grow.", "represent.")):
            raise UserError(f"--{key}: the plan sets it, for each run its own; tiers.py and matrix.py say how")

"""Seconds of an update, by method and stage: short runs in turn, on a machine that does nothing else.

A run's own clock is not used for comparisons, as runs share a machine: its seconds are its updates times these medians.
"""

import itertools
import json
import shutil
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import planning
import work
from matrix import CONFIRM, GIFTS, LABELS, MAIN, STEP_KEYS, WINS
from planning import TRAIN, Job, Setting
from points import Point

from slm_assist import config, metrics
from slm_assist.errors import UserError
from slm_assist.report.runs import read_metrics
from slm_assist.train import train

FILE = "seconds.json"
UPDATES, WARM = 60, 8  # of a short run, half of them with help; the first of each stage are left out
ROUNDS = 3
PLAIN, HELPER = "plain", "small_lm"


def name_of(file: str, stage: str) -> str:
    """What an update of an experiment file's stage is called; without help all files have the same."""
    return stage if stage == PLAIN else f"{file}/{stage}"


def seconds_of(point: Point, medians: dict[str, float], share: float, helper_steps: int) -> float | None:
    """Seconds of a point's updates, and of that share of its small LM's; None where something was not timed.

    Timed are the main methods, with the small LM that they share, and what wins; not others in the same file (another
    teacher costs something else), nor the scoring of a corpus beforehand.
    """
    names = {stage: name_of(point.row.file, stage) for stage in point.stages}
    timed = point.row.group in (MAIN, GIFTS, CONFIRM) and "select.list" not in point.row.overrides
    timed = timed and (point.row.key in WINS or LABELS.items() <= (LABELS | dict(point.row.overrides)).items())
    if not timed or not {*names.values(), HELPER} <= medians.keys():
        return None
    helper = share * helper_steps * medians[HELPER] if point.helper_flops else 0.0
    return helper + sum(count * medians[names[stage]] for stage, count in point.stages.items())


def measure(setting: Setting, jobs: Sequence[Job], command: str) -> Path:
    """Times every main method and the small LM in turn, `ROUNDS` times over, and writes OUT/seconds.json.

    Raises:
      UserError: what the methods need, the first seed's small LM and list, is not there yet.
    """
    chosen = {job.file: job for job in reversed(jobs) if _is_timed(setting, job)}
    for path in {path for job in chosen.values() for path in job.needs}:
        if not Path(path).exists():
            raise UserError(f"{path}: it is not there yet, and timing needs it; train first")
    found: dict[str, list[float]] = defaultdict(list)
    folder = Path(setting.out) / "timing"
    for number, (file, job) in itertools.product(range(ROUNDS), sorted(chosen.items())):
        for stage, seconds in _short_run(job, folder / f"{file}-{number}").items():
            found[file if file == HELPER else name_of(file, stage)].append(seconds)
    shutil.rmtree(folder)
    result: dict[str, Any] = {
        "command": command, "commit": work.commit(), "rounds": found,
        "median": {name: statistics.median(values) for name, values in sorted(found.items())},
    }  # fmt: skip
    metrics.write_json(Path(setting.out) / FILE, result)
    return Path(setting.out) / FILE


def read(setting: Setting) -> dict[str, float] | None:
    """The medians, None before they were measured."""
    path = Path(setting.out) / FILE
    return json.loads(path.read_text(encoding="utf-8"))["median"] if path.is_file() else None


def _is_timed(setting: Setting, job: Job) -> bool:
    if job.kind != TRAIN or job.first or (job.ratio, job.seed) != (setting.tier.ratios[0], setting.seeds_from):
        return False
    return (job.row.group in (MAIN, GIFTS) or job.key in WINS) if job.row else job.key == "helper-small"


def _short_run(job: Job, path: Path) -> dict[str, float]:
    """The median seconds of an update in each stage of a run of a few."""
    half = {key: UPDATES // 2 for key in (*STEP_KEYS.values(), "select.steps") if key in job.overrides}
    overrides = {**job.overrides, **half, "steps": UPDATES, "checkpoint.keep": (), "checkpoint.every": 0,
                 "optimizer.warmup_steps": 1}  # fmt: skip
    resolved, _ = config.resolve(str(planning.FILES / f"{job.file}.py"), overrides)
    train(resolved, str(path), say=lambda line: None)
    records = [record for record in read_metrics(path) if record["kind"] == "train"]
    times: dict[str, list[float]] = defaultdict(list)
    for before, record in itertools.pairwise(records):
        times[record["stage"]].append(record["seconds"] - before["seconds"])
    jax.clear_caches()
    return {stage: statistics.median(values[WARM:]) for stage, values in times.items()}

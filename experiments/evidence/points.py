"""The runs' files to points: a point is one fully decayed model, what it reached on held-out text and what it cost."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import corpus
import measures
import numpy as np
import reading
import work
from matrix import BUCKETS, TUNED, Row
from planning import TRAIN, Job, Setting

from slm_assist.errors import UserError
from slm_assist.report.runs import Run, read_run

ALIKE = ("vocabulary", "objective", "parameters", "train_rows", "batch_rows", "seq_len")  # facts of all students


@dataclasses.dataclass(frozen=True, eq=False)
class Point:
    """One fully decayed model.

    Attributes:
      flops: of the run from step 0 on, all passes of helpers and the scoring of lists included.
      helper_flops: of training the small LMs that helped, 0 without.
      stages: updates by the name of the compiled step, for seconds.
      tokens: learnt from; rows: read, candidates included; epochs: rows learnt from over how many of them are distinct.
      measures: [1 + replicates] bits a byte by name, the first of all documents, the others of those drawn.
    """

    row: Row
    seed: int
    steps: int
    path: str
    flops: float
    helper_flops: float
    stages: dict[str, int]
    tokens: float
    rows: float
    epochs: float
    switch: int | None
    helper_parameters: int
    measures: dict[str, np.ndarray]

    def cost(self, share: float) -> float:
        """FLOPs with so much of the small LM's training charged."""
        return self.flops + share * self.helper_flops


@dataclasses.dataclass(frozen=True)
class Found:
    """What there is of a plan on one part of the held-out text.

    Attributes:
      points: by (ratio, row's key, seed), in the order of steps; of seeds whose model at all of the steps is there, at
        the ends that all such seeds of the row have.
      facts: of one of the runs, and of all the names that differ between runs.
    """

    part: str
    points: dict[tuple[int, str, int], list[Point]]
    rows: dict[tuple[int, str], Row]
    held: measures.Held
    runs: dict[str, Run]

    def seeds(self, ratio: int, key: str) -> list[int]:
        return sorted(seed for r, k, seed in self.points if (r, k) == (ratio, key))


def read(setting: Setting, jobs: Sequence[Job], part: str) -> Found:
    """All points of rows that are measured on `part`.

    Raises:
      UserError: runs that cannot be compared, or that are not what the plan says; no run is there.
    """
    chosen = [job for job in jobs if is_measured(job, part)]
    cutter = next(job for job in jobs if job.row and job.row.group == BUCKETS)
    if not work.done(cutter):
        raise UserError(
            f"{cutter.path}: the run that cuts the buckets is not there yet; train with --only=group=buckets"
        )
    held = measures.held(Path(setting.out), part, Path(cutter.path))
    there = [job for job in chosen if work.done(job) and job.row.group != BUCKETS]
    if not there:
        raise UserError(f"{setting.out}: no run of the plan has ended; train first")
    runs = {job.path: read_run(job.path) for job in there}
    runs |= {job.trunk: read_run(job.trunk) for job in there if job.trunk and job.trunk not in runs}
    _check_alike(list(runs.values()))
    nats = np.stack([measures.row_nats(Path(job.path), part) for job in there])
    found = held.measure(nats, held.draws())
    points: dict[tuple[int, str, int], list[Point]] = {}
    for i, job in enumerate(there):
        values = {name: value[:, i] for name, value in found.items()}
        points.setdefault((job.ratio, job.key, job.seed), []).append(_point(job, runs, values))
    return _whole(part, chosen, points, held, runs)


def is_measured(job: Job, part: str) -> bool:
    """Whether a row's comparisons on a part of the held-out text stand on this job."""
    return bool(job.kind == TRAIN and job.row and job.row.group != TUNED and job.row.test == (part == corpus.TEST))


def _check_alike(runs: Sequence[Run]) -> None:
    """Raises `UserError` unless all students have one size, vocabulary and corpus, and read as much in an update."""
    for run in runs[1:]:
        for fact in ALIKE:
            if run.facts.get(fact) != runs[0].facts.get(fact):
                raise UserError(
                    f"{run.path}: its {fact} ({run.facts.get(fact)}) differs from that of {runs[0].path} "
                    f"({runs[0].facts.get(fact)}), so the two cannot be compared; train both with the same options"
                )


def _whole(part: str, chosen: Sequence[Job], points: dict, held: measures.Held, runs: dict[str, Run]) -> Found:
    """Seeds whose model at all of the steps is there, at the ends that all of them have."""
    planned: dict[tuple[int, str, int], list[Job]] = {}
    rows: dict[tuple[int, str], Row] = {}
    for job in chosen:
        if job.row.group != BUCKETS:
            planned.setdefault((job.ratio, job.key, job.seed), []).append(job)
            rows[job.ratio, job.key] = job.row
    whole: dict[tuple[int, str, int], list[Point]] = {}
    for row in rows:
        keys = [key for key in planned if key[:2] == row]
        ends = {key: {point.steps for point in points.get(key, [])} for key in keys}
        there = [key for key in keys if planned[key][0].full in ends[key]]
        common = set.intersection(*(ends[key] for key in there)) if there else set()
        for key in there:
            whole[key] = sorted((p for p in points[key] if p.steps in common), key=lambda point: point.steps)
    return Found(part, whole, rows, held, runs)


def _point(job: Job, runs: dict[str, Run], values: dict[str, np.ndarray]) -> Point:
    run, trunk = runs[job.path], runs.get(job.trunk)
    before = [record for record in trunk.train if record["step"] <= job.first] if trunk else []
    own = [record for record in run.train if record["step"] > job.first]
    if [record["step"] for record in before + own] != list(range(1, job.steps + 1)) or run.seed != job.seed:
        raise UserError(f"{run.path}/metrics.jsonl: not one record for each of the {job.steps} updates with seed "
                        f"{job.seed}; it is damaged or another plan's: remove that run and train it again")  # fmt: skip
    stages: dict[str, int] = {}
    for record in before + own:
        stages[record["stage"]] = stages.get(record["stage"], 0) + 1
    batch = run.config["batch_rows"]
    return Point(
        job.row, job.seed, job.steps, job.path,
        flops=_total(before, own, "flops") + _scoring(run),
        helper_flops=_helper_flops(run, trunk),
        stages=stages,
        tokens=_total(before, own, "tokens"),
        rows=math.fsum(record.get("candidates", batch) for record in before + own),
        epochs=batch * job.steps / reading.distinct(run.config, run.facts["train_rows_count"], job.steps),
        switch=run.switch_step if not trunk else (trunk.switch_step or run.switch_step),
        helper_parameters=max((fact["parameters"] for fact in run.helpers.values()), default=0),
        measures=values,
    )  # fmt: skip


def _total(before: Sequence[dict], own: Sequence[dict], key: str) -> float:
    """A running total at the end of a branch, whether it counts on from its trunk's or from 0."""
    if not before or own[0][key] > before[-1][key]:
        return own[-1][key]
    return before[-1][key] + own[-1][key]


def _scoring(run: Run) -> float:
    """FLOPs of scoring the corpus for the run's lists of rows; a list that no model scored cost none."""
    found = run.scoring_flops
    if found is None:
        raise UserError(f"{run.path}: its list of rows does not say what scoring it cost; make it again")
    return found


def _helper_flops(run: Run, trunk: Run | None) -> float:
    """FLOPs of training the small LMs that helped, in whatever role, each run once and up to its latest step."""
    cost: dict[str, float] = {}
    for facts in (trunk.helpers if trunk else {}, run.helpers):
        for role, helper in facts.items():
            if ":" in helper["run"]:
                continue  # a function: made of counts, not trained
            if not helper.get("train_flops"):
                raise UserError(f"{run.path}/config.json: helper {role} does not say what training it cost; the small "
                                "LM's metrics.jsonl was gone when this run began: train it again")  # fmt: skip
            cost[helper["run"]] = max(cost.get(helper["run"], 0.0), helper["train_flops"])
    return math.fsum(cost.values())


def notes(paths: Sequence[str]) -> list[dict[str, Any]]:
    """What is kept of how runs were made: command, commit, seconds."""
    return [json.loads((Path(path) / work.NOTE).read_text(encoding="utf-8")) for path in paths]

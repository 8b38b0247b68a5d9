"""The runs' files to figures: what every method reached, at equal steps and at equal FLOPs, paired by seed.

Nothing is read but the directories of the planned runs. All methods go through the same functions. A point is one fully
decayed model. BASELINE at a method's FLOPs is interpolated between BASELINE's own points of the same seed, linearly in
the logarithm of the FLOPs, and never extrapolated; where a method's cost to BASELINE's quality is asked for, the
method's own points are interpolated in the same way.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import page
from planning import BASELINE, HELPER, Plan, PlannedRun

from slm_assist import metrics
from slm_assist.errors import UserError
from slm_assist.report import stats
from slm_assist.report.compare import SHARES, check_comparable
from slm_assist.report.runs import Run, read_run
from slm_assist.report.stats import Estimate

EDGE = 1e-9  # relative: FLOPs added up in another order are the same FLOPs
QUALITY = ("log_perplexity", "bits_per_byte")
ALIKE = ("train_rows", "parameters", "batch_rows", "seq_len")  # facts that all students share


@dataclasses.dataclass(frozen=True)
class Point:
    """One fully decayed model.

    Attributes:
      steps: updates; flops: of the run from step 0 on, every helper's forward passes included.
      helper_flops: of training the small LMs that helped, 0 without; by_part: `flops` by student, teacher, ...
      tokens: learnt from; rows: read, candidates included.
    """

    steps: int
    log_perplexity: float
    bits_per_byte: float
    flops: float
    helper_flops: float
    tokens: float
    rows: int

    def cost(self, share: float) -> float:
        """FLOPs with so much of the small LM's training charged."""
        return self.flops + share * self.helper_flops


Points = dict[str, dict[int, list[Point]]]  # by method and seed, in the order of steps


def write(planned: Plan, out: Path, command: str) -> Path:
    """Writes README.md, results.json and gifts.png into `out`; returns the page.

    Raises:
      UserError: runs are missing, unfinished or not comparable.
    """
    results = collect(planned, command)
    metrics.write_json(out / "results.json", results)
    (out / "gifts.png").write_bytes(page.picture(results))
    (out / "README.md").write_text(page.markdown(results), encoding="utf-8")
    return out / "README.md"


def collect(planned: Plan, command: str = "") -> dict[str, Any]:
    """Every figure of the measurement, as JSON has it.

    Raises:
      UserError: as `write`.
    """
    runs = read_all(planned)
    points = read_points(planned, runs)
    base = points[BASELINE]
    methods = {}
    for method, seeds in points.items():
        methods[method] = {
            "name": _name(runs, planned, method),
            "budgets": [_at(planned, method, seeds, base, i) for i in range(len(next(iter(seeds.values()))))],
            "to_quality": _to_quality(seeds, base, planned.budgets[-1]),
        }
    return {
        "command": command,
        "setting": _setting(planned, runs),
        "detectable": {str(steps): detectable(base, steps) for steps in planned.budgets},
        "methods": methods,
    }


def read_all(planned: Plan) -> dict[str, Run]:
    """All planned runs by directory.

    Raises:
      UserError: some are missing or unfinished, or they cannot be compared.
    """
    left = [run.path for run in planned.runs if not (Path(run.path) / "summary.json").is_file()]
    if left:
        named = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
        raise UserError(
            f"{len(left)} of {len(planned.runs)} runs are missing or unfinished ({named}); measure.py with the options "
            "they began with goes on with them"
        )
    runs = {run.path: read_run(run.path) for run in planned.runs}
    check_comparable(list(runs.values()))
    students = [runs[run.path] for run in planned.students()]
    for run in students:
        for fact in ALIKE:
            if run.facts.get(fact) != students[0].facts.get(fact):
                raise UserError(
                    f"{run.path}: its {fact} ({run.facts.get(fact)}) differ from those of {students[0].path} "
                    f"({students[0].facts.get(fact)}), so the two cannot be compared; train both with the same options"
                )
    for run in planned.runs:
        found = (runs[run.path].final["step"], runs[run.path].seed)
        if found != (run.steps, run.seed):
            raise UserError(
                f"{run.path}: ended at step {found[0]} with seed {found[1]}, and the plan has {run.steps} and "
                f"{run.seed}; use the options it was made with, or another --out"
            )
    return runs


def read_points(planned: Plan, runs: dict[str, Run]) -> Points:
    """What the students reached and cost."""
    points: Points = {}
    for run in planned.students():
        points.setdefault(run.method, {}).setdefault(run.seed, []).append(_point(run, runs))
    for seeds in points.values():
        for own in seeds.values():
            own.sort(key=lambda point: point.steps)
    return points


def _point(planned: PlannedRun, runs: dict[str, Run]) -> Point:
    run, trunk = runs[planned.path], runs.get(planned.trunk)
    before = [record for record in trunk.train if record["step"] <= planned.first] if trunk else []
    own = [record for record in run.train if record["step"] > planned.first]
    if [record["step"] for record in before + own] != list(range(1, planned.steps + 1)):
        raise UserError(f"{run.path}/metrics.jsonl: not one record for each of the {planned.steps} updates; it is "
                        "damaged, or another run's trunk; train that run again")  # fmt: skip
    total = {key: _total(before, own, key) for key in ("flops", "tokens")}
    batch = run.config["batch_rows"]
    return Point(
        planned.steps,
        *(run.final[name] for name in QUALITY),
        total["flops"],
        _helper_flops(run, trunk),
        total["tokens"],
        round(sum(record.get("candidates", batch) for record in before + own)),
    )


def _total(before: Sequence[dict], own: Sequence[dict], key: str) -> float:
    """A running total at the end of a branch, whether it counts on from its trunk's or from 0."""
    if not before or own[0][key] > before[-1][key]:
        return own[-1][key]
    return before[-1][key] + own[-1][key]


def _helper_flops(run: Run, trunk: Run | None) -> float:
    """FLOPs of training the small LMs that helped, in whatever role, each run once and up to its latest step."""
    cost: dict[str, float] = {}
    for facts in (trunk.facts if trunk else {}, run.facts):
        for role, helper in (facts.get("helpers") or {}).items():
            if not helper.get("train_flops"):
                raise UserError(f"{run.path}/config.json: facts.helpers.{role} does not say what training it cost; the "
                                "small LM's metrics.jsonl was gone when this run began: train it again")  # fmt: skip
            cost[helper["run"]] = max(cost.get(helper["run"], 0.0), helper["train_flops"])
    return sum(cost.values())


def _at(planned: Plan, method: str, seeds: dict[int, list[Point]], base: dict[int, list[Point]], i: int) -> dict:
    """A method's i-th budget: quality, cost, and how far from BASELINE."""
    points = {seed: own[i] for seed, own in seeds.items()}
    steps = next(iter(points.values())).steps
    row = {
        "steps": steps,
        **{name: _over(points.values(), lambda p, name=name: getattr(p, name)).to_json() for name in QUALITY},
        "flops": _over(points.values(), lambda p: p.flops).to_json(),
        "helper_flops": _over(points.values(), lambda p: p.helper_flops).to_json(),
        "tokens": _over(points.values(), lambda p: p.tokens).to_json(),
        "rows": _over(points.values(), lambda p: p.rows).to_json(),
    }
    if method == BASELINE:
        return row
    for name in QUALITY:
        row[f"{name}_at_equal_steps"] = _apart(
            points, lambda seed, p, name=name: at_steps(base[seed], p.steps, name), name
        )
    row["at_equal_flops"] = {
        share: _apart(points, lambda seed, p, part=part: at_flops(base[seed], p.cost(part)))
        for share, part in SHARES.items()
    }
    if steps == planned.budgets[-1]:
        row["against_longer"] = _apart(points, lambda seed, p: at_steps(base[seed], planned.longer))
    return row


def at_steps(points: Sequence[Point], steps: int, name: str = "log_perplexity") -> float:
    """The quality of the model that was trained for exactly so many steps."""
    return next(getattr(point, name) for point in points if point.steps == steps)


def at_flops(points: Sequence[Point], flops: float) -> float | None:
    """Log-perplexity at so many FLOPs, linear in their logarithm between the points; None outside them."""
    x = [point.flops for point in points]
    for end in (x[0], x[-1]):
        if abs(flops / end - 1) < EDGE:
            flops = end
    return stats.interpolate(math.log(flops), [math.log(v) for v in x], [point.log_perplexity for point in points])


def _apart(
    points: dict[int, Point], of_base: Callable[[int, Point], float | None], name: str = "log_perplexity"
) -> dict[str, Any]:
    """A method's points minus what `of_base` gives for each, paired by seed, and the verdict."""
    base = {seed: of_base(seed, point) for seed, point in points.items()}
    own = {seed: getattr(point, name) for seed, point in points.items()}
    if None in base.values():
        return stats.estimate([None] * len(base)).to_json() | {"verdict": "outside the measured range"}
    apart = stats.difference(own, base)
    return apart.to_json() | {"verdict": verdict(apart)}


def verdict(apart: Estimate) -> str:
    """`better`, `worse` or `not resolved`: on which side of 0 the interval lies."""
    if apart.half_width is None:
        return "one seed"
    if abs(apart.mean) <= apart.half_width:
        return "not resolved"
    return "better" if apart.mean < 0 else "worse"


def _to_quality(seeds: dict[int, list[Point]], base: dict[int, list[Point]], steps: int) -> dict[str, Any]:
    """Steps, and FLOPs over BASELINE's, until the quality of BASELINE's model of so many steps, seed by seed."""
    costs: dict[str, Callable[[Point], float]] = {"steps": lambda p: float(p.steps), "flops": lambda p: p.flops}
    reached = {}
    for axis, of in costs.items():
        reached[axis] = {
            seed: reach([of(p) for p in own], [p.log_perplexity for p in own], at_steps(base[seed], steps))
            for seed, own in seeds.items()
        }
    values = {axis: [value for value, _ in found.values()] for axis, found in reached.items()}
    target = {seed: next(p for p in own if p.steps == steps) for seed, own in base.items()}
    ratios = {
        share: stats.estimate([
            None if value is None else (value + part * own[-1].helper_flops) / target[seed].flops
            for (seed, own), value in zip(seeds.items(), values["flops"], strict=True)
        ]).to_json()
        for share, part in SHARES.items()
    }  # fmt: skip
    return {
        "where": [word for _, word in reached["steps"].values()],
        "steps": stats.estimate(values["steps"]).to_json(),
        "steps_over_baseline": stats.estimate([None if v is None else v / steps for v in values["steps"]]).to_json(),
        "flops_over_baseline": ratios,
    }


def reach(cost: Sequence[float], loss: Sequence[float], target: float) -> tuple[float | None, str]:
    """Cost at which the loss first is `target`, linear in log cost between points, and `within`, `before` or `never`.

    `before`: the first point is better already, `never`: none is as good; both without a value.
    """
    if loss[0] < target:
        return None, "before"
    found = stats.first_crossing([math.log(value) for value in cost], loss, target)
    return (None, "never") if found is None else (math.exp(found), "within")


def detectable(base: dict[int, list[Point]], steps: int) -> float | None:
    """Difference of two means that BASELINE's own spread over seeds makes, at the 95 % level; None with one seed."""
    values = [at_steps(own, steps) for own in base.values()]
    return stats.least_significant_difference(values, len(values)) if len(values) > 1 else None


def _over(points: Iterable[Point], of: Callable[[Point], float]) -> Estimate:
    return stats.estimate([of(point) for point in points])


def _name(runs: dict[str, Run], planned: Plan, method: str) -> str:
    run = next(run for run in planned.runs if run.method == method)
    return runs[run.path].name.removesuffix(f" at {run.steps} steps")


def _setting(planned: Plan, runs: dict[str, Run]) -> dict[str, Any]:
    """What a reader must know of all the runs, from the first student's files and the small LMs'."""
    student = runs[planned.students()[0].path]
    small = [runs[run.path] for run in planned.runs if run.method == HELPER]
    facts, config = student.facts, student.config
    same = ("hardware", "devices", "dtype", "versions", "vocabulary_size", "parameters", "train_rows", "train_tokens",
            "train_rows_count", "validation_rows", "validation_rows_count", "seq_len", "batch_rows")  # fmt: skip
    return {
        **{name: facts.get(name) for name in same},
        "unlike": [name for name in ("hardware", "devices", "dtype", "versions")
                   if any(run.facts.get(name) != facts.get(name) for run in runs.values())],
        "seeds": sorted({run.seed for run in planned.runs}),
        "budgets": list(planned.budgets),
        "longer": planned.longer,
        "longest": planned.longest,
        "stage_1": planned.stage_1,
        "optimizer": dict(config["optimizer"]),
        "runs": len(planned.runs),
        "updates": {"large": sum(run.updates for run in planned.students()),
                    "small": sum(run.updates for run in planned.runs if run.method == HELPER)},
        "helper": {
            "parameters": small[0].facts["parameters"],
            "steps": small[0].final["step"],
            **{name: stats.estimate([run.final[name] for run in small]).to_json() for name in QUALITY},
        },
    }  # fmt: skip

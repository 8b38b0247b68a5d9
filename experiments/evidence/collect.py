"""From the runs' files to `results.json`: every figure of the page. All rows go through the same functions."""

import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import compare
import corpus
import earlier
import measures
import numpy as np
import planning
import points
import timing
import tuned
import work
from compare import SHARES, Seeds
from matrix import BASELINE, BUCKETS, GIFTS, GRID, MAIN, Row
from measures import PRIMARY
from planning import Job, Setting
from points import Found, Point
from tables import Results
from tiers import TIERS

BINS = 40  # of the undecayed curve
ALIKE = ("hardware", "devices", "dtype", "versions", "parameters", "vocabulary_size", "seq_len", "batch_rows")


def collect(setting: Setting, jobs: Sequence[Job], command: str, before: Results | None = None) -> Results:
    """Every figure of the measurement, as JSON has it.

    Args:
      before: results whose rows stay where the runs at hand do not go beyond them.

    Raises:
      UserError: nothing to collect, or runs that cannot be compared.
    """
    parts = {part: points.read(setting, jobs, part) for part in _parts(jobs, before)}
    seconds = timing.read(setting) or (before or {}).get("seconds")
    results: Results = {"command": command, "setting": _setting(setting, parts), "seconds": seconds}
    for part, found in parts.items():
        results[part] = {
            "rows": [_row(setting, found, ratio, row, seconds) for (ratio, _), row in found.rows.items()
                     if row.group != GRID and found.seeds(ratio, row.key)]
        }  # fmt: skip
    results["tuned"] = tuned.collect(jobs)
    validation = parts[corpus.VALIDATION]
    results["grid"] = [
        {"title": row.title, "key": row.key, "method": row.pair,
         "peak": row.overrides["optimizer.peak_learning_rate"], "decay": row.overrides["optimizer.weight_decay"],
         PRIMARY: _values(seeds_of(validation, ratio, row.key), -1, PRIMARY)["mean"]}
        for (ratio, _), row in validation.rows.items() if row.group == GRID and validation.seeds(ratio, row.key)
    ]  # fmt: skip
    if before:
        earlier.join(results, before)
    _count(results, jobs)
    return results


def _count(results: Results, jobs: Sequence[Job]) -> None:
    """In the plan's order, what there is; what is planned and not there; and how much was trained for it."""
    order = {(job.ratio, job.key): i for i, job in reversed(list(enumerate(jobs)))}
    main = results["setting"]["ratios"][0]
    results["grid"].sort(key=lambda row: order.get((main, row["key"]), len(order)))
    updates = results["setting"]["updates"] = {}
    for part in (corpus.VALIDATION, corpus.TEST):
        if part not in results:
            continue
        rows = results[part]["rows"]
        rows.sort(key=lambda row: order.get((row["ratio"], row["key"]), len(order)))
        titles = {(job.ratio, job.key): job.row.title for job in jobs if job.row}
        for row in rows:
            row["title"] = titles.get((row["ratio"], row["key"]), row["title"])
        measured = [job for job in jobs if points.is_measured(job, part) and job.row and job.row.group != BUCKETS]
        tried = {row["key"] for row in results["grid"]}
        there = {(row["ratio"], row["key"]): earlier.models(row) for row in rows}
        there |= {(job.ratio, job.key): {(job.seed, job.steps)} for job in measured if job.key in tried}
        results[part]["missing"] = _missing(measured, there)
        updates[part] = {"models": sum(map(len, there.values())), "updates": sum(map(_updates, there.values()))}


def _missing(jobs: Sequence[Job], there: dict[tuple[int, str], earlier.Models]) -> list[dict[str, Any]]:
    planned: dict[tuple[int, str], list[Job]] = {}
    for job in jobs:
        planned.setdefault((job.ratio, job.key), []).append(job)
    found = []
    for (ratio, key), own in planned.items():
        models = there.get((ratio, key), set())
        lacking, row = {(job.seed, job.steps) for job in own} - models, own[0].row
        if lacking and row:
            found.append({"ratio": ratio, "row": key, "title": row.title, "seeds": sorted({seed for seed, _ in models}),
                          "models": len(lacking), "planned": row.seeds})  # fmt: skip
    return found


def _updates(models: earlier.Models) -> int:
    """Updates in which a row's models were trained, shared trunks counted once."""
    last = {seed: max(steps for its, steps in models if its == seed) for seed, _ in models}
    return sum(steps if steps == last[seed] else steps - planning.leaves(steps) for seed, steps in models)


def _parts(jobs: Sequence[Job], before: Results | None) -> list[str]:
    """The validation part, and the test part once: when every last model of what is claimed has been measured on it."""
    claimed = [job for job in jobs if job.row and job.row.test and job.steps >= job.full]
    here = [job for job in claimed if work.done(job)]
    rows = (before or {}).get(corpus.TEST, {}).get("rows", [])
    there = {(row["ratio"], row["key"], *model) for row in rows for model in earlier.models(row)}
    lacking = [job for job in claimed if job not in here and (job.ratio, job.key, job.seed, job.steps) not in there]
    if here and lacking:
        print(f"the test part at hand is held back: {len(lacking)} models that are claimed lack, as {lacking[0].path}")
    return [corpus.VALIDATION] + [corpus.TEST] * (bool(here) and not lacking)


def seeds_of(found: Found, ratio: int, key: str) -> Seeds:
    return {seed: found.points[ratio, key, seed] for seed in found.seeds(ratio, key)}


def _row(setting: Setting, found: Found, ratio: int, row: Row, seconds: dict[str, float] | None) -> dict[str, Any]:
    """One row of the matrix: what each of its ends reached and cost, and how far it is from BASELINE."""
    own, base = seeds_of(found, ratio, row.key), seeds_of(found, ratio, BASELINE)
    pair = seeds_of(found, ratio, row.pair)
    full = planning.steps_of(setting, ratio)
    steps = [point.steps for point in next(iter(own.values()))]
    result = {
        "key": row.key, "title": row.title, "group": row.group, "ratio": ratio, "pair": row.pair,
        "seeds": sorted(own), "planned": row.seeds, "steps": full,
        "switch": [points[-1].switch for points in own.values()],
        "helper_parameters": next(iter(own.values()))[-1].helper_parameters,
        "ends": [_end(found, own, base, i, full) for i in range(len(steps))],
        "runs": _runs(own),
        "undecayed": _undecayed(found, own) if row.group in (MAIN, GIFTS) else [],
    } | _scored(found, own)  # fmt: skip
    shared = {seed: points for seed, points in own.items() if seed in base}
    if row.key == BASELINE or not shared or full not in steps:
        return result
    if len(steps) > 1:
        result["to_quality"] = _to_quality(shared, base, full, seconds)
    if row.pair != BASELINE and set(own) & set(pair):
        result["against_pair"] = _apart(own, pair, full, base, PRIMARY)
        result["against_pair_flops"] = {
            share: _against_at_flops(shared, pair, base, full, part) for share, part in SHARES.items()
        }
    long = round(planning.LONGEST * full)
    if compare.at_steps(next(iter(base.values())), long):
        result["against_longest"] = compare.apart(
            shared, full, lambda seed, point: compare.at_steps(base[seed], long).measures[PRIMARY], PRIMARY,
            compare.detectable(base, long, PRIMARY, len(shared)),
        )  # fmt: skip
    return result


def _end(found: Found, own: Seeds, base: Seeds, i: int, full: int) -> dict[str, Any]:
    """A row's models of one number of steps."""
    chosen = {seed: points[i] for seed, points in own.items()}
    first = next(iter(chosen.values()))
    # All measures only where they are read: at the end, and over time where the page shows it.
    whole = first.steps == full or first.row.group in (MAIN, GIFTS)
    names = list(first.measures) if whole else [PRIMARY]
    result: dict[str, Any] = {
        "steps": first.steps,
        "part": first.steps / full,
        "measures": {name: _told(name, _values(own, i, name)) for name in names},
        "flops": statistics.fmean(point.flops for point in chosen.values()),
        "helper_flops": statistics.fmean(point.helper_flops for point in chosen.values()),
        "tokens": statistics.fmean(point.tokens for point in chosen.values()),
        "epochs": statistics.fmean(point.epochs for point in chosen.values()),
        "read": statistics.fmean(point.rows for point in chosen.values()) / _train_rows(found),
    }
    shared = {seed: points for seed, points in own.items() if seed in base}
    if first.row.key == BASELINE:
        result["detectable"] = {name: compare.detectable(base, first.steps, name, len(base)) for name in names}
    elif shared and compare.at_steps(next(iter(base.values())), first.steps):
        result["equal_steps"] = {name: _told(name, _apart(shared, base, first.steps, base, name)) for name in names}
        result["equal_flops"] = {
            share: {
                name: _told(name, _at_flops(shared, base, first.steps, name, part))
                for name in (names if first.steps == full and share == "full" else [PRIMARY])
            }
            for share, part in SHARES.items()
        }
    return result


def _told(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """Seed by seed for the primary measure only, which keeps the file small."""
    return found if name == PRIMARY else {key: value for key, value in found.items() if key != "seeds"}


def _apart(own: Seeds, other: Seeds, steps: int, base: Seeds, name: str) -> dict[str, Any]:
    shared = {seed: points for seed, points in own.items() if seed in other}
    limit = compare.detectable(base, steps, name, len(shared))
    return compare.apart(
        shared, steps, lambda seed, point: compare.at_steps(other[seed], steps).measures[name], name, limit
    )


def _at_flops(own: Seeds, base: Seeds, steps: int, name: str, share: float) -> dict[str, Any]:
    limit = compare.detectable(base, steps, name, len(own))
    return compare.apart(
        own, steps, lambda seed, point: compare.at_flops(base[seed], point.cost(share), name), name, limit
    )


def _against_at_flops(own: Seeds, pair: Seeds, base: Seeds, steps: int, share: float) -> dict[str, Any]:
    """What a row has over BASELINE at the row's FLOPs, minus what its pair has over BASELINE at the pair's."""

    def of_pair(seed: int, point: Point) -> np.ndarray | None:
        other = compare.at_steps(pair[seed], steps)
        at_own, at_pair = (compare.at_flops(base[seed], one.cost(share), PRIMARY) for one in (point, other))
        return None if at_own is None or at_pair is None else other.measures[PRIMARY] - at_pair + at_own

    shared = {seed: points for seed, points in own.items() if seed in pair}
    limit = compare.detectable(base, steps, PRIMARY, len(shared))
    return compare.apart(shared, steps, of_pair, PRIMARY, limit)


def _to_quality(own: Seeds, base: Seeds, full: int, seconds: dict[str, float] | None) -> dict[str, Any]:
    costs = {"steps": lambda point: float(point.steps)}
    costs |= {f"flops_{share}": lambda point, part=part: point.cost(part) for share, part in SHARES.items()}
    everyone = [point for row in (own, base) for points in row.values() for point in points]
    if seconds and None not in [timing.seconds_of(point, seconds, 0.0, full) for point in everyone]:
        for share, part in SHARES.items():
            costs[f"seconds_{share}"] = lambda point, part=part: timing.seconds_of(point, seconds, part, full)
    return {name: compare.to_quality(own, base, full, cost) for name, cost in costs.items()}


def _values(own: Seeds, i: int, name: str) -> dict[str, Any]:
    values = [float(points[i].measures[name][0]) for points in own.values()]
    return {"mean": statistics.fmean(values), "seeds": [round(value, 6) for value in values]}


def _runs(own: Seeds) -> dict[str, Any]:
    """How a row's runs were made."""
    made = points.notes([point.path for row in own.values() for point in row])
    return {
        "commits": sorted({note["commit"] for note in made}),
        "seconds": sum(note["seconds"] for note in made),
        "count": len(made),
    }


def _undecayed(found: Found, own: Seeds) -> list[list[float]]:
    """[step, nats a token] of the training text along the trunk until it decays, in bins, means over seeds.

    Empty while the trunk is not among the row's models.
    """
    trunks = [found.runs[points[-1].path] for points in own.values()]
    if any(trunk.train[0]["step"] > 1 for trunk in trunks):
        return []
    stop = planning.leaves(next(iter(own.values()))[-1].steps)
    bins = min(BINS, stop)
    edges = [round(stop * i / bins) for i in range(bins + 1)]
    losses = [[record["cross_entropy"] for record in trunk.train[:stop]] for trunk in trunks]
    return [
        [(left + right) / 2, round(statistics.fmean(x for seed in losses for x in seed[left:right]), 4)]
        for left, right in itertools.pairwise(edges)
    ]


def _scored(found: Found, own: Seeds) -> dict[str, Any]:
    """Of rows chosen online: the mean share of candidates that score exactly 0, and the updates that had to keep some.

    A row scores 0 where half of its tokens' labels or more are outside the scorer's k likeliest, so ties say nothing.
    """
    records = [r for points in own.values() for r in found.runs[points[-1].path].train if r.get("score_zero")]
    if not records:
        return {}
    filled = sum(r["kept_rows"] > (1 - r["score_zero"]) * r["candidates"] for r in records)
    zero = statistics.fmean(r["score_zero"] for r in records)
    return {"scored": {"zero": zero, "filled": filled, "updates": len(records)}}


def _train_rows(found: Found) -> int:
    return next(iter(found.runs.values())).facts["train_rows_count"]


def _setting(setting: Setting, parts: dict[str, Found]) -> dict[str, Any]:
    """What a reader must know of all the runs."""
    found = parts[corpus.VALIDATION]
    students = list(found.runs.values())
    first = students[0]
    made = json.loads((Path(setting.out) / "corpus" / "corpus.json").read_text(encoding="utf-8"))
    return {
        "tier": setting.tier.name,
        "seeds_from": setting.seeds_from,
        "tiers": list(TIERS),
        "ratios": list(setting.tier.ratios),
        "steps": {str(ratio): planning.steps_of(setting, ratio) for ratio in setting.tier.ratios},
        "longer": {str(r): planning.longer(setting, planning.steps_of(setting, r)) for r in setting.tier.ratios},
        "stage_1": {str(ratio): round(planning.matrix.STAGE_1 * planning.steps_of(setting, ratio))
                    for ratio in setting.tier.ratios},
        **{name: first.facts.get(name) for name in (*ALIKE, "train_tokens", "train_rows_count", "train_rows")},
        "unlike": [name for name in ALIKE if any(run.facts.get(name) != first.facts.get(name) for run in students)],
        "optimizer": dict(first.config["optimizer"]) | {"peak_learning_rate": setting.tier.peak,
                                                         "weight_decay": setting.tier.weight_decay},
        "relative": {name: planning.relative(setting, name) for name in setting.tier.helpers},
        "corpus": {"parts": made["parts"], "split": made["split"], "files": made["files"]},
        "held": {part: {"documents": one.held.count, "domains": list(one.held.domains),
                        "shares": [round(float(x), 4) for x in one.held.shares],
                        "bytes": float(one.held.bytes.sum())} for part, one in parts.items()},
        "replicates": measures.REPLICATES,
    }  # fmt: skip

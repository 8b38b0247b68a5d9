"""Groups runs into methods, refuses those that cannot be ranked, and computes every figure of the report."""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from slm_assist.config import MAY_CHANGE_ON_RESUME, flatten
from slm_assist.errors import UserError, nearest
from slm_assist.report import stats
from slm_assist.report.runs import Run, read_run
from slm_assist.report.stats import Estimate, estimate

SMALL, BASELINE, RKD, SALT, SALT_DS, OTHER = KINDS = ("small LM", "BASELINE", "RKD", "SALT", "SALT_DS", "other")
AXES = {"steps": "step", "flops": "train_flops", "seconds": "train_seconds"}
METRICS = ("log_perplexity", "bits_per_byte", "accuracy")
BUCKETS = ("easy", "medium", "hard")
SHARES = {"free": 0.0, "shared": 0.1, "full": 1.0}  # part of the small LM's own cost that is charged
SAME = {"vocabulary": "vocabulary", "validation_rows": "validation rows", "objective": "objective"}
PER_SEED = ("seed", "data.order_seed", "assist.teacher", "validation.buckets", "data.vocabulary", "validation.every",
            "select.scorer", "select.reference", "select.list", *MAY_CHANGE_ON_RESUME)  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
    """Runs that differ in their seed, and their figures; an Estimate is over these runs.

    Attributes:
      curves: mean over seeds at the common validation steps: `steps`, each of AXES and `log_perplexity`, and
        `buckets` by name.
      final: by metric; domains, buckets: by name, then metric (nats a token, bits a byte, part correct).
      difference: final log-perplexity minus BASELINE's; None for BASELINE, small LMs and unfinished runs.
      to_target: cost until BASELINE's final quality, by axis, absolute (no value: not reached).
      ratio: the same over BASELINE's own, by axis, then by share of the small LM's cost charged.
      whole: cost of the whole run over BASELINE's, as `ratio`.
      seconds: by phase; flops: student, teacher and scorer (all scoring), all in the run itself.
      helper: what the small LMs' own training cost, `flops` and `seconds`; None: not known.
    """

    name: str
    kind: str
    runs: tuple[Run, ...]
    curves: dict[str, Any]
    final: dict[str, Estimate]
    domains: dict[str, dict[str, Estimate]]
    buckets: dict[str, dict[str, Estimate]]
    seconds: dict[str, Estimate]
    flops: dict[str, Estimate]
    difference: Estimate | None = None
    to_target: dict[str, Estimate] = dataclasses.field(default_factory=dict)
    ratio: dict[str, dict[str, Estimate]] = dataclasses.field(default_factory=dict)
    whole: dict[str, dict[str, Estimate]] = dataclasses.field(default_factory=dict)
    helper: dict[str, Estimate] = dataclasses.field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return all(run.finished for run in self.runs)

    @property
    def assisted(self) -> bool:
        return any(run.assisted for run in self.runs)

    @property
    def small_lms(self) -> str:
        """`small LM`, or `small LMs` where several distinct ones helped a run."""
        several = any(len({helper["run"] for helper in run.helpers.values()}) > 1 for run in self.runs)
        return "small LMs" if several else "small LM"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All figures of a report.

    Attributes:
      methods: small LM, BASELINE, RKD, SALT, others; baseline: the one compared with, None without one.
      noise: `threshold` in nats a token (None: not known), `source` (seeds, rows, domains or none), `seeds`.
      notes: what the reader must know about the runs: left out, unfinished, not alike.
    """

    methods: tuple[Method, ...]
    baseline: Method | None
    noise: dict[str, Any]
    notes: tuple[str, ...]


def compare(runs: Sequence[str | Path], *, baseline: str | None = None) -> Comparison:
    """Reads run directories and compares what they measured on their validation rows.

    Args:
      runs: run directories; those with one name (`config.name`, or else the directory's) and different seeds
        are one method.
      baseline: name or run directory of the method to compare with; by default the one called BASELINE, or
        else the only one that is neither assisted nor a small LM of the others.

    Raises:
      UserError: as `read_run`; vocabularies, validation rows or objectives differ; runs of one name share a
        seed or differ in more than the seed; no or several methods could be the baseline that is asked for.
    """
    if not runs:
        raise UserError("no runs to compare: give at least one run directory")
    read = [read_run(path) for path in {Path(path).resolve(): path for path in runs}.values()]
    check_comparable(read)
    groups = group_seeds(read)
    small = {name for name, group in groups.items() if all(_is_small(run, read) for run in group)}
    base_name = _find_baseline(groups, small, baseline)
    notes: list[str] = []
    methods = []
    for name, group in groups.items():
        done = [run for run in group if run.finished]
        for run in group:
            if not run.finished:
                fate = "left out" if done else "its figures are those so far and it is not ranked"
                total = run.config.get("steps", "?")
                notes.append(f"{run.path} is unfinished (step {run.final['step']} of {total}): {fate}.")
        methods.append(_measure(name, _kind(name, group, small, base_name), tuple(done or group)))
    methods.sort(key=lambda method: (KINDS.index(method.kind), not method.assisted))
    base = next((method for method in methods if method.name == base_name), None)
    methods = [_charge(method, read) for method in methods]
    if base and base.finished:
        methods = [m if m.kind == SMALL else _against(m, base) for m in methods]
    base = next((method for method in methods if method.name == base_name), None)
    notes += _unlike([method for method in methods if method.kind != SMALL])
    return Comparison(tuple(methods), base, _noise(methods, base), tuple(notes))


def check_comparable(runs: Sequence[Run]) -> None:
    """Raises `UserError` unless the runs' vocabulary, validation rows and objective are the first one's."""
    for run in runs[1:]:
        for fact, words in SAME.items():
            one, other = (str(r.facts[fact])[:12] for r in (runs[0], run))
            if runs[0].facts[fact] != run.facts[fact]:
                raise UserError(
                    f"{run.path}: its {words} ({other}) differs from that of {runs[0].path} ({one}), so the "
                    "two cannot be ranked; report them apart"
                )


def group_seeds(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """`{method: runs, a seed each}`: by name, or without `config.name` also by config but for the seed."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        name = run.name
        if name not in groups and not run.config.get("name"):
            twins = (n for n, group in groups.items() if _twins(run, group))
            name = next(twins, name)
        for other in groups.setdefault(name, []):
            if run.seed == other.seed:
                raise UserError(
                    f"{run.path} and {other.path} are both called {name} and have seed {run.seed}; leave one "
                    "out, or rename it (config.name)"
                )
            if differing := _differing(run, other):
                raise UserError(
                    f"{run.path} and {other.path} are both called {name} but differ in {differing[0]}, so "
                    "they are no seeds of one method; rename one (config.name)"
                )
        groups[name].append(run)
    return groups


def _twins(run: Run, group: list[Run]) -> bool:
    """Whether `run` can only be another seed of an unnamed group."""
    seeds = {other.seed for other in group}
    return not group[0].config.get("name") and run.seed not in seeds and not _differing(run, group[0])


def _differing(a: Run, b: Run) -> list[str]:
    flat_a, flat_b = flatten(a.config), flatten(b.config)
    return [key for key in sorted(flat_a.keys() | flat_b.keys())
            if flat_a.get(key) != flat_b.get(key) and not _per_seed(key)]  # fmt: skip


def _per_seed(key: str) -> bool:
    return key in PER_SEED or any(key.startswith(section) for section in PER_SEED if section.endswith("."))


def _helps(small: Run, helper: dict[str, Any]) -> bool:
    """Whether `helper`, a fact of another run, is the run `small`, also where both have been moved."""
    path = Path(helper["run"])  # of a model of Hugging Face's, one that is not there
    moved = path.name == small.path.resolve().name and helper.get("parameters") == small.facts["parameters"]
    return path.resolve() == small.path.resolve() or moved


def _is_small(run: Run, runs: Sequence[Run]) -> bool:
    return any(_helps(run, helper) for other in runs if other is not run for helper in other.helpers.values())


def _find_baseline(groups: dict[str, list[Run]], small: set[str], asked: str | None) -> str | None:
    if asked is not None:
        for name, group in groups.items():
            if asked == name or any(Path(asked).resolve() == run.path.resolve() for run in group):
                return name
        raise UserError(f"baseline {asked!r} is none of {', '.join(groups)}{nearest(asked, groups)}")
    plain = [n for n, group in groups.items() if n not in small and not any(r.assisted or r.selection for r in group)]
    named = [name for name in plain if name.casefold() == "baseline"]
    if len(named or plain) > 1:
        raise UserError(f"{', '.join(named or plain)} could each be the baseline; say which (baseline=NAME)")
    return (named or plain or [None])[0]


def _kind(name: str, group: list[Run], small: set[str], baseline: str | None) -> str:
    if name == baseline:
        return BASELINE
    if name in small:
        return SMALL
    run = group[0]
    if {"guide", "parent"} & run.helpers.keys():
        return OTHER
    if run.schedule == "none" or run.selection not in ("", "rows"):
        return OTHER
    if run.selection:
        return SALT_DS if run.schedule != "constant" and run.config["select"].get("rule") != "random" else OTHER
    return RKD if run.schedule == "constant" else SALT


def _measure(name: str, kind: str, runs: tuple[Run, ...]) -> Method:
    """The figures that need no other method."""

    def over_seeds(field: str) -> dict[str, dict[str, Estimate]]:
        parts = [run.final.get(field) or {} for run in runs]
        common = [part for part in parts[0] if all(part in other for other in parts)]
        return {part: {m: estimate([p[part][m] for p in parts]) for m in METRICS if m in parts[0][part]}
                for part in common}  # fmt: skip

    def totals(field: str) -> dict[str, Estimate]:
        parts = [(run.summary or {}).get(field) or {} for run in runs]
        keys = dict.fromkeys(key for part in parts for key in part)
        return {key: estimate([part.get(key, 0.0) for part in parts]) for key in keys}

    final = {metric: estimate([run.column(metric)[-1] for run in runs]) for metric in METRICS}
    return Method(name, kind, runs, _curves(runs), final, over_seeds("domains"), over_seeds("buckets"),
                  totals("seconds"), totals("flops"))  # fmt: skip


def _curves(runs: Sequence[Run]) -> dict[str, Any]:
    steps = sorted(set.intersection(*(set(run.column("step")) for run in runs)))

    def mean(key: str) -> list[float]:
        columns = [dict(zip(run.column("step"), run.column(key), strict=True)) for run in runs]
        return [statistics.fmean(column[step] for column in columns) for step in steps]

    curves: dict[str, Any] = {axis: mean(key) for axis, key in AXES.items()}
    curves["log_perplexity"] = mean("log_perplexity")
    everywhere = [set(record.get("buckets") or {}) for run in runs for record in run.validation]
    present = [bucket for bucket in BUCKETS if all(bucket in names for names in everywhere)]
    return curves | {"buckets": {bucket: mean(f"buckets.{bucket}.log_perplexity") for bucket in present}}


def _charge(method: Method, runs: Sequence[Run]) -> Method:
    """Adds what the small LMs' own training cost, up to the steps that helped, and the scoring for lists of rows."""
    if not method.assisted:
        return method
    costs: dict[str, list[float | None]] = {"flops": [], "seconds": []}
    for run in method.runs:
        # one run in several roles was trained once: the step of the most FLOPs is charged
        by_cost = sorted(run.helpers.values(), key=lambda h: (h.get("train_flops") or 0, h.get("step", 0)))
        helpers = {helper["run"]: helper for helper in by_cost}
        found = [_helper_cost(helper, run, runs) for helper in helpers.values()]
        for axis, values in costs.items():
            parts = [cost[axis] for cost in found]
            if run.scoring_flops != 0:  # for a list; how long that took is in no file of the run
                parts.append(run.scoring_flops if axis == "flops" else None)
            values.append(None if None in parts or not parts else sum(parts))
    return dataclasses.replace(method, helper={axis: estimate(values) for axis, values in costs.items()})


def _helper_cost(helper: dict[str, Any], student: Run, runs: Sequence[Run]) -> dict[str, float | None]:
    matches = [run for run in runs if _helps(run, helper)]
    exact = [run for run in matches if run.path.resolve() == Path(helper["run"]).resolve()]
    same_seed = [run for run in matches if run.seed == student.seed]
    own = next(iter(exact or same_seed or matches), None)

    flops, seconds = (own.spent(axis, helper["step"]) if own else None for axis in ("flops", "seconds"))
    return {"flops": helper.get("train_flops") or flops, "seconds": seconds}


def _against(method: Method, base: Method) -> Method:
    """Adds the figures relative to BASELINE, each seed against BASELINE's of that seed if there is one."""
    finals = {run.seed: run.column("log_perplexity")[-1] for run in base.runs}
    target = {run.seed: finals.get(run.seed, base.final["log_perplexity"].mean) for run in method.runs}

    def base_cost(axis: str, cost: Callable[[Run, float], float]) -> dict[int, float]:
        own = {run.seed: cost(run, finals[run.seed]) for run in base.runs}
        return {run.seed: own.get(run.seed, statistics.fmean(own.values())) for run in method.runs}

    to_target, ratio, whole = {}, {}, {}
    for axis, key in AXES.items():

        def reach(run: Run, quality: float, key: str = key) -> float | None:
            return stats.first_crossing(run.column(key), run.column("log_perplexity"), quality)

        def total(run: Run, _: float, key: str = key) -> float:
            return run.column(key)[-1]

        reached = [reach(run, target[run.seed]) for run in method.runs]
        to_target[axis] = estimate(reached)
        ratio[axis] = _shares(method, axis, reached, base_cost(axis, reach))
        whole[axis] = _shares(method, axis, [total(r, 0.0) for r in method.runs], base_cost(axis, total))
    apart = None
    if method.name != base.name and method.finished:
        apart = stats.difference({r.seed: r.column("log_perplexity")[-1] for r in method.runs}, finals)
    whole = whole if method.finished else {}
    return dataclasses.replace(method, difference=apart, to_target=to_target, ratio=ratio, whole=whole)


def _shares(method: Method, axis: str, costs: Sequence[float | None], base: dict[int, float]):
    """(own cost + share of the small LM's) / BASELINE's cost, by share; None where a part is not known."""
    extra = method.helper[axis].values if axis in method.helper else [0.0] * len(costs)
    ratios = {}
    for share, part in SHARES.items():
        if axis == "steps" and part:
            continue
        charged = [0.0] * len(costs) if not part else [None if e is None else part * e for e in extra]
        ratios[share] = estimate([
            None if None in (cost, more) or not base[run.seed] else (cost + more) / base[run.seed]
            for run, cost, more in zip(method.runs, costs, charged, strict=True)
        ])  # fmt: skip
    return ratios


def _noise(methods: Sequence[Method], base: Method | None) -> dict[str, Any]:
    """Below which difference of final log-perplexity methods cannot be told apart, and how that is known."""
    others = [m for m in methods if m.difference]
    if base is None or not base.finished:
        return {"threshold": None, "source": "none", "seeds": len(base.runs) if base else 0}
    seeds, finals = len(base.runs), base.final["log_perplexity"].values
    if seeds > 1:
        widths = [m.difference.half_width for m in others]
        if others and None not in widths:
            return {"threshold": max(widths), "source": "pairs", "seeds": seeds}
        n_other = min((len(m.runs) for m in others), default=seeds)
        limit = stats.least_significant_difference(finals, n_other)
        return {"threshold": limit, "source": "seeds", "seeds": seeds}
    by_row = [_row_error(m, base) for m in others]
    if others and None not in by_row:
        return {"threshold": max(by_row), "source": "rows", "seeds": seeds}
    by_domain = [_domain_error(m, base) for m in others]
    if others and None not in by_domain:
        return {"threshold": max(by_domain), "source": "domains", "seeds": seeds}
    return {"threshold": None, "source": "none", "seeds": seeds}


def _row_error(method: Method, base: Method) -> float | None:
    """Of the difference of two runs on the same rows, paired by row."""
    ours, theirs = (m.runs[0].rows for m in (method, base))
    if not ours or not theirs or ours["tokens"] != theirs["tokens"]:
        return None
    rows = zip(ours["cross_entropy"], theirs["cross_entropy"], ours["tokens"], strict=True)
    apart, tokens = zip(*(((a - b) / n, n) for a, b, n in rows if n), strict=True)
    return 1.96 * stats.clustered_standard_error(apart, tokens)


def _domain_error(method: Method, base: Method) -> float | None:
    ours, theirs = (m.runs[0].final.get("domains") or {} for m in (method, base))
    if len(ours) < 3 or ours.keys() != theirs.keys():
        return None
    apart = [ours[name]["log_perplexity"] - theirs[name]["log_perplexity"] for name in ours]
    tokens = [domain["tokens"] for domain in ours.values()]
    return stats.t_975(len(ours) - 1) * stats.clustered_standard_error(apart, tokens)


UNLIKE = {
    "parameters": "students differ in size", "train_rows": "training rows differ",
    "seq_len": "row lengths differ", "batch_rows": "batch sizes differ",
    "hardware": "hardware differs, so seconds do not compare",
    "devices": "numbers of devices differ, so seconds do not compare",
    "dtype": "compute precision differs", "versions": "versions of the software differ",
}  # fmt: skip


def _unlike(methods: Sequence[Method]) -> list[str]:
    runs = [run for method in methods for run in method.runs]
    notes = []
    for fact, words in UNLIKE.items():
        if any(run.facts.get(fact) != runs[0].facts.get(fact) for run in runs):
            values = ", ".join(f"{m.name} {str(m.runs[0].facts.get(fact))[:40]}" for m in methods)
            notes.append(f"Not alike: {words}" + (f" ({values})." if fact != "versions" else "."))
    if len({run.config.get("steps") for run in runs}) > 1:
        lengths = ", ".join(f"{m.name} {m.runs[0].config.get('steps')} steps" for m in methods)
        notes.append(f"Not alike: runs differ in length ({lengths}).")
    return notes

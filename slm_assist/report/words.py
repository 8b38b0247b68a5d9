"""What the figures say in plain words: the first lines of the page and of the printed table."""

import dataclasses
from pathlib import Path

from slm_assist.report.compare import OTHER, RKD, SALT, SALT_DS, SMALL, Comparison, Method
from slm_assist.report.runs import Run

UNITS = {"steps": "steps", "flops": "FLOPs", "seconds": "seconds"}
REMARKS_ORDER = (SALT, SALT_DS, RKD)


@dataclasses.dataclass(frozen=True)
class Line:
    """One of the first lines; `tone` is data, noise, gain, loss or note."""

    tone: str
    text: str


def count(number: float | None) -> str:
    """2562048 -> `2.56 M`: three digits; below 10,000 all of them."""
    if number is None:
        return "?"
    if number < 1e4:
        return f"{number:,.0f}"
    size, unit = next((s, u) for s, u in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")) if number >= s)
    return f"{number / size:.3g} {unit}"


def chosen(run: Run) -> str:
    """What the run chose to learn from and how, in a few words; empty if it took all there was."""
    select = run.config.get("select") or {}
    words = []
    if select.get("rows") == "online":
        rule, score = select.get("rule", "top"), select.get("score", "salt")
        share = f"1 of {select['pool_factor']} rows" if rule != "threshold" and "pool_factor" in select else "rows"
        words.append(f"{share}, {rule}" + (f" by {score}" if rule != "random" else ""))
    elif select.get("rows") == "list":
        words.append(f"rows of {Path(select.get('list', '?')).name}")
    if select.get("token_share", 1) < 1:
        words.append(f"{100 * select['token_share']:g} % of tokens")
    return "; ".join(words)


def help_of(run: Run) -> str:
    """What the small LM gave: `soft labels and rows chosen by the small LM`; empty for a run without help."""
    by = " by the small LM" if set(run.helpers) - {"teacher", "guide", "parent"} else ""
    choice = f"{run.selection} chosen{by}" if run.selection else ""
    select = run.config.get("select") or {}
    if choice and select.get("rows") == "online" and select.get("rule") == "random":
        choice = choice.replace(f"chosen{by}", "drawn at random")
    given = {
        "weights": "parent" in run.helpers, "soft labels": run.schedule != "none",
        "representations": "guide" in run.helpers, choice: bool(choice),
    }  # fmt: skip
    return " and ".join(gift for gift, there in given.items() if there)


def first_lines(comparison: Comparison) -> list[Line]:
    """Data, seeds and noise; then, SALT first, what each method won and lost; then what else to know."""
    lines = [Line("data", _data(comparison)), Line("noise", _noise(comparison))]
    base = comparison.baseline
    others = [m for m in comparison.methods if m.kind != SMALL and m is not base]
    rank = {kind: i for i, kind in enumerate(REMARKS_ORDER)}
    for method in sorted(others, key=lambda m: rank.get(m.kind, len(rank))):
        lines += _remarks(method, comparison)
    if others and base is None:
        lines.append(Line("note", "No BASELINE among the runs: nothing is ranked."))
    elif others and not base.finished:
        lines.append(Line("note", f"{base.name} is unfinished: nothing is ranked."))
    runs = [run for method in comparison.methods for run in method.runs]
    functions = {helper["run"] for run in runs for helper in run.helpers.values() if helper.get("step", 0) < 0}
    notes = [f"The FLOPs of {name}, a function that taught, are not counted." for name in sorted(functions)]
    return lines + [Line("note", note) for note in (*notes, *comparison.notes)]


def _data(comparison: Comparison) -> str:
    students = [m for m in comparison.methods if m.kind != SMALL]
    student = comparison.baseline or (students or comparison.methods)[0]
    facts = student.runs[0].facts
    unique = facts.get("train_tokens")
    text = [
        f"Data: {count(unique)} training tokens in {count(facts.get('train_rows_count'))} rows of "
        f"{facts.get('seq_len', '?')}."
    ]
    for method in dict.fromkeys([student, *(m for m in comparison.methods if m.kind == SMALL)]):
        tokens, parameters = method.runs[0].tokens, method.runs[0].facts["parameters"]
        ratio = _times(tokens / parameters) if tokens else "?"
        epochs = f", {_times(tokens / unique)} epochs" if tokens and unique else ""
        text.append(
            f"{method.name} ({count(parameters)} parameters) saw {count(tokens)} tokens: {ratio} a parameter{epochs}."
        )
    return " ".join(text)


def _times(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.2g}"


def _noise(comparison: Comparison) -> str:
    noise, seeds = comparison.noise, comparison.noise["seeds"]
    limit = f"{noise['threshold']:.3f} nats a token" if noise["threshold"] is not None else ""
    if noise["source"] == "pairs":
        return (
            f"{seeds} seeds: a difference in final log-perplexity is noise where its 95 % interval (paired by seed "
            f"where seeds agree) holds 0; the widest is ±{limit}."
        )
    if noise["source"] == "seeds":
        return (
            f"{seeds} seeds: a difference in final log-perplexity below {limit} is noise (least significant "
            f"difference at 95 %, from the spread of {comparison.baseline.name}'s seeds)."
        )
    unknown = "how far results spread from seed to seed is not known (run --seeds 3)"
    if noise["source"] == "rows":
        return (
            f"One seed: {unknown}. The choice of validation rows alone makes differences below {limit} noise (95 %, "
            "paired by row)."
        )
    if noise["source"] == "domains":
        return (
            f"One seed: {unknown}. The choice of validation text alone makes differences below {limit} noise "
            "(95 %, from how the differences vary by domain)."
        )
    if seeds == 0:
        return "Noise: not known without a finished BASELINE."
    return f"One seed: {unknown}, so no difference here can be told from noise."


def _remarks(method: Method, comparison: Comparison) -> list[Line]:
    if method.difference is None:
        return []
    base, lines = comparison.baseline.name, [_quality(method, comparison)]
    missed = method.to_target["steps"].values.count(None)
    if missed:
        where = f" in {missed} of {len(method.runs)} seeds" if len(method.runs) > 1 else ""
        lines.append(Line("loss", f"{method.name} loses on cost{where}: it never reaches {base}'s final quality."))
        return lines
    free = {axis: shares["free"].mean for axis, shares in method.ratio.items()}
    if None in free.values():
        return lines
    times = ", ".join(f"{free[axis]:.2f} of its {unit}" for axis, unit in UNITS.items())
    given = f", the {method.small_lms} taken as given" if method.assisted else ""
    losing = " and ".join(unit for axis, unit in UNITS.items() if free[axis] > 1)
    verdict = f": it loses on {losing}." if losing else "."
    text = f"{method.name} reaches {base}'s final quality at {times}{given}{verdict}"
    lines.append(Line("loss" if losing else "gain", text))
    return lines + ([_charged(method, base)] if method.assisted else [])


def _quality(method: Method, comparison: Comparison) -> Line:
    apart, limit, base = method.difference, comparison.noise["threshold"], comparison.baseline
    spread = " (one seed)"
    if apart.half_width is not None:
        noise = abs(apart.mean) <= apart.half_width
        spread = f" (95 % interval ±{apart.half_width:.3f})"
    else:
        noise = limit is None or abs(apart.mean) < limit
    ours, theirs = (m.final["log_perplexity"].mean for m in (method, base))
    described = method.runs[0].selection or method.kind == OTHER
    name = f"{method.name} ({help_of(method.runs[0])})" if described and help_of(method.runs[0]) else method.name
    doubt = ", which cannot be told from noise" if noise else ""
    figures = f"{ours:.3f} against {theirs:.3f}, {apart.mean:+.3f} nats a token{spread}{doubt}."
    if apart.mean > 0:
        return Line("loss", f"{name} loses on final quality: log-perplexity {figures}")
    verdict = "ends level with" if apart.mean == 0 else "ends better than"
    tone = "note" if noise else "gain"
    return Line(tone, f"{name} {verdict} {base.name}: log-perplexity {figures}")


def _charged(method: Method, base: str) -> Line:
    """The cost with the small LM's own training counted, in each unit in which it is known."""
    full, tenth = (
        {axis: shares[share].mean for axis, shares in method.ratio.items() if axis != "steps"}
        for share in ("full", "shared")
    )
    known = [axis for axis in full if full[axis] is not None]
    if not known:
        return Line("note", f"What {method.name}'s {method.small_lms} cost is not in the files, so it is not counted.")
    times = " and ".join(f"{full[axis]:.2f} of {base}'s {UNITS[axis]}" for axis in known)
    shared = " and ".join(f"{tenth[axis]:.2f}" for axis in known)
    losing = " and ".join(UNITS[axis] for axis in known if full[axis] > 1)
    possessive = "small LMs'" if method.small_lms.endswith("s") else "small LM's"
    verdict = f"{method.name} loses on {losing}" if losing else f"{method.name} still wins"
    return Line(
        "loss" if losing else "gain",
        f"With the {possessive} own training counted in full, {verdict}: {times} to the same quality (shared "
        f"over 10 students: {shared}).",
    )

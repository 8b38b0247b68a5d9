"""The tables that the terminal and the page share, cells as text."""

import dataclasses
import textwrap
from collections.abc import Sequence

from slm_assist.assist.stages import PLAIN
from slm_assist.report.compare import BUCKETS, Comparison, Method
from slm_assist.report.gifts import gifts, update_seconds
from slm_assist.report.stats import Estimate
from slm_assist.report.words import UNITS, chosen, count, first_lines

WIDTH = 100
NONE = "–"


@dataclasses.dataclass(frozen=True)
class Table:
    """`note` says how to read it; `short` is the header where space is scarce."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    short: Sequence[str] = ()


def show(figure: Estimate | None, form: str = ".3f", scale: float = 1.0, missing: str = "not reached") -> str:
    """`mean ±half-width` unless that is 0; where seeds lack a value, `missing` or how many have one."""
    if figure is None or not figure.values:
        return NONE
    if figure.mean is None:
        have = len(figure.values) - figure.values.count(None)
        return f"in {have} of {len(figure.values)}" if have else missing
    text = format(figure.mean * scale, form)
    if figure.half_width:
        text += f" ±{format(figure.half_width * scale, form.replace('+', ''))}"
    return text


def quality_table(comparison: Comparison) -> Table:
    base = comparison.baseline.name if comparison.baseline else "BASELINE"
    rows = []
    for m in comparison.methods:
        run = m.runs[0]
        rows.append((
            m.name, count(run.facts["parameters"]), f"{run.final['step']}{'' if m.finished else ' so far'}",
            show(m.final["log_perplexity"]), show(m.difference, "+.3f"), show(m.final["bits_per_byte"]),
            show(m.final["accuracy"], ".2f", 100),
        ))  # fmt: skip
    return Table(
        "Final quality on the validation rows",
        ("method", "parameters", "steps", "log-perplexity, nats a token", f"minus {base}", "bits a byte",
         "accuracy, %"),
        rows,
        "Plain next-token cross-entropy, the same for every method; lower is better, but for accuracy. "
        "± is the half-width of the 95 % t-interval over seeds; differences are paired by seed.",
        ("method", "params", "steps", "log-ppl", "minus base", "bits/byte", "acc. %"),
    )  # fmt: skip


def ratio_table(comparison: Comparison) -> Table | None:
    """Cost to BASELINE's final quality over BASELINE's own, the small LM free, shared and counted in full."""
    methods = [m for m in comparison.methods if m.ratio]
    if not methods:
        return None
    base = comparison.baseline.name
    return Table(
        f"Cost to {base}'s final quality, as a part of {base}'s own",
        ("method", "steps", "FLOPs, small LM free", "FLOPs, shared by 10", "FLOPs, in full",
         "seconds, small LM free", "seconds, shared by 10", "seconds, in full"),
        [(m.name, *_ratio_cells(m)) for m in methods],
        f"Below 1 is cheaper. {crossing_caveat(comparison)}",
        ("method", "steps", "FLOPs", "+LM/10", "+LM", "seconds", "+LM/10", "+LM"),
    )  # fmt: skip


def _ratio_cells(method: Method) -> list[str]:
    cells = [show(method.ratio["steps"]["free"], ".2f")]
    reached = None not in method.to_target["steps"].values
    for axis in ("flops", "seconds"):
        cells.append(show(method.ratio[axis]["free"], ".2f"))
        for share in ("shared", "full"):
            charged = show(method.ratio[axis][share], ".2f", missing="?" if reached else "not reached")
            cells.append(charged if method.assisted else NONE)
    return cells


def crossing_caveat(comparison: Comparison) -> str:
    """How crossings are found, and what one in the middle of a learning-rate schedule means."""
    base = comparison.baseline
    text = (
        "The crossing is the first, linear between the two validation points around it. FLOPs are the models' "
        "own, the small LM's forward passes for soft labels and scores included; seconds are those of training, "
        "without compilation, "
        "validation and saves."
    )
    if base.runs[0].config.get("optimizer", {}).get("schedule") == "constant":
        return text
    return (
        f"{text} {base.name}'s final quality comes after its learning rate has decayed; the others cross it "
        "before theirs has. With a schedule that ends at the crossing they should be better there, so the ratios "
        "are expected to be too high rather than too low; no run here measures by how much."
    )


def absolute_table(comparison: Comparison) -> Table:
    rows = []
    for m in comparison.methods:
        forms = {"steps": ",.0f", "flops": ".3g", "seconds": ",.1f"}
        rows.append((
            m.name, *(show(m.to_target.get(axis), form) for axis, form in forms.items()),
            f"{m.curves['flops'][-1]:.3g}", f"{m.curves['seconds'][-1]:,.1f}",
            *(show(m.helper.get(axis), forms[axis], missing="?") for axis in ("flops", "seconds")),
        ))  # fmt: skip
    return Table(
        "The same in steps, FLOPs and seconds",
        ("method", *(f"{unit} to that quality" for unit in UNITS.values()), "FLOPs, whole run",
         "seconds, whole run", "its small LM's own FLOPs", "its small LM's own seconds"),
        rows,
        "What a small LM cost is counted up to the step that helped, once where one run served in several roles; "
        "the scoring of a corpus for a list of rows is part of it. Its seconds are known (not ?) where its own run is "
        "among the runs and no list was made.",
    )  # fmt: skip


def part_table(comparison: Comparison, field: str, title: str) -> Table | None:
    """Final log-perplexity by domain or bucket, a method a column."""
    parts = [getattr(m, field) for m in comparison.methods]
    names = list(dict.fromkeys(name for part in parts for name in part))
    if not names:
        return None
    if field == "buckets":
        names = [name for name in BUCKETS if name in names]
    rows = [(n, *(show(part.get(n, {}).get("log_perplexity")) for part in parts)) for n in names]
    return Table(title, (field[:-1], *(m.name for m in comparison.methods)), rows, "Nats a token.")


def phase_table(comparison: Comparison) -> Table | None:
    phases = list(dict.fromkeys(phase for m in comparison.methods for phase in m.seconds))
    if not phases:
        return None
    scored = any(m.flops.get("scorer") and m.flops["scorer"].mean for m in comparison.methods)
    aligned = any(m.flops.get("guide") and m.flops["guide"].mean for m in comparison.methods)
    parts = {"student": "student", "teacher": "soft labels"} | ({"scorer": "scoring"} if scored else {})
    parts |= {"guide": "representations"} if aligned else {}
    rows = []
    for m in comparison.methods:
        seconds = [show(m.seconds.get(phase), ",.1f") for phase in phases]
        rows.append((m.name, *seconds, *(show(m.flops.get(part), ".3g") for part in parts)))
    header = ("method", *(f"{phase}, s" for phase in phases), *(f"{words}, FLOPs" for words in parts.values()))
    note = "One run; the mean over seeds."
    if scored:
        note += " Scoring: every forward pass that chooses rows or tokens, the student's own among them."
    return Table("What each phase cost", header, rows, note)


def gift_table(comparison: Comparison) -> Table | None:
    """Which gifts were on, from whom, when, and their cost."""
    rows = []
    for m in comparison.methods:
        for gift in gifts(m.runs[0]):
            when = f"updates 1 to {gift.stop}" if gift.stop else "before the first update"
            share = NONE if gift.share is None else f"{100 * gift.share:.1f} %"
            cost = count(gift.training_flops) if gift.helpers else NONE
            rows.append((m.name, gift.name, gift.givers or NONE, when, count(gift.flops), share, cost))
    if not rows:
        return None
    header = ("method", "gift", "small LM", "when", "FLOPs in the run", "of the run's", "FLOPs of its training")
    return Table(
        "The gifts: which, when, and what each cost",
        header,
        rows,
        "The first seed's run. One small LM that gives several things is trained once, and one forward pass may serve "
        "two gifts: it is counted with soft labels or with scores, whichever needs it anyway.",
    )


def update_table(comparison: Comparison) -> Table | None:
    """What an update took in each stage."""
    rows = []
    for m in comparison.methods:
        seconds = update_seconds(m.runs[0])
        plain = seconds.get(PLAIN)
        for stage, median in seconds.items():
            times = f"{median / plain:.2f}" if plain else NONE
            rows.append((m.name, stage.replace("_", " + "), f"{median:.4g}", times))
    if len(rows) == len({row[0] for row in rows}):
        return None
    header = ("method", "stage", "seconds an update", "by its plain stage's")
    return Table("What an update took, by stage", header, rows, "Medians over the first seed's run.")


def run_table(comparison: Comparison) -> Table:
    rows = []
    for m in comparison.methods:
        for run in m.runs:
            known = [str(run.facts.get(fact, "?")) for fact in ("hardware", "devices", "dtype")]
            versions = ", ".join(f"{k} {v}" for k, v in (run.facts.get("versions") or {}).items())
            step, seed = str(run.final["step"]), str(run.seed)
            branch = run.config.get("branch") or {}
            place = f"{run.path}, a branch of {branch['run']}" if branch.get("run") else str(run.path)
            rows.append((m.name, place, seed, run.schedule, chosen(run) or NONE, step, *known, versions))
    header = ("method", "directory", "seed", "schedule", "choice", "steps", "hardware", "devices", "compute",
              "versions")  # fmt: skip
    return Table("The runs", header, rows)


def text_table(comparison: Comparison) -> str:
    """First lines and the two main tables, at most 100 columns wide."""
    wrap = textwrap.TextWrapper(WIDTH, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)
    blocks = ["\n".join(wrap.fill(line.text) for line in first_lines(comparison))]
    blocks += [_as_text(table) for table in (quality_table(comparison), ratio_table(comparison)) if table]
    return "\n\n".join(blocks)


def _as_text(table: Table) -> str:
    lines = [table.short, *table.rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    widths[0] = max(6, min(widths[0], WIDTH - sum(widths[1:]) - 2 * len(widths[1:])))
    header, *rows = (_row_as_text(line, widths) for line in lines)
    return "\n".join([*textwrap.wrap(table.title, WIDTH), "", header, "-" * len(header), *rows])


def _row_as_text(cells: Sequence[str], widths: Sequence[int]) -> str:
    name, *figures = cells
    name = name if len(name) <= widths[0] else name[: widths[0] - 1] + "…"
    return "  ".join([name.ljust(widths[0]), *(c.rjust(w) for c, w in zip(figures, widths[1:], strict=True))])

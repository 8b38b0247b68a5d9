"""The pictures: validation curves, buckets, seconds. Each is a PNG, as bytes; nothing needs a screen."""

import io
import math
from collections.abc import Sequence

from slm_assist.report.compare import AXES, BASELINE, BUCKETS, OTHER, RKD, SALT, SALT_DS, SMALL, Comparison, Method

# Okabe and Ito's palette, told apart by colour-blind eyes; markers tell the curves apart in print
COLOURS = {SMALL: "#8c8c8c", BASELINE: "#0072B2", RKD: "#D98200", SALT: "#009E73", SALT_DS: "#882255",
           OTHER: "#CC79A7"}  # fmt: skip
SPARE_COLOURS = ("#CC79A7", "#56B4E9", "#D55E00", "#000000", "#B8A800")
MARKERS = {SMALL: "v", BASELINE: "s", RKD: "^", SALT: "o", SALT_DS: "P", OTHER: "D"}
PHASE_COLOURS = {"start": "#DDDDDD", "compile": "#BBBBBB", "stage1": "#009E73", "stage2": "#0072B2",
                 "validation": "#F0E442", "save": "#CC79A7"}  # fmt: skip
STYLE = {
    "font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": "#e6e6e6", "grid.linewidth": 0.8, "axes.edgecolor": "#888888", "axes.axisbelow": True,
    "xtick.color": "#444444", "ytick.color": "#444444", "axes.titlesize": 10, "axes.titleweight": "bold",
    "legend.frameon": False, "figure.facecolor": "white", "axes.titlelocation": "left",
}  # fmt: skip
LABEL_TOP = 0.97  # of a panel: where the words beside dotted lines begin, one below the other
LABELS = {"steps": "steps", "flops": "training FLOPs of the models", "seconds": "training seconds"}


def pictures(comparison: Comparison) -> dict[str, bytes]:
    """`{file name: PNG}`: validation.png, seconds.png and, if the runs have them, buckets.png, cost.png."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figures = {"validation.png": _validation(comparison, ("steps", "flops")),
                   "seconds.png": _validation(comparison, ("seconds",)),
                   "buckets.png": _buckets(comparison), "cost.png": _cost(comparison)}  # fmt: skip
        return {name: png(figure) for name, figure in figures.items() if figure}


def png(figure) -> bytes:
    """The figure in 128 colours, which are enough for lines and text and a third of the bytes."""
    from PIL import Image

    drawn, out = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=130)
    Image.open(drawn).convert("RGB").quantize(128).save(out, format="png", optimize=True)
    return out.getvalue()


def new_figure(rows: int, columns: int, size: tuple[float, float], **kwargs):
    """A figure apart from pyplot, so that the caller's own figures and backend are left alone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def colours_of(comparison: Comparison) -> dict[str, str]:
    """A colour a method: its kind's, or a spare one where the kind's is taken."""
    colours, spare = {}, list(SPARE_COLOURS)
    for m in comparison.methods:
        wanted = COLOURS[m.kind]
        if wanted in colours.values() and spare:
            wanted = spare.pop(0)
        spare = [colour for colour in spare if colour != wanted]
        colours[m.name] = wanted
    return colours


def _validation(comparison: Comparison, axes: Sequence[str]):
    """Log-perplexity against each of `axes`: all of it, and the last half of BASELINE's run, enlarged."""
    if len(axes) > 1:
        figure, plots = new_figure(2, len(axes), (5.0 * len(axes), 6.6), sharey="row")
    else:
        figure, plots = new_figure(1, 2, (10.0, 3.7))
        plots = plots.T
    for column, axis in enumerate(axes):
        for zoom, plot in zip((False, True), plots[:, column], strict=True):
            _panel(plot, comparison, axis, zoom=zoom, words=column == 0)
    handles, labels = plots[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(5, len(labels)))
    return figure


def _panel(plot, comparison: Comparison, axis: str, *, zoom: bool, words: bool) -> None:
    """One pair of axes; the small LM, of another size and length, is only in the whole picture."""
    students = [m for m in comparison.methods if m.kind != SMALL] or comparison.methods
    shown = students if zoom else comparison.methods
    colours = colours_of(comparison)
    left = (comparison.baseline or students[0]).curves[axis][-1] / 2 if zoom else 0.0
    right = max(m.curves[axis][-1] for m in shown)
    for m in shown:
        _curve(plot, m, axis, colours[m.name])
        _switch(plot, m, axis, colours[m.name], left, label=words and not zoom)
    _target(plot, comparison, label=words and zoom)
    _limits(plot, shown, axis, left, right)
    if zoom:
        _name_ends(plot, shown, axis, colours)
    seeds = max(len(m.runs) for m in shown)
    each = f" (thick: mean, thin: each of {seeds} seeds)" if seeds > 1 and words and not zoom else ""
    plot.set_title(f"{'last half' if zoom else 'whole run'}, by {axis.replace('flops', 'FLOPs')}{each}")
    power = math.floor(math.log10(right)) if axis == "flops" and right > 0 else 0
    if power:
        plot.xaxis.set_major_formatter(lambda x, _: f"{x / 10**power:g}")
    plot.set_xlabel(LABELS[axis] + (f" ($10^{{{power}}}$)" if power else ""))
    if words:
        plot.set_ylabel("validation log-perplexity\n(nats a token)")


def _curve(plot, m: Method, axis: str, colour: str) -> None:
    x, y = m.curves[axis], m.curves["log_perplexity"]
    label = m.name if m.finished else f"{m.name}, unfinished"
    plot.plot(x, y, color=colour, ls="-" if m.finished else "--", label=label, zorder=3, **_line(m, len(x)))
    if len(m.runs) > 1:
        for run in m.runs:
            x, y = run.column(AXES[axis]), run.column("log_perplexity")
            plot.plot(x, y, color=colour, lw=0.7, alpha=0.45, zorder=2)


def _line(m: Method, points: int) -> dict:
    return {"lw": 1.7, "ms": 3.6, "marker": MARKERS[m.kind], "markevery": max(1, points // 25)}


def _target(plot, comparison: Comparison, label: bool) -> None:
    base = comparison.baseline
    if base is None or not base.finished:
        return
    level = base.final["log_perplexity"].mean
    plot.axhline(level, color=COLOURS[BASELINE], lw=0.9, ls=(0, (5, 3)), zorder=1)
    if label:
        plot.annotate(f"{base.name}, final", (0.015, level), (0, -3), xycoords=("axes fraction", "data"),
                      textcoords="offset points", va="top", color=COLOURS[BASELINE], fontsize=8)  # fmt: skip


def _switch(plot, m: Method, axis: str, colour: str, left: float, label: bool) -> None:
    """A dotted line where soft labels end, or else representations, or else the choice of rows or tokens."""
    run, what = m.runs[0], "soft labels end"
    step = run.switch_step
    if step is None and "guide" in run.helpers:
        step, what = run.alignment_stop, "representations end"
    if step is None and not {"teacher", "guide"} & run.helpers.keys():
        step, what = run.selection_stop, f"choice of {run.selection or 'data'} ends"
    at = None if step is None else m.runs[0].spent(axis, step)
    if at is None or at < left:
        return
    plot.axvline(at, color=colour, lw=1.2, ls=":", zorder=1)
    if label:
        others = sum(isinstance(text.xy, tuple) and text.xy[1] == LABEL_TOP for text in plot.texts)
        plot.annotate(f"{m.name}: {what}", (at, LABEL_TOP), (4, -11 * others), xycoords=("data", "axes fraction"),
                      textcoords="offset points", va="top", color=colour, fontsize=8)  # fmt: skip


def _limits(plot, shown: Sequence[Method], axis: str, left: float, right: float) -> None:
    """From `left` to `right`, as high as the curves there, an untrained model's loss left out."""
    values = [
        y for m in shown for run in m.runs
        for step, x, y in zip(*map(run.column, ("step", AXES[axis], "log_perplexity")), strict=True)
        if left <= x and step > 0
    ]  # fmt: skip
    if right > left:
        plot.set_xlim(left, left + (right - left) * (1.17 if left else 1.03))
    if values and max(values) > min(values):
        margin = 0.06 * (max(values) - min(values))
        low, high = min(values) - margin, max(values) + margin
        if not plot.get_autoscaley_on():  # the panel beside it, with the same y axis, has set its own limits
            low, high = min(low, plot.get_ylim()[0]), max(high, plot.get_ylim()[1])
        plot.set_ylim(low, high)


def _name_ends(plot, shown: Sequence[Method], axis: str, colours: dict[str, str]) -> None:
    """The methods' names at the ends of their curves, pushed apart where they would overlap."""
    low, high = plot.get_ylim()
    points_high, line = 170, 10  # the panel and a line of text, in points, roughly
    bottom = -math.inf
    for m in sorted(shown, key=lambda m: m.curves["log_perplexity"][-1]):
        x, y = m.curves[axis][-1], m.curves["log_perplexity"][-1]
        own = (y - low) / (high - low) * points_high
        bottom = max(own, bottom + line)
        plot.annotate(m.name[:14], (x, y), (5, bottom - own), textcoords="offset points", va="center",
                      color=colours[m.name], fontsize=8, bbox={"fc": "white", "ec": "none", "pad": 0.6})  # fmt: skip


def _buckets(comparison: Comparison):
    """Log-perplexity minus BASELINE's, by easy, medium and hard rows, at the steps that both evaluated."""
    base = comparison.baseline
    others = [m for m in comparison.methods if m.kind != SMALL and m is not base]
    names = [b for b in BUCKETS if base and b in base.curves["buckets"]]
    if not names or not any(name in m.curves["buckets"] for m in others for name in names):
        return None
    figure, plots = new_figure(1, len(names), (3.4 * len(names), 3.4), sharey=True)
    colours = colours_of(comparison)
    for plot, name in zip(plots[0], names, strict=True):
        theirs = dict(zip(base.curves["steps"], base.curves["buckets"][name], strict=True))
        plot.axhline(0, color=COLOURS[BASELINE], lw=1.4, label=base.name)
        for m in others:
            ours = zip(m.curves["steps"], m.curves["buckets"].get(name, []), strict=False)
            points = [(step, y - theirs[step]) for step, y in ours if step in theirs and step > 0]
            x, y = zip(*points, strict=True) if points else ((), ())
            plot.plot(x, y, color=colours[m.name], label=m.name, **_line(m, len(x)))
            _switch(plot, m, "steps", colours[m.name], 0.0, label=False)
        plot.set_title(f"{name} rows")
        plot.set_xlabel("steps")
    plots[0, 0].set_ylabel(f"log-perplexity minus {base.name}'s\n(nats a token; below 0 is better)")
    handles, labels = plots[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return figure


def _cost(comparison: Comparison):
    """Wall-clock seconds of a run by phase, one bar a method, mean over seeds."""
    methods = [m for m in comparison.methods if m.seconds]
    if not methods:
        return None
    figure, plots = new_figure(1, 1, (8.2, 1.3 + 0.42 * len(methods)))
    plot, left = plots[0, 0], [0.0] * len(methods)
    for phase in dict.fromkeys([*PHASE_COLOURS, *(p for m in methods for p in m.seconds)]):
        seconds = [m.seconds[phase].mean if phase in m.seconds else 0.0 for m in methods]
        plot.barh([m.name for m in methods], seconds, left=left, height=0.62, edgecolor="white",
                  linewidth=0.6, color=PHASE_COLOURS.get(phase, "#56B4E9"),
                  label=phase.replace("stage", "stage "))  # fmt: skip
        left = [a + b for a, b in zip(left, seconds, strict=True)]
    for i, total in enumerate(left):
        plot.annotate(f"{total:,.0f} s", (total, i), (4, 0), textcoords="offset points", va="center")
    plot.set_xlim(0, max(left) * 1.1 or 1)
    plot.invert_yaxis()
    plot.grid(axis="y", visible=False)
    plot.set_xlabel("wall-clock seconds of one run (stage 1: with the small LM, stage 2: without)")
    figure.legend(loc="outside upper center", ncols=6)
    return figure

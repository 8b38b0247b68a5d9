"""The pictures: validation curves, buckets, seconds. Each is a PNG, as bytes; nothing needs a screen."""

import io
from collections.abc import Sequence

from slm_assist.report import stats
from slm_assist.report.compare import AXES, BASELINE, BUCKETS, OTHER, RKD, SALT, SMALL, Comparison, Method

# Okabe and Ito's palette, told apart by colour-blind eyes; markers tell the curves apart in print
COLOURS = {SMALL: "#8c8c8c", BASELINE: "#0072B2", RKD: "#D98200", SALT: "#009E73", OTHER: "#CC79A7"}
SPARE_COLOURS = ("#CC79A7", "#56B4E9", "#D55E00", "#000000", "#B8A800")
MARKERS = {SMALL: "v", BASELINE: "s", RKD: "^", SALT: "o", OTHER: "D"}
PHASE_COLOURS = {"compile": "#BBBBBB", "stage1": "#009E73", "stage2": "#0072B2", "validation": "#F0E442",
                 "save": "#CC79A7"}  # fmt: skip
STYLE = {
    "font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": "#e6e6e6", "grid.linewidth": 0.8, "axes.edgecolor": "#888888", "axes.axisbelow": True,
    "xtick.color": "#444444", "ytick.color": "#444444", "axes.titlesize": 10, "axes.titleweight": "bold",
    "legend.frameon": False, "figure.facecolor": "white", "axes.titlelocation": "left",
}  # fmt: skip
LINE = {"lw": 1.7, "ms": 3.6}
LABELS = {"steps": "steps", "flops": "training FLOPs, models only", "seconds": "training seconds"}


def pictures(comparison: Comparison) -> dict[str, bytes]:
    """`{file name: PNG}`: validation.png, seconds.png and, if the runs have them, buckets.png, cost.png."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figures = {"validation.png": _validation(comparison, ("steps", "flops")),
                   "seconds.png": _validation(comparison, ("seconds",)),
                   "buckets.png": _buckets(comparison), "cost.png": _cost(comparison)}  # fmt: skip
        return {name: _png(figure) for name, figure in figures.items() if figure}


def _png(figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=130)
    return out.getvalue()


def _figure(rows: int, columns: int, size: tuple[float, float], **kwargs):
    """A figure apart from pyplot, so that the caller's own figures and backend are left alone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def _colours(comparison: Comparison) -> dict[str, str]:
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
    """Log-perplexity against each of `axes`; above all of it, below the last half of BASELINE's run."""
    figure, plots = _figure(2, len(axes), (4.9 * len(axes) + 0.2, 6.6), sharey="row")
    colours = _colours(comparison)
    for column, axis in enumerate(axes):
        for row, plot in enumerate(plots[:, column]):
            for m in comparison.methods:
                _curve(plot, m, axis, colours[m.name])
            _target(plot, comparison, label=column == 0 and row == 1)
            for m in comparison.methods:
                _switch(plot, m, axis, colours[m.name], label=row == 0 and column == 0)
            _limits(plot, comparison, axis, zoom=row == 1)
            plot.set_title(f"{'last half' if row else 'whole run'}, by {axis.replace('flops', 'FLOPs')}")
            if column == 0:
                plot.set_ylabel("validation log-perplexity\n(nats a token)")
        plots[1, column].set_xlabel(LABELS[axis])
    handles, labels = plots[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(labels)))
    return figure


def _curve(plot, m: Method, axis: str, colour: str) -> None:
    size = f" ({len(m.runs)} seeds: mean and each)" if len(m.runs) > 1 else ""
    unfinished = "" if m.finished else ", unfinished"
    plot.plot(m.curves[axis], m.curves["log_perplexity"], color=colour, marker=MARKERS[m.kind], **LINE,
              ls="-" if m.finished else "--", label=m.name + unfinished + size, zorder=3)  # fmt: skip
    if len(m.runs) > 1:
        for run in m.runs:
            x, y = run.column(AXES[axis]), run.column("log_perplexity")
            plot.plot(x, y, color=colour, lw=0.7, alpha=0.45, zorder=2)


def _target(plot, comparison: Comparison, label: bool) -> None:
    base = comparison.baseline
    if base is None or not base.finished:
        return
    level = base.final["log_perplexity"].mean
    plot.axhline(level, color=COLOURS[BASELINE], lw=0.9, ls=(0, (5, 3)), zorder=1)
    if label:
        plot.annotate(f"{base.name}, final", (0.015, level), (0, -3), xycoords=("axes fraction", "data"),
                      textcoords="offset points", va="top", color=COLOURS[BASELINE], fontsize=8)  # fmt: skip


def _switch(plot, m: Method, axis: str, colour: str, label: bool) -> None:
    step = m.runs[0].switch_step
    at = None if step is None else stats.interpolate(step, m.curves["steps"], m.curves[axis])
    if at is None:
        return
    plot.axvline(at, color=colour, lw=1.2, ls=":", zorder=1)
    if label:
        plot.annotate(f"{m.name}: soft labels end", (at, 0.97), (4, 0), xycoords=("data", "axes fraction"),
                      textcoords="offset points", va="top", color=colour, fontsize=8)  # fmt: skip


def _limits(plot, comparison: Comparison, axis: str, zoom: bool) -> None:
    """Leaves out the untrained model's loss; the zoom shows BASELINE's last half and the others there."""
    students = [m for m in comparison.methods if m.kind != SMALL] or comparison.methods
    shown = students if zoom else comparison.methods
    right = max(m.curves[axis][-1] for m in shown)
    left = (comparison.baseline or students[0]).curves[axis][-1] / 2 if zoom else 0.0
    values = [
        y for m in shown
        for i, (x, y) in enumerate(zip(m.curves[axis], m.curves["log_perplexity"], strict=True))
        if x >= left and (i > 0 or len(m.curves[axis]) == 1)
    ]  # fmt: skip
    if right > left:
        plot.set_xlim(left, left + (right - left) * 1.02)
    if values and max(values) > min(values):
        margin = 0.06 * (max(values) - min(values))
        low, high = plot.get_ylim() if plot.get_autoscaley_on() is False else (min(values), max(values))
        plot.set_ylim(min(low, min(values) - margin), max(high, max(values) + margin))


def _buckets(comparison: Comparison):
    """Log-perplexity minus BASELINE's, by easy, medium and hard rows, at the steps that both evaluated."""
    base = comparison.baseline
    others = [m for m in comparison.methods if m.kind != SMALL and m is not base]
    names = [b for b in BUCKETS if base and b in base.curves["buckets"]]
    if not names or not any(name in m.curves["buckets"] for m in others for name in names):
        return None
    figure, plots = _figure(1, len(names), (3.4 * len(names), 3.4), sharey=True)
    colours = _colours(comparison)
    for plot, name in zip(plots[0], names, strict=True):
        theirs = dict(zip(base.curves["steps"], base.curves["buckets"][name], strict=True))
        plot.axhline(0, color=COLOURS[BASELINE], lw=1.4, label=base.name)
        for m in others:
            ours = zip(m.curves["steps"], m.curves["buckets"].get(name, []), strict=False)
            points = [(step, y - theirs[step]) for step, y in ours if step in theirs and step > 0]
            x, y = zip(*points, strict=True) if points else ((), ())
            plot.plot(x, y, color=colours[m.name], marker=MARKERS[m.kind], label=m.name, **LINE)
            _switch(plot, m, "steps", colours[m.name], label=False)
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
    figure, plots = _figure(1, 1, (8.2, 1.3 + 0.42 * len(methods)))
    plot, left = plots[0, 0], [0.0] * len(methods)
    for phase in dict.fromkeys([*PHASE_COLOURS, *(p for m in methods for p in m.seconds)]):
        seconds = [m.seconds[phase].mean if phase in m.seconds else 0.0 for m in methods]
        plot.barh([m.name for m in methods], seconds, left=left, height=0.62, edgecolor="white",
                  linewidth=0.6, color=PHASE_COLOURS.get(phase, "#56B4E9"), label=phase)  # fmt: skip
        left = [a + b for a, b in zip(left, seconds, strict=True)]
    for i, total in enumerate(left):
        plot.annotate(f"{total:,.0f} s", (total, i), (4, 0), textcoords="offset points", va="center")
    plot.set_xlim(0, max(left) * 1.1 or 1)
    plot.invert_yaxis()
    plot.grid(axis="y", visible=False)
    plot.set_xlabel("wall-clock seconds of one run (stage 1: with the small LM, stage 2: without)")
    figure.legend(loc="outside upper center", ncols=6)
    return figure

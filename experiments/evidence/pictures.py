"""The pictures of the page, from `results.json`."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from answers import last, row
from compare import SHARES
from matrix import GIFTS, MAIN
from measures import PRIMARY

from slm_assist.report import plots

COLOURS = ("#0072B2", "#009E73", "#D98200", "#882255", "#56B4E9", "#CC79A7", "#000000", "#B8A800")
MARKERS = "so^PvDX*"

Results = dict[str, Any]


def all_pictures(results: Results) -> dict[str, bytes]:
    """PNGs by file name: those that there are figures for."""
    import matplotlib

    with matplotlib.rc_context(plots.STYLE):
        drawn = {"curves.png": _curves(results), "time.png": _time(results), "sweeps.png": _sweeps(results),
                 "undecayed.png": _undecayed(results)}  # fmt: skip
        return {name: plots.png(figure) for name, figure in drawn.items() if figure}


def _shown(results: Results, ratio: int) -> list[dict[str, Any]]:
    """Rows of the first two groups that have a curve."""
    rows = [found for found in results["validation"]["rows"] if found["group"] in (MAIN, GIFTS)]
    return [found for found in rows if found["ratio"] == ratio and len(found["ends"]) > 1]


def _curves(results: Results):
    """Decayed bits a byte against steps, and against FLOPs with the small LM's training charged in three ways."""
    ratios = [ratio for ratio in results["setting"]["ratios"] if _shown(results, ratio)]
    if not ratios:
        return None
    axes: dict[str, Callable[[dict[str, Any]], float]] = {"steps": lambda end: end["steps"]}
    words = {"free": "left out", "shared": "shared by 10", "full": "in full"}
    for share in ("free", "full"):
        axes[f"FLOPs, small LM's training {words[share]}"] = lambda end, part=SHARES[share]: (
            end["flops"] + part * end["helper_flops"]
        )
    figure, panels = plots.new_figure(len(ratios), len(axes), (4.0 * len(axes), 3.6 * len(ratios)), sharey="row")
    for line, ratio in zip(panels, ratios, strict=True):
        for panel, (label, x_of) in zip(line, axes.items(), strict=True):
            for i, found in enumerate(_shown(results, ratio)):
                _curve(panel, found, x_of, i)
            panel.set_xscale("log")
            panel.set_xlabel(label)
            if label == "steps":
                steps = sorted({end["steps"] for found in _shown(results, ratio) for end in found["ends"]})
                panel.set_xticks(steps[::2], map(str, steps[::2]))
            panel.minorticks_off()
        line[0].set_ylabel("bits a byte, validation documents")
        line[0].set_title(f"{ratio} tokens a parameter; small dots: seeds")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(8, len(labels)))
    return figure


def _curve(panel, found: dict[str, Any], x_of: Callable[[dict[str, Any]], float], i: int) -> None:
    look = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
    x = [x_of(end) for end in found["ends"]]
    values = [end["measures"][PRIMARY] for end in found["ends"]]
    panel.plot(x, [value["mean"] for value in values], **look, markersize=4.5, lw=1.4, label=found["title"])
    dots = [(a, seed) for a, value in zip(x, values, strict=True) for seed in value["seeds"]]
    panel.scatter(*zip(*dots, strict=True), s=6, alpha=0.45, linewidths=0, **look)


def _undecayed(results: Results):
    """Training loss along the trunks, which no comparison is made of: each method's minus BASELINE's."""
    shown = [found for found in _shown(results, results["setting"]["ratios"][0]) if found.get("undecayed")]
    base = dict(map(tuple, next((found["undecayed"] for found in shown if found["key"] == "baseline"), [])))
    if not base or len(shown) < 2:
        return None
    figure, panels = plots.new_figure(1, 1, (6.4, 3.4))
    steps, losses = list(base), list(base.values())
    for i, found in enumerate(shown):
        x, y = zip(*found["undecayed"], strict=True)
        apart = [value - float(np.interp(step, steps, losses)) for step, value in zip(x, y, strict=True)]
        panels[0, 0].plot(x, apart, color=COLOURS[i % len(COLOURS)], lw=1.3, label=found["title"])
    panels[0, 0].set_xlabel("steps, learning rate not decayed")
    panels[0, 0].set_ylabel("training loss minus BASELINE's\n(nats a token)")
    panels[0, 0].set_ylim(-0.6, 0.3)
    panels[0, 0].legend(fontsize=8)
    return figure


def _time(results: Results):
    """Each measure minus BASELINE's at equal steps, over the steps: one panel a method."""
    shown = [found for found in _shown(results, results["setting"]["ratios"][0])
             if found["key"] != "baseline" and len(found["ends"]) > 1]  # fmt: skip
    if not shown:
        return None
    columns = max(2, min(4, len(shown)))
    lines = math.ceil(len(shown) / columns)
    figure, panels = plots.new_figure(lines, columns, (3.6 * columns, 3.4 * lines), sharey=True, sharex=True)
    for panel, found in zip(panels.flat, shown, strict=False):
        names = [name for name in found["ends"][0]["equal_steps"] if ":" in name]
        x = [100 * end["part"] for end in found["ends"]]
        for i, name in enumerate(names):
            kind, _, short = name.partition(":")
            y = [end["equal_steps"][name]["mean"] for end in found["ends"]]
            bucket = kind == "bucket"
            panel.plot(x, y, color=COLOURS[i % len(COLOURS)], lw=2.0 if bucket else 1.0, ls="-" if bucket else "--",
                       label=f"{short} rows" if bucket else short)  # fmt: skip
        limit = found["ends"][-1]["equal_steps"][PRIMARY]["detectable"]
        if limit:
            panel.axhspan(-limit, limit, color="#eeeeee", zorder=0)
        panel.axhline(0, color="#888888", lw=0.8)
        panel.set_title(found["title"])
        panel.set_xlabel("% of the steps")
        panel.tick_params(labelbottom=True)
    for panel in list(panels.flat)[len(shown) :]:
        panel.set_visible(False)
    panels[0, 0].set_ylabel("bits a byte minus BASELINE's\n(grey: not detectable, overall)")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(6, 2 * columns), fontsize=8)
    return figure


def _sweeps(results: Results):
    """What each setting of SALT, and growth's noise, gives with one seed: one panel a key."""
    salt = row(results, "salt", part="validation")
    if not salt:
        return None
    kinds = {
        "n_KD, part of the steps": _points(
            results, "n_kd-", salt, results["setting"]["stage_1"], ("salt-40", 0.4), ("rkd", 1.0)
        ),
        "w": _points(results, "w-", salt, 0.667),
        "temperature": _points(results, "tau-", salt, 1.0),
        "small LM's FLOPs an update, part of the student's": _sizes(results, salt),
        "small LM's steps, part of the student's": [
            (1.0, _value(salt)),
            *_rows_at(results, ("size-half", 0.5), ("salt-quarter", 0.25), ("salt-eighth", 0.125)),
        ],
    }
    grown = row(results, "grow", part="validation")
    if grown:
        kinds["noise of growth"] = _points(results, "grow-noise-", grown, 1.0)
    kinds = {name: found for name, found in kinds.items() if len(found) > 1}
    if not kinds:
        return None
    columns = min(4, len(kinds))
    lines = math.ceil(len(kinds) / columns)
    figure, panels = plots.new_figure(lines, columns, (3.4 * columns, 3.0 * lines), sharey=True)
    shown, spare = list(panels.flat)[: len(kinds)], list(panels.flat)[len(kinds) :]
    for panel in spare:
        panel.set_visible(False)
    for panel, (name, found) in zip(shown, kinds.items(), strict=True):
        panel.plot(*zip(*sorted(found), strict=True), marker="o", color=COLOURS[1], lw=1.4)
        panel.set_xlabel(name)
        if name in ("temperature", "noise of growth"):
            panel.set_xscale("log", base=2)
    base = row(results, "baseline", part="validation")
    for panel in shown:
        panel.axhline(last(base)["measures"][PRIMARY]["seeds"][0], color=COLOURS[0], ls="--", lw=1.0, label="BASELINE")
    panels[0, 0].legend()
    panels[0, 0].set_ylabel("bits a byte, one seed, all steps")
    return figure


def _value(found: dict[str, Any]) -> float:
    return last(found)["measures"][PRIMARY]["seeds"][0]


def _points(results: Results, prefix: str, salt: dict[str, Any], at: Any, *others: tuple[str, float]) -> list[tuple]:
    """(setting, bits a byte) of the rows whose key begins so, of SALT itself, and of others at a known setting."""
    start = at[str(salt["ratio"])] / salt["steps"] if isinstance(at, dict) else at
    found = [(start, _value(salt))]
    found += [(float(one["key"].removeprefix(prefix)), _value(one)) for one in results["validation"]["rows"]
              if one["key"].startswith(prefix) and one["ratio"] == salt["ratio"]]  # fmt: skip
    return found + _rows_at(results, *others)


def _rows_at(results: Results, *rows: tuple[str, float]) -> list[tuple[float, float]]:
    """(setting, bits a byte) of those rows that are there."""
    return [(x, _value(one)) for key, x in rows if (one := row(results, key, part="validation"))]


def _sizes(results: Results, salt: dict[str, Any]) -> Sequence[tuple[float, float]]:
    relative = results["setting"]["relative"]
    others = _rows_at(results, *((f"size-{name}", part) for name, part in relative.items() if name != "small"))
    return [(relative["small"], _value(salt)), *others]

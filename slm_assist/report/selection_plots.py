"""Pictures of what was selected: scores by domain and by step, what is kept of each domain. PNGs, as bytes."""

from collections.abc import Sequence

import numpy as np

from slm_assist.report.plots import MARKERS, SPARE_COLOURS, STYLE, new_figure, png
from slm_assist.report.selection import Choice, Selection

DOMAINS = 16  # of the most rows are drawn; the others together
PANELS = 4  # choices beside each other
COLUMNS = 40  # of a histogram with many rows
SPARE = tuple(dict.fromkeys(("#000000", *SPARE_COLOURS, "#009E73")))


def pictures(selection: Selection, colours: dict[str, str] | None = None) -> dict[str, bytes]:
    """`{file name: PNG}`: selection-scores.png, selection-steps.png, selection-domains.png, those that can be drawn.

    Args:
      colours: of methods, by name, so that a run has the colour of its curve.
    """
    import matplotlib

    hues = _colours(selection.choices, colours or {})

    with matplotlib.rc_context(STYLE):
        figures = {"selection-scores.png": _scores([c for c in selection.choices if c.scores is not None]),
                   "selection-steps.png": _steps([c for c in selection.choices if c.means], hues),
                   "selection-domains.png": _domains([c for c in selection.choices if c.kept_share], hues)}  # fmt: skip
        return {name: png(figure) for name, figure in figures.items() if figure}


def _colours(choices: Sequence[Choice], given: dict[str, str]) -> dict[str, str]:
    """A colour a choice, by name."""
    colours = {c.name: given[c.name] for c in choices if c.name in given}
    spare = [colour for colour in SPARE if colour not in given.values()]
    rest = [c.name for c in choices if c.name not in given and (c.kept_share or c.means)]
    return colours | {name: spare[i % len(spare)] for i, name in enumerate(rest)}


def _largest(counts: dict[str, float]) -> list[str]:
    """The names with the most, largest first, at most DOMAINS of them."""
    return sorted(counts, key=lambda name: -counts[name])[:DOMAINS]


def _scores(choices: Sequence[Choice]):
    """A panel a choice; in it, each domain's histogram above its own line, scaled to its own highest column."""
    choices = choices[:PANELS]
    if not choices:
        return None
    names = [_largest(_counts(choice)) for choice in choices]
    rows = max(map(len, names))
    figure, plots = new_figure(1, len(choices), (10.0, 1.1 + 0.4 * (rows + 1)))
    for plot, choice, shown in zip(plots[0], choices, names, strict=True):
        _ridges(plot, choice, shown)
    return figure


def _counts(choice: Choice) -> dict[str, int]:
    counts = np.bincount(choice.domain, minlength=len(choice.domain_names))
    return {name: int(n) for name, n in zip(choice.domain_names, counts, strict=True) if n}


def _ridges(plot, choice: Choice, shown: Sequence[str]) -> None:
    known = ~np.isnan(choice.scores)
    scores, names = choice.scores[known], np.asarray(choice.domain_names)[choice.domain[known]]
    low, high = (0.0, 1.0) if not len(scores) else np.quantile(scores, (0.0, 0.999))
    edges = np.linspace(low, high if high > low else low + 1, 1 + min(COLUMNS, max(8, len(scores) // 12)))
    counts, ticks = _counts(choice), []
    for place, name in enumerate(["all", *shown]):
        own = scores if name == "all" else scores[names == name]
        heights = np.histogram(np.clip(own, edges[0], edges[-1]), edges)[0]
        top = heights / max(heights.max(), 1) * 0.85
        colour = "#555555" if name == "all" else "#0072B2"
        plot.stairs(place - top, edges, baseline=place, fill=True, color=colour, alpha=0.55)
        plot.stairs(place - top, edges, baseline=place, color=colour, lw=0.8)
        if len(own):
            plot.plot([np.median(own)] * 2, [place, place - 0.85], color="#D55E00", lw=1.6)
        number = len(scores) if name == "all" else counts[name]
        ticks.append(f"{name[:20]}  ({number:,})")
    left_out = len(counts) - len(shown)
    plot.set_yticks(range(len(ticks)), ticks)
    plot.set_ylim(len(ticks) - 0.85, -1.1)
    plot.grid(axis="y", visible=False)
    rest = f"; the {left_out} smallest domains are not drawn" if left_out else ""
    plot.set_xlabel(f"{choice.score} score of a row, nats{rest}")
    plot.set_title(f"{choice.name[:30]}: {'all rows' if choice.whole else 'a sample'}")


def _steps(choices: Sequence[Choice], colours: dict[str, str]):
    """Mean score of the candidates and of the rows kept, a panel a run."""
    choices = choices[:PANELS]
    if not choices:
        return None
    figure, plots = new_figure(1, len(choices), (10.0, 3.3))
    for plot, choice in zip(plots[0], choices, strict=True):
        colour, steps = colours[choice.name], choice.means["steps"]
        every = max(1, len(choice.means["steps"]) // 20)
        plot.plot(steps, choice.means["kept"], color=colour, lw=1.7, marker="o", ms=3.2, markevery=every, label="kept")
        plot.plot(steps, choice.means["candidates"], color="#777777", lw=1.7, ls="--", label="all candidates")
        plot.set_title(choice.name[:34])
        plot.set_xlabel("steps")
        plot.legend(loc="lower center", bbox_to_anchor=(0.5, 1.07), ncols=2)
        plot.set_ylabel(f"mean {choice.score} score, nats")
    return figure


def _domains(choices: Sequence[Choice], colours: dict[str, str]):
    """Of each domain's candidates the share that was kept; a line at the share of all, a choice a colour."""
    if not choices:
        return None
    totals: dict[str, float] = {}
    for choice in choices:
        for name, (candidates, _) in choice.domains.items():
            totals[name] = totals.get(name, 0) + candidates
    names = _largest(totals)
    rate = {name: [c.domains[name][1] / c.domains[name][0] for c in choices if c.domains.get(name, (0, 0))[0]]
            for name in names}  # fmt: skip
    names.sort(key=lambda name: -rate[name][0] if rate[name] else 0)
    figure, plots = new_figure(1, 1, (8.2, 1.4 + 0.34 * len(names)))
    plot, shift = plots[0, 0], 0.5 / max(len(choices), 1)
    for i, choice in enumerate(choices):
        colour = colours[choice.name]
        places = [place for place, name in enumerate(names) if choice.domains.get(name, (0, 0))[0]]
        pairs = np.array([choice.domains[names[place]] for place in places], float)
        share = pairs[:, 1] / pairs[:, 0]
        heights = np.array(places) + (i - (len(choices) - 1) / 2) * shift
        plot.hlines(heights, *_interval(pairs), color=colour, lw=1.3, alpha=0.6)
        marker = MARKERS.get(choice.kind, "X*<>dhp8"[i % 8])
        plot.plot(share, heights, color=colour, marker=marker, ls="none", ms=6, label=choice.name[:30], clip_on=False)
        plot.axvline(choice.kept_share, color=colour, lw=1, ls="--", zorder=1)
    plot.set_yticks(range(len(names)), [name[:28] for name in names])
    plot.set_ylim(len(names) - 0.4, -0.6)
    plot.set_xlim(left=0)
    plot.xaxis.set_major_formatter(lambda x, _: f"{100 * x:g} %")
    plot.set_xlabel("share of a domain's candidate rows that was kept (dashed: of all candidates)")
    figure.legend(loc="outside upper center", ncols=4)
    return figure


def _interval(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's 95 % interval of kept / candidates; the rows of a document are not as independent as it takes them."""
    n, kept = pairs.T
    share, z2 = kept / n, 1.96**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = 1.96 * np.sqrt(share * (1 - share) / n + z2 / (4 * n**2)) / (1 + z2 / n)
    return middle - half, middle + half

"""The pictures of `figures` and `figures_tabular`: PNGs, as bytes. Lines are predicted, markers are measured."""

import math
from collections.abc import Sequence

from slm_assist.errors import one_of
from slm_assist.report.plots import STYLE, new_figure, png
from slm_assist.theory.figures import Figure

BLUE, ORANGE, GREEN, PURPLE, GREY, RED = "#0072B2", "#D98200", "#009E73", "#882255", "#8c8c8c", "#D55E00"
TERMS = {"bias": PURPLE, "variance": BLUE, "variance_hat": BLUE, "variance_best": GREEN, "remainder": GREY}
METHODS = {"BASELINE": BLUE, "RKD": ORANGE, "SALT": GREEN}


def picture(figure: Figure) -> bytes:
    """The PNG of one figure.

    Raises:
      UserError: there is none of that name.
    """
    import matplotlib

    draw = {"bias": _bias, "variance": _variance, "increments": _increments, "coverage": _coverage, "rate": _rate,
            "best-weight": _best_weight, "floor": _floor, "crossover": _crossover, "excess": _excess,
            "network": _network}  # fmt: skip
    one_of("figure", figure.name, draw)
    with matplotlib.rc_context(STYLE):
        drawn = draw[figure.name](figure.data)
        return png(drawn)


def _new(titles: Sequence[str], x: str, y: str, *, log: str = "", rows: int = 1, width: float = 4.4):
    """Panels with titles and labels; `log` names the axes that are logarithmic."""
    columns = math.ceil(len(titles) / rows)
    figure, plots = new_figure(rows, columns, (width * columns, 3.6 * rows))
    for i, (plot, title) in enumerate(zip(plots.ravel(), titles, strict=False)):
        plot.set_title(title)
        plot.set_xlabel(x)
        if i % columns == 0:
            plot.set_ylabel(y)
        for axis in log:
            getattr(plot, f"set_{axis}scale")("log")
    return figure, list(plots.ravel())


def _legend(figure, plot, columns: int = 4) -> None:
    handles, labels = plot.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, fontsize=8.5)


def _bias(data: dict):
    figure, (plot,) = _new([f"bias of 64 models, M = {data['largest_loss']:.2f}, TV = {data['total_variation']:.3f}"],
                           "models, by their bias", "|R - R^w|, nats a token", log="y", width=7.4)  # fmt: skip
    for (w, gaps), colour in zip(data["gaps"].items(), (BLUE, GREEN, ORANGE), strict=False):
        plot.plot(sorted(gaps), "o", ms=3, color=colour, label=f"measured (exact), w = {w}")
        plot.axhline(data["limits"][w], color=colour, lw=1.4, label="predicted at most: 2 M w TV")
    _legend(figure, plot, 3)
    return figure


def _variance(data: dict):
    figure, (plot,) = _new(["variance of loss^w, share of that at w = 0"], "w", "share", width=6.4)
    fine = [i / 100 for i in range(101)]
    plot.plot(fine, [(1 - w) ** 2 for w in fine], color=BLUE, label="at a context, predicted: (1 - w)^2")
    plot.plot(data["weights"], data["measured"], "o", ms=4, color=BLUE, label="at a context, measured")
    plot.plot(data["weights"], data["row"], color=ORANGE, label="of a row's mean loss, predicted (exact)")
    plot.plot([1.0], [data["row_measured"]], "s", ms=5, color=ORANGE, label="of a row's mean loss, measured")
    _legend(figure, plot, 2)
    return figure


def _increments(data: dict):
    shown = data["shown"]
    titles = [f"increment {t}: {'first context' if t == '0' else 'token ' + t}" for t in shown]
    figure, plots = _new([*titles, "variance by position"], "xi_t, nats", "rows", rows=2, width=3.8)
    for plot, item in zip(plots, shown.values(), strict=False):
        edges = item["edges"]
        middle = [(a + b) / 2 for a, b in zip(edges, edges[1:], strict=False)]
        plot.bar(middle, item["counts"], width=edges[1] - edges[0], color="#9ecae1", label="measured")
        plot.stairs(item["exact_counts"], edges, color=BLUE, lw=1.2, label="predicted, from the law")
        plot.axvline(0, color="#444444", lw=0.8)
    last = plots[len(shown)]
    last.plot(data["measured"], "o", ms=3.5, color=BLUE, label="measured: mean of xi_t^2")
    last.plot(data["mean_variance"], color=BLUE, label="predicted: E[xi_t^2]")
    last.plot(data["largest_variance"], color=ORANGE, label="V_t, of the worst past")
    last.set_xlabel("position t")
    last.set_ylim(0)
    last.legend(fontsize=8)
    for plot in plots[len(shown) + 1 :]:
        plot.set_axis_off()
    handles, labels = plots[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2)
    return figure


def _coverage(data: dict):
    figure, plots = _new(["R(hat) - R(best)", "largest R - R^w_N of 64 models", "what the bounds consist of"],
                         "N rows of 16 tokens", "nats a token", log="xy")  # fmt: skip
    for plot, kind in zip(plots, ("excess", "class"), strict=False):
        items = [item for item in data["bounds"] if item["kind"] == kind]
        for w, colour in ((0.0, BLUE), (0.667, ORANGE)):
            at = [i for i, v in enumerate(items[0]["weight"]) if v == w]
            for item, style in zip(items, ("-", "--"), strict=True):
                plot.plot([item["rows"][i] for i in at], [item["bound"][i] for i in at], style, color=colour,
                          label=f"bound, {item['words'].partition(', ')[2]}, w = {w:g}")  # fmt: skip
            plot.plot([items[0]["rows"][i] for i in at], [items[0]["truth"][i] for i in at], "o", ms=4.5, color=colour,
                      label=f"measured, 95 % quantile, w = {w:g}")  # fmt: skip
        plot.axhline(data["log_vocab"], color="#444444", lw=0.8, ls=":")
        plot.annotate("ln V", (1, data["log_vocab"]), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                      fontsize=8)  # fmt: skip
        low, high = plot.get_ylim()
        plot.set_ylim(low, high * (300 if kind == "excess" else 60))
        plot.legend(fontsize=7, loc="upper right")
    _terms(plots[2], data)
    return figure


def _terms(plot, data: dict) -> None:
    """Stacked shares of each term at the largest N."""
    bars, labels = [], []
    for item in data["bounds"]:
        if item["form"] in ("covering", "martingale"):
            for i, (w, n) in enumerate(zip(item["weight"], item["rows"], strict=True)):
                if n == max(item["rows"]):
                    bars.append(item["terms"][i])
                    labels.append(f"{'excess' if item['kind'] == 'excess' else 'class'}, w = {w:g}")
    used = set()
    for at, terms in enumerate(bars):
        left = 0.0
        for name, colour in TERMS.items():
            if name in terms:
                words = name.replace("_", " of ").replace("variance of hat", "variance")
                label = None if words in used else words
                plot.barh(at, terms[name] / terms["total"], left=left, color=colour, height=0.7, label=label)
                used.add(words)
                left += terms[name] / terms["total"]
    plot.set_xscale("linear")
    plot.set_yscale("linear")
    plot.set_yticks(range(len(labels)), labels)
    plot.set_ylim(len(labels) - 0.5, -2.2)
    plot.set_xlabel(f"share of the bound at N = {max(data['bounds'][0]['rows'])}")
    plot.legend(fontsize=7, ncols=2, loc="upper center")


def _rate(data: dict):
    figure, plots = _new(["sup |R_N - R|, w = 0", "the whole bound of the finite class"], "tokens, N T",
                         "nats a token", log="xy", width=5.4)  # fmt: skip
    for (name, curve), colour, marker in zip(data.items(), (BLUE, GREEN, ORANGE), "os^", strict=False):
        plots[0].plot(curve["tokens"], curve["sup"], marker, ms=4.5, color=colour, label=f"measured {name}")
        plots[0].plot(curve["tokens"], curve["sd"], color=colour, lw=1.2, label="predicted: sqrt(Var(L) / N), exact")
        plots[0].plot(curve["tokens"], curve["width"], ":", color=colour, label="bound's width, exact")
    low, high = plots[0].get_ylim()
    plots[0].set_ylim(low, high * 8)
    plots[0].legend(fontsize=7, ncols=2, loc="upper right")
    whole = data["whole bound"]
    for name, colour in (("w*", GREEN), ("w = 0.667", ORANGE)):
        plots[1].plot(whole["tokens"], whole[name], "o-", ms=4, color=colour, label=f"computed, {name}")
    x, start = whole["tokens"], whole["w*"][-1] * whole["tokens"][-1] ** 0.5
    plots[1].plot(x, [start / n**0.5 for n in x], "k:", lw=1, label="predicted slope -1/2")
    plots[1].legend(fontsize=8)
    return figure


def _best_weight(data: dict):
    titles = [f"{bucket} contexts" for bucket in data] + [f"{bucket}, over the closed form w*" for bucket in data]
    figure, plots = _new(titles, "n, tokens of each context", "best w", log="x", rows=2)
    for i, points in enumerate(data.values()):
        for plot, unit in ((plots[i], 0), (plots[i + len(data)], 1)):
            scale = [p["predicted"] if unit else 1.0 for p in points]
            n, at = [p["n"] for p in points], list(zip(points, scale, strict=True))
            plot.plot(n, [p["predicted"] / s for p, s in at], color=BLUE, label="predicted: closed form w*")
            plot.plot(n, [p["refined"] / s for p, s in at], "--", color=ORANGE, label="predicted: corrected for KL")
            for measure, colour, words in (("chi_square", BLUE, "chi-square risk"), ("kl", ORANGE, "KL")):
                best = [p[measure]["best"] / s for p, s in at]
                error = [(p[measure]["interval"][1] - p[measure]["best"]) / s for p, s in at]
                plot.errorbar(n, best, error, fmt="o", ms=4, color=colour, label=f"measured, {words}")
            first = min(p["n"] / p["n_min_d"] for p in points)
            plot.axvline(first, color="#444444", lw=0.8, ls=":")
            plot.annotate("n min d = 1", (first, 0.02), xycoords=("data", "axes fraction"), fontsize=8)
        plots[i].set_yscale("log")
        plots[i + len(data)].set_ylim(0.8, 1.3)
    plots[len(data)].set_ylabel("best w / w*")
    _legend(figure, plots[0], 2)
    return figure


def _floor(data: dict):
    buckets = [key for key in data if key != "sizes"]
    figure, plots = _new([f"{bucket} contexts" for bucket in buckets], "n, tokens of each context", "KL, nats a token",
                         log="xy")  # fmt: skip
    colours = {"0.0": BLUE, "0.25": GREEN, "0.667": ORANGE, "1.0": PURPLE, "w*": "#000000"}
    for plot, bucket in zip(plots, buckets, strict=True):
        for w, colour in colours.items():
            values = [v if math.isfinite(v) else math.nan for v in data[bucket][w]]
            plot.plot(data["sizes"], values, "o-", lw=0.7, ms=3.8, color=colour,
                      label=f"measured, {'w = ' + w if w != 'w*' else w}")  # fmt: skip
            if w in data[bucket]["floors"]:
                first = "predicted floor" if w == "0.25" else None
                plot.axhline(data[bucket]["floors"][w], color=colour, lw=1.3, ls="--", label=first)
    _legend(figure, plots[0], 3)
    return figure


def _crossover(data: dict):
    figure, plots = _new([f"{bucket}, chi2 = {data['chi2'][bucket]:g}" for bucket in data["curves"]],
                         "n, tokens of each context", "KL, nats a token", log="xy")  # fmt: skip
    for plot, (bucket, curves) in zip(plots, data["curves"].items(), strict=True):
        for (w, values), colour in zip(curves.items(), (BLUE, ORANGE), strict=True):
            values = [v if math.isfinite(v) else math.nan for v in values]
            words = f"measured, {'BASELINE' if float(w) == 0 else 'w = ' + w}"
            plot.plot(data["sizes"], values, "o-", lw=0.7, ms=3.5, color=colour, label=words)
        plot.axvline(data["predicted"][bucket], color="#444444", lw=1.2, label="predicted: (V-1)(2-w) / (w chi2)")
        plot.axvline(data["measured"][bucket], color=RED, lw=1.2, ls=":", label="measured crossover")
    _legend(figure, plots[0], 2)
    return figure


def _excess(data: dict):
    figure, (plot,) = _new(["excess KL of a tabular student on rows"], "tokens, N T", "KL, nats a token", log="xy",
                           width=6.4)  # fmt: skip
    plot.plot(data["tokens"], data["limit"], color=BLUE, label="predicted, w = 0: C (V - 1) / (2 N T)")
    for name, colour in (("w = 0", BLUE), ("w*", GREEN)):
        values = [v if v is not None and math.isfinite(v) else math.nan for v in data[name]]
        plot.plot(data["tokens"], values, "o", ms=5, color=colour, label=f"measured, {name}")
    _legend(figure, plot, 3)
    return figure


def _network(data: dict):
    buckets = [key for key in data if key not in ("steps", "switch")]
    figure, plots = _new([f"{bucket} contexts" for bucket in buckets], "updates of 64 tokens", "KL, nats a token",
                         log="y")  # fmt: skip
    for plot, bucket in zip(plots, buckets, strict=True):
        for name, colour in METHODS.items():
            plot.plot(data["steps"], data[bucket][name], color=colour, lw=1.4, label=f"measured, {name}")
        plot.axhline(data[bucket]["floor"], color=ORANGE, ls="--", lw=1.2, label="predicted floor of RKD")
        plot.axvline(data["switch"], color=GREEN, lw=0.9, ls=":")
    _legend(figure, plots[0])
    return figure

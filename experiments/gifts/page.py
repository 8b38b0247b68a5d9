"""The figures of `collect.py` as a Markdown page and a picture; every number comes from them."""

import statistics
from collections.abc import Sequence
from typing import Any

from slm_assist.report import plots
from slm_assist.report.tables import NONE

SHARES = {"free": "left out", "shared": "shared by 10", "full": "in full"}
COLOURS = ("#0072B2", "#009E73", "#882255", "#D98200", "#56B4E9", "#CC79A7", "#000000", "#B8A800")
MARKERS = "soP^vDX*"


def markdown(results: dict[str, Any]) -> str:
    """The page: what was run, then the tables, each with how to read it."""
    parts = [_setting(results), _equal_steps(results), _equal_flops(results), _longer(results), _to_quality(results),
             _rows(results), "![decayed log-perplexity against steps and FLOPs](gifts.png)"]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _setting(results: dict[str, Any]) -> str:
    s, o, helper = results["setting"], results["setting"]["optimizer"], results["setting"]["helper"]
    versions = ", ".join(f"{name} {version}" for name, version in (s["versions"] or {}).items())
    facts = [
        ("command", f"`{results['command']}`"),
        ("hardware", f"{s['hardware']}, {s['devices']} device(s), {s['dtype']}"),
        ("software", versions),
        ("seeds", ", ".join(map(str, s["seeds"]))),
        ("corpus", f"fingerprint {s['train_rows']}: {s['train_tokens']:,} training tokens of {s['vocabulary_size']} "
                   f"pieces, {s['validation_rows_count']} validation rows of {s['seq_len']}"),
        ("updates", f"{s['updates']['large']:,} of the large LM and {s['updates']['small']:,} of the small one, in "
                    f"{s['runs']} runs"),
    ]  # fmt: skip
    unlike = f" The runs are not alike in {', '.join(s['unlike'])}." if s["unlike"] else ""
    budgets = ", ".join(map(str, s["budgets"]))
    return "\n\n".join([
        "# Gifts of a small LM, measured",
        table(("", ""), facts),
        f"Students of {s['parameters']:,} parameters and small LMs of {helper['parameters']:,}, one for each seed, "
        f"{helper['steps']} steps of the same rows ({_mean(helper['log_perplexity'])} nats a token). Updates of "
        f"{s['batch_rows']} x {s['seq_len']} tokens; {o['name']}; the learning rate rises for {o['warmup_steps']} "
        f"updates to {o['peak_learning_rate']:g}, stays, and falls to {o['final_fraction']:g} of that over the last "
        f"{o['decay_fraction']:.0%} of each budget ({budgets} steps), in a branch of its own; so every compared model "
        "is fully decayed. The peak is the same for all and was tuned for none. A pair of runs with one seed reads the "
        "same rows in the same order, but for methods that choose rows. Soft labels, choice of rows and "
        f"representations end after {s['stage_1']} updates, whatever the budget; candidates are scored by the small "
        f"LM's last checkpoint.{unlike}",
        f"± is the half-width of the 95 % t-interval over {len(s['seeds'])} seed(s), of differences paired by seed; "
        "`not resolved` where it includes 0. Intervals hold one by one; they are not widened for their number. What "
        "the choice of validation rows adds is not in them. Seconds are not compared: the runs shared a machine.",
    ])  # fmt: skip


def _equal_steps(results: dict[str, Any]) -> str:
    rows = []
    for method in results["methods"].values():
        for row in method["budgets"]:
            apart = row.get("log_perplexity_at_equal_steps")
            bits = row.get("bits_per_byte_at_equal_steps")
            rows.append((
                method["name"], str(row["steps"]), _mean(row["log_perplexity"]), _mean(row["bits_per_byte"]),
                _signed(apart), _signed(bits), _verdict(apart),
            ))  # fmt: skip
    limits = "; ".join(
        f"{limit:.3f} at {steps} steps" for steps, limit in results["detectable"].items() if limit is not None
    )
    noise = (f"By BASELINE's own spread over seeds, unpaired means that differ by less than this are not told apart "
             f"(95 %), in nats: {limits}." if limits else "One seed does not say how far results spread.")  # fmt: skip
    header = ("method", "steps", "log-perplexity, nats a token", "bits a byte", "log-perplexity minus BASELINE",
              "bits a byte minus BASELINE", "")  # fmt: skip
    return f"## At equal steps\n\n{table(header, rows)}\n\n{noise}"


def _equal_flops(results: dict[str, Any]) -> str:
    rows = []
    for method in _others(results):
        for row in method["budgets"]:
            shares = (_both(row["at_equal_flops"][share]) for share in SHARES)
            costs = (f"{row[name]['mean']:.4g}" for name in ("flops", "helper_flops"))
            rows.append((method["name"], str(row["steps"]), *costs, *shares))
    header = ("method", "steps", "FLOPs", "training of its small LM, FLOPs",
              *(f"minus BASELINE, small LM {words}" for words in SHARES.values()))  # fmt: skip
    measured = ", ".join(str(row["steps"]) for row in _base(results)["budgets"])
    text = (
        "Log-perplexity minus that of BASELINE with as many FLOPs, between BASELINE's own fully decayed models, "
        f"linearly in the logarithm of FLOPs ({measured} steps). Soft labels, scores of candidates "
        "and every other forward pass of a small LM always count; in full, each row is charged its whole training."
    )
    return f"## At equal FLOPs\n\n{text}\n\n{table(header, rows)}"


def _longer(results: dict[str, Any]) -> str:
    rows = [(method["name"], str(row["steps"]), _signed(row["against_longer"]), _verdict(row["against_longer"]))
            for method in _others(results) for row in method["budgets"] if "against_longer" in row]  # fmt: skip
    steps = results["setting"]["longer"]
    text = (
        f"BASELINE with the FLOPs of the small LM's training as extra steps: {steps} in all, fully decayed. What the "
        "small LM then costs in a method's own run is not given to BASELINE here; at equal FLOPs, above, it is."
    )
    return f"## Against BASELINE, longer\n\n{text}\n\n" + table(
        ("method", "steps", f"log-perplexity minus BASELINE's at {steps} steps", ""), rows
    )


def _to_quality(results: dict[str, Any]) -> str:
    steps = results["setting"]["budgets"][-1]
    rows = []
    for method in results["methods"].values():
        found = method["to_quality"]
        where = [found["where"].count(word) for word in ("within", "before", "never")]
        cells = [_figure(found["steps"], ".0f"), _figure(found["steps_over_baseline"], ".2f")]
        cells += [_figure(found["flops_over_baseline"][share], ".2f") for share in SHARES]
        rows.append((method["name"], "{} / {} / {}".format(*where), *cells))
    header = ("method", "seeds within / before / never", "steps", "steps, of BASELINE's",
              *(f"FLOPs, of BASELINE's, small LM {words}" for words in SHARES.values()))  # fmt: skip
    text = (
        f"Cost to the log-perplexity of BASELINE's model of {steps} steps, seed by seed, between a method's own fully "
        "decayed models, linearly in the logarithm of the cost. Below 1 is cheaper. `before`: its first model is "
        f"better already; `never`: none is as good; {NONE}: not every seed has a value."
    )
    return f"## To BASELINE's quality\n\n{text}\n\n{table(header, rows)}"


def _rows(results: dict[str, Any]) -> str:
    s = results["setting"]
    rows = []
    for method in results["methods"].values():
        for row in method["budgets"]:
            tokens, epochs = row["tokens"]["mean"], row["rows"]["mean"] / s["train_rows_count"]
            unique = f"{tokens:,.0f}" if epochs <= 1 else f"at most {min(tokens, s['train_tokens']):,.0f}"
            rows.append((method["name"], str(row["steps"]), f"{tokens:,.0f}", unique, f"{epochs:.3f}",
                         f"{tokens / s['parameters']:.2f}", str(len(s["seeds"]))))  # fmt: skip
    header = ("method", "steps", "tokens learnt from", "unique", "epochs of rows read", "tokens a parameter", "seeds")
    text = (
        "Rows read include candidates that were not chosen. Beside that, every method but BASELINE had a small LM that "
        f"had read the rows of all {s['budgets'][-1]} steps before its student began, those after a smaller budget's "
        "end too: teacher and guide speak of rows that they were trained on."
    )
    return f"## What each row stands on\n\n{text}\n\n{table(header, rows)}"


def _base(results: dict[str, Any]) -> dict[str, Any]:
    return results["methods"]["baseline"]


def _others(results: dict[str, Any]) -> list[dict[str, Any]]:
    return [method for key, method in results["methods"].items() if key != "baseline"]


def _mean(figure: dict[str, Any]) -> str:
    return f"{figure['mean']:.3f}"


def _figure(figure: dict[str, Any], form: str) -> str:
    """Mean and half-width of an interval, as text."""
    if figure["mean"] is None:
        return NONE
    text = format(figure["mean"], form)
    if figure["interval_95"]:
        half = (figure["interval_95"][1] - figure["interval_95"][0]) / 2
        text += f" ±{format(half, form.replace('+', ''))}"
    return text


def _signed(apart: dict[str, Any] | None) -> str:
    return _figure(apart, "+.3f") if apart else ""


def _verdict(apart: dict[str, Any] | None) -> str:
    return apart["verdict"] if apart else ""


def _both(apart: dict[str, Any]) -> str:
    """A difference and what is to be made of it, in one cell."""
    return apart["verdict"] if apart["mean"] is None else f"{_signed(apart)}, {apart['verdict']}"


def picture(results: dict[str, Any]) -> bytes:
    """PNG: log-perplexity of the decayed models against steps, and FLOPs without and with the small LM's training."""
    import matplotlib

    axes = {
        "steps": lambda row: [float(row["steps"])] * len(row["flops"]["seeds"]),
        "FLOPs, small LM's training left out": lambda row: row["flops"]["seeds"],
        "FLOPs, small LM's training in full": lambda row: [
            own + helper for own, helper in zip(row["flops"]["seeds"], row["helper_flops"]["seeds"], strict=True)
        ],
    }
    with matplotlib.rc_context(plots.STYLE):
        figure, panels = plots.new_figure(1, len(axes), (4.0 * len(axes), 4.2), sharey=True)
        for panel, (label, x_of) in zip(panels[0], axes.items(), strict=True):
            for i, method in enumerate(results["methods"].values()):
                look = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
                x = [x_of(row) for row in method["budgets"]]
                y = [row["log_perplexity"]["seeds"] for row in method["budgets"]]
                panel.plot([statistics.fmean(v) for v in x], [statistics.fmean(v) for v in y], **look, markersize=5,
                           label=method["name"])  # fmt: skip
                panel.scatter(sum(x, []), sum(y, []), s=8, alpha=0.5, linewidths=0, **look)
            panel.set_xscale("log")
            panel.set_xlabel(label)
            if label == "steps":
                ticks = [*results["setting"]["budgets"], results["setting"]["longest"]]
                panel.set_xticks(ticks, map(str, ticks))
                panel.minorticks_off()
        panels[0, 0].set_ylabel("validation log-perplexity, nats a token")
        panels[0, 0].set_title("fully decayed models; small dots are seeds")
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=min(8, len(labels)))
        return plots.png(figure)

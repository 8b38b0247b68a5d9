"""`results.json` as a Markdown page: every number on it comes from there, every judgement from `compare.verdict`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import answers
import theory
from compare import CHARGED, SHARES
from matrix import ADAPTIVE, CONFIRM, CONTROLS, DATA, EPOCHS, GIFTS, MAIN, SWEEPS
from measures import EQUAL, PRIMARY, UNSEEN

NONE = "–"
TITLES = {
    MAIN: "BASELINE, SALT, RKD",
    GIFTS: "Other gifts: weights, representations, judgement of data",
    CONTROLS: "Controls",
    DATA: "The helper's data",
    ADAPTIVE: "Rules for w, and combinations (explored)",
    SWEEPS: "Sweeps (one seed, exploratory)",
    EPOCHS: "Several epochs of a quarter of the rows",
    CONFIRM: "Confirmation",
}

Results = dict[str, Any]


def read_theory(out: Path) -> Results | None:
    """What theory.py wrote into the page's directory, None where it has not."""
    path = out / "theory.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def markdown(results: Results, of_theory: Results | None = None) -> str:
    """The page; with the section that theory.py makes of its own figures."""
    ratios = results["setting"]["ratios"]
    parts = ["# Does a small LM's help pay?", answers.markdown(results), _how(results)]
    if "test" in results:
        parts.append(_group(results, "test", ratios[0], CONFIRM))
    parts += [_group(results, "validation", ratio, group) for group in TITLES if group != CONFIRM for ratio in ratios]
    parts += [_tuned(results), _over_time(results), _grid(results)]
    parts += [theory.markdown(of_theory).strip() if of_theory else ""]
    parts += [_stands_on(results), _runs(results), _missing(results)]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def rows_of(results: Results, part: str, ratio: int, group: str) -> list[dict[str, Any]]:
    return [row for row in results.get(part, {}).get("rows", []) if (row["ratio"], row["group"]) == (ratio, group)]


def last(row: dict[str, Any]) -> dict[str, Any]:
    """The end at all of the steps."""
    return next(end for end in row["ends"] if end["steps"] == row["steps"])


def signed(apart: dict[str, Any] | None, digits: int = 4) -> str:
    """A difference, its interval and what is to be made of it, in one cell."""
    if not apart:
        return ""
    if apart["mean"] is None:
        return apart["verdict"]
    text = f"{apart['mean']:+.{digits}f}"
    if apart["interval"]:
        text += " [{:+.{d}f}, {:+.{d}f}]".format(*apart["interval"], d=digits)
    return f"{text}, {apart['verdict']}"


def _how(results: Results) -> str:
    s = results["setting"]
    o, held, main = s["optimizer"], s["held"]["validation"], str(s["ratios"][0])
    versions = ", ".join(f"{name} {version}" for name, version in (s["versions"] or {}).items())
    trained = s["corpus"]["parts"]["train"]
    facts = [
        ("command", f"`{results['command']}`"),
        ("hardware", f"{s['hardware']}, {s['devices']} device(s), {s['dtype']}"),
        ("software", versions),
        ("student", f"{s['parameters']:,} parameters with {s['vocabulary_size']} pieces; small LMs at "
                    + ", ".join(f"{value:.2f} ({name})" for name, value in s["relative"].items()) + " of its FLOPs"),
        ("training text", f"{sum(d['bytes'] for d in trained.values()) / 1e6:.1f} MB, {s['train_tokens']:,} tokens, "
                          f"fingerprint {s['train_rows']}"),
        ("held out", f"{held['documents']} documents to choose by, as many again for the test; "
                     f"{s['corpus']['split']['unseen']} is never trained on"),
        ("models compared", "; ".join(f"{u['models']:,} on {part}, {u['updates']:,} updates"
                                      for part, u in s["updates"].items())),
    ]  # fmt: skip
    unlike = f" The runs are not alike in {', '.join(s['unlike'])}." if s["unlike"] else ""
    steps = ", ".join(f"{count} steps ({ratio} tokens a parameter)" for ratio, count in s["steps"].items())
    return "\n\n".join([
        "## How it was measured",
        table(("", ""), facts),
        f"A whole run is {steps} of {s['batch_rows']} x {s['seq_len']} tokens; {o['name']}, the learning rate rises "
        f"for {o['warmup_steps']} updates to {o['peak_learning_rate']:g}, stays, and falls to {o['final_fraction']:g} "
        f"of that over the last {o['decay_fraction']:.0%}; weight decay {o['weight_decay']:g}. Every compared model is "
        "the end of a branch of its own, fully decayed: at 40, 50, 60, 70, 80 and 100 % of the steps for every method "
        "(of rows that only explore: 70 and 100 %); nothing else is quoted. No row of text is read twice in a run but "
        "where a table says so. Each seed has its own small LM, initialisation and order of the data, and all methods "
        "of a seed share them; the small LM has read the same rows, as in the paper. Help ends after "
        f"{s['stage_1'][main]} updates (17.3 %) unless a row says otherwise.{unlike}",
        "The measure is bits a byte of held-out documents, domains weighed by their share of the training text; beside "
        "it their equal-weight mean and the domain never trained on. **The primary endpoint, named beforehand, is bits "
        "a byte on the test part at equal total FLOPs, the small LM's training charged in full, at all of the steps of "
        "the main ratio**; the same with that charge shared by 10 students, and left out, stands beside it. Forward "
        "passes of helpers and the scoring of rows always count. BASELINE at a method's FLOPs lies between BASELINE's "
        "own decayed models, which go to twice the steps; one of them, of "
        f"{s['longer'][main]} steps, is BASELINE given the FLOPs of the small LM's training as extra steps. Rows that "
        "only explore are measured on the validation part.",
        f"In brackets: 95 % intervals of {s['replicates']} bootstrap replicates over seeds and documents (within "
        "domains), of differences paired by seed. `better` and `worse` only where the interval leaves out 0 and the "
        "difference is at least the minimum detectable one: that which BASELINE's own spread over seeds lets one find "
        "with 80 % power at the 95 % level. All else is `not resolved`. What the draw of so few "
        "seeds adds to an interval is widened as Student's t is; intervals are not widened for their number. "
        "Buckets are thirds of the held-out rows by the loss of a BASELINE of another seed.",
    ])  # fmt: skip


def _group(results: Results, part: str, ratio: int, group: str) -> str:
    """The tables of one group of rows."""
    rows = rows_of(results, part, ratio, group)
    others = [row for row in rows if row["key"] != "baseline"]
    if not others:
        return ""
    exploring = group in (ADAPTIVE, SWEEPS)
    where = "test documents, fresh seeds" if part == "test" else "validation documents"
    title = f"## {TITLES[group]}, {ratio} tokens a parameter"
    texts = [title, f"At all of the steps, on {where}; bits a byte, and minus BASELINE's.", _at_the_end(rows)]
    if any("against_pair" in row for row in others):
        texts += [
            "Against the row that differs in one thing only; at equal FLOPs, how far each is from BASELINE at its "
            "own FLOPs, one minus the other:",
            _against_pairs(results, part, others),
        ]
    if group == DATA:
        texts += ["Against BASELINE given the helper's extra tokens, twice the steps:", _against_longest(others)]
    if not exploring:
        texts += [_to_quality(others), _measures(others)]
    return "\n\n".join(texts)


def _at_the_end(rows: Sequence[dict[str, Any]]) -> str:
    found = []
    for row in rows:
        end = last(row)
        limits = (end.get("equal_steps", {}).get(PRIMARY, {}).get("detectable"), end.get("detectable", {}).get(PRIMARY))
        limit = next(filter(None, limits), None)
        cells = [signed((end.get("equal_flops") or {}).get(share, {}).get(PRIMARY)) for share in SHARES]
        found.append((
            row["title"], str(len(row["seeds"])), f"{end['measures'][PRIMARY]['mean']:.4f}",
            signed((end.get("equal_steps") or {}).get(PRIMARY)), *cells, f"{limit:.4f}" if limit else NONE,
        ))  # fmt: skip
    header = ("row", "seeds", "bits a byte", "at equal steps",
              *(f"at equal FLOPs, small LM {CHARGED[share]}" for share in SHARES), "detectable")  # fmt: skip
    return table(header, found)


def _against_pairs(results: Results, part: str, rows: Sequence[dict[str, Any]]) -> str:
    titles = {row["key"]: row["title"] for row in results[part]["rows"]}
    found = [
        (row["title"], titles[row["pair"]], signed(row["against_pair"]),
         *(signed(row["against_pair_flops"][share]) for share in SHARES))
        for row in rows if "against_pair" in row
    ]  # fmt: skip
    header = ("row", "against", "at equal steps", *(f"at equal FLOPs, small LM {CHARGED[share]}" for share in SHARES))
    return table(header, found)


def _against_longest(rows: Sequence[dict[str, Any]]) -> str:
    found = [(row["title"], signed(row.get("against_longest"))) for row in rows]
    return table(("row", "bits a byte apart"), found)


def _to_quality(rows: Sequence[dict[str, Any]]) -> str:
    found, costs = [], ("steps", "flops_free", "flops_shared", "flops_full", "seconds")
    for row in rows:
        if "to_quality" in row:
            found.append(
                (
                    row["title"],
                    *(answers.part(row["to_quality"][cost]) if cost in row["to_quality"] else NONE for cost in costs),
                )
            )
    header = ("row", "steps", "FLOPs, small LM left out", "shared by 10", "in full", "seconds, small LM left out")
    return (
        "Cost to BASELINE's quality at all of its steps, as a part of BASELINE's; below 1 is cheaper. `≤`: the first "
        f"of the row's models is as good already; `never`: none is; {NONE}: not measured.\n\n" + table(header, found)
    )


def _measures(rows: Sequence[dict[str, Any]]) -> str:
    names = list(last(rows[0])["measures"])
    shown = [name for name in names if name != PRIMARY]
    titles = {EQUAL: "mean of domains", UNSEEN: "never trained on"}
    header = ("row", *(titles.get(name, name.partition(":")[2]) for name in shown))
    parts = []
    for words, of in (
        ("steps", lambda end: end.get("equal_steps")),
        ("FLOPs, the small LM in full", lambda end: end.get("equal_flops", {}).get("full")),
    ):
        found = [(row["title"], *(_short((of(last(row)) or {}).get(name)) for name in shown)) for row in rows]
        parts.append(f"By domain and bucket, minus BASELINE at equal {words} (bold: better or worse):")
        parts.append(table(header, found))
    return "\n\n".join(parts)


def _short(apart: dict[str, Any] | None) -> str:
    if not apart or apart["mean"] is None:
        return NONE
    text = f"{apart['mean']:+.3f}"
    return f"**{text}**" if apart["verdict"] in ("better", "worse") else text


def _tuned(results: Results) -> str:
    rows = []
    for found in results["tuned"]:
        apart = found.get("apart")
        cell = NONE
        if apart:
            cell = signed({"mean": apart["mean"], "interval": apart["interval_95"], "verdict": found["verdict"]})
        means = (f"{found[name]['mean']:.4f}" for name in ("log_perplexity", "accuracy"))
        rows.append((found["title"], str(len(found["seeds"])), *means, cell))
    if not rows:
        return ""
    return (
        "## After fine-tuning\n\nGSM8K, from each model at all of its steps, all in one way; on "
        "its test problems, nats a token of the solutions and next-token accuracy. In brackets 95 % t-intervals over "
        "seeds.\n\n" + table(("row", "seeds", "nats a token", "accuracy", "nats minus BASELINE's"), rows)
    )


def _over_time(results: Results) -> str:
    pictures = [("curves.png", "Fully decayed models against steps and FLOPs"),
                ("time.png", "Where methods gain and lose over time"),
                ("sweeps.png", "Sweeps of SALT"),
                ("undecayed.png", "Training loss of the rows read, before any decay, to look at only")]  # fmt: skip
    there = [f"![{words}]({name})" for name, words in pictures if name in results.get("pictures", ())]
    return "## Over time\n\n" + "\n\n".join(there) if there else ""


def _grid(results: Results) -> str:
    if not results["grid"]:
        return ""
    s, cells = results["setting"], {(g["method"], g["peak"], g["decay"]): g[PRIMARY] for g in results["grid"]}
    methods = list(dict.fromkeys(g["method"] for g in results["grid"]))
    pairs = list(dict.fromkeys((g["peak"], g["decay"]) for g in results["grid"]))
    rows = []
    for pair in pairs:
        values = [cells.get((method, *pair)) for method in methods]
        rows.append((f"{pair[0]:g}", f"{pair[1]:g}", *(NONE if v is None else f"{v:.4f}" for v in values)))
    best = {method: min((v, k[1:]) for k, v in cells.items() if k[0] == method)[1] for method in methods}
    named = "; ".join(f"{method}: {peak:g}, {decay:g}" for method, (peak, decay) in best.items())
    return (
        "## Peak learning rate and weight decay\n\nThe same grid for each, one seed of its own, bits a byte on the "
        f"validation part at all of the steps. Best: {named}. All rows above have "
        f"{s['optimizer']['peak_learning_rate']:g} and {s['optimizer']['weight_decay']:g}; `own best` says where not."
        "\n\n" + table(("peak", "weight decay", *methods), rows)
    )


def _all(results: Results) -> list[tuple[str, dict[str, Any]]]:
    return [(part, row) for part in ("validation", "test") for row in results.get(part, {}).get("rows", [])]


def _stands_on(results: Results) -> str:
    rows, s = [], results["setting"]
    for part, row in _all(results):
        end = last(row) if any(e["steps"] == row["steps"] for e in row["ends"]) else row["ends"][-1]
        epochs = end["epochs"]
        unique = end["tokens"] if epochs <= 1 else min(end["tokens"], s["train_tokens"])
        rows.append((row["title"], part, str(row["ratio"]), f"{end['tokens']:,.0f}",
                     f"{'' if epochs <= 1 else 'at most '}{unique:,.0f}", f"{epochs:.3f}",
                     f"{end['tokens'] / s['parameters']:.1f}", f"{end['flops']:.4g}", f"{end['helper_flops']:.4g}",
                     ", ".join(map(str, row["seeds"]))))  # fmt: skip
    header = ("row", "part", "ratio", "tokens learnt from", "unique", "epochs of rows read", "tokens a parameter",
              "FLOPs", "FLOPs of the small LM's training", "seeds")  # fmt: skip
    return "## What each row stands on\n\nAt all of the steps; rows read include candidates.\n\n" + table(header, rows)


def _runs(results: Results) -> str:
    command = results["command"].replace(" --collect", "")
    found = [
        (row["title"], part, str(row["ratio"]), f"`--only=row={row['key']}`", ", ".join(row["runs"]["commits"]),
         str(row["runs"]["count"]), f"{row['runs']['seconds'] / 60:.0f}") for part, row in _all(results)
    ]  # fmt: skip
    return (
        f"## How to run a line again\n\n`{command}` with what the line says. Minutes are of one process on a shared "
        "machine; no time on this page is made of them.\n\n"
        + table(("row", "part", "ratio", "only", "commit", "runs", "minutes"), found)
    )


def _missing(results: Results) -> str:
    found = [
        (
            entry["title"],
            part,
            str(entry["ratio"]),
            f"{len(entry['seeds'])} of {entry['planned']}",
            str(entry["models"]),
        )
        for part in ("validation", "test")
        for entry in results.get(part, {}).get("missing", [])
    ]
    tiers = [] if results["setting"]["tier"] == "gpu" else ["The GPU tier was not run: no GPU was at hand."]
    if found:
        tiers.append(table(("row", "part", "ratio", "seeds that are there", "models that are not"), found))
    return "## What is not here\n\n" + "\n\n".join(tiers) if tiers else ""

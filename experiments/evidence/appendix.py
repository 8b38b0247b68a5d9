"""The page's sections beside the comparisons: how it was measured, what each row stands on, what is not here."""

import shlex
from typing import Any

from matrix import LATER
from measures import PRIMARY
from tables import NONE, Results, last, table

WORDS = (
    ("BASELINE", "the student alone"),
    ("SALT", "the small LM's soft labels for the first 17.3 % of the steps"),
    ("RKD", "soft labels to the end"),
    ("SALT_DS", "SALT that learns, as long as the small LM is there, from the rows that it scores as challenging yet "
                "learnable: chosen among the candidates of an update (online), or beforehand (offline)"),
    ("LET", "the student's early layer is drawn towards the small LM's last one for the first 17.3 %"),
    ("growth", "the student begins as the small LM, made wider; clones are told apart by noise"),
    ("w", "the weight of soft labels; n_KD, how many updates have them"),
    ("left out, shared by 10, in full", "how much of the FLOPs of training the small LM is charged"),
    ("detectable", "the least difference that so many seeds find, by BASELINE's spread"),
)  # fmt: skip


def how(results: Results) -> str:
    """What was measured with, and by which rules."""
    s = results["setting"]
    texts = ["## How it was measured", table(("", ""), _facts(results)), *_rules(s), _intervals(s)]
    return "\n\n".join([*texts, "Words: " + "; ".join(f"**{name}**, {words}" for name, words in WORDS) + "."])


def _facts(results: Results) -> list[tuple[str, str]]:
    s = results["setting"]
    trained, held = s["corpus"]["parts"]["train"], s["held"]["validation"]
    documents = s["corpus"]["parts"]["validation"]
    shares = sorted(zip(held["shares"], held["domains"], strict=True), reverse=True)
    weighed = ", ".join(f"{name} {share:.0%} ({documents[name]['documents']})" for share, name in shares if share)
    tested = sum(domain["documents"] for domain in s["corpus"]["parts"]["test"].values())
    return [
        ("command", f"`{results['command']}`"),
        ("hardware", f"{s['hardware']}, {s['devices']} device(s), {s['dtype']}"),
        ("software", ", ".join(f"{name} {version}" for name, version in (s["versions"] or {}).items())),
        ("student", f"{s['parameters']:,} parameters with {s['vocabulary_size']} pieces; small LMs at "
                    + ", ".join(f"{value:.2f} ({name})" for name, value in s["relative"].items()) + " of its FLOPs"),
        ("training text", f"{sum(d['bytes'] for d in trained.values()) / 1e6:.1f} MB, {s['train_tokens']:,} tokens, "
                          f"fingerprint {s['train_rows']}"),
        ("held out", f"{held['documents']} documents to choose by, {tested} for the test; "
                     f"{s['corpus']['split']['unseen']} is never trained on"),
        ("weights of the measure", f"{weighed}; in brackets documents of the validation part"),
        ("models compared", "; ".join(f"{u['models']:,} on {part}, {u['updates']:,} updates"
                                      for part, u in s["updates"].items())),
        *([("earlier page", f"`results.json` with SHA-256 {results['earlier']}...; its rows keep the seconds an "
                             "update and BASELINE's models that they were measured with")]
          if "earlier" in results else []),
        *([("trained twice", f"{again['models']} models, for an earlier page and again since: their bits a byte "
                             f"differ by at most {again['largest']:.2g}")] if (again := results.get("again")) else []),
    ]  # fmt: skip


def _rules(s: dict[str, Any]) -> list[str]:
    o, main = s["optimizer"], str(s["ratios"][0])
    unlike = f" The runs are not alike in {', '.join(s['unlike'])}." if s["unlike"] else ""
    steps = ", ".join(f"{count} steps ({ratio} tokens a parameter)" for ratio, count in s["steps"].items())
    return [
        f"A whole run is {steps} of {s['batch_rows']} x {s['seq_len']} tokens; {o['name']}, the learning rate rises "
        f"for {o['warmup_steps']} updates to {o['peak_learning_rate']:g}, stays, and falls to {o['final_fraction']:g} "
        f"of that over the last {o['decay_fraction']:.0%}; weight decay {o['weight_decay']:g}. Every compared model is "
        "the end of a branch of its own, fully decayed: at 40, 50, 60, 70, 80 and 100 % of the steps (of rows that "
        "only explore: 70 and 100 %, where they are there); nothing else is quoted. Each seed has its own small LM, "
        "initialisation and order of the data, and all methods of a seed share them; the small LM has read the same "
        f"rows, as in the paper. Help ends after {s['stage_1'][main]} updates (17.3 %) unless a row says otherwise. "
        "How often a run has read a row of text stands below as its epochs: once, but where rows are chosen "
        f"beforehand.{unlike}",
        "The measure is bits a byte of held-out documents, domains weighed by their share of the training text; beside "
        "it their equal-weight mean and the domain never trained on. **The primary endpoint, named beforehand, is bits "
        "a byte on the test part at equal total FLOPs, the small LM's training charged in full, at all of the steps of "
        "the main ratio**; the same with that charge shared by 10 students, and left out, stands beside it. Forward "
        "passes of helpers and the scoring of rows always count. BASELINE at a method's FLOPs lies between BASELINE's "
        "own decayed models, which go to twice the steps; one of them, of "
        f"{s['longer'][main]} steps, is BASELINE given the FLOPs of the small LM's training as extra steps. Rows that "
        "only explore are measured on the validation part; the test part is shown when all that is claimed has been "
        "run on it.",
    ]  # fmt: skip


def later(results: Results) -> str:
    """What is to be known of the rows that were claimed when others' figures on the test part had been read."""
    keys = {*LATER, *(f"{key}-own" for key in LATER)}
    titles = [row["title"] for row in results.get("test", {}).get("rows", []) if row["key"] in keys]
    if not titles:
        return ""
    return (
        f"Claimed later: {'; '.join(titles)}. They were chosen on the validation part, too, named before any run of "
        "theirs was measured on the test part, and run there once; but the figures of the other rows there had been "
        "read by then (own best rates: those of the same method as well)."
    )


def _intervals(s: dict[str, Any]) -> str:
    return (
        f"In brackets: 95 % intervals of {s['replicates']} bootstrap replicates over seeds and documents (within "
        "domains), of differences paired by seed. `better` and `worse` only where the interval leaves out 0 and the "
        "difference is at least the minimum detectable one: that which BASELINE's own spread over seeds lets so "
        "many seeds find with 80 % power at the 95 % level, unpaired. All else is `not resolved`. What the draw of so "
        "few seeds adds to an interval is widened as Student's t is; intervals are not widened for their number: one "
        "in twenty leaves out 0 by chance. Buckets are thirds of the held-out rows by the loss of a "
        "BASELINE of another seed."
    )


def grid(results: Results) -> str:
    """The grid of peak learning rates and weight decays."""
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
    titles = {row["key"]: row["title"] for row in results["validation"]["rows"]}
    titles = {method: titles.get(method, method) for method in methods}
    named = "; ".join(f"{titles[method]}: {peak:g}, {decay:g}" for method, (peak, decay) in best.items())
    return (
        "## Peak learning rate and weight decay\n\nThe same grid for each, one seed of its own, bits a byte on the "
        f"validation part at all of the steps. Best, with one seed: {named}. All rows above have "
        f"{s['optimizer']['peak_learning_rate']:g} and {s['optimizer']['weight_decay']:g}; `own best` says where not."
        "\n\n" + table(("peak", "weight decay", *titles.values()), rows)
    )


def _all(results: Results) -> list[tuple[str, dict[str, Any]]]:
    return [(part, row) for part in ("validation", "test") for row in results.get(part, {}).get("rows", [])]


def stands_on(results: Results) -> str:
    """Tokens, epochs, FLOPs and seeds of each row."""
    rows, s = [], results["setting"]
    for part, row in _all(results):
        end = last(row)
        rows.append((row["title"], part, str(row["ratio"]), f"{end['tokens']:,.0f}",
                     f"{end['tokens'] / end['epochs']:,.0f}", f"{end['epochs']:.3f}", f"{end['read']:.3f}",
                     f"{end['tokens'] / s['parameters']:.1f}", f"{end['flops']:.4g}", f"{end['helper_flops']:.4g}",
                     ", ".join(map(str, row["seeds"]))))  # fmt: skip
    header = ("row", "part", "ratio", "tokens learnt from", "unique", "epochs", "of all rows read",
              "tokens a parameter", "FLOPs", "FLOPs of the small LM's training", "seeds")  # fmt: skip
    return (
        "## What each row stands on\n\nAt all of the steps. Epochs: rows learnt from over how many of them are "
        "distinct; the rows read include candidates that were not chosen.\n\n" + table(header, rows)
    )


def _without(command: str) -> str:
    """The command that trains, of the one that has collected."""
    words, kept = iter(shlex.split(command)), []
    for word in words:
        if word in ("--page", "--earlier"):
            next(words, None)
        elif word != "--collect" and not word.startswith(("--page=", "--earlier=")):
            kept.append(word)
    return shlex.join(kept)


def runs(results: Results) -> str:
    """How each row was made, and is made again."""
    command = _without(results["command"])
    found = [
        (row["title"], f"`--only=row={row['key']},part={part},ratio={row['ratio']}`",
         ", ".join(row["runs"]["commits"]), str(row["runs"]["count"]), f"{row['runs']['seconds'] / 60:.0f}")
        for part, row in _all(results)
    ]  # fmt: skip
    return (
        f"## How to run a line again\n\n`{command}` with what the line says: it brings BASELINE of the same seeds and "
        "the run that cuts the buckets; `--seeds_from=1000` takes other seeds, and with `--collect` makes a page of "
        "them. Minutes are of one process on a shared machine; no time on this "
        "page is made of them.\n\n" + table(("row", "only", "commit", "runs", "minutes"), found)
    )


def missing(results: Results) -> str:
    """What was planned and is not there."""
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
    tier, tiers = results["setting"]["tier"], results["setting"]["tiers"]
    others = ", ".join(f"`--tier={name}`" for name in tiers if name != tier)
    texts = [f"Other sizes, which need a GPU, have not been run: {others}."] if others else []
    if found:
        texts.append(table(("row", "part", "ratio", "seeds with a last model", "models that lack"), found))
    return "## What is not here\n\n" + "\n\n".join(texts) if texts else ""

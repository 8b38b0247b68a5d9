"""`results.json` as a Markdown page: every number on it comes from there, every judgement from `compare.verdict`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import answers
import appendix
import theory
from compare import CHARGED, SHARES
from matrix import ADAPTIVE, CONFIRM, CONTROLS, DATA, EPOCHS, GIFTS, MAIN, SWEEPS
from measures import EQUAL, PRIMARY, UNSEEN
from tables import NONE, Results, last, relative, signed, table

TITLES = {
    MAIN: "BASELINE, SALT, RKD",
    GIFTS: "Other gifts: weights, representations, judgement of data",
    CONTROLS: "Controls",
    DATA: "The helper's data",
    ADAPTIVE: "Rules for w, and combinations (explored)",
    SWEEPS: "Sweeps (exploratory)",
    EPOCHS: "Several epochs of a quarter of the rows",
    CONFIRM: "Confirmation",
}


def read_theory(out: Path) -> Results | None:
    """What theory.py wrote into the page's directory, None where it has not."""
    path = out / "theory.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def markdown(results: Results, of_theory: Results | None = None) -> str:
    """The page; with the section that theory.py makes of its own figures."""
    ratios = results["setting"]["ratios"]
    parts = ["# Does a small LM's help pay?", answers.markdown(results), appendix.how(results)]
    if "test" in results:
        parts.append(_group(results, "test", ratios[0], CONFIRM))
    parts += [_group(results, "validation", ratio, group) for group in TITLES if group != CONFIRM for ratio in ratios]
    parts += [_tuned(results), _over_time(results), appendix.grid(results)]
    parts += [theory.markdown(of_theory).strip() if of_theory else ""]
    parts += [appendix.stands_on(results), appendix.runs(results), appendix.missing(results)]
    return "\n\n".join(filter(None, parts)) + "\n"


def rows_of(results: Results, part: str, ratio: int, group: str) -> list[dict[str, Any]]:
    return [row for row in results.get(part, {}).get("rows", []) if (row["ratio"], row["group"]) == (ratio, group)]


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
    texts += [appendix.later(results)] if part == "test" else []
    if any("against_pair" in row for row in others):
        texts += [
            "Against another row; at equal FLOPs, how far each of the two is from BASELINE at its own FLOPs, one minus "
            "the other (so a row that does less of what is dear gains there, as BASELINE itself would):",
            _against_pairs(results, part, others),
        ]
    if group == DATA:
        texts += ["Against BASELINE given the helper's extra tokens, twice the steps:", _against_longest(others)]
    if not exploring:
        texts += [_by_end(others), _to_quality(others), _measures(others)]
    return "\n\n".join(filter(None, texts))


def _at_the_end(rows: Sequence[dict[str, Any]]) -> str:
    found = []
    for row in rows:
        end = last(row)
        limits = (end.get("equal_steps", {}).get(PRIMARY, {}).get("detectable"), end.get("detectable", {}).get(PRIMARY))
        limit = next(filter(None, limits), None)
        cells = [signed((end.get("equal_flops") or {}).get(share, {}).get(PRIMARY)) for share in SHARES]
        mean, apart = end["measures"][PRIMARY]["mean"], (end.get("equal_steps") or {}).get(PRIMARY)
        beside = f"{mean - apart['mean']:.4f}" if apart and apart["mean"] is not None else ""
        found.append((row["title"], str(len(row["seeds"])), f"{mean:.4f}", beside, signed(apart), *cells,
                      f"{limit:.4f}" if limit else NONE))  # fmt: skip
    header = ("row", "seeds", "bits a byte", "BASELINE's, same seeds", "at equal steps",
              *(f"at equal FLOPs, small LM {CHARGED[share]}" for share in SHARES), "detectable")  # fmt: skip
    return table(header, found)


def _by_end(rows: Sequence[dict[str, Any]]) -> str:
    """Of rows with a curve, every end minus BASELINE's own model of so many steps."""
    curves = [row for row in rows if len(row["ends"]) > 1]
    if not curves:
        return ""
    parts = sorted({round(end["part"], 2) for row in curves for end in row["ends"]})
    found = []
    for row in curves:
        at = {round(end["part"], 2): end.get("equal_steps", {}).get(PRIMARY) for end in row["ends"]}
        found.append((row["title"], *(signed(at.get(one), 3) or NONE for one in parts)))
    header = ("row", *(f"{one:.0%}" for one in parts))
    return "Decayed at fewer steps, minus BASELINE decayed at as many:\n\n" + table(header, found)


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
    costs = ("steps", *(f"{unit}_{share}" for unit in ("flops", "seconds") for share in ("free", "shared", "full")))
    found = [
        (row["title"], *(relative(row["to_quality"][cost]) if cost in row["to_quality"] else NONE for cost in costs))
        for row in rows if "to_quality" in row
    ]  # fmt: skip
    header = ("row", "steps", "FLOPs, small LM left out", "shared by 10", "in full",
              "seconds, small LM left out", "seconds, shared by 10", "seconds, in full")  # fmt: skip
    if not found:
        return ""
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

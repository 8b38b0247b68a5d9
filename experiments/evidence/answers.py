"""The questions and what the figures say to them: sentences put together from verdicts, none written for a result."""

from collections.abc import Callable, Sequence
from typing import Any

import compare
import matrix
from compare import BETTER, CHARGED, WORSE
from measures import EQUAL, PRIMARY, UNSEEN

Results = dict[str, Any]
Row = dict[str, Any]
BRIEF = "salt-eighth"  # the row of the method that was found here


def markdown(results: Results) -> str:
    """The questions that there are figures for, each with its answer."""
    found = [(question, answer(results)) for question, answer in QUESTIONS]
    return "## What it says, at this scale\n\n" + "\n\n".join(
        f"**{question}** {text}" for question, text in found if text
    )


def row(results: Results, key: str, ratio: int = 0, part: str = "") -> Row | None:
    """A row at the main ratio unless said: on the test part where it is there, else on the validation part."""
    ratio = ratio or results["setting"]["ratios"][0]
    for where in [part] if part else ["test", "validation"]:
        for found in results.get(where, {}).get("rows", []):
            if (found["key"], found["ratio"]) == (key, ratio):
                return found | {"part": where}
    return None


def last(found: Row) -> dict[str, Any]:
    return next(end for end in found["ends"] if end["steps"] == found["steps"])


def said(apart: dict[str, Any] | None) -> str:
    """A difference in words: the verdict, then the figure."""
    if not apart or apart["mean"] is None:
        return "outside the measured range"
    text = f"{apart['mean']:+.4f}"
    if apart["interval"]:
        text += " [{:+.4f}, {:+.4f}]".format(*apart["interval"])
    return f"{apart['verdict']} ({text})"


def _listed(first: str, texts: Sequence[str]) -> str:
    return first + "\n\n" + "\n".join(f"- {text}" for text in texts) if texts else ""


def _rows(results: Results, keys: Sequence[str], part: str = "") -> list[Row]:
    return [found for key in keys if (found := row(results, key, part=part))]


def _primary(results: Results) -> str:
    texts = []
    for found in _rows(results, ("salt", BRIEF, "rkd", "grow", "grow_salt", "let", "salt_ds", "salt_ds_offline")):
        at = last(found)["equal_flops"]
        where = "test" if found["part"] == "test" else "validation only, not confirmed"
        texts.append(f"{found['title']} ({where}): in full {said(at['full'][PRIMARY])}, shared by 10 "
                     f"{said(at['shared'][PRIMARY])}, left out {said(at['free'][PRIMARY])}")  # fmt: skip
    return _listed(
        "Bits a byte minus BASELINE's at equal total FLOPs, by how the small LM's training is charged.", texts
    )


def _earlier(results: Results) -> str:
    texts = []
    for found in _rows(results, ("salt", BRIEF, "rkd", "grow", "grow_salt", "let", "salt_ds", "salt_ds_offline")):
        reached = found.get("to_quality")
        if not reached:
            continue
        if reached["steps"]["where"] == "never":
            texts.append(f"{found['title']}: never")
            continue
        words = {"steps": "of its steps", "flops_free": "of its FLOPs with the small LM's training left out",
                 "flops_full": "in full", "seconds": "of its seconds"}  # fmt: skip
        texts.append(f"{found['title']}: " + ", ".join(
            f"{part(reached[name])} {text}" for name, text in words.items() if name in reached
        ))  # fmt: skip
    return _listed("BASELINE's quality at all of its steps is reached at", texts)


def part(found: dict[str, Any]) -> str:
    """A cost as a part of BASELINE's, with its interval; `≤`: the first model is as good already."""
    if found["where"] == "never":
        return "never"
    text = ("≤ " if found["where"] == "before" else "") + f"{found['mean']:.2f}"
    if found["interval"]:
        text += " [{}, {}]".format(*("never" if x is None else f"{x:.2f}" for x in found["interval"]))
    return text


def _where(results: Results) -> str:
    texts = []
    for found in _rows(results, ("salt", "rkd", "grow")):
        for end in (found["ends"][0], last(found)):
            at = end.get("equal_steps", {})
            sides = {
                verdict: [_name(name) for name, apart in at.items() if apart["verdict"] == verdict and ":" in name]
                for verdict in (BETTER, WORSE)
            }
            words = [f"{verdict} on {', '.join(names)}" for verdict, names in sides.items() if names]
            texts.append(f"{found['title']} at {end['part']:.0%} of the steps is " + (
                " and ".join(words) if words else "resolved on no domain or bucket"))  # fmt: skip
        unseen = last(found)["equal_steps"].get(UNSEEN)
        texts[-1] += (f"; on the domain never trained on it is {said(unseen)}, in the mean of domains "
                      f"{said(last(found)['equal_steps'][EQUAL])}")  # fmt: skip
    return _listed("At equal steps:", texts)


def _name(measure: str) -> str:
    kind, _, name = measure.partition(":")
    return f"{name} rows" if kind == "bucket" else name


def _explored(results: Results, keys: Sequence[str], what: str, beside: str = "salt") -> str:
    """Exploratory rows and the row `beside` them at the same seed, best first; no verdict is made of one seed."""
    first, found = row(results, beside, part="validation"), _rows(results, keys, "validation")
    if not first or not found:
        return ""
    seed = found[0]["seeds"][0]
    values = {one["title"]: _at_seed(one, seed) for one in [first, *found] if seed in one["seeds"]}
    ranked = ", ".join(f"{title} {value:.4f}" for title, value in sorted(values.items(), key=lambda item: item[1]))
    base = row(results, "baseline", part="validation")
    limit = compare.of_spread(last(base)["measures"][PRIMARY]["seeds"], 1)
    spread = f", and differences below {limit:.4f} are noise" if limit else ""
    return f"{what}, bits a byte of one seed, best first: {ranked}. Exploratory: one seed{spread}."


def _at_seed(found: Row, seed: int) -> float:
    return last(found)["measures"][PRIMARY]["seeds"][found["seeds"].index(seed)]


def _leave(results: Results) -> str:
    keys = ("n_kd-0.05", "n_kd-0.1", "n_kd-0.3", "salt-40", "n_kd-0.6", "rkd", "schedule-auto")
    text = _explored(results, keys, "By how long it helps (SALT: 17 %)")
    auto = row(results, "schedule-auto", part="validation")
    if auto and text:
        switch = auto["switch"][0]
        ended = f"after {switch} updates, {switch / auto['steps']:.0%}" if switch else "never"
        text += f" `auto` let it go {ended}."
    return text


def _which(results: Results) -> str:
    keys = ("size-tiny", "size-medium", "size-equal", "size-half", "salt-quarter", BRIEF)
    text = _explored(results, keys, "By the small LM (SALT's has 0.3 of the student's parameters)")
    measured = []
    for found in _rows(results, ("salt", *keys), "validation"):
        seeds = last(found)["equal_flops"]["full"][PRIMARY]["seeds"]
        measured += [(seeds[found["seeds"].index(0)], found["title"])] if seeds and 0 in found["seeds"] else []
    if text and measured:
        text += (" With its training charged in full, minus BASELINE at equal FLOPs, of the same seed: "
                 + ", ".join(f"{title} {value:+.4f}" for value, title in sorted(measured)) + ".")  # fmt: skip
    return text


def _selection(results: Results) -> str:
    texts = []
    for found in _rows(results, ("salt_ds", "salt_ds_offline", "no_labels", "no_labels_offline", "miniplm", "rho1")):
        at = last(found)
        texts.append(f"{found['title']} at equal steps {said(at['equal_steps'][PRIMARY])}, with its scoring counted "
                     f"(training of the small LM left out) {said(at['equal_flops']['free'][PRIMARY])}")  # fmt: skip
        if "scored" in found:
            s = found["scored"]
            texts[-1] += (f" ({s['zero']:.0%} of its candidates scored exactly 0, and {s['filled']} of {s['updates']} "
                          "updates had to take some of those)")  # fmt: skip
    for found in _rows(results, ("random", "same_share", "unseen")):
        if found.get("against_pair"):
            texts.append(f"{found['title']} against its pair {said(found['against_pair'])}")
    return _listed("Bits a byte minus BASELINE's:", texts)


def _growth(results: Results) -> str:
    grown, both = row(results, "grow", part="validation"), row(results, "grow_salt", part="validation")
    if not grown or not both or not both.get("against_pair"):
        return ""
    text = f"Growth, then SALT against growth alone, at equal steps: {said(both['against_pair'])}."
    keys = [f"grow-noise-{noise:g}" for noise in matrix.NOISES]
    return f"{text} {_explored(results, keys, 'By how far clones are pushed apart (growth: 1)', 'grow')}".strip()


def _controls(results: Results) -> str:
    salt = row(results, "salt", part="validation")
    rows = _rows(results, ("smoothing", "unigram", "five_gram", "untrained", "small_w"), "validation")
    if not salt or not rows:
        return ""
    texts = [f"{found['title']} {said(last(found)['equal_steps'][PRIMARY])}" for found in [salt, *rows]]
    return _listed("Against BASELINE at equal steps:", texts)


def _data(results: Results) -> str:
    texts = [
        f"{found['title']}: against BASELINE at equal steps {said(last(found)['equal_steps'][PRIMARY])}, against "
        f"BASELINE of twice the steps, given the helper's tokens, {said(found.get('against_longest'))}"
        for found in _rows(results, ("salt_disjoint", "salt_more"), "validation")
    ]
    return _listed("Beside SALT, whose small LM has read the same rows:", texts)


def _adaptive(results: Results) -> str:
    texts = []
    for found in results["validation"]["rows"]:
        if found["group"] == "adaptive" and found.get("against_pair"):
            at = found["against_pair_flops"]["full"]
            texts.append(f"{found['title']}: {said(found['against_pair'])}; in full {said(at)}")
    text = _listed("Against SALT, on the seeds that choices are made on, at equal steps, and at equal FLOPs with the "
                   "small LM's training charged in full:", texts)  # fmt: skip
    fresh = row(results, BRIEF, part="test")
    if not text or not fresh or not fresh.get("against_pair"):
        return text
    at = ", ".join(f"{words} {said(fresh['against_pair_flops'][share])}" for share, words in CHARGED.items())
    return (
        f"{text}\n\nOn fresh seeds and the test part, {fresh['title']}, against SALT: at equal steps "
        f"{said(fresh['against_pair'])}, at equal FLOPs {at}."
    )


def _tuned(results: Results) -> str:
    texts = []
    for found in results["tuned"]:
        if "apart" in found:
            apart = found["apart"] | {"interval": found["apart"]["interval_95"], "verdict": found["verdict"]}
            texts.append(f"{found['title']} {said(apart)}")
    return _listed("Nats a token of GSM8K's solutions minus those of fine-tuned BASELINE:", texts)


QUESTIONS: tuple[tuple[str, Callable[[Results], str]], ...] = (
    ("Does it pay? (the primary endpoint)", _primary),
    ("How much earlier?", _earlier),
    ("Where does it gain and lose?", _where),
    ("Is it the small LM's knowledge?", _controls),
    ("When should the small LM leave?", _leave),
    ("Which small LM is worth its cost?", _which),
    ("Does it matter what the small LM has read?", _data),
    ("Does selection pay once its scoring is counted?", _selection),
    ("Do labels add to growth?", _growth),
    ("How good is it after fine-tuning?", _tuned),
    ("Is there a better rule for w, or a better combination?", _adaptive),
)

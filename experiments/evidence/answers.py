"""The questions and what the figures say to them: sentences put together from verdicts, none written for a result."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import appendix
import compare
import matrix
from compare import BETTER, CHARGED, WORSE
from measures import EQUAL, PRIMARY, UNSEEN
from tables import Results, Row, last, relative

METHODS = ("salt", *matrix.FOUND, *matrix.LATER, "rkd", "grow", "grow_salt", "let", "salt_ds", "salt_ds_offline")


def markdown(results: Results) -> str:
    """The questions that there are figures for, each with its answer."""
    found = [(question, answer(results)) for question, answer in QUESTIONS]
    return "\n\n".join([
        "## What it says, at this scale", *(f"**{question}** {text}" for question, text in found if text)
    ])  # fmt: skip


def row(results: Results, key: str, part: str = "validation") -> Row | None:
    """A row of the main ratio."""
    for found in results.get(part, {}).get("rows", []):
        if (found["key"], found["ratio"]) == (key, results["setting"]["ratios"][0]):
            return found | {"part": part}
    return None


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


def _rows(results: Results, keys: Sequence[str]) -> list[Row]:
    return [found for key in keys if (found := row(results, key))]


def _judged(results: Results) -> list[Row]:
    """The methods: on the test part where they are there, else on the validation part."""
    return [found for key in METHODS if (found := row(results, key, "test") or row(results, key))]


def _short(results: Results) -> str:
    rows = _judged(results)
    if not rows:
        return ""
    ways = {"at equal steps": lambda end: end["equal_steps"]}
    for share, words in CHARGED.items():
        ways[f"at equal FLOPs, the small LM's training {words}"] = lambda end, share=share: end["equal_flops"][share]
    texts = []
    for words, of in ways.items():
        verdicts = {found["title"]: of(last(found))[PRIMARY]["verdict"] for found in rows}
        sides = [(verdict, [title for title, its in verdicts.items() if its == verdict]) for verdict in (BETTER, WORSE)]
        texts.append(
            f"{words}. "
            + ". ".join(f"{verdict.capitalize()}: {'; '.join(titles) or 'none'}" for verdict, titles in sides)
        )
    tested = any(found["part"] == "test" for found in rows)
    part = (
        "on the test part, or where the next list says so on the validation part"
        if tested
        else "on the validation part"
    )
    return _listed(f"Of {len(rows)} methods, against BASELINE, {part}; what is not named is not resolved:", texts)


def _primary(results: Results) -> str:
    texts = []
    for found in _judged(results):
        at = last(found)["equal_flops"]
        where = "test" if found["part"] == "test" else "validation only, not confirmed"
        texts.append(f"{found['title']} ({where}): in full {said(at['full'][PRIMARY])}, shared by 10 "
                     f"{said(at['shared'][PRIMARY])}, left out {said(at['free'][PRIMARY])}")  # fmt: skip
    told = _listed(
        "Bits a byte minus BASELINE's at equal total FLOPs, by how the small LM's training is charged.", texts
    )
    return "\n\n".join(filter(None, [told, appendix.later(results)]))


def _earlier(results: Results) -> str:
    texts = []
    for key in METHODS:
        curves = [one for part in ("test", "validation") if (one := row(results, key, part)) and "to_quality" in one]
        if not curves:
            continue
        found, reached = curves[0], curves[0]["to_quality"]
        name = f"{found['title']} ({found['part']})"
        if reached["steps"]["where"] == "never":
            texts.append(f"{name}: never")
            continue
        words = {"steps": "of its steps", "flops_free": "of its FLOPs with the small LM's training left out",
                 "flops_full": "of its FLOPs in full", "seconds_free": "of its seconds, left out",
                 "seconds_full": "of its seconds in full"}  # fmt: skip
        texts.append(f"{name}: " + ", ".join(
            f"{relative(reached[cost])} {text}" for cost, text in words.items() if cost in reached
        ))  # fmt: skip
    return _listed("BASELINE's quality at all of its steps is reached, on the part that is named, at", texts)


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
    return _listed("At equal steps, on the validation part:", texts)


def _name(measure: str) -> str:
    kind, _, name = measure.partition(":")
    return f"{name} rows" if kind == "bucket" else name


def _explored(results: Results, keys: Sequence[str], what: str, beside: str = "salt") -> str:
    """Exploratory rows minus the row `beside` them, over the seeds that both have; no verdict is made of one seed."""
    first, found = row(results, beside), _rows(results, keys)
    if not first or not found:
        return ""
    told = []
    for one in found:
        seeds = [seed for seed in one["seeds"] if seed in first["seeds"]]
        apart = statistics.fmean(_at_seed(one, seed) - _at_seed(first, seed) for seed in seeds) if seeds else None
        told += [(apart, f"{one['title']} {apart:+.4f}" + f" ({len(seeds)} seeds)" * (len(seeds) > 1))] if seeds else []
    spread = last(row(results, "baseline"))["measures"][PRIMARY]["seeds"]
    limit = compare.of_spread(spread, 1)
    least = f", where nothing below {limit:.4f} is resolved" if limit else ""
    return f"{what}, minus {first['title']} of the same seed{least}: {', '.join(text for _, text in sorted(told))}."


def _at_seed(found: Row, seed: int) -> float:
    return last(found)["measures"][PRIMARY]["seeds"][found["seeds"].index(seed)]


def _leave(results: Results) -> str:
    keys = ("n_kd-0.05", "n_kd-0.1", "n_kd-0.3", "salt-40", "n_kd-0.6", "rkd", "schedule-auto")
    text = _explored(results, keys, "By how long it helps (SALT: 17 %)")
    auto = row(results, "schedule-auto")
    if auto and text:
        switch = auto["switch"][0]
        ended = f"after {switch} updates, {switch / auto['steps']:.0%}" if switch else "never"
        text += f" `auto` let it go {ended}."
    return text


def _how_soft(results: Results) -> str:
    keys = [f"tau-{temperature:g}" for temperature in matrix.TEMPERATURES]
    return _explored(results, keys, "By the temperature that divides the teacher's logits (SALT: 1)")


def _which(results: Results) -> str:
    keys = ("size-tiny", "size-medium", "size-equal", "size-half", "salt-quarter", "salt-eighth")
    text = _explored(results, keys, "By the small LM (SALT's has 0.3 of the student's parameters, and as many steps)")
    measured = []
    for found in _rows(results, ("salt", *keys)):
        apart = last(found)["equal_flops"]["full"][PRIMARY]
        if apart["mean"] is not None:
            measured.append((apart["mean"], f"{found['title']} {said(apart)}"))
    if not text or not measured:
        return text
    first = (
        "Its training charged in full, minus BASELINE at equal FLOPs (dearer than BASELINE's longest run: not there):"
    )
    return text + "\n\n" + _listed(first, [words for _, words in sorted(measured)])


def _selection(results: Results) -> str:
    texts = []
    for found in _rows(results, ("salt_ds", "salt_ds_offline", "no_labels", "no_labels_offline", "miniplm", "rho1")):
        at = last(found)
        texts.append(f"{found['title']} at equal steps {said(at['equal_steps'][PRIMARY])}, with its scoring counted "
                     f"(training of the small LM left out) {said(at['equal_flops']['free'][PRIMARY])}")  # fmt: skip
        if found.get("against_pair"):
            texts[-1] += (
                f", against {row(results, found['pair'])['title']} at equal steps {said(found['against_pair'])}"
            )
        if "scored" in found:
            s = found["scored"]
            texts[-1] += (f" ({s['zero']:.0%} of its candidates scored exactly 0, and {s['filled']} of {s['updates']} "
                          "updates had to take some of those)")  # fmt: skip
    for found in _rows(results, ("random", "same_share", "unseen")):
        if found.get("against_pair"):
            pair = row(results, found["pair"])
            texts.append(f"{found['title']} against {pair['title']} {said(found['against_pair'])}")
    return _listed("On the validation part, bits a byte minus BASELINE's:", texts)


def _growth(results: Results) -> str:
    grown, both = row(results, "grow"), row(results, "grow_salt")
    if not grown or not both or not both.get("against_pair"):
        return ""
    text = f"Growth, then SALT against growth alone, at equal steps: {said(both['against_pair'])}."
    keys = [f"grow-noise-{noise:g}" for noise in matrix.NOISES]
    noises = _explored(results, keys, "By how far clones are pushed apart (1, chosen by this, is growth's own)", "grow")
    return f"{text} {noises}".strip()


def _controls(results: Results) -> str:
    salt = row(results, "salt")
    rows = _rows(
        results,
        ("smoothing", "uniform", "unigram", "five_gram", "five_gram_other", "untrained", "small_w", "t4-unigram"),
    )
    if not salt or not rows:
        return ""
    texts = [f"SALT: {said(last(salt)['equal_steps'][PRIMARY])}"]
    for found in rows:
        pair = f"; {said(found['against_pair'])}" if found.get("against_pair") else ""
        texts.append(f"{found['title']}: {said(last(found)['equal_steps'][PRIMARY])}{pair}")
    return _listed("At equal steps, against BASELINE; and against SALT of the same seeds:", texts)


def _data(results: Results) -> str:
    texts = [
        f"{found['title']}: against BASELINE at equal steps {said(last(found)['equal_steps'][PRIMARY])}, against "
        f"BASELINE of twice the steps, given the helper's tokens, {said(found.get('against_longest'))}"
        for found in _rows(results, ("salt_disjoint", "salt_more"))
    ]
    return _listed("Beside SALT, whose small LM has read the same rows:", texts)


def _adaptive(results: Results) -> str:
    texts = []
    for found in results["validation"]["rows"]:
        if found["group"] == "adaptive" and found.get("against_pair"):
            at = last(found)["equal_flops"]["full"][PRIMARY]
            texts.append(f"{found['title']}: {said(found['against_pair'])}; in full {said(at)}")
    text = _listed("On the seeds that choices are made on, against SALT at equal steps; and against BASELINE at equal "
                   "FLOPs, the small LM's training charged in full, without which nothing is won:", texts)  # fmt: skip
    fresh = [
        found
        for key in (*matrix.FOUND, *matrix.LATER)
        if (found := row(results, key, "test")) and found.get("against_pair")
    ]
    told = []
    for found in fresh:
        end = last(found)
        told.append(f"{found['title']}: against SALT at equal steps {said(found['against_pair'])}; against BASELINE at "
                    f"equal steps {said(end['equal_steps'][PRIMARY])}, at equal FLOPs in full "
                    f"{said(end['equal_flops']['full'][PRIMARY])}")  # fmt: skip
    texts = [text, _listed("The best of them, on fresh seeds and the test part:", told)]
    if fresh:
        kept = [found["title"] for found in fresh if last(found)["equal_flops"]["full"][PRIMARY]["verdict"] == BETTER]
        texts.append(f"Of these, better than BASELINE with all charged: {'; '.join(kept) or 'none'}.")
    return "\n\n".join(filter(None, texts))


def _tuned(results: Results) -> str:
    texts = []
    for found in results["tuned"]:
        if "apart" in found:
            apart = found["apart"] | {"interval": found["apart"]["interval_95"], "verdict": found["verdict"]}
            texts.append(f"{found['title']} {said(apart)}")
    return _listed("Nats a token of GSM8K's solutions minus those of fine-tuned BASELINE:", texts)


QUESTIONS: tuple[tuple[str, Callable[[Results], str]], ...] = (
    ("In short.", _short),
    ("Does it pay? (the primary endpoint)", _primary),
    ("How much earlier?", _earlier),
    ("Where does it gain and lose?", _where),
    ("Is it the small LM's knowledge?", _controls),
    ("When should the small LM leave?", _leave),
    ("How soft should its labels be?", _how_soft),
    ("Which small LM is worth its cost?", _which),
    ("Does it matter what the small LM has read?", _data),
    ("Does selection pay once its scoring is counted?", _selection),
    ("Do labels add to growth?", _growth),
    ("How good is it after fine-tuning?", _tuned),
    ("Is there a better rule for w, or a better combination?", _adaptive),
)

"""Rows of an earlier `results.json`, whose runs are elsewhere, beside those that have been measured since.

A row stays as it was unless the runs at hand have all of its models and more. What both have is compared.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import compare
import corpus
from matrix import BASELINE
from measures import PRIMARY
from tables import Results, Row, last

from slm_assist.errors import UserError

SAME = ("tier", "seeds_from", "steps", "stage_1", "parameters", "vocabulary_size", "batch_rows", "seq_len",
        "train_rows", "optimizer", "replicates")  # fmt: skip
NEEDED = {*SAME, "hardware", "devices", "dtype", "versions", "unlike", "held", "corpus"}
Models = set[tuple[int, int]]


def read(path: str) -> Results:
    """An earlier `results.json`, with the fingerprint of the file.

    Raises:
      UserError: there is none, or it is something else.
    """
    try:
        text = Path(path).read_bytes()
        found = json.loads(text)
        if not found["validation"]["rows"] or not {"tuned", "grid", "seconds"} <= found.keys():
            raise ValueError
        found["setting"] = {"seeds_from": 0} | found["setting"]
        if lacking := NEEDED - found["setting"].keys():
            raise ValueError(lacking)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--earlier={path}: not a results.json that --collect has written") from error
    return found | {"fingerprint": hashlib.sha256(text).hexdigest()[:12]}


def join(results: Results, earlier: Results) -> None:
    """Adds to `results` what only the earlier ones have, and says which rows at hand are left out for it.

    Raises:
      UserError: they are not of one measurement, or new rows stand beside fewer of BASELINE's models than the old.
    """
    setting, before = results["setting"], earlier["setting"]
    for name in SAME:
        if setting[name] != before[name]:
            raise UserError(f"--earlier: its {name} ({before[name]}) differs from that of the runs at hand "
                            f"({setting[name]}), so the two make no page together")  # fmt: skip
    held = [part for part in setting["held"].keys() & before["held"] if setting["held"][part] != before["held"][part]]
    if held or setting["corpus"]["parts"] != before["corpus"]["parts"]:
        raise UserError(
            "--earlier: its text is split in another way than that of the runs at hand; the two make no page together"
        )
    unlike = [name for name in ("hardware", "devices", "dtype", "versions") if setting[name] != before[name]]
    setting["unlike"] = list(dict.fromkeys([*setting["unlike"], *before["unlike"], *unlike]))
    setting["held"] = before["held"] | setting["held"]
    differences = []
    for part in (corpus.VALIDATION, corpus.TEST):
        new, old = (_by_name(found.get(part, {}).get("rows", [])) for found in (results, earlier))
        if new or old:
            both = [(new[name], old[name]) for name in new.keys() & old.keys()]
            differences += [x for pair in both if pair[0]["runs"] != pair[1]["runs"] for x in _differences(*pair)]
            for row, kept in both:
                if (more := models(row) - models(kept)) and not _beyond(row, kept):
                    print(f"{row['title']}, {part}: left out with {len(more)} models, as the earlier row has others")
            results[part] = {"rows": list(_joined(part, new, old).values())}
    results["earlier"] = earlier["fingerprint"]
    if differences:
        results["again"] = {"models": len(differences), "largest": max(differences)}
    results["tuned"] = max(earlier["tuned"], results["tuned"], key=lambda rows: sum(len(row["seeds"]) for row in rows))
    results["grid"] = list(({row["key"]: row for row in [*results["grid"], *earlier["grid"]]}).values())


def models(row: Row) -> Models:
    """(seed, steps) of a row's models."""
    return {(seed, end["steps"]) for seed in row["seeds"] for end in row["ends"]}


def _by_name(rows: list[Row]) -> dict[tuple[int, str], Row]:
    return {(row["ratio"], row["key"]): row for row in rows}


def _joined(part: str, new: dict[tuple[int, str], Row], old: dict[tuple[int, str], Row]) -> dict[Any, Row]:
    more = {name: row for name, row in new.items() if name not in old or _beyond(row, old[name])}
    for ratio in {ratio for ratio, key in more if key != BASELINE}:
        name = (ratio, BASELINE)
        lacking = models(old[name]) - models(new[name]) if name in old and name in new else set()
        if lacking or name not in new:
            raise UserError(
                f"--earlier: it has {len(lacking) or 'all'} of BASELINE's models that are not at hand, by which new "
                f"rows are judged; train with --only=row={BASELINE},part={part},ratio={ratio} first"
            )
    return {name: _judged(row) for name, row in old.items()} | more


def _judged(row: Row) -> Row:
    """A row whose difference from its pair is held to BASELINE's limit, which earlier pages did not do."""
    if "against_pair" not in row:
        return row
    apart, limit = row["against_pair"], last(row)["equal_steps"][PRIMARY]["detectable"]
    verdict = compare.verdict(apart["mean"], apart["interval"], limit)
    return row | {"against_pair": apart | {"detectable": limit, "verdict": verdict}}


def _beyond(new: Row, old: Row) -> bool:
    return models(new) > models(old) and new.keys() >= old.keys()


def _differences(new: Row, old: Row) -> list[float]:
    """Of the models that both have, how far apart they are, bits a byte."""

    def values(row: Row) -> dict[tuple[int, int], float]:
        return {(seed, end["steps"]): value for end in row["ends"]
                for seed, value in zip(row["seeds"], end["measures"][PRIMARY]["seeds"], strict=True)}  # fmt: skip

    left, right = values(new), values(old)
    return [abs(left[name] - right[name]) for name in left.keys() & right.keys()]

"""Markdown tables and the cells of figures, for all parts of the page."""

from collections.abc import Sequence
from typing import Any

NONE = "–"

Results = dict[str, Any]
Row = dict[str, Any]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def last(found: Row) -> dict[str, Any]:
    """The end at all of the steps."""
    return next(end for end in found["ends"] if end["steps"] == found["steps"])


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


def relative(found: dict[str, Any]) -> str:
    """A cost as a part of BASELINE's, with its interval; `≤`: the first model is as good already."""
    if found["where"] == "never":
        return "never"
    text = ("≤ " if found["where"] == "before" else "") + f"{found['mean']:.2f}"
    if found["interval"]:
        text += " [{}, {}]".format(*("never" if x is None else f"{x:.2f}" for x in found["interval"]))
    return text

"""Which gifts of a small LM a run took, from whom, when, and what each cost."""

import dataclasses
import statistics
from pathlib import Path
from typing import Any

from slm_assist.report.runs import Run


@dataclasses.dataclass(frozen=True)
class Gift:
    """One gift in one run.

    Attributes:
      name: labels, data, representations or weights.
      helpers: the small LMs that gave it, as facts of the run; none where nobody was asked (random rows).
      stop: updates with it, from the first; 0 for weights, which are there before.
      flops: that it took in the run, None while the run is unfinished.
      share: of the run's FLOPs.
    """

    name: str
    helpers: tuple[dict[str, Any], ...]
    stop: int
    flops: float | None
    share: float | None

    @property
    def givers(self) -> str:
        """`small_lm at step 300`, or a function; several are joined."""
        return " and ".join(dict.fromkeys(map(_giver, self.helpers)))

    @property
    def training_flops(self) -> float | None:
        """Of the small LMs' own training, each once, up to the latest step; None where it is not known."""
        costs: dict[str, float] = {}
        for helper in self.helpers:
            if helper.get("train_flops") is None or helper["step"] < 0:  # nobody knows what a function cost
                return None
            costs[helper["run"]] = max(costs.get(helper["run"], 0.0), helper["train_flops"])
        return sum(costs.values()) if costs else None

    def to_json(self) -> dict[str, Any]:
        return {
            "helpers": [_giver(helper) for helper in self.helpers],
            "updates": self.stop, "flops": self.flops, "share": self.share, "training_flops": self.training_flops,
        }  # fmt: skip


def _giver(helper: dict[str, Any]) -> str:
    return f"{Path(helper['run']).name} at step {helper['step']}" if helper["step"] >= 0 else helper["run"]


# The part of a stage's name that tells of a gift, its FLOPs in summary.json, and the roles of who gives it.
STAGED = {
    "labels": ("assisted", "teacher", ("teacher",)),
    "data": ("selecting", "scorer", ("scorer", "reference")),
    "representations": ("aligned", "guide", ("guide",)),
}


def gifts(run: Run) -> list[Gift]:
    """The run's gifts, so far as its files show them."""
    spent = (run.summary or {}).get("flops") or {}
    whole, found = sum(spent.values()), []
    for name, (part, key, roles) in STAGED.items():
        stops = [stage["stop"] for stage in run.stages if part in stage["name"].split("_")]
        if stops:
            flops = spent.get(key, 0.0) if whole else None
            share = flops / whole if whole else None
            found.append(Gift(name, _helpers(run, roles), max(stops), flops, share))
    if parent := run.helpers.get("parent"):
        found.append(Gift("weights", (parent,), 0, 0.0 if whole else None, 0.0 if whole else None))
    return found


def _helpers(run: Run, roles: tuple[str, ...]) -> tuple[dict[str, Any], ...]:
    """Those with one of the roles, in the run itself or for a list of rows (`scorer of select.list`)."""
    return tuple(helper for role, helper in run.helpers.items() if role.split(" of ")[0] in roles)


def update_seconds(run: Run) -> dict[str, float]:
    """Median seconds of an update, by stage; of stages with fewer than `LEAST_UPDATES` none."""
    lines = [line for line in run.train if {"step", "stage", "seconds"} <= line.keys()]
    passed: dict[str, list[float]] = {}
    for before, line in zip(lines, lines[1:], strict=False):
        if line["step"] == before["step"] + 1:
            passed.setdefault(line["stage"], []).append(line["seconds"] - before["seconds"])
    return {stage: statistics.median(times) for stage, times in passed.items() if len(times) >= LEAST_UPDATES}


LEAST_UPDATES = 5

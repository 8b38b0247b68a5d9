"""When stage 1 ends, decided from how training goes: the schedule `auto`.

The paper derives no rule for n_KD; this one is ours. Stage 1 ends at the first update after which

    margin     the student's next-token accuracy is within `margin` of the small LM's on the same tokens, both
               averaged over about `window` updates (accuracy, since the temperature moves no argmax, and since with
               soft labels the student's cross-entropy may stay above the small LM's for ever), or
    patience   the last `patience` validations brought no lower cross-entropy, or
    cap        `cap` updates are done.

It is asked every `CHECKED_EVERY` updates and at the cap. A decision at step n looks at nothing that was learnt after
step n - 2, even where it is known already: a run reads its metrics late, and earlier where it saves or goes on from a
checkpoint, so only then do all of them decide alike.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from slm_assist.errors import UserError

CHECKED_EVERY = 10  # steps: hosts that agree wait for each other, so not at every update
LAG = 2  # steps: what a run has always read by then


class Decision(NamedTuple):
    """Stage 1 has `step` updates; `reason` is for people."""

    step: int
    reason: str


class Auto:
    """The rule, fed with metrics and asked before every update. Nothing in it depends on when it is fed.

    Args:
      cap: the most updates that stage 1 may have.
      margin: of accuracy, as a part of 1.
      window: updates over which accuracy is smoothed; no decision by it before so many.
      patience: validations without improvement that end stage 1; 0: never by that.

    Raises:
      UserError: an option out of its range.
    """

    def __init__(self, cap: int, margin: float = 0.005, window: int = 50, patience: int = 3):
        for key, value, least in (("steps", cap, 0), ("window", window, 1), ("patience", patience, 0)):
            if value < least:
                raise UserError(f"assist.{key}={value}: with assist.schedule=auto it must be at least {least}")
        if not math.isfinite(margin):
            raise UserError(f"assist.margin={margin}: must be a finite number")
        self.cap, self.margin, self.window, self.patience = cap, margin, window, patience
        self._known = -1  # the last step whose observations are counted below; those of later ones wait
        self._waiting: dict[int, dict[str, Any]] = {}  # by step
        self._updates, self._weight, self._accuracy, self._teacher_accuracy = 0, 0.0, 0.0, 0.0
        self._best, self._worse = None, 0
        self._reason: str | None = None

    def observe(self, step: int, accuracy: float, teacher_accuracy: float) -> None:
        """Takes both models' next-token accuracy, in [0, 1], on the batch of the update that led to `step`.

        Raises:
          ValueError: not finite, or so late that a decision was made without it.
        """
        if not (math.isfinite(accuracy) and math.isfinite(teacher_accuracy)):
            raise ValueError(
                f"accuracy {accuracy} and teacher_accuracy {teacher_accuracy} of step {step} must be finite"
            )
        self._at(step)["accuracy"] = [float(accuracy), float(teacher_accuracy)]

    def observe_validation(self, step: int, cross_entropy: float) -> None:
        """Takes the student's held-out cross-entropy, nats, after `step` updates; one that is not finite is no better.

        Raises:
          ValueError: so late that a decision was made without it.
        """
        self._at(step)["validation"] = [float(cross_entropy) if math.isfinite(cross_entropy) else None]

    def is_asked(self, n: int) -> bool:
        """Whether `decide` is due: every few updates, and at the cap."""
        return n % CHECKED_EVERY == 0 or n == self.cap

    def decide(self, n: int) -> Decision | None:
        """Whether stage 1 ends with `n` updates, by what was known at step n - 2; to be asked at rising n."""
        for step in sorted(step for step in self._waiting if step <= n - LAG):
            seen = self._waiting.pop(step)
            if "accuracy" in seen:
                self._count_accuracy(step, *seen["accuracy"])
            if "validation" in seen:
                self._count_validation(step, *seen["validation"])
        self._known = max(self._known, n - LAG)
        if self._reason:
            return Decision(n, self._reason)
        return Decision(n, f"its cap of {self.cap} updates is reached") if n >= self.cap else None

    def state(self) -> dict[str, Any]:
        """All it knows, for JSON; `restore` makes the same rule of it, to the bit."""
        return {
            "known": self._known,
            "waiting": [[step, dict(self._waiting[step])] for step in sorted(self._waiting)],
            "smoothed": [self._updates, self._weight, self._accuracy, self._teacher_accuracy],
            "validations": [self._best, self._worse],
            "reason": self._reason,
        }

    @classmethod
    def restore(cls, options: Mapping[str, Any], state: Mapping[str, Any] | None) -> "Auto":
        """The rule with the arguments `options` that `state()` came from; a new one if `state` is None."""
        auto = cls(**options)
        if state is not None:
            auto._known, auto._reason = state["known"], state["reason"]
            auto._waiting = {step: dict(seen) for step, seen in state["waiting"]}
            auto._updates, auto._weight, auto._accuracy, auto._teacher_accuracy = state["smoothed"]
            auto._best, auto._worse = state["validations"]
        return auto

    def _at(self, step: int) -> dict[str, Any]:
        if step <= self._known:
            raise ValueError(f"metrics of step {step} come after a decision that should have known them")
        return self._waiting.setdefault(step, {})

    def _count_accuracy(self, step: int, accuracy: float, teacher_accuracy: float) -> None:
        keep = 1 - 1 / self.window
        self._updates += 1
        self._weight = keep * self._weight + (1 - keep)  # below 1 at first: dividing by it corrects the bias
        self._accuracy = keep * self._accuracy + (1 - keep) * accuracy
        self._teacher_accuracy = keep * self._teacher_accuracy + (1 - keep) * teacher_accuracy
        student, teacher = self._accuracy / self._weight, self._teacher_accuracy / self._weight
        if self._updates >= self.window and student >= teacher - self.margin:
            self._because(
                f"the student's accuracy {student:.4f} came within {self.margin:g} of the small LM's {teacher:.4f} "
                f"at step {step} (asked every {CHECKED_EVERY} updates)"
            )

    def _count_validation(self, step: int, cross_entropy: float | None) -> None:
        better = cross_entropy is not None and (self._best is None or cross_entropy < self._best)
        self._best, self._worse = (cross_entropy, 0) if better else (self._best, self._worse + 1)
        if self.patience and self._worse >= self.patience:
            best = "none was finite" if self._best is None else f"the best is {self._best:.4f}"
            self._because(f"{self._worse} validations up to step {step} brought no lower cross-entropy ({best})")

    def _because(self, reason: str) -> None:
        self._reason = self._reason or reason

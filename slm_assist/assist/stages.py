"""Spans of a run that share one compiled step: with or without soft labels, with or without a choice of data."""

import dataclasses

PLAIN = "plain"


@dataclasses.dataclass(frozen=True)
class Stage:
    """Updates `start` up to, not including, `stop`."""

    start: int
    stop: int
    soft_labels: bool  # the teacher takes part
    selecting: bool  # rows or tokens are chosen

    @property
    def name(self) -> str:
        """`plain`, `assisted`, `selecting` or `assisted_selecting`; stages of one name share a compiled step."""
        names = ["assisted"] * self.soft_labels + ["selecting"] * self.selecting
        return "_".join(names) or PLAIN


def stages(steps: int, *, assisted: int, selecting: int = 0) -> tuple[Stage, ...]:
    """The stages of a run of `steps` updates, in order, without empty ones.

    Args:
      assisted: the first so many updates have soft labels.
      selecting: the first so many updates choose their data.
    """
    cuts = sorted({0, min(assisted, steps), min(selecting, steps), steps})
    spans = zip(cuts, cuts[1:], strict=False)
    return tuple(Stage(start, stop, start < assisted, start < selecting) for start, stop in spans)


def stage_at(plan: tuple[Stage, ...], step: int) -> Stage:
    """The stage of the update `step` -> `step + 1`."""
    return next(stage for stage in plan if stage.start <= step < stage.stop)

"""Spans of a run that share one compiled step: with or without soft labels, representations, a choice of data."""

import dataclasses

PLAIN = "plain"


@dataclasses.dataclass(frozen=True)
class Stage:
    """Updates `start` up to, not including, `stop`."""

    start: int
    stop: int
    soft_labels: bool  # the teacher takes part
    selecting: bool  # rows or tokens are chosen
    aligning: bool = False  # the guide's representations take part

    @property
    def name(self) -> str:
        """`plain`, or the gifts joined by `_`, as `assisted_aligned_selecting`; equal names share a compiled step."""
        gifts = {"assisted": self.soft_labels, "aligned": self.aligning, "selecting": self.selecting}
        return "_".join(name for name, on in gifts.items() if on) or PLAIN


def stages(steps: int, *, assisted: int, selecting: int = 0, aligned: int = 0) -> tuple[Stage, ...]:
    """The stages of a run of `steps` updates, in order, without empty ones.

    Args:
      assisted: the first so many updates have soft labels.
      selecting: the first so many updates choose their data.
      aligned: the first so many updates align representations.
    """
    cuts = sorted({0, steps, *(min(end, steps) for end in (assisted, selecting, aligned))})
    return tuple(
        Stage(start, stop, start < assisted, start < selecting, start < aligned)
        for start, stop in zip(cuts, cuts[1:], strict=False)
    )


def stage_at(plan: tuple[Stage, ...], step: int) -> Stage:
    """The stage of the update `step` -> `step + 1`."""
    return next(stage for stage in plan if stage.start <= step < stage.stop)

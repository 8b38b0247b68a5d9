"""How long the small LM helps, and with which weight.

Stage 1, the first n_KD updates, mixes soft labels into the loss with weight w; stage 2 is plain next-token
training (arXiv 2410.18779). The kinds differ in how w ends:

    none       w = 0 throughout: BASELINE
    constant   w throughout: RKD
    step       w in stage 1, then 0: SALT
    linear     as step, but w decays linearly to 0 over the last `decay_steps` of stage 1
"""

import dataclasses

import jax
import jax.numpy as jnp

from slm_assist.errors import one_of

KINDS = ("none", "constant", "step", "linear")


@dataclasses.dataclass(frozen=True)
class AssistSchedule:
    """A weight for every update. Made by `assist_schedule`."""

    kind: str
    weight: float
    stage1_steps: int | float  # updates with the small LM; infinite for `constant`
    decay_steps: int = 0

    def weight_at(self, step: int | jax.Array) -> jax.Array:
        """w, a float32 scalar, for the update `step` -> `step + 1`; traceable."""
        step = jnp.asarray(step)
        remaining = self.stage1_steps - step
        weight = jnp.where(remaining > 0, self.weight, 0.0)
        if self.decay_steps:
            weight = weight * jnp.clip(remaining / self.decay_steps, 0.0, 1.0)
        return weight.astype(jnp.float32)


def assist_schedule(kind: str, *, weight: float = 0.667, steps: int = 0, decay_steps: int = 0) -> AssistSchedule:
    """The schedule of the small LM's weight.

    Args:
      kind: `none`, `constant` (RKD), `step` (SALT) or `linear`.
      weight: w in [0, 1]; the loss is (1 - w) cross-entropy + w CE(teacher, student).
      steps: n_KD, the number of assisted updates; not used by `none` and `constant`.
      decay_steps: `linear` only: the updates at the end of stage 1 over which w goes to 0; by default half.

    Raises:
      UserError: the kind is unknown.
      ValueError: a weight outside [0, 1], or `decay_steps` longer than stage 1.
    """
    one_of("assist.schedule", kind, KINDS)
    if not 0.0 <= weight <= 1.0:
        raise ValueError(f"weight {weight} must lie between 0 and 1")
    if kind == "none":
        return AssistSchedule(kind, 0.0, 0)
    if kind == "constant":
        return AssistSchedule(kind, weight, float("inf"))
    if steps < 0 or not 0 <= decay_steps <= steps:
        raise ValueError(f"steps {steps} and decay_steps {decay_steps} must satisfy 0 <= decay_steps <= steps")
    if kind == "linear":
        return AssistSchedule(kind, weight, steps, decay_steps or max(1, steps // 2))
    return AssistSchedule(kind, weight, steps)


@dataclasses.dataclass(frozen=True)
class Stage:
    """Updates `start` up to, not including, `stop`, which share one compiled step."""

    name: str  # "assisted" | "plain"
    start: int
    stop: int


def stages(schedule: AssistSchedule, steps: int) -> tuple[Stage, ...]:
    """The stages of a run of `steps` updates, in order, without empty ones."""
    switch = int(min(schedule.stage1_steps, steps))
    both = (Stage("assisted", 0, switch), Stage("plain", switch, steps))
    return tuple(stage for stage in both if stage.stop > stage.start)

"""How long the small LM helps, and with which weight.

Stage 1, the first n_KD updates, mixes soft labels into the loss with weight w; stage 2 is plain next-token
training (arXiv 2410.18779). The kinds differ in how w ends:

    none       w = 0 throughout: BASELINE
    constant   w throughout: RKD
    step       w in stage 1, then 0: SALT
    linear     as step, but w decays linearly to 0 over the last `decay_steps` of stage 1
    ratio      as linear, but it is w / (1 - w), soft against hard labels, that decays linearly
    auto       w until `assist.auto` ends stage 1, at the latest after `steps` updates

"package.module:function" names a schedule of somebody's own: `function(step) -> w` in stage 1, then 0.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from slm_assist import plugins
from slm_assist.errors import UserError, one_of

KINDS = ("none", "constant", "step", "linear", "ratio", "auto")


@dataclasses.dataclass(frozen=True)
class AssistSchedule:
    """A weight for every update. Made by `assist_schedule`.

    Attributes:
      kind: as it was asked for.
      weight: w before it decays.
      stage1_steps: updates with the small LM; infinite for `constant`, None for `auto`, which has yet to decide.
      decay_steps: updates at the end of stage 1 over which w goes to 0.
      cap: `auto` only: the most that `stage1_steps` can become.
      function: step -> w in stage 1, for schedules of somebody's own.
    """

    kind: str
    weight: float
    stage1_steps: int | float | None
    decay_steps: int = 0
    cap: int | None = None
    function: Callable[[jax.Array], jax.Array] | None = None

    def weight_at(self, step: int | jax.Array) -> jax.Array:
        """w, a float32 scalar, for the update `step` -> `step + 1`; traceable.

        That of `auto` never ends by itself: whoever asks takes the small LM away.
        """
        if self.stage1_steps is None:
            return jnp.float32(self.weight)
        step = jnp.asarray(step)
        remaining = self.stage1_steps - step
        weight = self.weight if self.function is None else self.function(step)
        if self.decay_steps:
            part = jnp.clip(remaining / self.decay_steps, 0.0, 1.0)
            weight = weight * part
            if self.kind == "ratio":  # r = part * w / (1 - w), and w = r / (1 + r)
                weight = weight / (1 - self.weight + weight)
        return jnp.where(remaining > 0, weight, 0.0).astype(jnp.float32)


def assist_schedule(
    kind: str, *, weight: float = 0.667, steps: int = 0, decay_steps: int = 0, section: str = "assist"
) -> AssistSchedule:
    """The schedule of the small LM's weight.

    Args:
      kind: `none`, `constant` (RKD), `step` (SALT), `linear`, `ratio`, `auto`, or "package.module:function",
        a traceable function from a step (int32 scalar) to w.
      weight: w in [0, 1]; the loss is (1 - w) cross-entropy + w CE(teacher, student). Not used by a function.
      steps: n_KD, the number of assisted updates, of `auto` the most; not used by `none` and `constant`.
      decay_steps: `linear` and `ratio`: the updates at the end of stage 1 over which w goes to 0; by default half.
      section: of the config, for messages.

    Raises:
      UserError: the kind is unknown, `ratio` has a weight of 1, or a function cannot be found or gives no scalar.
      ValueError: a weight outside [0, 1], or `decay_steps` longer than stage 1.
    """
    most = 1.0 if section == "assist" else math.inf  # of a mixture's w; other sections add a term
    function = _function(f"{section}.schedule", kind, steps, most) if plugins.is_plugin(kind) else None
    if function is None:
        one_of(f"{section}.schedule", kind, KINDS)
    if not 0.0 <= weight <= 1.0:
        raise ValueError(f"weight {weight} must lie between 0 and 1")
    if kind == "none":
        return AssistSchedule(kind, 0.0, 0)
    if kind == "constant":
        return AssistSchedule(kind, weight, float("inf"))
    if steps < 0 or not 0 <= decay_steps <= steps:
        raise ValueError(f"steps {steps} and decay_steps {decay_steps} must satisfy 0 <= decay_steps <= steps")
    if kind == "auto":
        return AssistSchedule(kind, weight, None, cap=steps)
    if kind == "ratio" and weight == 1.0:
        raise UserError(
            "assist.weight=1.0: assist.schedule=ratio lets w / (1 - w) decay, which is infinite there; use a smaller "
            "weight, or assist.schedule=linear"
        )
    if kind in ("linear", "ratio"):
        return AssistSchedule(kind, weight, steps, decay_steps or max(1, steps // 2))
    return AssistSchedule(kind, weight, steps, function=function)


def _function(key: str, name: str, steps: int, most: float) -> Callable[[jax.Array], jax.Array]:
    """Somebody's schedule, tried traced and at the first, middle and last step of stage 1."""
    function = plugins.load(key, name)
    plugins.check_parameters(key, name, function, "step")
    traced = plugins.call(key, name, jax.eval_shape, lambda step: jnp.asarray(function(step)), _STEP)
    if traced.shape:
        raise UserError(f"{key}={name!r}: it gives an array of shape {traced.shape}; w is a scalar")
    for step in sorted({0, steps // 2, max(steps - 1, 0)}):
        weight = float(function(jnp.int32(step)))
        if not 0 <= weight <= most:
            range_of = f"from 0 to {most:g}" if math.isfinite(most) else "of at least 0"
            raise UserError(f"{key}={name!r}: it gives {weight} for step {step}; give a finite number {range_of}")
    return function


_STEP = jax.ShapeDtypeStruct((), jnp.int32)

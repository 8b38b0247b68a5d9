"""Representations: an early layer of the student learns to point where the small LM's last one does.

LET (arXiv 2602.05393): loss = next-token loss - lambda cos(h of an early student layer, final h of the small LM), token
by token, lambda falling to 0 by a stop step. Where the widths differ, a map between them is needed, and the paper's is
not certain: a projection learnt beside the student, from its width to the small LM's, or the first dimensions of both.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from slm_assist.assist.schedule import AssistSchedule
from slm_assist.errors import UserError, one_of
from slm_assist.losses import Loss
from slm_assist.losses.common import collect
from slm_assist.models import ModelConfig, Transformer

MAPS = ("projection", "truncate")
FINAL = -1  # the small LM's hidden states after its final norm, those that its head reads
EARLY = -1  # the student's layer a third of the way up
EPSILON = 1e-6  # a vector that is shorter has no direction: its cosine is 0, and so is the gradient


@dataclasses.dataclass(frozen=True)
class Align:
    """How the student follows a small LM's representations; everything is known before tracing.

    Attributes:
      guide: the small LM.
      schedule: lambda for every update.
      student_layer: whose output is aligned, counted from 0.
      guide_layer: with which layer's, or `FINAL`.
      map: one of `MAPS`.
      optimizer: of the projection.
      role: whose parameters the guide's are: "teacher" where they are one checkpoint.
    """

    guide: Transformer
    schedule: AssistSchedule
    student_layer: int
    guide_layer: int = FINAL
    map: str = "projection"
    optimizer: optax.GradientTransformation | None = None
    role: str = "guide"

    def __post_init__(self):
        one_of("represent.map", self.map, MAPS)

    @property
    def shares_soft_labels(self) -> bool:
        """Whether the teacher's forward pass gives these hidden states too."""
        return self.role == "teacher" and self.guide_layer == FINAL


def layers(student: ModelConfig, student_layer: int, guide: ModelConfig, guide_layer: int) -> tuple[int, int]:
    """The layers of both models that a config means; `EARLY` of the student is a third of the way up.

    Raises:
      UserError: a layer that the model does not have.
    """
    student_layer = (student.num_layers - 1) // 3 if student_layer == EARLY else student_layer
    for key, layer, model in (("student", student_layer, student), ("helper", guide_layer, guide)):
        if not FINAL <= layer < model.num_layers:
            raise UserError(
                f"represent.{key}_layer={layer}: the {'student' if model is student else 'small LM'} has the layers 0 "
                f"to {model.num_layers - 1}; or leave it at -1"
            )
    return student_layer, guide_layer


class Map(NamedTuple):
    """The projection [D, E] from the student's width to the small LM's, and its optimizer's state."""

    kernel: jax.Array
    opt_state: Any


def init_map(key: jax.Array, width: int, guide_width: int, optimizer: optax.GradientTransformation) -> Map:
    """A projection that keeps lengths on average."""
    kernel_DxE = jax.random.normal(key, (width, guide_width), jnp.float32) * width**-0.5
    return Map(kernel_DxE, optimizer.init(kernel_DxE))


def let(
    student_BxTxD: jax.Array,
    guide_BxTxE: jax.Array,
    mask_BxT: jax.Array,
    kernel_DxE: jax.Array | None = None,
    *,
    per_token: bool = False,
) -> Loss:
    """1 - cos(student, guide) of every token that the mask has, with statistics in float32.

    Args:
      student_BxTxD: hidden states of one of the student's layers.
      guide_BxTxE: the small LM's; no gradient reaches them.
      mask_BxT: bool or float; 0 leaves a token out, whatever the other arrays hold there.
      kernel_DxE: projects the student's; None: the first min(D, E) dimensions of both are compared.
      per_token: return [B, T] terms instead of sums.

    Returns:
      A `Loss` whose part `cosine` is that of the angle; a vector of no length has cosine 0.

    Raises:
      UserError: shapes that do not fit together.
    """
    _check(student_BxTxD, guide_BxTxE, mask_BxT, kernel_DxE)
    counted = mask_BxT[..., None] != 0
    guide_BxTxE = jax.lax.stop_gradient(guide_BxTxE)
    # What stands at masked positions may be anything, and would reach the gradient as 0 times that.
    ours, theirs = (jnp.where(counted, x, 0).astype(x.dtype) for x in (student_BxTxD, guide_BxTxE))
    if kernel_DxE is not None:
        ours = jnp.einsum("btd,de->bte", ours, kernel_DxE.astype(ours.dtype), preferred_element_type=jnp.float32)
    width = min(ours.shape[-1], theirs.shape[-1])
    ours, theirs = (x[..., :width].astype(jnp.float32) for x in (ours, theirs))
    cosine_BxT = jnp.sum(ours * theirs, axis=-1) * _inverse_length(ours) * _inverse_length(theirs)
    return collect(1 - cosine_BxT, {"cosine": cosine_BxT}, mask_BxT, per_token)


def _inverse_length(x: jax.Array) -> jax.Array:
    square = jnp.sum(jnp.square(x), axis=-1)
    long = square > EPSILON**2
    return jnp.where(long, jax.lax.rsqrt(jnp.where(long, square, 1.0)), 0.0)


def _check(student: jax.Array, guide: jax.Array, mask: jax.Array, kernel: jax.Array | None) -> None:
    if student.shape[:2] != mask.shape or guide.shape[:2] != mask.shape or student.ndim != 3 or guide.ndim != 3:
        raise UserError(
            f"hidden states {student.shape} and {guide.shape} do not fit mask {mask.shape}: pass [B, T, D], [B, T, E] "
            "and [B, T]"
        )
    if kernel is not None and kernel.shape != (student.shape[2], guide.shape[2]):
        raise UserError(
            f"projection {kernel.shape} does not lead from width {student.shape[2]} to width {guide.shape[2]}"
        )


def added(loss: Loss, aligned: Loss, strength: jax.Array) -> Loss:
    """`loss` + lambda times the other one, both sums over the same tokens."""
    return Loss(loss.total + strength * aligned.total, loss.weight, loss.parts | aligned.parts)


def hidden_of(align: Align, seen: tuple[jax.Array, Mapping[int, jax.Array]]) -> jax.Array:
    """The guide's hidden states that count, from (final ones, those tapped)."""
    final, tapped = seen
    return final if align.guide_layer == FINAL else tapped[align.guide_layer]


def taps(align: Align) -> tuple[int, ...]:
    """The guide's layers to ask for beside its final hidden states."""
    return () if align.guide_layer == FINAL else (align.guide_layer,)

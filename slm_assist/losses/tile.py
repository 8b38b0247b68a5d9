"""One tile of `blocked`: from N tokens' hidden states to their terms of the loss and their gradient."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from slm_assist.losses.common import TokenInfo
from slm_assist.losses.distribution import Distribution, Span


class LogitForm(NamedTuple):
    """softcap * tanh(scale * x / softcap), or scale * x for softcap 0."""

    softcap: float
    scale: float


@dataclasses.dataclass(frozen=True)
class Formula:
    """The loss, as far as it is known before tracing; without `teacher` it is cross-entropy."""

    student: LogitForm
    teacher: LogitForm | None = None
    temperature: float = 1.0
    top_k: int = 0
    z_loss: float = 0.0
    weight_fn: Callable[[TokenInfo], jax.Array] | None = None


class Tokens(NamedTuple):
    """Arrays with one entry a token: [B, T, ...], or [N, ...] in a tile. `scale` multiplies the gradient."""

    hidden: jax.Array
    target: jax.Array
    keep: jax.Array
    teacher_hidden: jax.Array | None
    weight: jax.Array | None
    scale: jax.Array | None


def one_tile(
    formula: Formula, span: Span, heads: list[jax.Array], tokens: Tokens
) -> tuple[dict[str, jax.Array], jax.Array | None, jax.Array | None]:
    """Terms of each token {name: [N]}, and with `tokens.scale` dhidden [N, D] and dhead [D, V].

    Masked tokens become zeros on entry: finite, whatever was there, so that their zero error stays zero.

    Args:
      heads: the student's [D, V] and, with soft labels, the teacher's [E, V]; the columns that `span` tells of.
    """
    keep = tokens.keep
    hidden, target = jnp.where(keep[:, None], tokens.hidden, 0), jnp.where(keep, tokens.target, 0)
    student = Distribution(_logits(hidden, heads[0], formula.student), target, span)
    terms = {"total": student.loss, "cross_entropy": student.loss, "rank": student.rank}
    soft, weight = None, 0.0

    if tokens.teacher_hidden is not None:
        teacher_hidden = jnp.where(keep[:, None], tokens.teacher_hidden, 0)
        teacher = Distribution(_logits(teacher_hidden, heads[1], formula.teacher), target, span)
        soft = teacher.tempered(formula.temperature, formula.top_k)
        weight = formula.weight_fn(_info(student, teacher)) if formula.weight_fn else tokens.weight
        weight = jnp.where(keep, weight, 0.0)
        # The divergence not as soft loss - entropy(q): this way equal models give exactly 0.
        student_mean, difference = soft.means(student.shifted, soft.shifted - student.shifted)
        terms["total"] = (1 - weight) * student.loss + weight * (student.log_sum - student_mean)
        terms["distillation_kl"] = student.log_sum - soft.log_sum + difference
        terms["teacher_cross_entropy"], terms["teacher_rank"] = teacher.loss, teacher.rank
    if formula.z_loss:
        terms["total"] += formula.z_loss * student.logsumexp**2
    if tokens.scale is None:
        return terms, None, None

    # The error term, its factors gathered so that each logit is touched once.
    scale = jnp.where(keep, tokens.scale, 0.0)
    of_p = scale * (1 + 2 * formula.z_loss * student.logsumexp) / student.sum_exp
    of_y = scale * (1 - weight)
    error = of_p[:, None] * student.exp - jnp.where(student.is_target(), of_y[:, None], 0.0)
    if soft is not None:
        error -= (scale * weight / soft.sum_exp)[:, None] * soft.exp
    if formula.student.softcap:
        error *= 1 - (student.logits / formula.student.softcap) ** 2
    error = (formula.student.scale * error).astype(hidden.dtype)
    dhidden = jnp.einsum("nv,dv->nd", error, heads[0], preferred_element_type=jnp.float32)
    dhead = jnp.einsum("nd,nv->dv", hidden, error, preferred_element_type=jnp.float32)
    # Parts of a sum over the vocabulary stay float32 until they are joined.
    return terms, dhidden if span.axis else dhidden.astype(hidden.dtype), dhead


def _logits(hidden_NxD: jax.Array, head_DxV: jax.Array, form: LogitForm) -> jax.Array:
    logits = form.scale * jnp.dot(hidden_NxD, head_DxV, preferred_element_type=jnp.float32)
    return form.softcap * jnp.tanh(logits / form.softcap) if form.softcap else logits


def _info(student: Distribution, teacher: Distribution) -> TokenInfo:
    return TokenInfo(*(f for d in (student, teacher) for f in (d.loss, d.entropy, d.top_probability, d.rank)))

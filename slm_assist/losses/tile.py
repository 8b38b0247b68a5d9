"""One tile of `blocked`: from N tokens' hidden states to their terms of the loss and the error of their logits."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from slm_assist.losses.common import NO_PROBABILITY, TokenInfo
from slm_assist.losses.distribution import Distribution, Seen, Span, distributions


class LogitForm(NamedTuple):
    """softcap * tanh(scale * x / softcap), or scale * x for softcap 0, of x = hidden @ head."""

    softcap: float
    scale: float
    tied: bool = False  # the head is a table of embeddings [V, D]: x = hidden @ head^T

    @property
    def head(self) -> str:
        """The head's dimensions, for `einsum`."""
        return "vd" if self.tied else "dv"


@dataclasses.dataclass(frozen=True)
class Formula:
    """The loss, as far as it is known before tracing; without `teacher` it is cross-entropy."""

    student: LogitForm
    teacher: LogitForm | None = None
    temperature: float = 1.0
    top_k: int = 0
    z_loss: float = 0.0
    weight_fn: Callable[[TokenInfo], jax.Array] | None = None
    teacher_fn: Callable[[tuple, jax.Array], jax.Array] | None = None  # (arrays, hidden) -> logits of all V


class Tokens(NamedTuple):
    """Arrays with one entry a token: [B, T, ...], or [N, ...] in a tile. `scale` multiplies the gradient."""

    hidden: jax.Array
    target: jax.Array
    keep: jax.Array
    teacher_hidden: jax.Array | None
    weight: jax.Array | None
    scale: jax.Array | None

    def masked(self) -> "Tokens":
        """Zeros where not `keep`: finite, whatever was there, so that a zero error stays zero."""

        def zero(x):
            return jnp.where(self.keep.reshape(self.keep.shape + (1,) * (x.ndim - 1)), x, jnp.zeros((), x.dtype))

        return jax.tree.map(zero, self)


def one_tile(
    formula: Formula, span: Span, heads: list[jax.Array], tokens: Tokens
) -> tuple[dict[str, jax.Array], jax.Array | None]:
    """Terms of each token {name: [N]}, and with `tokens.scale` the error [N, V] in the hidden states' dtype.

    The error is the gradient with respect to hidden @ head. It is 0 where `tokens.scale` and `tokens.weight` are.

    Args:
      heads: the student's [D, V] and, with soft labels, the teacher's [E, V], or transposed as their forms say; the
        part of the vocabulary that `span` tells of. With `formula.teacher_fn` the arrays that it takes are the second.
    """
    logits = [_logits(tokens.hidden, heads[0], formula.student)]
    if formula.teacher_fn is not None:
        logits.append(_answered(formula, span, heads[1], tokens, logits[0].shape[-1]))
    elif formula.teacher is not None:
        logits.append(_logits(tokens.teacher_hidden, heads[1], formula.teacher))
    student_softmax, *teacher_softmax = distributions(logits, tokens.target, span)
    if not teacher_softmax:
        student = student_softmax.seen(*span.join(student_softmax.counts()))
        return _finish(formula, tokens, student_softmax, student, {"total": student.loss})

    (teacher_softmax,) = teacher_softmax
    soft = teacher_softmax.tempered(formula.temperature, formula.top_k)
    shifted = student_softmax.shifted
    parts = {
        "student": student_softmax.counts(),
        "teacher": teacher_softmax.counts(),
        # The divergence not as soft loss - entropy(q): this way equal models give exactly 0.
        "soft": soft.products(shifted, soft.shifted - shifted),
    }
    if formula.weight_fn:
        parts["entropies"] = [x.products(x.shifted)[1] for x in (student_softmax, teacher_softmax)]
    parts = span.join(parts)
    student, teacher = student_softmax.seen(*parts["student"]), teacher_softmax.seen(*parts["teacher"])
    soft_sum, *means = parts["soft"]
    if soft is teacher_softmax:
        soft_sum = teacher.sum_exp  # summed by the same operations as the student's, so that equal ones cancel
    student_mean, difference = (x / soft_sum for x in means)
    weight = formula.weight_fn(_info(student, teacher, parts["entropies"])) if formula.weight_fn else tokens.weight
    weight = jnp.where(tokens.keep, weight, 0.0)
    terms = {"token_weight": weight} if formula.weight_fn else {}
    terms |= {
        "total": (1 - weight) * student.loss + weight * (student.log_sum - student_mean),
        "distillation_kl": student.log_sum - jnp.log(soft_sum) + difference,
        "teacher_cross_entropy": teacher.loss,
        "teacher_rank": teacher.rank,
    }
    return _finish(formula, tokens, student_softmax, student, terms, weight, soft.exp, soft_sum)


def _finish(formula, tokens: Tokens, softmax: Distribution, student: Seen, terms, weight=0.0, soft_exp=None,
            soft_sum=None):  # fmt: skip
    """The student's own terms, and the error: its factors gathered so that each logit is touched once."""
    terms |= {"cross_entropy": student.loss, "rank": student.rank}
    if formula.z_loss:
        terms["total"] += formula.z_loss * student.logsumexp**2
    if tokens.scale is None:
        return terms, None
    of_p = tokens.scale * (1 + 2 * formula.z_loss * student.logsumexp) / student.sum_exp
    of_y = tokens.scale * (1 - weight)
    error = of_p[:, None] * softmax.exp - jnp.where(softmax.is_target(), of_y[:, None], 0.0)
    if soft_exp is not None:
        error -= (tokens.scale * weight / soft_sum)[:, None] * soft_exp
    if formula.student.softcap:
        error *= 1 - (softmax.logits / formula.student.softcap) ** 2
    return terms, (formula.student.scale * error).astype(tokens.hidden.dtype)


def gradients(form: LogitForm, span: Span, head: jax.Array, hidden_NxD: jax.Array, error_NxV: jax.Array):
    """dhidden [N, D], float32 where other devices have parts of it, else in its dtype; dhead like `head`, float32."""
    dhidden = jnp.einsum(f"nv,{form.head}->nd", error_NxV, head, preferred_element_type=jnp.float32)
    dhead = jnp.einsum(f"nd,nv->{form.head}", hidden_NxD, error_NxV, preferred_element_type=jnp.float32)
    return dhidden if span.axis else dhidden.astype(hidden_NxD.dtype), dhead


def _logits(hidden_NxD: jax.Array, head: jax.Array, form: LogitForm) -> jax.Array:
    return _formed(jnp.einsum(f"nd,{form.head}->nv", hidden_NxD, head, preferred_element_type=jnp.float32), form)


def _formed(x_NxV: jax.Array, form: LogitForm) -> jax.Array:
    logits = form.scale * x_NxV
    return form.softcap * jnp.tanh(logits / form.softcap) if form.softcap else logits


def _answered(formula: Formula, span: Span, arrays: tuple, tokens: Tokens, size: int) -> jax.Array:
    """This device's part of the logits that a teacher's function gives for the whole vocabulary."""
    logits_NxV = formula.teacher_fn(arrays, tokens.teacher_hidden).astype(jnp.float32)
    if span.axis is not None:
        logits_NxV = jax.lax.dynamic_slice_in_dim(logits_NxV, span.start, size, axis=1)
    logits_NxV = jnp.where(tokens.keep[:, None], _formed(logits_NxV, formula.teacher), 0.0)
    return jnp.maximum(logits_NxV, NO_PROBABILITY)


def _info(student: Seen, teacher: Seen, products: list[jax.Array]) -> TokenInfo:
    both = zip((student, teacher), products, strict=True)
    return TokenInfo(*(f for s, product in both for f in (s.loss, s.entropy(product), s.top_probability, s.rank)))

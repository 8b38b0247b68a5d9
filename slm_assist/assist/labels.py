"""Labels: the next token (hard) and the small LM's predictions for the student's own inputs (soft)."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from slm_assist.losses import Loss, blocked
from slm_assist.losses.common import Weight
from slm_assist.models import Transformer

Batch = Mapping[str, jax.Array]


class SoftLabels(NamedTuple):
    """A teacher's predictions, before its head is applied: all that is kept of its forward pass."""

    hidden_BxTxD: jax.Array
    head_DxV: jax.Array


def hidden_and_head(model: Transformer, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Last hidden states [B, T, d] and output head [d, V] of `model` on the rows of `batch`.

    Every model meets a batch through this function, so a teacher sees the student's exact inputs, segments
    and positions.
    """
    hidden_BxTxD = model.apply(params, batch["tokens"], segment_ids=batch["segment_ids"], positions=batch["positions"])
    return hidden_BxTxD, model.head(params)


def teach(teacher: Transformer, params: Any, batch: Batch) -> SoftLabels:
    """The teacher's soft labels for `batch`; call it outside `jax.value_and_grad`."""
    return SoftLabels(*jax.lax.stop_gradient(hidden_and_head(teacher, params, batch)))


def next_token_loss(student: Transformer, params: Any, batch: Batch, **options) -> Loss:
    """Cross-entropy of the next token on a batch; `options` (z_loss, block_bytes, per_token) go to `blocked`."""
    return blocked.cross_entropy(
        *hidden_and_head(student, params, batch),
        batch["targets"],
        batch["mask"],
        softcap=student.config.logit_softcap,
        logit_scale=student.config.logit_scale,
        **options,
    )


def soft_label_loss(
    student: Transformer,
    params: Any,
    batch: Batch,
    teacher: Transformer,
    soft_labels: SoftLabels,
    *,
    weight: Weight,
    temperature: float = 1.0,
    **options,
) -> Loss:
    """(1 - w) cross-entropy + w CE(q, p) on a batch, q from `soft_labels`, the result of `teach`.

    Gradients reach `params` only. `options` (z_loss, block_bytes, per_token) and the result are those of
    `losses.blocked.distillation`.
    """
    return blocked.distillation(
        *hidden_and_head(student, params, batch),
        *soft_labels,
        batch["targets"],
        batch["mask"],
        weight=weight,
        temperature=temperature,
        softcap=student.config.logit_softcap,
        logit_scale=student.config.logit_scale,
        teacher_softcap=teacher.config.logit_softcap,
        teacher_logit_scale=teacher.config.logit_scale,
        **options,
    )

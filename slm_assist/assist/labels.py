"""Labels: the next token (hard) and the small LM's predictions for the student's own inputs (soft)."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from slm_assist.assist.own_teacher import OwnTeacher
from slm_assist.losses import Loss, TokenStats, blocked
from slm_assist.losses.common import Head, Weight
from slm_assist.models import Transformer
from slm_assist.sharding import constrain, helper_layout

Batch = Mapping[str, jax.Array]
ARRAYS = ("tokens", "targets", "segment_ids", "positions", "mask")  # of every batch, [B, T]; some have a prefix_mask
CountedTokens = Callable[[jax.Array, jax.Array], jax.Array]  # the student's (hidden, head) -> mask [B, T]


class SoftLabels(NamedTuple):
    """A teacher's predictions, before its head is applied: all that is kept of its forward pass."""

    hidden_BxTxD: jax.Array
    head: Head


def hidden_and_head(model: Transformer, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Last hidden states [B, T, d] and output head [d, V] of `model` on the rows of `batch`.

    Every model meets a batch through this function, so a teacher sees the student's exact inputs, segments,
    positions and prefixes.
    """
    hidden_BxTxD = model.apply(
        params,
        batch["tokens"],
        segment_ids=batch["segment_ids"],
        positions=batch["positions"],
        prefix_mask=batch.get("prefix_mask"),
    )
    return hidden_BxTxD, model.head(params)


def _logits(model: Transformer) -> dict[str, Any]:
    """How the losses get from hidden states to logits."""
    c = model.config
    if c is None:  # an `OwnTeacher`
        return {}
    return {"softcap": c.logit_softcap, "logit_scale": c.logit_scale, "tied": c.tie_embeddings}


def judge(
    model: Transformer, params: Any, batch: Batch, *, helper: bool = True, block_bytes: int | None = None
) -> tuple[TokenStats, jax.Array]:
    """(loss, rank) of every target of `batch` under `model`, [B, T] each, and its last hidden states; no gradient.

    Args:
      helper: the model is frozen and has the helpers' layout; False: it is the one that is trained.
    """
    with helper_layout(_rows(batch)) if helper else contextlib.nullcontext():
        rows = _laid_out(batch)
        view = jax.lax.stop_gradient(hidden_and_head(model, params, rows))
        stats = stats_of(model, *view, rows, block_bytes)
    return TokenStats(*_laid_out(stats._asdict()).values()), constrain(view[0], "batch", "length", "act_embed")


def token_stats(
    model: Transformer, params: Any, batch: Batch, *, helper: bool = True, block_bytes: int | None = None
) -> TokenStats:
    """`judge` without the hidden states."""
    return judge(model, params, batch, helper=helper, block_bytes=block_bytes)[0]


def stats_of(
    model: Transformer, hidden_BxTxD: jax.Array, head_DxV: jax.Array, batch: Batch, block_bytes: int | None = None
) -> TokenStats:
    """`token_stats` where the last hidden states are there already."""
    return blocked.token_stats(
        hidden_BxTxD,
        head_DxV,
        batch["targets"],
        **_logits(model),
        block_bytes=block_bytes,
    )


def teach(teacher: Transformer | OwnTeacher, params: Any, batch: Batch) -> SoftLabels:
    """The teacher's soft labels for `batch`; call it outside `jax.value_and_grad`.

    Where the teacher has seen these rows already, as their scorer, `batch` brings its hidden states along.
    """
    if TEACHER_HIDDEN in batch:
        return SoftLabels(batch[TEACHER_HIDDEN], teacher.head(params))
    with helper_layout(_rows(batch)):
        rows = _laid_out(batch)
        if isinstance(teacher, OwnTeacher):
            hidden_BxTxD, head = teacher.answer(params, rows)
        else:
            hidden_BxTxD, head = jax.lax.stop_gradient(hidden_and_head(teacher, params, rows))
    return SoftLabels(constrain(hidden_BxTxD, "batch", "length", "act_embed"), head)


def _rows(batch: Batch) -> int:
    return batch["tokens"].shape[0]


def _laid_out(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Arrays [B, T] on the layout in force; anything else as it is."""
    return {name: constrain(x, "batch", "length") if x.ndim == 2 else x for name, x in arrays.items()}


TEACHER_HIDDEN = "teacher_hidden"


def next_token_loss(
    student: Transformer, params: Any, batch: Batch, *, counted: CountedTokens | None = None, **options
) -> Loss:
    """Cross-entropy of the next token on a batch.

    Args:
      counted: which tokens the loss counts, from what the student makes of them; None: those of the mask.
      options: z_loss, block_bytes and per_token of `losses.blocked.cross_entropy`.
    """
    view = hidden_and_head(student, params, batch)
    return blocked.cross_entropy(
        *view,
        batch["targets"],
        counted(*view) if counted else batch["mask"],
        **_logits(student),
        **options,
    )


def soft_label_loss(
    student: Transformer,
    params: Any,
    batch: Batch,
    teacher: Transformer | OwnTeacher,
    soft_labels: SoftLabels,
    *,
    weight: Weight,
    counted: CountedTokens | None = None,
    **options,
) -> Loss:
    """(1 - w) cross-entropy + w CE(q, p) on a batch, q from `soft_labels`, the result of `teach`.

    Gradients reach `params` only. `counted` is that of `next_token_loss`; `options` (temperature, top_k, z_loss,
    block_bytes, per_token) and the result are those of `losses.blocked.distillation`.
    """
    view = hidden_and_head(student, params, batch)
    return blocked.distillation(
        *view,
        *soft_labels,
        batch["targets"],
        counted(*view) if counted else batch["mask"],
        weight=weight,
        **_logits(student),
        **{f"teacher_{name}": value for name, value in _logits(teacher).items()},
        **options,
    )

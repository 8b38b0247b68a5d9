"""Labels: the next token (hard) and the small LM's predictions for the student's own inputs (soft)."""

import contextlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from slm_assist.assist.own_teacher import OwnTeacher
from slm_assist.losses import Loss, TokenStats, blocked
from slm_assist.losses.common import Head, Weight
from slm_assist.models import Transformer
from slm_assist.sharding import constrain, helper_layout

Batch = Mapping[str, jax.Array]
ARRAYS = ("tokens", "targets", "segment_ids", "positions", "mask")  # of every batch, [B, T]; some have a prefix_mask


class SoftLabels(NamedTuple):
    """A teacher's predictions, before its head is applied: all that is kept of its forward pass."""

    hidden_BxTxD: jax.Array
    head: Head


class View(NamedTuple):
    """A model's last hidden states [B, T, d], its output head [d, V], and the hidden states after layers asked for."""

    hidden_BxTxD: jax.Array
    head_DxV: jax.Array
    tapped: Mapping[int, jax.Array]


def see(model: Transformer, params: Any, batch: Batch, taps: tuple[int, ...] = ()) -> View:
    """What `model` makes of the rows of `batch`.

    Every model meets a batch through this function, so a teacher sees the student's exact inputs, segments,
    positions and prefixes.
    """
    hidden, tapped = hidden_states(model, params, batch, taps)
    return View(hidden, model.head(params), tapped)


def hidden_states(
    model: Transformer, params: Any, batch: Batch, taps: tuple[int, ...] = ()
) -> tuple[jax.Array, Mapping[int, jax.Array]]:
    """`see` without the head."""
    found = model.apply(
        params,
        batch["tokens"],
        segment_ids=batch["segment_ids"],
        positions=batch["positions"],
        prefix_mask=batch.get("prefix_mask"),
        taps=taps,
    )
    return found if taps else (found, {})


def hidden_and_head(model: Transformer, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """`see` without taps."""
    return see(model, params, batch)[:2]


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
    if isinstance(teacher, OwnTeacher):
        with helper_layout(_rows(batch)):
            hidden_BxTxE, head = teacher.answer(params, _laid_out(batch))
        return SoftLabels(constrain(hidden_BxTxE, "batch", "length", "act_embed"), head)
    return SoftLabels(frozen_hidden(teacher, params, batch)[0], teacher.head(params))


def frozen_hidden(
    model: Transformer, params: Any, batch: Batch, taps: tuple[int, ...] = ()
) -> tuple[jax.Array, Mapping[int, jax.Array]]:
    """`hidden_states` of a helper, on its own layout, handed over to the student's."""
    with helper_layout(_rows(batch)):
        found = jax.lax.stop_gradient(hidden_states(model, params, _laid_out(batch), taps))
    return jax.tree.map(lambda x: constrain(x, "batch", "length", "act_embed"), found)


def _rows(batch: Batch) -> int:
    return batch["tokens"].shape[0]


def _laid_out(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Arrays [B, T] on the layout in force; anything else as it is."""
    return {name: constrain(x, "batch", "length") if x.ndim == 2 else x for name, x in arrays.items()}


TEACHER_HIDDEN = "teacher_hidden"


def next_token_loss(student: Transformer, view: View, batch: Batch, mask_BxT: jax.Array, **options) -> Loss:
    """Cross-entropy of the next token.

    Args:
      view: what the student makes of the batch, from `see`.
      mask_BxT: the tokens that the loss counts, by how much.
      options: z_loss, block_bytes and per_token of `losses.blocked.cross_entropy`.
    """
    return blocked.cross_entropy(
        view.hidden_BxTxD, view.head_DxV, batch["targets"], mask_BxT, **_logits(student), **options
    )


def soft_label_loss(
    student: Transformer,
    view: View,
    batch: Batch,
    mask_BxT: jax.Array,
    teacher: Transformer | OwnTeacher,
    soft_labels: SoftLabels,
    *,
    weight: Weight,
    **options,
) -> Loss:
    """(1 - w) cross-entropy + w CE(q, p), q from `soft_labels`, the result of `teach`.

    Gradients reach what `view` was made of only, and `options` (temperature, top_k, z_loss, block_bytes, per_token)
    and the result are those of `losses.blocked.distillation`. Other arguments as for `next_token_loss`.
    """
    return blocked.distillation(
        view.hidden_BxTxD,
        view.head_DxV,
        *soft_labels,
        batch["targets"],
        mask_BxT,
        weight=weight,
        **_logits(student),
        **{f"teacher_{name}": value for name, value in _logits(teacher).items()},
        **options,
    )

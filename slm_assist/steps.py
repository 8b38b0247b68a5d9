"""The compiled steps: pure functions of (state, batch, helpers).

    plain_step     next-token training
    assisted_step  the same with a small LM's soft labels; its forward pass is part of the step
                   (either of them, with `align`, also by a small LM's representations)
    choosing_step  either of them on rows that a small LM has chosen among candidates, as part of the step
    eval_step      sums for each row

What does not change during a run (models, optimizer, options) is bound by `functools.partial` before
`jax.jit`. A gradient is always that of the sum of token losses over the sum of the mask, whatever the
microbatches and devices.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from slm_assist.assist import labels, online, representations, scores, selection, token_weight
from slm_assist.assist.labels import Batch
from slm_assist.assist.own_teacher import OwnTeacher
from slm_assist.assist.representations import Align
from slm_assist.assist.schedule import AssistSchedule
from slm_assist.assist.token_weight import TokenWeight
from slm_assist.evals.token_metrics import TokenMetric
from slm_assist.losses import Loss
from slm_assist.metrics import Metrics
from slm_assist.models import Transformer
from slm_assist.state import TrainState


@dataclasses.dataclass(frozen=True)
class Student:
    """What a training step needs beside its state: the model, its optimizer and the loss's options."""

    model: Transformer
    optimizer: optax.GradientTransformation
    learning_rate: Callable[[jax.Array], jax.Array]
    z_loss: float = 0.0
    block_bytes: int | None = None
    microbatches: int = 1

    @property
    def loss_options(self) -> dict[str, Any]:
        return {"z_loss": self.z_loss, "block_bytes": self.block_bytes}


@dataclasses.dataclass(frozen=True)
class Focus:
    """Learning from a share of the tokens only: those where the reference is most ahead (arXiv 2404.07965)."""

    reference: Transformer
    share: float


def plain_step(
    state: TrainState,
    batch: Batch,
    helpers: Mapping[str, Any] = MappingProxyType({}),
    *,
    student: Student,
    focus: Focus | None = None,
    align: Align | None = None,
) -> tuple[TrainState, Metrics]:
    """One update by next-token cross-entropy.

    Args:
      state: may be donated.
      batch: `tokens`, `targets`, `mask`, `segment_ids`, `positions`, each [B, T], and `prefix_mask` where the
        objective has one.
      helpers: parameters by role: "reference" with a `focus`, `align.role` with `align`; else none.
      student, focus, align: static.

    Returns:
      The state after the update, and metrics as (sum, weight) pairs.
    """

    def label_loss(view: labels.View, rows: Batch, mask: jax.Array, _: labels.SoftLabels | None) -> Loss:
        return labels.next_token_loss(student.model, view, rows, mask, **student.loss_options)

    return _learn(label_loss, state, batch, helpers, student, focus, align)


def assisted_step(
    state: TrainState,
    batch: Batch,
    helpers: Mapping[str, Any],
    *,
    student: Student,
    teacher: Transformer | OwnTeacher,
    schedule: AssistSchedule,
    temperature: float,
    top_k: int = 0,
    weigh: TokenWeight | None = None,
    focus: Focus | None = None,
    align: Align | None = None,
) -> tuple[TrainState, Metrics]:
    """One update by (1 - w) cross-entropy + w CE(teacher, student) (arXiv 2410.18779).

    Args:
      state, batch, student, focus, align: as for `plain_step`.
      helpers: those of `plain_step`, and `{"teacher": its parameters}`; not in the state, not donated.
      teacher: the model of those parameters; static.
      schedule: gives w for `state.step`; static.
      temperature, top_k: of the soft labels, see `losses.blocked.distillation`; static.
      weigh: w of each token from the schedule's, see `assist.token_weight`; static.

    Returns:
      As `plain_step`, with the teacher's metrics beside the student's.
    """
    weight = schedule.weight_at(state.step)

    def label_loss(view: labels.View, rows: Batch, mask: jax.Array, soft_labels: labels.SoftLabels | None) -> Loss:
        return labels.soft_label_loss(
            student.model,
            view,
            rows,
            mask,
            teacher,
            soft_labels,
            weight=token_weight.of_update(weigh, weight),
            temperature=temperature,
            top_k=top_k,
            **student.loss_options,
        )

    state, metrics = _learn(label_loss, state, batch, helpers, student, focus, align, teacher)
    return state, metrics | {"assist_weight": (weight, jnp.float32(1))}


def choosing_step(
    state: TrainState, candidates: Batch, helpers: Mapping[str, Any], *, chooser: online.Filter, then: Callable
) -> tuple[TrainState, Metrics]:
    """Chooses rows among candidates on the device, and learns from them by `then`.

    Args:
      state: may be donated; `state.assist` holds what the rule remembers.
      candidates: see `online.choose`.
      helpers: parameters of the helpers that score, and of those that `then` needs.
      chooser: static.
      then: `plain_step` or `assisted_step` with all but its first three arguments bound; static.

    Returns:
      As `then`, with the statistics of the scores, and under `online.ROWS` which rows were kept.
    """
    params = {"learner": state.params, **helpers}
    chosen = online.choose(chooser, candidates, params, state.assist, state.step)
    state, metrics = then(state._replace(assist=chosen.assist), chosen.batch, helpers)
    return state, metrics | chosen.metrics | {online.ROWS: chosen.rows}


def eval_step(
    params: Any,
    batch: Batch,
    *,
    model: Transformer,
    block_bytes: int | None = None,
    metrics: Mapping[str, TokenMetric] = MappingProxyType({}),
) -> dict[str, jax.Array]:
    """Sums over the tokens of each row, [B] float32: `cross_entropy` (nats), `correct`, `tokens`, and of `metrics`."""
    stats = labels.token_stats(model, params, batch, helper=False, block_bytes=block_bytes)
    per_token = {"cross_entropy": stats.loss, "correct": stats.rank == 0, "tokens": jnp.ones_like(stats.loss)}
    per_token |= {name: metric(stats, batch) for name, metric in metrics.items()}
    mask_BxT = batch["mask"]
    return {name: jnp.where(mask_BxT != 0, mask_BxT * x, 0.0).sum(axis=1) for name, x in per_token.items()}


class _Given(NamedTuple):
    """What helpers say of a microbatch, outside the gradient."""

    soft_labels: labels.SoftLabels | None
    guide_hidden: jax.Array | None  # [B, T, E]
    reference_loss: jax.Array | None  # [B, T]


class _Trained(NamedTuple):
    """What gradients are taken of."""

    params: Any
    kernel: jax.Array | None  # of the map between representations


def _learn(
    label_loss: Callable[[labels.View, Batch, jax.Array, labels.SoftLabels | None], Loss],
    state: TrainState,
    batch: Batch,
    helpers: Mapping[str, Any],
    student: Student,
    focus: Focus | None,
    align: Align | None,
    teacher: Transformer | None = None,
) -> tuple[TrainState, Metrics]:
    """One update by `label_loss` and, with `align`, lambda times the distance of representations."""
    strength = align.schedule.weight_at(state.step) if align else None
    projects = align is not None and align.map == "projection"

    def loss_of(trained: _Trained, rows: Batch, given: _Given) -> Loss:
        view = labels.see(student.model, trained.params, rows, (align.student_layer,) if align else ())
        mask_BxT = _counted(student, view, rows, focus, given)
        loss = label_loss(view, rows, mask_BxT, given.soft_labels)
        if align is None:
            return loss
        aligned = representations.let(view.tapped[align.student_layer], given.guide_hidden, mask_BxT, trained.kernel)
        return representations.added(loss, aligned, strength)

    def before(rows: Batch) -> _Given:
        soft_labels = labels.teach(teacher, helpers["teacher"], rows) if teacher else None
        guide_hidden = _guide_hidden(align, helpers, rows, soft_labels) if align else None
        return _Given(soft_labels, guide_hidden, _reference_loss(rows, helpers, student, focus))

    trained = _Trained(state.params, state.assist["map"].kernel if projects else None)
    grads, loss = _gradients(loss_of, before, trained, batch, student.microbatches)
    state, metrics = _update(state, grads, loss, student, align if projects else None)
    if align:
        metrics["align_weight"] = (strength, jnp.float32(1))
    return state, metrics | _selected_tokens(batch, loss, focus)


def _guide_hidden(
    align: Align, helpers: Mapping[str, Any], rows: Batch, soft_labels: labels.SoftLabels | None
) -> jax.Array:
    if align.shares_soft_labels:
        return soft_labels.hidden_BxTxD
    seen = labels.frozen_hidden(align.guide, helpers[align.role], rows, representations.taps(align))
    return representations.hidden_of(align, seen)


def _reference_loss(rows: Batch, helpers: Mapping[str, Any], student: Student, focus: Focus | None) -> jax.Array | None:
    if focus is None:
        return None
    return labels.token_stats(focus.reference, helpers["reference"], rows, block_bytes=student.block_bytes).loss


def _counted(student: Student, view: labels.View, rows: Batch, focus: Focus | None, given: _Given) -> jax.Array:
    """The mask, or of its tokens the top share by learner minus reference loss; one more pass over the head."""
    if focus is None:
        return rows["mask"]
    hidden_BxTxD, head_DxV = jax.lax.stop_gradient(view[:2])
    learner = labels.stats_of(student.model, hidden_BxTxD, head_DxV, rows, student.block_bytes)
    excess = scores.excess(learner.loss, given.reference_loss)
    return rows["mask"] * selection.top_share(excess, rows["mask"], focus.share)


def _selected_tokens(batch: Batch, loss: Loss, focus: Focus | None) -> Metrics:
    return {} if focus is None else {"selected_tokens": (loss.weight, batch["mask"].sum())}


def _gradients(
    loss_of: Callable[[Any, Batch, Any], Loss],
    before: Callable[[Batch], Any],
    params: Any,
    batch: Batch,
    microbatches: int,
) -> tuple[Any, Loss]:
    """Summed gradients of `loss_of(params, rows, before(rows)).total` over microbatches, and the summed loss.

    `before` runs outside the gradient, one microbatch at a time, so what it makes never exists for a whole batch.
    """

    def one(rows: Batch) -> tuple[Any, Loss]:
        given = before(rows)

        def total(params: Any) -> tuple[jax.Array, Loss]:
            loss = loss_of(params, rows, given)
            return loss.total, loss

        (_, loss), grads = jax.value_and_grad(total, has_aux=True)(params)
        return grads, loss

    if microbatches == 1:
        return one(batch)
    # Every microbatch takes every M-th row, so that each device keeps the rows it has.
    split = jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), dict(batch))
    shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], split))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def add(sums: tuple[Any, Loss], rows: Batch) -> tuple[tuple[Any, Loss], None]:
        return jax.tree.map(jnp.add, sums, one(rows)), None

    return jax.lax.scan(add, zeros, split)[0]


def _update(
    state: TrainState, grads: _Trained, loss: Loss, student: Student, align: Align | None
) -> tuple[TrainState, Metrics]:
    scale = jnp.where(loss.weight > 0, 1 / jnp.maximum(loss.weight, 1), 0.0)
    grads = jax.tree.map(lambda g: g * scale, grads)
    updates, opt_state = student.optimizer.update(grads.params, state.opt_state, state.params)
    one = jnp.float32(1)
    metrics = {"loss": (loss.total, loss.weight), "tokens": (loss.weight, one)}
    metrics |= {NAMES.get(name, name): (total, loss.weight) for name, total in loss.parts.items()}
    metrics |= {
        "grad_norm": (optax.tree.norm(grads.params), one),
        "learning_rate": (jnp.asarray(student.learning_rate(state.step), jnp.float32), one),
    }
    params = optax.apply_updates(state.params, updates)
    assist = state.assist | ({"map": _map_update(align, state.assist["map"], grads.kernel)} if align else {})
    return TrainState(state.step + 1, params, opt_state, assist), metrics


def _map_update(align: Align, old: representations.Map, grad_DxE: jax.Array) -> representations.Map:
    update, opt_state = align.optimizer.update(grad_DxE, old.opt_state, old.kernel)
    return representations.Map(optax.apply_updates(old.kernel, update), opt_state)


NAMES = {"correct": "accuracy", "teacher_correct": "teacher_accuracy"}  # of a part once it is a mean

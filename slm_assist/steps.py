"""The compiled steps: pure functions of (state, batch, helpers).

    plain_step     next-token training
    assisted_step  the same with a small LM's soft labels; its forward pass is part of the step
    eval_step      sums for each row

What does not change during a run (models, optimizer, options) is bound by `functools.partial` before
`jax.jit`. A gradient is always that of the sum of token losses over the sum of the mask, whatever the
microbatches and devices.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from slm_assist.assist import labels
from slm_assist.assist.labels import Batch
from slm_assist.assist.schedule import AssistSchedule
from slm_assist.losses import Loss
from slm_assist.metrics import Pairs
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


def plain_step(state: TrainState, batch: Batch, *, student: Student) -> tuple[TrainState, Pairs]:
    """One update by next-token cross-entropy.

    Args:
      state: may be donated.
      batch: `tokens`, `targets`, `mask`, `segment_ids`, `positions`, each [B, T].
      student: static.

    Returns:
      The state after the update, and metrics as (sum, weight) pairs.
    """

    def loss_of(params: Any, rows: Batch, _: None) -> Loss:
        return labels.next_token_loss(
            student.model, params, rows, z_loss=student.z_loss, block_bytes=student.block_bytes
        )

    grads, loss = _gradients(loss_of, lambda rows: None, state.params, batch, student.microbatches)
    return _update(state, grads, loss, student)


def assisted_step(
    state: TrainState,
    batch: Batch,
    helpers: Mapping[str, Any],
    *,
    student: Student,
    teacher: Transformer,
    schedule: AssistSchedule,
    temperature: float,
) -> tuple[TrainState, Pairs]:
    """One update by (1 - w) cross-entropy + w CE(teacher, student) (arXiv 2410.18779).

    Args:
      state, batch, student: as for `plain_step`.
      helpers: `{"teacher": its parameters}`; not in the state, not donated.
      teacher: the model of those parameters; static.
      schedule: gives w for `state.step`; static.
      temperature: divides the teacher's logits; static.

    Returns:
      As `plain_step`, with the teacher's metrics beside the student's.
    """
    weight = schedule.weight_at(state.step)

    def loss_of(params: Any, rows: Batch, soft_labels: labels.SoftLabels) -> Loss:
        return labels.soft_label_loss(
            student.model,
            params,
            rows,
            teacher,
            soft_labels,
            weight=weight,
            temperature=temperature,
            z_loss=student.z_loss,
            block_bytes=student.block_bytes,
        )

    def teach(rows: Batch) -> labels.SoftLabels:
        return labels.teach(teacher, helpers["teacher"], rows)

    grads, loss = _gradients(loss_of, teach, state.params, batch, student.microbatches)
    state, metrics = _update(state, grads, loss, student)
    return state, metrics | {"assist_weight": (weight, jnp.float32(1))}


def eval_step(params: Any, batch: Batch, *, model: Transformer, block_bytes: int | None = None) -> dict[str, jax.Array]:
    """Sums over the tokens of each row, [B] float32: `cross_entropy` (nats), `correct` and `tokens`."""
    loss = labels.next_token_loss(model, params, batch, block_bytes=block_bytes, per_token=True)
    per_row = {"cross_entropy": loss.parts["cross_entropy"], "correct": loss.parts["correct"], "tokens": loss.weight}
    return {name: value_BxT.sum(axis=1) for name, value_BxT in per_row.items()}


def _gradients(
    loss_of: Callable[[Any, Batch, Any], Loss],
    before: Callable[[Batch], Any],
    params: Any,
    batch: Batch,
    microbatches: int,
) -> tuple[Any, Loss]:
    """Summed gradients of `loss_of(params, rows, before(rows)).total` over microbatches, and the summed loss.

    `before` runs outside the gradient, one microbatch at a time, so its results never exist for a whole batch.
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


def _update(state: TrainState, grads: Any, loss: Loss, student: Student) -> tuple[TrainState, Pairs]:
    scale = jnp.where(loss.weight > 0, 1 / jnp.maximum(loss.weight, 1), 0.0)
    grads = jax.tree.map(lambda g: g * scale, grads)
    updates, opt_state = student.optimizer.update(grads, state.opt_state, state.params)
    one = jnp.float32(1)
    metrics = {"loss": (loss.total, loss.weight), "tokens": (loss.weight, one)}
    metrics |= {NAMES.get(name, name): (total, loss.weight) for name, total in loss.parts.items()}
    metrics |= {
        "grad_norm": (optax.tree.norm(grads), one),
        "learning_rate": (jnp.asarray(student.learning_rate(state.step), jnp.float32), one),
    }
    state = state._replace(step=state.step + 1, params=optax.apply_updates(state.params, updates), opt_state=opt_state)
    return state, metrics


NAMES = {"correct": "accuracy", "teacher_correct": "teacher_accuracy"}  # of a part once it is a mean

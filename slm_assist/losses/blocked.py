"""The losses of `dense` from hidden states and heads, without any [B, T, V] array.

Tokens are cut into tiles whose float32 logits fit in `block_bytes`; a batch that fits is one tile. When a
gradient is wanted, the forward pass computes it tile by tile, since all of it is known there but a factor:

    error = dL/dlogits = p (1 + 2 z_loss lse) - (1 - w) e_y - w q,  then through softcap and scale
    dhidden = error @ head^T,    dhead = sum over tiles of hidden^T @ error, in float32

and the backward pass multiplies by the cotangent of `.total`. With student and teacher widths d_s and d_t
that is 6 V d_s + 2 V d_t FLOPs a token; without a gradient, 2 V d_s + 2 V d_t. Matmuls take operands in the
hidden states' dtype and accumulate in float32; everything between them is float32.

Under a mesh (`jax.set_mesh`) the tiles are cut inside `jax.shard_map`: each data shard runs only its own, the
vocabulary may be split over `VOCAB_AXIS`, and the head's gradient is reduced once, after the last tile.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from slm_assist import sharding
from slm_assist.errors import UserError
from slm_assist.losses.common import Distribution, Loss, Span, TokenInfo, TokenStats, Weight, collect

# Small enough for a CPU's caches; on accelerators large, as each tile passes once over the head's gradient.
BLOCK_BYTES_CPU, BLOCK_BYTES = 16 * 2**20, 512 * 2**20


def cross_entropy(
    hidden_BxTxD: jax.Array,
    head_DxV: jax.Array,
    target_BxT: jax.Array,
    mask_BxT: jax.Array,
    *,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    block_bytes: int | None = None,
    per_token: bool = False,
) -> Loss:
    """`dense.cross_entropy` of the logits softcap(logit_scale * hidden @ head).

    Args:
      hidden_BxTxD: after the final norm, in the compute dtype.
      head_DxV: of any float dtype (it is cast to that of `hidden`; its gradient comes back in its own).
      target_BxT: int, already shifted: the token that follows position t.
      mask_BxT: bool or float; 0 leaves a token out, whatever the other arrays hold there.
      z_loss: coefficient of logsumexp^2.
      softcap: logits become softcap * tanh(logits / softcap); 0 for none.
      logit_scale: multiplies the logits before the cap.
      block_bytes: the most that the live float32 logits of a tile may take, on a device; a tile has at least
        one token. None: 16 MiB on a CPU, 512 MiB elsewhere.
      per_token: return [B, T] terms; their gradient costs a second pass over the logits.

    Raises:
      UserError: shapes that do not fit together.
    """
    student = _Model(hidden_BxTxD, head_DxV)
    plan = _Plan(student=_LogitForm(softcap, logit_scale), z_loss=float(z_loss))
    return _loss(plan, student, _Frozen(target_BxT, mask_BxT), None, block_bytes, per_token)


def distillation(
    hidden_BxTxD: jax.Array,
    head_DxV: jax.Array,
    teacher_hidden_BxTxE: jax.Array,
    teacher_head_ExV: jax.Array,
    target_BxT: jax.Array,
    mask_BxT: jax.Array,
    *,
    weight: Weight,
    temperature: float = 1.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    teacher_softcap: float = 0.0,
    teacher_logit_scale: float = 1.0,
    block_bytes: int | None = None,
    per_token: bool = False,
) -> Loss:
    """`dense.distillation` of both models' logits.

    Args:
      teacher_hidden_BxTxE, teacher_head_ExV: like the student's, of any width and dtype. No gradient reaches
        them.
      weight: w, a scalar, an array that broadcasts to [B, T], or a function of `TokenInfo`, called with the
        tokens of one tile [N]. It may close over traced values, but not over ones being differentiated.
      temperature: divides the teacher's logits (after cap and scale); 0.25 sharpens, 4 softens.
      teacher_softcap, teacher_logit_scale: of the teacher's logits.
      block_bytes: here two models' logits are live.
      Others: as in `cross_entropy`.

    Raises:
      UserError: shapes that do not fit together, or a temperature that is not positive.
    """
    if not temperature > 0:
        raise UserError(f"temperature={temperature}: it divides the teacher's logits, use a positive number")
    student = _Model(hidden_BxTxD, head_DxV)
    teacher = jax.lax.stop_gradient(_Model(teacher_hidden_BxTxE, teacher_head_ExV))
    plan = _Plan(
        student=_LogitForm(softcap, logit_scale),
        teacher=_LogitForm(teacher_softcap, teacher_logit_scale),
        temperature=float(temperature),
        z_loss=float(z_loss),
    )
    return _loss(plan, student, _Frozen(target_BxT, mask_BxT, teacher), weight, block_bytes, per_token)


def token_stats(
    hidden_BxTxD: jax.Array,
    head_DxV: jax.Array,
    target_BxT: jax.Array,
    *,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    block_bytes: int | None = None,
) -> TokenStats:
    """(loss, rank) of every target, [B, T] each; arguments as in `cross_entropy`. Has no gradient."""
    student = jax.lax.stop_gradient(_Model(hidden_BxTxD, head_DxV))
    frozen = _Frozen(target_BxT, jnp.ones(target_BxT.shape, jnp.float32))
    plan = _Plan(student=_LogitForm(softcap, logit_scale))
    terms, _ = _run(*_prepare(plan, student, frozen, None, block_bytes))
    return TokenStats(terms["cross_entropy"], terms["rank"])


class _LogitForm(NamedTuple):
    """softcap * tanh(scale * x / softcap), or scale * x for softcap 0."""

    softcap: float
    scale: float


@dataclasses.dataclass(frozen=True)
class _Plan:
    """All that is known before tracing."""

    student: _LogitForm
    teacher: _LogitForm | None = None
    temperature: float = 1.0
    z_loss: float = 0.0
    weight_fn: Callable[[TokenInfo], jax.Array] | None = None
    tile: int = 1  # tokens
    sharded: bool = False
    batch_axes: tuple[str, ...] = ()
    vocab_axis: str | None = None


class _Model(NamedTuple):
    hidden: jax.Array
    head: jax.Array


class _Frozen(NamedTuple):
    """Inputs without a gradient."""

    target: jax.Array
    mask: jax.Array
    teacher: _Model | None = None
    weight: jax.Array | None = None  # [B, T], unless the plan has a function


class _Tokens(NamedTuple):
    """Arrays with one entry a token: [B, T, ...], or [N, ...] in a tile. `scale` multiplies the gradient."""

    hidden: jax.Array
    target: jax.Array
    keep: jax.Array
    teacher_hidden: jax.Array | None
    weight: jax.Array | None
    scale: jax.Array | None


def _prepare(plan: _Plan, student: _Model, frozen: _Frozen, weight: Weight | None, block_bytes: int | None):
    """Checks shapes, decides on tiles and shards, and makes the weight an array or part of the plan."""
    (batch, length), vocab = frozen.target.shape, student.head.shape[1]
    _check(student, frozen, (batch, length))
    mesh = sharding.ambient_mesh()
    if mesh is not None and mesh.size > 1 and AxisType.Manual not in mesh.axis_types:
        batch_axes = sharding.axes_on(mesh, sharding.BATCH_AXES, batch)
        vocab_axes = sharding.axes_on(mesh, (sharding.VOCAB_AXIS,), vocab)
        batch //= math.prod(mesh.shape[name] for name in batch_axes)
        vocab //= math.prod(mesh.shape[name] for name in vocab_axes)
        plan = dataclasses.replace(
            plan, sharded=True, batch_axes=batch_axes, vocab_axis=vocab_axes[0] if vocab_axes else None
        )
    models = 1 if frozen.teacher is None else 2
    if block_bytes is None:
        block_bytes = BLOCK_BYTES_CPU if jax.default_backend() == "cpu" else BLOCK_BYTES
    plan = dataclasses.replace(plan, tile=_tile_size(batch * length, 4 * vocab * models, block_bytes))

    frozen = frozen._replace(mask=jax.lax.stop_gradient(frozen.mask.astype(jnp.float32)))
    if callable(weight):
        plan = dataclasses.replace(plan, weight_fn=weight)
    elif weight is not None:
        weight = jnp.asarray(jax.lax.stop_gradient(weight), jnp.float32)
        frozen = frozen._replace(weight=jnp.broadcast_to(weight, frozen.target.shape))
    return plan, student, frozen


def _check(student: _Model, frozen: _Frozen, tokens: tuple[int, int]) -> None:
    for name, model in (("hidden", student), ("teacher_hidden", frozen.teacher or student)):
        if model.hidden.shape[:2] != tokens or model.hidden.shape[2:] != model.head.shape[:1]:
            raise UserError(
                f"{name} {model.hidden.shape} does not fit targets {tokens} and head {model.head.shape}: "
                "pass [B, T, d], [B, T] and [d, V]"
            )
        if model.head.shape[1] != student.head.shape[1]:
            raise UserError(
                f"head {student.head.shape} and teacher_head {model.head.shape} differ in the vocabulary: "
                "soft labels need the same one for both models"
            )
    if frozen.mask.shape != tokens:
        raise UserError(f"mask {frozen.mask.shape} does not fit targets {tokens}: pass one entry a target")


def _tile_size(tokens: int, token_bytes: int, block_bytes: int) -> int:
    """Tokens in a tile: all, or as even a division as multiples of 8 (which suit the hardware) allow."""
    most = max(1, block_bytes // token_bytes)
    if tokens <= most:
        return max(1, tokens)
    step = 8 if most >= 8 else 1
    tiles = -(-tokens // (most // step * step))
    return -(-tokens // (tiles * step)) * step


# The gradient rules.


def _loss(plan, student: _Model, frozen: _Frozen, weight, block_bytes: int | None, per_token: bool) -> Loss:
    plan, student, frozen = _prepare(plan, student, frozen, weight, block_bytes)
    return (_token_terms if per_token else _summed)(plan, student, frozen)


def _collect(terms: dict[str, jax.Array], mask: jax.Array, per_token: bool) -> Loss:
    parts = {"cross_entropy": terms["cross_entropy"], "correct": terms["rank"] == 0}
    if "distillation_kl" in terms:
        parts["distillation_kl"] = terms["distillation_kl"]
        parts["teacher_cross_entropy"] = terms["teacher_cross_entropy"]
        parts["teacher_correct"] = terms["teacher_rank"] == 0
    return collect(terms["total"], parts, mask, per_token)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(plan: _Plan, student: _Model, frozen: _Frozen) -> Loss:
    return _collect(_run(plan, student, frozen)[0], frozen.mask, per_token=False)


def _summed_forward(plan, student, frozen):
    terms, gradient = _run(plan, student, frozen, frozen.mask)
    return _collect(terms, frozen.mask, per_token=False), gradient


def _summed_backward(plan, gradient, cotangent: Loss):
    return jax.tree.map(lambda g: (cotangent.total * g).astype(g.dtype), gradient), None


_summed.defvjp(_summed_forward, _summed_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_terms(plan: _Plan, student: _Model, frozen: _Frozen) -> Loss:
    return _collect(_run(plan, student, frozen)[0], frozen.mask, per_token=True)


def _token_terms_forward(plan, student, frozen):
    return _token_terms(plan, student, frozen), (student, frozen)


def _token_terms_backward(plan, inputs, cotangent: Loss):
    student, frozen = inputs
    return _run(plan, student, frozen, frozen.mask * cotangent.total)[1], None


_token_terms.defvjp(_token_terms_forward, _token_terms_backward)


# Shards, tiles, one tile.


def _run(plan: _Plan, student: _Model, frozen: _Frozen, scale_BxT: jax.Array | None = None):
    """Terms of each token ({name: [B, T]}) and, given `scale`, the gradient of sum(scale * total)."""
    # Compiled once for calls outside `jit`, but a cache must not hold what a function closes over.
    run = _run_mesh if plan.weight_fn else _run_mesh_compiled
    return run(plan, student, frozen, scale_BxT)


def _run_mesh(plan: _Plan, student: _Model, frozen: _Frozen, scale_BxT: jax.Array | None):
    """`_run` on the ambient mesh, or on one device."""
    teacher = frozen.teacher
    keep, teacher_hidden = frozen.mask != 0, None if teacher is None else teacher.hidden
    tokens = _Tokens(student.hidden, frozen.target, keep, teacher_hidden, frozen.weight, scale_BxT)
    # Cast before the shards gather their heads: half the traffic in bfloat16.
    heads = [model.head.astype(model.hidden.dtype) for model in (student, teacher) if model is not None]
    run = partial(_run_shard, plan)
    if plan.sharded:
        rows, columns = P(plan.batch_axes or None), P(None, plan.vocab_axis)
        specs = {"in_specs": (rows, columns), "out_specs": (rows, _Model(rows, columns))}
        run = jax.shard_map(run, check_vma=False, **specs)
    terms, gradient = run(tokens, heads)
    if scale_BxT is None:
        return terms, None
    return terms, _Model(gradient.hidden, gradient.head.astype(student.head.dtype))


_run_mesh_compiled = jax.jit(_run_mesh, static_argnums=0)


def _run_shard(plan: _Plan, tokens: _Tokens, heads: list[jax.Array]):
    """`_run` for the tokens and the part of the vocabulary that one device holds."""
    shape, size = tokens.target.shape, heads[0].shape[1]
    span = Span(jax.lax.axis_index(plan.vocab_axis) * size, plan.vocab_axis) if plan.vocab_axis else Span()
    count = math.prod(shape)
    tiles = -(-count // plan.tile)
    tokens = jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), tokens)
    one_tile = partial(_tile, plan, span, heads)
    if tiles == 1:
        terms, dhidden, dhead = one_tile(tokens)
    else:
        padding = tiles * plan.tile - count  # keep = False
        pad = lambda x: jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))  # noqa: E731
        tokens = jax.tree.map(lambda x: pad(x).reshape(tiles, plan.tile, *x.shape[1:]), tokens)

        def step(dhead, tile):
            terms, dhidden, dhead_tile = one_tile(tile)
            return dhead if dhead_tile is None else dhead + dhead_tile, (terms, dhidden)

        start = None if tokens.scale is None else jnp.zeros(heads[0].shape, jnp.float32)
        dhead, (terms, dhidden) = jax.lax.scan(step, start, tokens)
        terms, dhidden = jax.tree.map(lambda x: x.reshape(tiles * plan.tile, *x.shape[2:])[:count], (terms, dhidden))
    terms = jax.tree.map(lambda x: x.reshape(shape), terms)
    if dhead is None:
        return terms, _Model(None, None)
    dhidden = span.join(dhidden).astype(tokens.hidden.dtype).reshape(*shape, -1)
    return terms, _Model(dhidden, jax.lax.psum(dhead, plan.batch_axes) if plan.batch_axes else dhead)


def _tile(plan: _Plan, span: Span, heads: list[jax.Array], tokens: _Tokens):
    """One tile: terms of each token {name: [N]}, and with `tokens.scale` dhidden [N, D] and dhead [D, V].

    Masked tokens become zeros on entry: finite, whatever was there, so that their zero error stays zero.
    """
    keep = tokens.keep
    hidden, target = jnp.where(keep[:, None], tokens.hidden, 0), jnp.where(keep, tokens.target, 0)
    student = Distribution(_logits(hidden, heads[0], plan.student), target, span)
    terms = {"total": student.loss, "cross_entropy": student.loss, "rank": student.rank}
    teacher, weight = None, 0.0

    if tokens.teacher_hidden is not None:
        teacher_hidden = jnp.where(keep[:, None], tokens.teacher_hidden, 0)
        teacher = Distribution(_logits(teacher_hidden, heads[1], plan.teacher), target, span)
        soft = teacher
        if plan.temperature != 1.0:
            soft = Distribution(teacher.logits / plan.temperature, target, span)
        weight = plan.weight_fn(_info(student, teacher)) if plan.weight_fn else tokens.weight
        weight = jnp.where(keep, weight, 0.0)
        soft_loss = student.log_sum - soft.mean(student.shifted)
        terms["total"] = (1 - weight) * student.loss + weight * soft_loss
        # Not soft_loss - entropy(q): this way equal models give exactly 0.
        terms["distillation_kl"] = student.log_sum - soft.log_sum + soft.mean(soft.shifted - student.shifted)
        terms["teacher_cross_entropy"], terms["teacher_rank"] = teacher.loss, teacher.rank
    if plan.z_loss:
        terms["total"] += plan.z_loss * student.logsumexp**2
    if tokens.scale is None:
        return terms, None, None

    # The error term, its factors gathered so that each logit is touched once.
    scale = jnp.where(keep, tokens.scale, 0.0)
    of_p = scale * (1 + 2 * plan.z_loss * student.logsumexp) / student.sum_exp
    of_y = scale * (1 - weight)
    error = of_p[:, None] * student.exp - jnp.where(student.is_target(), of_y[:, None], 0.0)
    if teacher is not None:
        error -= (scale * weight / soft.sum_exp)[:, None] * soft.exp
    if plan.student.softcap:
        error *= 1 - (student.logits / plan.student.softcap) ** 2
    error = (plan.student.scale * error).astype(hidden.dtype)
    dhidden = jnp.einsum("nv,dv->nd", error, heads[0], preferred_element_type=jnp.float32)
    dhead = jnp.einsum("nd,nv->dv", hidden, error, preferred_element_type=jnp.float32)
    # Parts of a sum over the vocabulary stay float32 until they are joined.
    return terms, dhidden if span.axis else dhidden.astype(hidden.dtype), dhead


def _logits(hidden_NxD: jax.Array, head_DxV: jax.Array, form: _LogitForm) -> jax.Array:
    logits = form.scale * jnp.dot(hidden_NxD, head_DxV, preferred_element_type=jnp.float32)
    return form.softcap * jnp.tanh(logits / form.softcap) if form.softcap else logits


def _info(student: Distribution, teacher: Distribution) -> TokenInfo:
    return TokenInfo(*(f for d in (student, teacher) for f in (d.loss, d.entropy, d.top_probability, d.rank)))

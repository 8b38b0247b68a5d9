"""The losses of `dense` from hidden states and heads, without any [B, T, V] array.

Tokens are cut into tiles whose float32 logits fit in `block_bytes`; a batch that fits is one tile. When a
gradient is wanted, the forward pass computes it tile by tile, since all of it is known there but a factor:

    error = dL/dlogits = p (1 + 2 z_loss lse) - (1 - w) e_y - w q,  then through softcap and scale
    dhidden = error @ head^T,    dhead = sum over groups of tiles of hidden^T @ error, in float32

and the backward pass multiplies by the cotangent of `.total`. With student and teacher widths d_s and d_t
that is 6 V d_s + 2 V d_t FLOPs a token; without a gradient, 2 V d_s + 2 V d_t. Matmuls take operands in the
hidden states' dtype and accumulate in float32; everything between them is float32, the error is rounded to that
dtype before the matmuls.

Under a mesh (`jax.set_mesh`) the tiles are cut inside `jax.shard_map`: each data shard runs only its own, the
vocabulary may be split over `VOCAB_AXIS`, and the head's gradient is reduced once, after the last tile: scattered
over the axis that splits the head's width, then summed over the others. Where devices share the vocabulary, a tile
needs two small messages among them: what is largest, then all sums over the vocabulary.
"""

import dataclasses
import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from slm_assist import sharding
from slm_assist.errors import UserError
from slm_assist.losses.common import Head, Loss, TokenStats, Weight, check_answers, check_top_k, collect, split_head
from slm_assist.losses.distribution import Span
from slm_assist.losses.tile import Formula, LogitForm, Tokens, gradients, one_tile
from slm_assist.losses.tiling import default_block_bytes, tiling


def cross_entropy(
    hidden_BxTxD: jax.Array,
    head_DxV: jax.Array,
    target_BxT: jax.Array,
    mask_BxT: jax.Array,
    *,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    tied: bool = False,
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
      tied: the head is the transpose of a table of embeddings [V, d]: if it is larger than a block, it is then used as
        the table lies in memory, and CPUs need not copy it, nor its gradient.
      block_bytes: the most that the live float32 logits of a tile may take, on a device, and as much again for errors
        narrower than float32; a tile has at least one token. None: 32 MiB or what 64 tokens need on a CPU,
        elsewhere 512 MiB or 512 tokens.
      per_token: return [B, T] terms; their gradient costs a second pass over the logits.

    Raises:
      UserError: shapes that do not fit together.
    """
    student = _Model(hidden_BxTxD, head_DxV)
    plan = _Plan(Formula(LogitForm(softcap, logit_scale, tied), z_loss=float(z_loss)))
    return _loss(plan, student, _Frozen(target_BxT, mask_BxT), None, block_bytes, per_token)


def distillation(
    hidden_BxTxD: jax.Array,
    head_DxV: jax.Array,
    teacher_hidden_BxTxE: jax.Array,
    teacher_head: Head,
    target_BxT: jax.Array,
    mask_BxT: jax.Array,
    *,
    weight: Weight,
    temperature: float = 1.0,
    top_k: int = 0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    teacher_softcap: float = 0.0,
    teacher_logit_scale: float = 1.0,
    tied: bool = False,
    teacher_tied: bool = False,
    block_bytes: int | None = None,
    per_token: bool = False,
) -> Loss:
    """`dense.distillation` of both models' logits.

    Args:
      teacher_hidden_BxTxE, teacher_head: like the student's, of any width and dtype. No gradient reaches them. The
        head may also be a function of one tile's hidden [N, E], which may then hold integers, that gives its logits
        [N, V] (-inf for no probability), for the whole vocabulary on every device. Arrays that it needs are best bound
        to it by `jax.tree_util.Partial`: on a mesh JAX does not let it index those that it closes over.
      weight: w, a scalar, an array that broadcasts to [B, T], or a function of `TokenInfo`, called with the
        tokens of one tile [N]. It may close over traced values, but not over ones being differentiated.
      temperature: divides the teacher's logits (after cap and scale); 0.25 sharpens, 4 softens.
      top_k: learn only the teacher's k likeliest tokens, renormalised, as in `dense.distillation`; 0: all.
      teacher_softcap, teacher_logit_scale, teacher_tied: of the teacher's logits.
      block_bytes: here two models' logits are live; a function's are whole where the student's are split.
      Others: as in `cross_entropy`.

    Raises:
      UserError: shapes that do not fit together, a temperature that is not positive, a `top_k` beyond the vocabulary.
    """
    if not temperature > 0:
        raise UserError(f"temperature={temperature}: it divides the teacher's logits, use a positive number")
    student = _Model(hidden_BxTxD, head_DxV)
    answers, teacher_head = split_head(teacher_head)
    teacher = jax.lax.stop_gradient(_Model(teacher_hidden_BxTxE, teacher_head))
    formula = Formula(
        student=LogitForm(softcap, logit_scale, tied),
        teacher=LogitForm(teacher_softcap, teacher_logit_scale, teacher_tied and not answers),
        temperature=float(temperature),
        top_k=check_top_k(top_k, (head_DxV if answers else teacher_head).shape[1]),
        z_loss=float(z_loss),
        teacher_fn=answers,
    )
    return _loss(_Plan(formula), student, _Frozen(target_BxT, mask_BxT, teacher), weight, block_bytes, per_token)


def token_stats(
    hidden_BxTxD: jax.Array,
    head_DxV: jax.Array,
    target_BxT: jax.Array,
    *,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    tied: bool = False,
    block_bytes: int | None = None,
) -> TokenStats:
    """(loss, rank) of every target, [B, T] each; arguments as in `cross_entropy`. Has no gradient."""
    student = jax.lax.stop_gradient(_Model(hidden_BxTxD, head_DxV))
    frozen = _Frozen(target_BxT, jnp.ones(target_BxT.shape, jnp.float32))
    plan = _Plan(Formula(LogitForm(softcap, logit_scale, tied)))
    terms, _ = _run(*_prepare(plan, student, frozen, None, block_bytes))
    return TokenStats(terms["cross_entropy"], terms["rank"])


@dataclasses.dataclass(frozen=True)
class _Plan:
    """All that is known before tracing."""

    formula: Formula
    tile: int = 1  # tokens
    tiles: int = 1  # in a group
    groups: int = 1
    sharded: bool = False
    batch_axes: tuple[str, ...] = ()
    width_axes: tuple[str, ...] = ()  # those of the batch axes that also split the head's width
    vocab_axis: str | None = None


class _Model(NamedTuple):
    hidden: jax.Array
    head: jax.Array | tuple  # of arrays: what the formula's `teacher_fn` takes


class _Frozen(NamedTuple):
    """Inputs without a gradient."""

    target: jax.Array
    mask: jax.Array
    teacher: _Model | None = None
    weight: jax.Array | None = None  # [B, T], unless the plan has a function


def _prepare(plan: _Plan, student: _Model, frozen: _Frozen, weight: Weight | None, block_bytes: int | None):
    """Checks shapes, decides on tiles and shards, and makes the weight an array or part of the plan."""
    (batch, length), vocab = frozen.target.shape, student.head.shape[1]
    _check(student, frozen, (batch, length), plan.formula)
    mesh = sharding.ambient_mesh()
    if mesh is not None and mesh.size > 1 and AxisType.Manual not in mesh.axis_types:
        batch_axes = sharding.axes_on(mesh, sharding.axes_of("batch"), batch)
        vocab_axes = sharding.axes_on(mesh, sharding.axes_of("vocab"), vocab)
        batch //= math.prod(mesh.shape[name] for name in batch_axes)
        vocab //= math.prod(mesh.shape[name] for name in vocab_axes)
        width_axes = sharding.axes_on(mesh, sharding.RULES["embed"], student.head.shape[0])
        plan = dataclasses.replace(
            plan,
            sharded=True,
            batch_axes=batch_axes,
            width_axes=tuple(name for name in width_axes if name in batch_axes),
            vocab_axis=vocab_axes[0] if vocab_axes else None,
        )
    models = 1 if frozen.teacher is None else 2
    if plan.formula.teacher_fn:
        models = 1 + student.head.shape[1] // vocab
    if block_bytes is None:
        block_bytes = default_block_bytes(4 * vocab * models)
    error_size = student.hidden.dtype.itemsize
    tile, tiles, groups = tiling(batch * length, vocab, models, error_size, block_bytes)
    formula = plan.formula
    formula = dataclasses.replace(
        formula,
        student=_laid_out(formula.student, student, vocab, block_bytes),
        teacher=formula.teacher and _laid_out(formula.teacher, frozen.teacher, vocab, block_bytes),
    )
    plan = dataclasses.replace(plan, formula=formula, tile=tile, tiles=tiles, groups=groups)

    frozen = frozen._replace(mask=jax.lax.stop_gradient(frozen.mask.astype(jnp.float32)))
    if callable(weight):
        plan = dataclasses.replace(plan, formula=dataclasses.replace(plan.formula, weight_fn=weight))
    elif weight is not None:
        weight = jnp.asarray(jax.lax.stop_gradient(weight), jnp.float32)
        frozen = frozen._replace(weight=jnp.broadcast_to(weight, frozen.target.shape))
    return plan, student, frozen


def _laid_out(form: LogitForm, model: _Model, vocab: int, block_bytes: int) -> LogitForm:
    """A tied head is used as a table where it is larger than a block: else turning every error costs more than a copy.

    (Two cores, V 2048 and 8192: 10 to 20 % of the loss; the other way round from V 32768 on.)
    """
    return form._replace(tied=form.tied and 4 * model.head.shape[0] * vocab >= block_bytes)


def _check(student: _Model, frozen: _Frozen, tokens: tuple[int, int], formula: Formula) -> None:
    models = [("hidden", student)]
    if formula.teacher_fn:
        check_answers(formula.teacher_fn, *frozen.teacher, tokens, student.head.shape[1])
    elif frozen.teacher is not None:
        models.append(("teacher_hidden", frozen.teacher))
    for name, model in models:
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


# The gradient rules.


def _loss(plan, student: _Model, frozen: _Frozen, weight, block_bytes: int | None, per_token: bool) -> Loss:
    plan, student, frozen = _prepare(plan, student, frozen, weight, block_bytes)
    return (_token_terms if per_token else _summed)(plan, student, frozen)


def _collect(terms: dict[str, jax.Array], mask: jax.Array, per_token: bool) -> Loss:
    parts = {"cross_entropy": terms["cross_entropy"], "correct": terms["rank"] == 0}
    if "distillation_kl" in terms:
        more = terms.keys() & {"distillation_kl", "teacher_cross_entropy", "token_weight"}
        parts |= {name: terms[name] for name in more} | {"teacher_correct": terms["teacher_rank"] == 0}
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


# Shards and tiles.


def _run(plan: _Plan, student: _Model, frozen: _Frozen, scale_BxT: jax.Array | None = None):
    """Terms of each token ({name: [B, T]}) and, given `scale`, the gradient of sum(scale * total)."""
    # Compiled once for calls outside `jit`, but a cache must not hold what a function closes over.
    run = _run_mesh if plan.formula.weight_fn or plan.formula.teacher_fn else _run_mesh_compiled
    return run(plan, student, frozen, scale_BxT)


def _run_mesh(plan: _Plan, student: _Model, frozen: _Frozen, scale_BxT: jax.Array | None):
    """`_run` on the ambient mesh, or on one device."""
    teacher = frozen.teacher
    keep, teacher_hidden = frozen.mask != 0, None if teacher is None else teacher.hidden
    tokens = Tokens(student.hidden, frozen.target, keep, teacher_hidden, frozen.weight, scale_BxT)
    # Cast before the shards gather their heads: half the traffic in bfloat16.
    models = [student] if teacher is None or plan.formula.teacher_fn else [student, teacher]
    heads = [model.head.astype(model.hidden.dtype) for model in models]
    forms = [plan.formula.student, plan.formula.teacher][: len(heads)]
    heads = [_turned(form, head) for form, head in zip(forms, heads, strict=True)]
    arrays = [teacher.head] if plan.formula.teacher_fn else []
    run = partial(_run_shard, plan)
    if plan.sharded:
        rows = P(plan.batch_axes or None)
        columns = [_head_spec(form, None, plan.vocab_axis) for form in forms]
        dhead = _head_spec(forms[0], plan.width_axes or None, plan.vocab_axis)
        specs = {"in_specs": (rows, columns + [P()] * len(arrays)), "out_specs": (rows, _Model(rows, dhead))}
        run = jax.shard_map(run, check_vma=False, **specs)
    terms, gradient = run(tokens, heads + arrays)
    if scale_BxT is None:
        return terms, None
    return terms, _Model(gradient.hidden, _turned(forms[0], gradient.head).astype(student.head.dtype))


def _turned(form: LogitForm, head: jax.Array) -> jax.Array:
    """A head [d, V] as its form has it, or back."""
    return head.T if form.tied else head


def _head_spec(form: LogitForm, width: tuple[str, ...] | None, vocab: str | None) -> P:
    return P(vocab, width) if form.tied else P(width, vocab)


_run_mesh_compiled = jax.jit(_run_mesh, static_argnums=0)


def _run_shard(plan: _Plan, tokens: Tokens, heads: list[jax.Array]):
    """`_run` for the tokens and the part of the vocabulary that one device holds."""
    shape, form = tokens.target.shape, plan.formula.student
    size = heads[0].shape[form.head.index("v")]
    span = Span(jax.lax.axis_index(plan.vocab_axis) * size, plan.vocab_axis) if plan.vocab_axis else Span()
    count, groups, tiles = math.prod(shape), plan.groups, plan.tiles
    tokens = jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), tokens).masked()
    if tokens.scale is None:
        groups, tiles = groups * tiles, 1  # no errors to keep together
    run_group = partial(_run_group, plan.formula, span, heads, tiles)
    if groups == 1:
        terms, dhidden, dhead = run_group(_padded(tokens, tiles * plan.tile))
    else:

        def step(dhead, group):
            terms, dhidden, dhead_group = run_group(group)
            return dhead if dhead_group is None else dhead + dhead_group, (terms, dhidden)

        start = None if tokens.scale is None else jnp.zeros(heads[0].shape, jnp.float32)
        tokens = _split(_padded(tokens, groups * tiles * plan.tile), groups)
        dhead, (terms, dhidden) = jax.lax.scan(step, start, tokens)
        terms, dhidden = jax.tree.map(_join, (terms, dhidden))
    terms, dhidden = jax.tree.map(lambda x: x[:count].reshape(*shape, *x.shape[1:]), (terms, dhidden))
    if dhead is None:
        return terms, _Model(None, None)
    if span.axis:
        dhidden = jax.lax.psum(dhidden, span.axis).astype(tokens.hidden.dtype)
    for axis in plan.width_axes:
        dhead = jax.lax.psum_scatter(dhead, axis, scatter_dimension=form.head.index("d"), tiled=True)
    others = tuple(name for name in plan.batch_axes if name not in plan.width_axes)
    return terms, _Model(dhidden, jax.lax.psum(dhead, others) if others else dhead)


def _run_group(formula: Formula, span: Span, heads: list[jax.Array], tiles: int, tokens: Tokens):
    """(terms, dhidden, dhead) of a group of tiles: logits tile by tile, one matmul each for the gradients."""
    run_tile = partial(one_tile, formula, span, heads)
    if tiles == 1:
        terms, error = run_tile(tokens)
    else:
        terms, error = jax.tree.map(_join, jax.lax.map(run_tile, _split(tokens, tiles)))
    return terms, *((None, None) if error is None else gradients(formula.student, span, heads[0], tokens.hidden, error))


def _padded(tokens: Tokens, count: int) -> Tokens:
    """With tokens that are not kept at the end."""
    more = count - len(tokens.target)
    return jax.tree.map(lambda x: jnp.pad(x, [(0, more)] + [(0, 0)] * (x.ndim - 1)), tokens) if more else tokens


def _split(tokens: Tokens, parts: int) -> Tokens:
    return jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), tokens)


def _join(x: jax.Array) -> jax.Array:
    return x.reshape(-1, *x.shape[2:])

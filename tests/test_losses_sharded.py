"""Blocked losses on meshes of eight virtual devices, and what their jaxprs hold."""

import functools

import jax
import jax.numpy as jnp
import losses_reference as reference
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from test_losses import close, problem, value_and_grad, weight_of_info

from slm_assist import sharding
from slm_assist.losses import blocked

D, VOCAB, TILE = 16, 64, 5
OPTIONS = {"temperature": 0.5, "z_loss": 1e-2, "softcap": 4.0, "logit_scale": 0.7, "teacher_softcap": 3.0}


def distillation(hidden, head, teacher_hidden, teacher_head, targets, mask, weight, **options):
    options = OPTIONS | {"block_bytes": TILE * VOCAB * 8} | options
    return blocked.distillation(hidden, head, teacher_hidden, teacher_head, targets, mask, weight=weight, **options)


def arguments(batch=8, vocab=VOCAB):
    student, teacher, targets, mask = problem(1, batch=batch, length=6, d=D, vocab=vocab)
    weights = np.random.default_rng(2).random(mask.shape).astype(np.float32)
    return *student, *teacher, targets, mask, weights


def same(sharded, plain, tolerance=2e-5):
    jax.tree.map(lambda a, b: close(a, b, tolerance), sharded, plain)


@functools.cache
def unsharded(per_token):
    return value_and_grad(lambda *a: distillation(*a, per_token=per_token), *arguments())


def place(args, mesh):
    """As a train step would: rows over the batch axes, heads over `fsdp` and `tensor`."""
    rows, head = sharding.batch_sharding(mesh), NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    teacher_head = NamedSharding(mesh, PartitionSpec(None, "tensor"))
    return jax.device_put(args, (rows, head, rows, teacher_head, rows, rows, rows))


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 4, 2), (1, 1, 8), (2, 1, 4), (4, 1, 1)])
@pytest.mark.parametrize("per_token", [False, True])
def test_sharded_is_unsharded(shape, per_token):
    mesh = sharding.make_mesh(*shape)
    with jax.set_mesh(mesh):
        sharded = value_and_grad(lambda *a: distillation(*a, per_token=per_token), *place(arguments(), mesh))
    same(sharded, unsharded(per_token))


@pytest.mark.parametrize("batch, vocab, shape", [(3, 64, (2, 2, 2)), (8, 50, (2, 1, 4)), (6, 50, (2, 4, 1))])
def test_what_does_not_divide_stays_whole(batch, vocab, shape):
    args = arguments(batch, vocab)
    plain = value_and_grad(distillation, *args)
    with jax.set_mesh(sharding.make_mesh(*shape)):
        sharded = value_and_grad(distillation, *args)
    same(sharded, plain)


def test_microbatches_in_a_scan_add_up_to_the_batch():
    student, teacher, targets, mask = problem(18, batch=4)
    expected = reference.loss(*student, targets, mask, teacher, weight=0.4)

    @jax.jit
    def accumulate(hidden, head, teacher_hidden, targets, mask):
        def step(sums, rows):
            h, th, y, m = rows
            fn = lambda p: blocked.distillation(h, p, th, teacher[1], y, m, weight=0.4, block_bytes=2048)  # noqa: E731
            loss, grad = jax.value_and_grad(lambda p: (fn(p).total, fn(p)), has_aux=True)(head)
            return jax.tree.map(jnp.add, sums, (loss[1].total, loss[1].weight, grad)), None

        rows = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), (hidden, teacher_hidden, targets, mask))
        return jax.lax.scan(step, (0.0, 0.0, jnp.zeros_like(head)), rows)[0]

    total, weight, dhead = accumulate(*student, teacher[0], targets, mask)
    close(total, expected.total.sum(), 2e-5)
    assert weight == mask.sum()
    close(dhead, expected.dhead, 2e-5)


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 1, 8)])
def test_sharded_function_weights_microbatches_and_bfloat16(shape):
    args = arguments()
    bf16 = [jnp.asarray(x, jnp.bfloat16) for x in args[:4]]

    def step(args, scale):
        def body(dhead, rows):
            h, th, y, m = rows
            weight = lambda info: scale * weight_of_info(info)  # noqa: E731
            loss, grad = jax.value_and_grad(
                lambda p: distillation(h, p, th, args[3].astype(jnp.bfloat16), y, m, weight).total
            )(args[1])
            return dhead + grad, loss

        rows = [x.reshape(2, 4, *x.shape[1:]) for x in (bf16[0], bf16[2], *args[4:6])]
        return jax.lax.scan(body, jnp.zeros_like(args[1]), rows)

    plain = jax.jit(step)(args, 0.5)
    with jax.set_mesh(sharding.make_mesh(*shape)):
        sharded = jax.jit(step)(args, 0.5)
    same(sharded, plain, 5e-3)  # the error term is rounded to bfloat16, and not at the same places


@pytest.mark.parametrize("shape", [(4, 1, 2), (1, 1, 8)])
def test_sharded_ranks_are_exact(shape):
    rng = np.random.default_rng(0)
    hidden = rng.integers(-1, 2, (4, 6, 3)).astype(np.float32)
    head = rng.integers(-2, 3, (3, 40)).astype(np.float32)
    targets = rng.integers(0, 40, (4, 6)).astype(np.int32)
    targets[0, 0] = 40
    plain = blocked.token_stats(hidden, head, targets)
    with jax.set_mesh(sharding.make_mesh(*shape)):
        sharded = jax.jit(lambda *a: blocked.token_stats(*a, block_bytes=160))(hidden, head, targets)
        outside_jit = blocked.token_stats(hidden, head, targets, block_bytes=160)
    np.testing.assert_array_equal(sharded.rank, plain.rank)
    np.testing.assert_array_equal(outside_jit.rank, plain.rank)
    np.testing.assert_allclose(sharded.loss, plain.loss, rtol=1e-5, atol=1e-5)


# What the jaxprs hold.


def equations(jaxpr, inside_scan=False):
    """(equation, is it in a scan) of a jaxpr and of every jaxpr in it."""
    for equation in jaxpr.eqns:
        yield equation, inside_scan
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner, inside_scan or equation.primitive.name == "scan")


def trace(mesh_shape=None, *, differentiate=True, per_token=False, tile=TILE, weight=None, top_k=0):
    args = arguments()

    def fn(*args):
        return jnp.sum(distillation(
            *args[:-1], weight or args[-1], per_token=per_token, top_k=top_k, block_bytes=tile * VOCAB * 8,
        ).total)  # fmt: skip

    fn = jax.value_and_grad(fn, (0, 1)) if differentiate else fn
    if mesh_shape is None:
        return list(equations(jax.make_jaxpr(fn)(*args).jaxpr))
    with jax.set_mesh(sharding.make_mesh(*mesh_shape)):
        return list(equations(jax.make_jaxpr(fn)(*args).jaxpr))


def outputs(found):
    return [(eqn, out.aval, inside) for eqn, inside in found for out in eqn.outvars if hasattr(out.aval, "shape")]


@pytest.mark.parametrize("mesh_shape", [None, (4, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize(
    "options", [{}, {"per_token": True}, {"weight": weight_of_info}, {"differentiate": False}, {"top_k": 3}]
)
def test_no_logits_beyond_block_bytes(mesh_shape, options):
    local = VOCAB // (mesh_shape[2] if mesh_shape else 1)
    sizes = [
        aval.size * 4
        for _, aval, _ in outputs(trace(mesh_shape, **options))
        if aval.ndim and local in aval.shape[-2:] and jnp.issubdtype(aval.dtype, jnp.floating)
        and aval.shape[0] not in (D, 12)  # the heads themselves
    ]  # fmt: skip
    assert sizes and max(sizes) <= TILE * VOCAB * 8 // 2  # half of it for either model


def trips(found):
    return [eqn.params["length"] for eqn, _ in found if eqn.primitive.name == "scan"]


def test_trips_per_device_fall_with_the_data_shards():
    assert trips(trace(tile=6)) == [8]
    assert trips(trace((2, 1, 1), tile=6)) == [4]
    assert trips(trace((2, 2, 1), tile=6)) == [2]
    assert trips(trace((2, 2, 2), tile=3)) == [2]  # half the vocabulary: twice the tokens
    assert trips(trace((8, 1, 1), tile=6)) == []
    assert trips(trace(tile=48)) == []


@pytest.mark.parametrize("mesh_shape", [(4, 1, 1), (1, 4, 1), (2, 2, 2)])
def test_head_gradient_is_reduced_once_after_the_scan(mesh_shape):
    head = (D, VOCAB // mesh_shape[2])
    found = outputs(trace(mesh_shape, tile=2))
    reductions = [
        inside for eqn, aval, inside in found
        if aval.shape == head and any(word in eqn.primitive.name for word in ("psum", "reduce_scatter", "gather"))
    ]  # fmt: skip
    assert reductions == [False]
    assert any(aval.shape == head and inside and eqn.primitive.name == "dot_general" for eqn, aval, inside in found)


def test_matmuls_take_operands_of_the_compute_dtype():
    student, teacher, targets, mask = problem(3)

    def fn(h, p):
        return distillation(h, p, jnp.asarray(teacher[0], jnp.bfloat16), teacher[1], targets, mask, 0.5).total

    jaxpr = jax.make_jaxpr(jax.grad(fn, (0, 1)))(jnp.asarray(student[0], jnp.bfloat16), student[1]).jaxpr
    matmuls = [eqn for eqn, _ in equations(jaxpr) if eqn.primitive.name == "dot_general"]
    assert len(matmuls) == 4  # logits of both models, dhidden, dhead
    for eqn in matmuls:
        assert [v.aval.dtype for v in eqn.invars] == [jnp.bfloat16] * 2
        assert eqn.outvars[0].aval.dtype == jnp.float32

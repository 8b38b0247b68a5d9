"""Blocked losses on meshes of eight virtual devices, and what their jaxprs hold."""

import functools

import jax
import jax.numpy as jnp
import losses_reference as reference
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from test_losses import close, problem, value_and_grad, weight_of_info

from slm_assist import compiled, sharding
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


@pytest.mark.parametrize("shape", [None, (2, 2, 2)])
@pytest.mark.parametrize("tied", [{"tied": True}, {"tied": True, "teacher_tied": True}, {"teacher_tied": True}])
def test_a_tied_head_is_the_same_head(shape, tied):
    """Of a table of embeddings that is the head's transpose; the gradient is that of the table."""

    def loss(hidden, table, teacher_hidden, teacher_table, *rest):
        return distillation(hidden, table.T, teacher_hidden, teacher_table.T, *rest, **tied)

    hidden, head, teacher_hidden, teacher_head, *rest = arguments()
    mesh = sharding.make_mesh(*shape) if shape else sharding.make_mesh(1)
    with jax.set_mesh(mesh):
        value, (dhidden, dtable) = value_and_grad(loss, hidden, head.T, teacher_hidden, teacher_head.T, *rest)
    same((value, (dhidden, dtable.T)), unsharded(False))


def test_a_tied_head_is_not_copied():
    """The loss of a table needs no more memory than that of a head, and transposes nothing of its size."""

    def temporaries(turn, **tied):
        head = jax.ShapeDtypeStruct((4096, 16) if turn else (16, 4096), jnp.float32)
        hidden, targets = jax.ShapeDtypeStruct((1, 64, 16), jnp.float32), jax.ShapeDtypeStruct((1, 64), jnp.int32)

        def loss(hidden, head, targets):
            mask, block = jnp.ones(targets.shape), 8 * 4096 * 4
            made = blocked.cross_entropy(hidden, head.T if turn else head, targets, mask, block_bytes=block, **tied)
            return made.total

        program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(hidden, head, targets).compile()
        return compiled.memory(program).temporaries

    assert temporaries(True, tied=True) < 1.02 * temporaries(False) < 0.8 * temporaries(True)


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


# What XLA makes of them.


def compile_on(mesh_shape, *, soft=True, gradient=True, dtype=jnp.float32, tile=4, **options):
    """The loss and its gradient, laid out as a train step has them; a batch of 8 x 6 tokens, V 64, d 16, teacher 12."""
    mesh = sharding.make_mesh(*mesh_shape)
    rows, head_layout = sharding.batch_sharding(mesh), NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    layouts = (rows, head_layout, rows, NamedSharding(mesh, PartitionSpec(None, "tensor")), rows, rows, rows)
    shapes = [
        jax.ShapeDtypeStruct(x.shape, dtype if i in (0, 2, 3) else x.dtype, sharding=layout)
        for i, (x, layout) in enumerate(zip(arguments(), layouts, strict=True))
    ]
    block_bytes = tile * VOCAB // mesh_shape[2] * (8 if soft else 4)

    def fn(hidden, head, teacher_hidden, teacher_head, targets, mask, weights):
        options_ = {"softcap": 4.0, "block_bytes": block_bytes, **options}
        if soft:
            teacher = teacher_hidden, teacher_head
            loss = blocked.distillation(
                hidden, head, *teacher, targets, mask, weight=weights, temperature=0.5, **options_
            )
        else:
            loss = blocked.cross_entropy(hidden, head, targets, mask, **options_)
        return loss.total, loss

    layout = (NamedSharding(mesh, PartitionSpec()), (rows, head_layout))
    step = jax.jit(jax.value_and_grad(fn, (0, 1), has_aux=True), out_shardings=layout) if gradient else jax.jit(fn)
    with jax.set_mesh(mesh):
        return step.lower(*shapes).compile()


@pytest.mark.parametrize(
    "soft, gradient, a_token",
    [
        (True, True, 6 * VOCAB * D + 2 * VOCAB * 12),
        (True, False, 2 * VOCAB * (D + 12)),
        (False, True, 6 * VOCAB * D),
        (False, False, 2 * VOCAB * D),
    ],
)
@pytest.mark.parametrize("mesh_shape, dtype", [((2, 2, 2), jnp.float32), ((1, 1, 1), jnp.bfloat16)])
def test_flops_are_those_of_the_formula(soft, gradient, a_token, mesh_shape, dtype):
    """Tiles of 4 divide the tokens of a device. The gradient is two matmuls more; nothing is computed twice."""
    step = compile_on(mesh_shape, soft=soft, gradient=gradient, dtype=dtype, tile=4)
    assert compiled.flops(step) == 48 * a_token / np.prod(mesh_shape)


def head_traffic(found, head):
    """The collectives of at least a quarter of a head [d, V]'s bytes."""
    return sorted((c.kind, c.bytes, c.times) for c in found if c.bytes >= head // 4)


@pytest.mark.parametrize("mesh_shape", [(8, 1, 1), (1, 8, 1), (2, 4, 1), (2, 2, 2)])
def test_head_is_gathered_once_and_its_gradient_reduced_once(mesh_shape):
    """Over `fsdp` it is scattered, over `data` summed: outside of the loop over tiles, each once.

    Sums of the loss may travel with the gradient: 7 scalars.
    """
    data, fsdp, tensor = mesh_shape
    head = D * VOCAB // tensor * 4
    step = compile_on(mesh_shape, tile=2)
    found = [c for c in compiled.collectives(step) if c.bytes >= head // fsdp]
    found = [c for c in found if c.bytes != 48 // data // fsdp * D * 4]  # the hidden states' gradient over `tensor`
    assert {c.times for c in found} == {1}
    sizes = {kind: [c.bytes for c in found if c.kind == kind] for kind in compiled.KINDS}
    assert sizes["all-gather"] == ([head] if fsdp > 1 else [])
    assert sizes["reduce-scatter"] == ([head // fsdp] if fsdp > 1 else [])
    assert len(sizes["all-reduce"]) == (data > 1)
    assert all(head // fsdp <= size <= head // fsdp + 28 for size in sizes["all-reduce"])


@pytest.mark.parametrize(
    "options, messages",
    [({}, 2), ({"soft": False}, 2), ({"weight": weight_of_info}, 2), ({"top_k": 3}, 3), ({"gradient": False}, 2)],
)
def test_shards_of_the_vocabulary_exchange_two_messages_a_tile(options, messages):
    """What is largest, then the sums; with top-k labels also the candidates. All of them are scalars of each token."""
    weight = options.get("weight")
    if weight:
        found = [eqn.primitive.name for eqn, inside in trace((1, 1, 8), weight=weight, tile=4) if inside]
        assert sum(name in ("all_gather", "psum", "psum_invariant", "pmax") for name in found) == messages
        return
    found = compiled.collectives(compile_on((1, 1, 8), **options))
    inside = [c for c in found if c.times > 1]
    assert len(inside) == messages and {c.times for c in inside} == {48 // 4}
    assert all(c.bytes <= 4 * 4 * 8 * 6 for c in inside)


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

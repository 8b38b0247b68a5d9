"""Small LMs on a layout of their own: what a device computes, holds and exchanges, read from the compiled program."""

import functools

import jax
import numpy as np
import pytest
from test_steps import SCHEDULE, STUDENT, TEACHER, make_batch, make_student

from slm_assist import compiled as compiled_lib
from slm_assist import sharding, steps
from slm_assist import state as state_lib
from slm_assist.assist import labels
from slm_assist.assist.helpers import Helper, Placement
from slm_assist.models import ModelConfig, Transformer

ROWS, LENGTH, LAYERS = 16, 32, 3
SHAPE = {"d_model": 64, "d_ff": 128, "num_heads": 2, "num_kv_heads": 2, "head_dim": 32}
MODEL = Transformer(ModelConfig(vocab_size=256, num_layers=LAYERS, **SHAPE))
HIDDEN = ROWS * LENGTH * SHAPE["d_model"] * 4  # bytes


def batch(rows: int = ROWS) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    ints = {name: rng.integers(0, 256, (rows, LENGTH)).astype(np.int32) for name in ("tokens", "targets")}
    segments = np.sort(rng.integers(0, 3, (rows, LENGTH)).astype(np.int32))
    where = {"segment_ids": segments, "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (rows, 1))}
    return ints | where | {"mask": (segments > 0).astype(np.float32)}


def looked_at(shape: tuple[int, int, int], kind: str, rows: int = ROWS):
    """(hidden states, loss, rank), and the compiled soft labels and statistics, on a mesh."""
    mesh = sharding.make_mesh(*shape)
    like = Helper("teacher", None, 1, MODEL, Placement(kind)).shapes(mesh)
    params = jax.tree.map(lambda x, to: jax.device_put(x, to.sharding), parameters(), like)
    given = jax.device_put(batch(rows), sharding.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        where = sharding.batch_sharding(mesh)
        teach = jax.jit(lambda p, b: labels.teach(MODEL, p, b).hidden_BxTxD, out_shardings=where)
        teach = teach.lower(params, given).compile()
        stats = jax.jit(functools.partial(labels.token_stats, MODEL), out_shardings=where)
        stats = stats.lower(params, given).compile()
        return jax.device_get((teach(params, given), *stats(params, given))), teach, stats


@functools.cache
def parameters():
    return jax.device_get(jax.jit(MODEL.init)(jax.random.key(0)))


@functools.cache
def alone():
    return looked_at((1, 1, 1), "replicated")


def assert_same(found, expected):
    for x, y in zip(found[:2], expected[:2], strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)
    assert np.mean(found[2] != expected[2]) < 0.01  # a rank may turn at a tie


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        pytest.param("replicated", (2, 2, 2), marks=pytest.mark.slow),
        ("replicated", (1, 1, 8)),
        ("fsdp", (2, 2, 2)),
        pytest.param("fsdp", (1, 1, 8), marks=pytest.mark.slow),
    ],
)
def test_each_device_runs_the_whole_helper_on_its_rows(kind, shape):
    found, teach, stats = looked_at(shape, kind)
    assert_same(found, alone()[0])
    for ours, theirs in zip((teach, stats), alone()[1:], strict=True):
        assert compiled_lib.flops(ours) == compiled_lib.flops(theirs) / 8
    exchanged = compiled_lib.collectives(teach)
    handed_over = ("all-gather", HIDDEN // (shape[0] * shape[1]), 1)  # to the student's batch layout
    assert handed_over in exchanged
    exchanged.remove(handed_over)
    if kind == "replicated":
        assert not exchanged
        scored = ROWS * LENGTH * 4 // (shape[0] * shape[1])  # bytes: nothing but loss and rank are handed over
        assert compiled_lib.collectives(stats) == [("all-gather", scored, 1)] * 2
        return
    matrices = [x.size // (LAYERS if x.ndim > 2 else 1) * 4 for x in jax.tree.leaves(parameters()) if x.size > 1000]
    assert {kind for kind, _, _ in exchanged} == {"all-gather"}
    in_scan = sorted(size for _, size, times in exchanged if times == LAYERS)
    assert in_scan == sorted(size for size in matrices if size < parameters()["embedding"].size * 4)
    assert all(size <= parameters()["embedding"].size * 4 for _, size, times in exchanged if times == 1)


def test_rows_that_the_mesh_does_not_divide():
    """Whole parameters are then used in parts, as the student's are."""
    found, teach, _ = looked_at((1, 4, 2), "replicated", rows=4)
    expected, one, _ = looked_at((1, 1, 1), "replicated", rows=4)
    assert_same(found, expected)
    assert compiled_lib.flops(teach) == compiled_lib.flops(one) / 8


def test_memory_is_told_as_it_is():
    mesh = sharding.make_mesh(2, 2, 2)
    size = MODEL.num_params() * 4
    for placement, split in (
        (Placement("auto", size), False),
        (Placement("auto", size - 1), True),
        (Placement("replicated", 0), False),
        (Placement("fsdp", size), True),
    ):
        helper = Helper("teacher", None, 1, MODEL, placement)
        assert helper.is_split(mesh) == split and not helper.is_split(sharding.make_mesh(1, 1, 1))
        places = jax.tree.leaves(helper.shapes(mesh))
        held = sum(np.prod(x.sharding.shard_shape(x.shape)) * 4 for x in places)
        assert helper.bytes() == size and helper.device_bytes(mesh) == held
        vectors = sum(x.size for x in jax.tree.leaves(parameters()) if x.size <= LAYERS * 64) * 4
        assert held == ((size - vectors) / 8 + vectors if split else size)
        assert ("MB on each" if split else "on every device") in helper.where(mesh)


def test_helper_and_student_do_not_wait_for_each_other():
    """XLA may run them at the same time: neither forward pass reads anything of the other's."""
    student = make_student()
    state = jax.eval_shape(functools.partial(state_lib.init, STUDENT, student.optimizer, 0, {}))
    teacher = TEACHER.shapes()
    step = functools.partial(steps.assisted_step, student=student, teacher=TEACHER, schedule=SCHEDULE, temperature=1.0)
    jaxpr = jax.make_jaxpr(step)(state, make_batch(), {"teacher": teacher}).jaxpr
    inputs = len(jax.tree.leaves((state, make_batch())))
    first = len(jax.tree.leaves(state.step))
    students = set(jaxpr.invars[first : first + len(jax.tree.leaves(state.params))])
    teachers = set(jaxpr.invars[inputs:])
    reads: dict = {
        var: ({"student"} if var in students else {"teacher"} if var in teachers else set()) for var in jaxpr.invars
    }
    scans = []
    for eqn in jaxpr.eqns:
        seen = set().union(*(reads.get(var, set()) for var in eqn.invars if not hasattr(var, "val")))
        reads |= dict.fromkeys(eqn.outvars, seen)
        if eqn.primitive.name == "scan":
            scans.append(seen)
    assert scans.count({"teacher"}) == 1 and {"student"} in scans  # the forward passes
    assert {"student", "teacher"} in scans  # the backward pass: the test can tell

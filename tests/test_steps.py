"""The compiled steps: right gradients, the same for any microbatches and any mesh, and no helper where none is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from slm_assist import optim, sharding, steps
from slm_assist import state as state_lib
from slm_assist.assist import labels
from slm_assist.assist.schedule import assist_schedule
from slm_assist.losses import dense
from slm_assist.models import ModelConfig, Transformer

VOCAB, ROWS, LENGTH = 64, 16, 12
SHAPE = {"vocab_size": VOCAB, "num_layers": 1, "d_ff": 32, "num_kv_heads": 2, "head_dim": 8}
STUDENT = Transformer(ModelConfig(d_model=16, num_heads=4, **SHAPE))
TEACHER = Transformer(ModelConfig(d_model=8, num_heads=2, **SHAPE))
SCHEDULE = assist_schedule("step", weight=0.667, steps=5)


def make_batch(seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of two documents each, with a different amount of padding and masked targets in every row."""
    rng = np.random.default_rng(seed)
    cut = rng.integers(2, LENGTH - 2, (ROWS, 1))
    end = rng.integers(LENGTH // 2, LENGTH + 1, (ROWS, 1))
    at = np.arange(LENGTH)[None]
    segments = np.where(at < end, 1 + (at >= cut), 0)
    mask = (segments > 0) & (rng.random((ROWS, LENGTH)) < 0.8)
    return {
        "tokens": rng.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32),
        "targets": rng.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32),
        "mask": mask.astype(np.float32),
        "segment_ids": segments.astype(np.int32),
        "positions": np.where(at >= cut, at - cut, at).astype(np.int32),
    }


def make_student(microbatches: int = 1, z_loss: float = 0.0, name: str = "adamw") -> steps.Student:
    schedule = optim.learning_rate("constant", peak=1e-2, steps=10)
    # A large eps: where a gradient is nearly 0, Adam would turn its rounding into a full step.
    optimizer = optim.make_optimizer(name, schedule, axes=STUDENT.logical_axes(), weight_decay=0.1, eps=1e-3)
    return steps.Student(STUDENT, optimizer, schedule, z_loss=z_loss, microbatches=microbatches)


def run(kind: str, student: steps.Student, mesh=None, updates: int = 3):
    """`updates` updates; returns final parameters and the metrics of each."""
    mesh = mesh or sharding.make_mesh(1, 1, 1)
    assist = {"stage1_steps": jnp.int32(5)}
    layout = state_lib.state_shardings(student.model, student.optimizer, assist, mesh)
    init = functools.partial(state_lib.init, student.model, student.optimizer, 0, assist)
    state = jax.jit(init, out_shardings=layout)()
    teacher = jax.device_put(jax.jit(TEACHER.init)(jax.random.key(1)), sharding.replicated(mesh))
    if kind == "plain":
        step, helpers = functools.partial(steps.plain_step, student=student), ()
    else:
        step = functools.partial(
            steps.assisted_step, student=student, teacher=TEACHER, schedule=SCHEDULE, temperature=0.5
        )
        helpers = ({"teacher": teacher},)
    metrics = []
    with jax.set_mesh(mesh):
        jitted = jax.jit(step, out_shardings=(layout, sharding.replicated(mesh)))
        for n in range(updates):
            batch = jax.device_put(make_batch(n), sharding.batch_sharding(mesh))
            state, pairs = jitted(state, batch, *helpers)
            metrics.append({name: float(total) / float(weight) for name, (total, weight) in pairs.items()})
    return jax.device_get(state.params), metrics


def assert_close(a, b, rtol=2e-5, atol=2e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


@functools.cache
def run_alone(kind: str):
    return run(kind, make_student())


@pytest.mark.parametrize(("kind", "microbatches"), [pytest.param("plain", 8, marks=pytest.mark.slow), ("assisted", 2)])
def test_microbatches_equal_one_batch(kind, microbatches):
    one, many = run_alone(kind), run(kind, make_student(microbatches))
    assert_close(one[0], many[0], rtol=2e-4, atol=1e-5)
    assert_close(one[1], many[1], rtol=1e-4)


MESHES = ((8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4))


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("assisted", shape) for shape in MESHES]
    + [("plain", MESHES[2])]
    + [pytest.param("plain", shape, marks=pytest.mark.slow) for shape in MESHES if shape != MESHES[2]],
)
def test_eight_devices_equal_one(kind, shape):
    one, eight = run_alone(kind), run(kind, make_student(), sharding.make_mesh(*shape))
    assert_close(one[0], eight[0], rtol=2e-4, atol=1e-5)
    assert_close(one[1], eight[1], rtol=1e-4)


@pytest.mark.slow
def test_microbatches_on_a_mesh_with_adafactor():
    mesh = sharding.make_mesh(2, 2, 2)
    one = run("assisted", make_student(name="adafactor"))
    many = run("assisted", make_student(4, name="adafactor"), mesh)
    assert_close(one[0], many[0], rtol=2e-4, atol=1e-5)


def test_assisted_update_is_the_gradient_of_the_definition():
    batch, w = make_batch(), 0.667
    params, teacher = jax.jit(STUDENT.init)(jax.random.key(0)), jax.jit(TEACHER.init)(jax.random.key(1))

    def logits(model, params):
        hidden, head = labels.hidden_and_head(model, params, batch)
        return hidden @ head

    def mean(params):
        return dense.distillation(
            logits(STUDENT, params), logits(TEACHER, teacher), batch["targets"], batch["mask"],
            weight=w, temperature=0.5, z_loss=1e-3,
        ).mean  # fmt: skip

    value, expected = jax.jit(jax.value_and_grad(mean))(params)
    spy = optax.GradientTransformation(lambda params: params, lambda grads, state, params: (grads, grads))
    student = steps.Student(STUDENT, spy, lambda step: 0.0, z_loss=1e-3)
    state = state_lib.TrainState(jnp.int32(0), params, spy.init(params), {})
    options = {"student": student, "teacher": TEACHER, "schedule": SCHEDULE, "temperature": 0.5}
    step = jax.jit(functools.partial(steps.assisted_step, **options))
    state, metrics = step(state, batch, {"teacher": teacher})
    assert_close(state.opt_state, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"][0] / metrics["loss"][1], value, rtol=1e-5)


def test_an_identical_teacher_has_no_divergence():
    params = jax.jit(STUDENT.init)(jax.random.key(0))
    student = make_student()
    state = state_lib.TrainState(jnp.int32(0), params, student.optimizer.init(params), {})
    options = {"student": student, "teacher": STUDENT, "schedule": SCHEDULE, "temperature": 1.0}
    step = jax.jit(functools.partial(steps.assisted_step, **options))
    _, metrics = step(state, make_batch(), {"teacher": params})
    assert abs(float(metrics["distillation_kl"][0])) < 1e-4
    np.testing.assert_allclose(metrics["cross_entropy"][0], metrics["teacher_cross_entropy"][0], rtol=1e-6)


def test_masked_positions_change_nothing():
    student, batch = make_student(), make_batch()
    params = jax.jit(STUDENT.init)(jax.random.key(0))
    state = state_lib.TrainState(jnp.int32(0), params, student.optimizer.init(params), {})
    other = dict(batch, targets=np.where(batch["mask"] > 0, batch["targets"], VOCAB - 1))
    step = jax.jit(functools.partial(steps.plain_step, student=student))
    (a, _), (b, _) = step(state, batch), step(state, other)
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)


def test_a_batch_without_targets_changes_no_moment():
    student = make_student()
    params = jax.jit(STUDENT.init)(jax.random.key(0))
    state = state_lib.TrainState(jnp.int32(0), params, student.optimizer.init(params), {})
    batch = make_batch() | {"mask": np.zeros((ROWS, LENGTH), np.float32)}
    after, metrics = steps.plain_step(state, batch, student=student)
    assert float(metrics["loss"][0]) == 0 and float(metrics["grad_norm"][0]) == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after.params))


def test_eval_step_sums_rows():
    params, batch = STUDENT.init(jax.random.key(0)), make_batch()
    sums = steps.eval_step(params, batch, model=STUDENT, block_bytes=2**20)
    hidden, head = labels.hidden_and_head(STUDENT, params, batch)
    logp = jax.nn.log_softmax(hidden @ head)
    loss = -np.take_along_axis(np.asarray(logp), batch["targets"][..., None], -1)[..., 0]
    np.testing.assert_allclose(sums["cross_entropy"], (loss * batch["mask"]).sum(1), rtol=1e-5)
    np.testing.assert_array_equal(sums["tokens"], batch["mask"].sum(1))
    hits = (np.asarray(logp).argmax(-1) == batch["targets"]) * batch["mask"]
    np.testing.assert_array_equal(sums["correct"], hits.sum(1))

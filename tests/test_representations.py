"""LET's loss: values and gradients against a definition in float64, under any mask, and its layers and maps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_steps import STUDENT, TEACHER, VOCAB, make_batch, make_student

from slm_assist import compiled as compiled_lib
from slm_assist import optim, sharding, steps
from slm_assist import state as state_lib
from slm_assist.assist import labels, representations
from slm_assist.assist.representations import EARLY, FINAL, Align
from slm_assist.assist.schedule import assist_schedule
from slm_assist.errors import UserError
from slm_assist.models import ModelConfig, Transformer

LAMBDA = 0.3
DEEP = Transformer(
    ModelConfig(vocab_size=VOCAB, num_layers=3, d_model=16, d_ff=16, num_heads=2, num_kv_heads=2, head_dim=8)
)
FLAT = Transformer(
    ModelConfig(
        vocab_size=VOCAB, num_layers=3, d_model=8, d_ff=16, num_heads=1, num_kv_heads=1, head_dim=8, scan_layers=False
    )
)


def draw(seed: int, width: int, guide_width: int, projects: bool, dtype=np.float64):
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 9, 2))
    student = rng.normal(size=(*shape, width)).astype(dtype)
    guide = rng.normal(size=(*shape, guide_width)).astype(dtype) * 10.0 ** rng.integers(-3, 4)
    mask = rng.integers(0, 2, shape) * rng.uniform(0.2, 2, shape)
    kernel = rng.normal(size=(width, guide_width)).astype(dtype) if projects else None
    return student, guide, mask, kernel


def definition(student, guide, mask, kernel):
    """(sum of mask (1 - cos), sum of mask cos, its gradients), token by token, in float64."""
    total, cosines = 0.0, 0.0
    dstudent, dkernel = np.zeros_like(student), None if kernel is None else np.zeros_like(kernel)
    for at in np.argwhere(mask):
        b, t = at
        a = student[b, t] if kernel is None else student[b, t] @ kernel
        width = min(len(a), len(guide[b, t]))
        a, g = a[:width], guide[b, t][:width]
        length = np.sqrt(a @ a)
        cosine = a @ g / length / np.sqrt(g @ g)
        da = -mask[b, t] * (g / np.sqrt(g @ g) - cosine * a / length) / length
        total, cosines = total + mask[b, t] * (1 - cosine), cosines + mask[b, t] * cosine
        if kernel is None:
            dstudent[b, t, :width] = da
        else:
            dstudent[b, t], dkernel[:] = kernel @ da, dkernel + np.outer(student[b, t], da)
    return total, cosines, dstudent, dkernel


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("projects, width, guide_width", [(True, 12, 5), (True, 4, 9), (False, 12, 5), (False, 4, 9)])
def test_the_loss_and_its_gradients_are_those_of_the_definition(seed, projects, width, guide_width):
    student, guide, mask, kernel = draw(seed, width, guide_width, projects)
    total, cosines, dstudent, dkernel = definition(student, guide, mask, kernel)

    def loss(student, kernel):
        found = representations.let(student, guide.astype(np.float32), mask.astype(np.float32), kernel)
        return found.total, found

    single = jax.tree.map(np.float32, (student, kernel))
    (_, found), grads = jax.value_and_grad(loss, argnums=(0, 1) if projects else 0, has_aux=True)(*single)
    np.testing.assert_allclose(found.total, total, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(found.parts["cosine"], cosines, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(found.weight, mask.sum(), rtol=1e-6)
    expected = (dstudent, dkernel) if projects else dstudent
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=5e-5, atol=2e-5), grads, expected)


def test_masked_positions_change_nothing_whatever_they_hold():
    student, guide, mask, kernel = draw(0, 6, 4, True, np.float32)
    assert (mask == 0).any() and (mask > 0).any()
    gradient = jax.value_and_grad(lambda *given: representations.let(*given[:2], mask, given[2]).total, argnums=(0, 2))
    clean = gradient(student, guide, kernel)
    for rubbish in (np.nan, np.inf, 0.0):
        dirty = [np.where((mask == 0)[..., None], rubbish, x).astype(np.float32) for x in (student, guide)]
        jax.tree.map(np.testing.assert_array_equal, gradient(*dirty, kernel), clean)
    per_token = representations.let(student, guide, mask, kernel, per_token=True)
    assert (np.asarray(per_token.total)[mask == 0] == 0).all() and per_token.total.shape == mask.shape


def test_a_vector_of_no_length_has_no_direction():
    student, guide = np.zeros((1, 2, 3), np.float32), np.ones((1, 2, 3), np.float32)
    value, grad = jax.value_and_grad(lambda x: representations.let(x, guide, np.ones((1, 2))).total)(student)
    assert value == 2.0 and not np.asarray(grad).any()


def test_bfloat16_sums_in_float32():
    student, guide, mask, _ = draw(1, 64, 64, False, np.float32)
    half = [jnp.asarray(x, jnp.bfloat16) for x in (student, guide)]
    exact = [np.asarray(x, np.float64) for x in half]
    found = representations.let(*half, mask)
    assert found.total.dtype == jnp.float32
    np.testing.assert_allclose(found.total, definition(*exact, mask, None)[0], rtol=2e-6)


def test_layers():
    assert representations.layers(DEEP.config, EARLY, TEACHER.config, FINAL) == (0, FINAL)
    assert representations.layers(DEEP.config, 2, TEACHER.config, 0) == (2, 0)
    for layers, words in {
        (3, FINAL): "represent.student_layer=3: the student",
        (0, 1): "represent.helper_layer=1",
    }.items():
        with pytest.raises(UserError, match=words):
            representations.layers(DEEP.config, layers[0], TEACHER.config, layers[1])
    for arguments in (
        (np.ones((2, 3, 4)), np.ones((2, 3, 4)), np.ones((2, 4))),
        (np.ones((2, 3, 4)), np.ones((2, 3, 5)), np.ones((2, 3)), np.ones((5, 4))),
    ):
        with pytest.raises(UserError, match="fit|lead"):
            representations.let(*arguments)


def make_align(guide=TEACHER, map_name="projection", role="guide", **more) -> Align:
    schedule = assist_schedule("constant", weight=LAMBDA)
    optimizer = optim.make_optimizer("adamw", optim.learning_rate("constant", peak=1e-2, steps=10), axes=("embed", "x"))
    return Align(guide, schedule, **{"student_layer": 0} | more, map=map_name, optimizer=optimizer, role=role)


@functools.cache
def parameters(model, seed):
    return jax.jit(model.init)(jax.random.key(seed))


def start(student: steps.Student, align: Align, mesh) -> state_lib.TrainState:
    def init():
        assist = {"stage1_steps": jnp.int32(5)}
        if align.map == "projection":
            widths = student.model.config.d_model, align.guide.config.d_model
            assist["map"] = representations.init_map(jax.random.key(7), *widths, align.optimizer)
        return state_lib.init(student.model, student.optimizer, 0, assist)

    layout = state_lib.state_shardings(student.model, student.optimizer, jax.eval_shape(init).assist, mesh)
    return jax.jit(init, out_shardings=layout)()


def updated(align: Align, student: steps.Student, mesh=None, kind="plain", updates=2):
    """State and metrics after some updates."""
    mesh = mesh or sharding.make_mesh(1, 1, 1)
    state, whole = start(student, align, mesh), sharding.replicated(mesh)
    helpers = {"guide": parameters(align.guide, 1), "teacher": parameters(TEACHER, 1)}
    step = functools.partial(steps.plain_step, student=student, align=align)
    if kind == "assisted":
        schedule = assist_schedule("constant", weight=0.5)
        step = functools.partial(
            steps.assisted_step, student=student, teacher=TEACHER, schedule=schedule, temperature=1.0, align=align
        )
    with jax.set_mesh(mesh):
        step = jax.jit(step)
        helpers = jax.device_put(helpers, whole)
        for seed in range(updates):
            state, metrics = step(state, jax.device_put(make_batch(seed), sharding.batch_sharding(mesh)), helpers)
    return jax.device_get((state.params, state.assist)), jax.device_get(metrics)


def assert_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.mark.parametrize("map_name", ["projection", pytest.param("truncate", marks=pytest.mark.slow)])
def test_the_update_is_the_gradient_of_both_losses(map_name):
    align, student, batch = make_align(map_name=map_name), make_student(), make_batch()
    state = start(student, align, sharding.make_mesh(1, 1, 1))
    guide = labels.hidden_and_head(TEACHER, parameters(TEACHER, 1), batch)[0]

    def mean(params, kernel):
        view = labels.see(STUDENT, params, batch, (0,))
        hard = labels.next_token_loss(STUDENT, view, batch, batch["mask"])
        a = view.tapped[0] if kernel is None else view.tapped[0] @ kernel
        width = min(a.shape[-1], guide.shape[-1])
        a, b = a[..., :width], guide[..., :width]
        cosine = (a * b).sum(-1) / jnp.linalg.norm(a, axis=-1) / jnp.linalg.norm(b, axis=-1)
        return hard.mean + LAMBDA * (batch["mask"] * (1 - cosine)).sum() / batch["mask"].sum()

    kernel = state.assist["map"].kernel if map_name == "projection" else None
    grads = jax.jit(jax.grad(mean, argnums=(0, 1) if kernel is not None else 0))(state.params, kernel)
    (params, assist), metrics = updated(align, student, updates=1)
    dparams, dkernel = grads if kernel is not None else (grads, None)
    np.testing.assert_allclose(metrics["grad_norm"][0], optax_norm(dparams), rtol=1e-4)
    update, _ = student.optimizer.update(dparams, state.opt_state, state.params)
    assert_close(params, jax.tree.map(jnp.add, state.params, update), rtol=1e-4, atol=1e-6)
    if kernel is not None:  # Adam's first update is the sign of the gradient
        moved = np.asarray(assist["map"].kernel - kernel)
        clear = np.abs(dkernel) > 1e-5
        assert clear.mean() > 0.9
        np.testing.assert_array_equal(np.sign(moved)[clear], -np.sign(dkernel)[clear])


def optax_norm(tree) -> float:
    return float(np.sqrt(sum((np.asarray(x, np.float64) ** 2).sum() for x in jax.tree.leaves(tree))))


@pytest.mark.parametrize("shape, microbatches", [pytest.param((8, 1, 1), 1, marks=pytest.mark.slow), ((2, 2, 2), 2)])
def test_any_mesh_and_microbatches_give_the_same(shape, microbatches):
    align = make_align()
    one, one_metrics = updated(align, make_student())
    many, many_metrics = updated(align, make_student(microbatches), sharding.make_mesh(*shape))
    assert_close(one, many, rtol=2e-4, atol=1e-5)
    np.testing.assert_allclose(one_metrics["cosine"], many_metrics["cosine"], rtol=1e-4)


def test_one_forward_pass_serves_soft_labels_and_representations():
    student = make_student()
    apart, shared = (updated(make_align(role=role), student, kind="assisted") for role in ("guide", "teacher"))
    assert_close(apart, shared, rtol=1e-5, atol=1e-6)

    helpers = {"teacher": TEACHER.shapes(), "guide": TEACHER.shapes()}

    def flops(align):
        state = jax.eval_shape(lambda: start(student, align, sharding.make_mesh(1, 1, 1)))
        schedule = assist_schedule("constant")
        options = {"student": student, "teacher": TEACHER, "schedule": schedule, "temperature": 1.0, "align": align}
        step = jax.jit(functools.partial(steps.assisted_step, **options))
        return compiled_lib.flops(step.lower(state, make_batch(), helpers).compile())

    one_pass = jax.jit(lambda params: labels.frozen_hidden(TEACHER, params, make_batch())[0])
    one_pass = compiled_lib.flops(one_pass.lower(helpers["guide"]).compile())
    assert flops(make_align()) - flops(make_align(role="teacher")) == one_pass > 0


def test_an_inner_layer_of_the_guide():
    """Of an unrolled model the layers behind it are not computed."""
    batch, params = make_batch(), parameters(FLAT, 2)
    _, tapped = labels.hidden_states(FLAT, params, batch, (0, 1, 2))
    for layer in (0, 2):
        align = make_align(FLAT, guide_layer=layer)
        seen = labels.frozen_hidden(FLAT, params, batch, representations.taps(align))
        np.testing.assert_array_equal(representations.hidden_of(align, seen), tapped[layer])

    def flops(layer):
        align = make_align(FLAT, guide_layer=layer)

        def hidden(params):
            return representations.hidden_of(
                align, labels.frozen_hidden(FLAT, params, batch, representations.taps(align))
            )

        return compiled_lib.flops(jax.jit(hidden).lower(params).compile())

    assert 3 * flops(0) == flops(2) == flops(FINAL)

"""Dense and blocked losses against the float64 reference, and what must hold exactly."""

import jax
import jax.numpy as jnp
import losses_reference as reference
import numpy as np
import pytest

from slm_assist.errors import UserError
from slm_assist.losses import Loss, TokenInfo, blocked, dense

ALL = 2**26
VALUE_TOLERANCE, GRADIENT_TOLERANCE = 2e-5, 2e-5  # relative to the largest entry


def problem(seed, *, batch=3, length=7, d=16, teacher_d=12, vocab=64, dtype=np.float32, sharpness=1.0):
    """Random (hidden, head), (teacher's hidden, head), targets, mask; rounded to `dtype` but numpy float32."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return np.asarray(jnp.asarray(sharpness * rng.standard_normal(shape), dtype), np.float32)

    student = draw(batch, length, d), draw(d, vocab) / np.float32(4)
    teacher = draw(batch, length, teacher_d), draw(teacher_d, vocab) / np.float32(4)
    targets = rng.integers(0, vocab, (batch, length)).astype(np.int32)
    mask = (rng.random((batch, length)) < 0.7).astype(np.float32)
    mask[0, 0] = 1.0
    return student, teacher, targets, mask


def close(actual, expected, tolerance):
    expected = np.asarray(expected, np.float64)
    scale = max(1e-3, np.abs(expected).max(initial=0.0))
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=0, atol=tolerance * scale)


def check(result: Loss, gradient, expected, *, per_token=False, tolerance=GRADIENT_TOLERANCE):
    summed = (lambda x: x) if per_token else np.sum
    close(result.total, summed(expected.total), VALUE_TOLERANCE)
    close(result.weight, summed(expected.weight), 1e-7)
    assert set(result.parts) == set(expected.parts)
    for name, value in expected.parts.items():
        close(result.parts[name], summed(value), 1e-7 if name.endswith("correct") else VALUE_TOLERANCE)
    close(gradient[0], expected.dhidden, tolerance)
    close(gradient[1], expected.dhead, tolerance)


def value_and_grad(fn, *args):
    """fn(*args) -> Loss, and the gradient of the sum of its total with respect to the first two arguments."""

    def total(*args):
        result = fn(*args)
        return jnp.sum(result.total), result

    (_, result), gradient = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(*args)
    return result, gradient


def cap(x, softcap, scale):
    return softcap * jnp.tanh(scale * x / softcap) if softcap else scale * x


SHAPES = {"softcap": 4.0, "logit_scale": 0.6, "teacher_softcap": 3.0, "teacher_logit_scale": 1.7}


def dense_distillation(hidden, head, teacher_hidden, teacher_head, targets, mask, *, weight, temperature, z_loss=0.0,
                       top_k=0, per_token=False, softcap=0.0, logit_scale=1.0, teacher_softcap=0.0,
                       teacher_logit_scale=1.0):  # fmt: skip
    z = cap(jnp.dot(hidden, head, preferred_element_type=jnp.float32), softcap, logit_scale)
    u = cap(jnp.dot(teacher_hidden, teacher_head), teacher_softcap, teacher_logit_scale)
    return dense.distillation(
        z, u, targets, mask, weight=weight, temperature=temperature, top_k=top_k, z_loss=z_loss, per_token=per_token
    )


def weight_of_info(info: TokenInfo):
    """Uses every field; `where` and `tanh` keep it smooth enough for float32."""
    w = 0.3 * jnp.where(info.teacher_loss < info.loss, 1.0, 0.2) + 0.05 * info.entropy
    w += 0.1 * info.top_probability - 0.05 * info.teacher_entropy + 0.2 * info.teacher_top_probability
    return w + 0.01 * jnp.where(info.rank < 5, 1.0, 0.0) + 0.01 * (info.teacher_rank == 0)


def weight_of_descriptions(student, teacher):
    w = 0.3 * (1.0 if teacher.loss < student.loss else 0.2) + 0.05 * student.entropy
    w += 0.1 * student.top_probability - 0.05 * teacher.entropy + 0.2 * teacher.top_probability
    return w + 0.01 * (student.rank < 5) + 0.01 * (teacher.rank == 0)


WEIGHTS = {
    "zero": (0.0, 0.0),
    "scalar": (0.667, 0.667),
    "array": (np.linspace(0, 1, 7, dtype=np.float32),) * 2,
    "column": (np.array([[0.0], [0.4], [1.0]], np.float32),) * 2,
    "function": (weight_of_info, weight_of_descriptions),
}


@pytest.mark.parametrize(
    "weight, temperature, z_loss, shaped, tokens, per_token",
    [
        ("scalar", 1.0, 0.0, False, None, False),
        ("scalar", 0.25, 1e-2, True, 1, False),
        ("array", 4.0, 0.0, False, 4, False),
        ("column", 1.0, 1e-2, True, 10, False),
        ("function", 0.25, 0.0, True, 9, False),
        ("function", 1.0, 0.0, False, None, True),
        ("zero", 4.0, 1e-2, False, 20, False),
        ("array", 0.25, 1e-2, True, None, True),
        ("scalar", 4.0, 0.0, True, 5, True),
    ],
)
def test_distillation_is_the_reference(weight, temperature, z_loss, shaped, tokens, per_token):
    vocab = 64
    student, teacher, targets, mask = problem(7 * len(weight) + int(4 * temperature), vocab=vocab)
    forms = SHAPES if shaped else {}
    weight, reference_weight = WEIGHTS[weight]
    expected = reference.loss(
        *student, targets, mask, teacher, weight=reference_weight, temperature=temperature, z_loss=z_loss, **forms
    )
    options = dict(weight=weight, temperature=temperature, z_loss=z_loss, per_token=per_token, **forms)
    args = (*student, *teacher, targets, mask)
    block_bytes = ALL if tokens is None else tokens * vocab * 4 * 2
    result, gradient = value_and_grad(lambda *a: blocked.distillation(*a, **options, block_bytes=block_bytes), *args)
    check(result, gradient, expected, per_token=per_token)
    result, gradient = value_and_grad(lambda *a: dense_distillation(*a, **options), *args)
    check(result, gradient, expected, per_token=per_token)


@pytest.mark.parametrize("tokens, per_token", [(None, False), (1, False), (8, True), (13, False)])
def test_cross_entropy_is_the_reference(tokens, per_token):
    student, _, targets, mask = problem(3, vocab=48)
    forms = {"softcap": 4.0, "logit_scale": 0.6}
    mask = mask * np.float32(0.5) + (mask > 0)  # weights other than 0 and 1 count too
    expected = reference.loss(*student, targets, mask, z_loss=1e-2, **forms)
    block_bytes = ALL if tokens is None else tokens * 48 * 4
    options = {"z_loss": 1e-2, "per_token": per_token}
    result, gradient = value_and_grad(
        lambda *a: blocked.cross_entropy(*a, **options, **forms, block_bytes=block_bytes), *student, targets, mask
    )
    check(result, gradient, expected, per_token=per_token)
    result, gradient = value_and_grad(
        lambda h, w, y, m: dense.cross_entropy(cap(h @ w, *forms.values()), y, m, **options),
        *student, targets, mask,
    )  # fmt: skip
    check(result, gradient, expected, per_token=per_token)


@pytest.mark.parametrize("seed", range(3))
def test_random_problems(seed):
    rng = np.random.default_rng(100 + seed)
    shape = {
        "batch": int(rng.integers(1, 5)), "length": int(rng.integers(1, 12)), "d": int(rng.integers(1, 20)),
        "teacher_d": int(rng.integers(1, 20)), "vocab": int(rng.integers(2, 90)),
        "sharpness": float(rng.uniform(0.2, 4)),
    }  # fmt: skip
    student, teacher, targets, mask = problem(seed, **shape)
    options = {
        "weight": rng.random(targets.shape).astype(np.float32), "temperature": float(rng.choice([0.25, 1, 4])),
        "z_loss": float(rng.choice([0, 1e-3])), "softcap": float(rng.choice([0, 7.5])),
    }  # fmt: skip
    expected = reference.loss(*student, targets, mask, teacher, **options)
    block_bytes = int(rng.integers(1, 9 * shape["vocab"] * targets.size))
    result, gradient = value_and_grad(
        lambda *a: blocked.distillation(*a, **options, block_bytes=block_bytes), *student, *teacher, targets, mask
    )
    check(result, gradient, expected)


def test_largest_vocabulary():
    student, teacher, targets, mask = problem(5, batch=1, length=3, vocab=262144)
    options = {"weight": 0.5, "temperature": 0.25, "z_loss": 1e-4}
    expected = reference.loss(*student, targets, mask, teacher, **options)
    result, gradient = value_and_grad(
        lambda *a: blocked.distillation(*a, **options, block_bytes=2 * 4 * 262144), *student, *teacher, targets, mask
    )
    check(result, gradient, expected)


@pytest.mark.parametrize("tokens", [None, 6, 2])
def test_bfloat16_inputs(tokens):
    """Values to 1e-4 of the reference on the rounded inputs, gradients to 1 %; in a tile, a group, 3 padded groups."""
    student, teacher, targets, mask = problem(11, dtype=jnp.bfloat16)
    expected = reference.loss(*student, targets, mask, teacher, weight=0.6, temperature=0.5, z_loss=1e-3)
    hidden, teacher_hidden = (jnp.asarray(x, jnp.bfloat16) for x in (student[0], teacher[0]))
    result, gradient = value_and_grad(
        lambda *a: blocked.distillation(
            *a, weight=0.6, temperature=0.5, z_loss=1e-3, block_bytes=ALL if tokens is None else tokens * 512
        ),
        hidden, student[1], teacher_hidden, teacher[1], targets, mask,
    )  # fmt: skip
    assert gradient[0].dtype == jnp.bfloat16 and gradient[1].dtype == jnp.float32
    assert result.total.dtype == jnp.float32
    close(result.total, expected.total.sum(), 1e-4)
    close(result.parts["distillation_kl"], expected.parts["distillation_kl"].sum(), 1e-4)
    close(gradient[0], expected.dhidden, 1e-2)
    close(gradient[1], expected.dhead, 1e-2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("tokens", [None, 4])
def test_identical_models_have_no_divergence(dtype, tokens):
    student, _, targets, mask = problem(2, sharpness=3.0)
    hidden, head = jnp.asarray(student[0], dtype), jnp.asarray(student[1])
    block_bytes = ALL if tokens is None else tokens * 64 * 8
    loss = jax.jit(
        lambda h, th: blocked.distillation(
            h, head, th, head, targets, mask, weight=1.0, block_bytes=block_bytes, per_token=True
        )
    )(hidden, jnp.array(hidden))
    np.testing.assert_array_equal(loss.parts["distillation_kl"], 0.0)
    np.testing.assert_array_equal(loss.parts["teacher_correct"], loss.parts["correct"])
    z = jnp.dot(hidden, head.astype(dtype))
    same = dense.distillation(z, z, targets, mask, weight=1.0)
    np.testing.assert_array_equal(same.parts["distillation_kl"], 0.0)


def test_no_weight_is_cross_entropy():
    student, teacher, targets, mask = problem(6)
    for block_bytes in (ALL, 5 * 64 * 8):
        plain, gradient = value_and_grad(
            lambda *a, n=block_bytes: blocked.cross_entropy(*a, block_bytes=n), *student, targets, mask
        )
        mixed, mixed_gradient = value_and_grad(
            lambda *a, n=block_bytes: blocked.distillation(*a, weight=0.0, block_bytes=n),
            *student, *teacher, targets, mask,
        )  # fmt: skip
        for name in plain.parts:
            close(mixed.parts[name], plain.parts[name], 1e-6)
        close(mixed.total, plain.total, 1e-6)
        for a, b in zip(gradient, mixed_gradient, strict=True):
            close(b, a, 1e-6)


@pytest.mark.parametrize("form", ["array", "function", "per token"])
def test_masked_values_change_nothing_blocked(form):
    student, teacher, targets, mask = problem(8)
    weights = np.random.default_rng(0).random(mask.shape).astype(np.float32)

    def loss(hidden, head, teacher_hidden, targets, weights, mask):
        return blocked.distillation(
            hidden, head, teacher_hidden, teacher[1], targets, mask, temperature=0.5, z_loss=1e-2,
            weight=weight_of_info if form == "function" else weights, per_token=form == "per token", block_bytes=2048,
        )  # fmt: skip

    clean = value_and_grad(loss, *student, teacher[0], targets, weights, mask)
    gone = mask == 0
    bad_hidden = np.where(gone[..., None], np.nan, student[0])
    bad_teacher = np.where(gone[..., None], np.inf, teacher[0])
    bad_targets, bad_weights = np.where(gone, 10**6, targets), np.where(gone, np.nan, weights)
    for same_mask in (mask, mask > 0):
        dirty = value_and_grad(loss, bad_hidden, student[1], bad_teacher, bad_targets, bad_weights, same_mask)
        jax.tree.map(np.testing.assert_array_equal, clean, dirty)


@pytest.mark.parametrize("form", ["array", "function"])
def test_masked_values_change_nothing_dense(form):
    student, teacher, targets, mask = problem(8)
    z, u = student[0] @ student[1], teacher[0] @ teacher[1]
    weights = np.random.default_rng(0).random(mask.shape).astype(np.float32)

    def loss(z, u, targets, weights, mask):
        w = weight_of_info if form == "function" else weights
        return dense.distillation(z, u, targets, mask, weight=w, temperature=0.5, z_loss=1e-2)

    clean = value_and_grad(loss, z, u, targets, weights, mask)
    assert np.abs(clean[1][0]).max() > 0 and np.abs(clean[1][1]).max() == 0
    gone = mask == 0
    bad_z, bad_u = np.where(gone[..., None], np.nan, z), np.where(gone[..., None], -np.inf, u)
    bad_targets, bad_weights = np.where(gone, -7, targets), np.where(gone, np.nan, weights)
    for same_mask in (mask, mask > 0):
        dirty = value_and_grad(loss, bad_z, bad_u, bad_targets, bad_weights, same_mask)
        jax.tree.map(np.testing.assert_array_equal, clean, dirty)


def test_target_outside_the_vocabulary_is_nan_where_it_counts():
    student, _, targets, mask = problem(9)
    targets[0, 0] = 64
    for loss in (
        blocked.cross_entropy(*student, targets, mask),
        dense.cross_entropy(student[0] @ student[1], targets, mask),
    ):
        assert np.isnan(loss.total) and np.isfinite(loss.parts["correct"])
    stats = blocked.token_stats(*student, targets)
    assert np.isnan(stats.loss[0, 0]) and stats.rank[0, 0] == 64


@pytest.mark.parametrize("per_token", [False, True])
def test_all_masked(per_token):
    student, teacher, targets, mask = problem(4)

    def mean(hidden, head):
        args = hidden, head, *teacher, targets, 0 * mask
        loss = blocked.distillation(*args, weight=0.5, z_loss=1e-3, block_bytes=2048, per_token=per_token)
        return loss.mean + dense.cross_entropy(hidden @ head, targets, 0 * mask, per_token=per_token).mean

    value, gradient = jax.jit(jax.value_and_grad(mean, (0, 1)))(*student)
    assert value == 0
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), gradient)


def test_mean_is_the_gradient_of_the_mean():
    student, _, targets, mask = problem(14)
    expected = reference.loss(*student, targets, mask)
    tokens = mask.sum()
    for per_token in (False, True):
        fn = lambda *a, p=per_token: blocked.cross_entropy(*a, targets, mask, per_token=p).mean  # noqa: E731
        value, gradient = jax.value_and_grad(fn, (0, 1))(*student)
        close(value, expected.total.sum() / tokens, VALUE_TOLERANCE)
        close(gradient[0], expected.dhidden / tokens, GRADIENT_TOLERANCE)
        close(gradient[1], expected.dhead / tokens, GRADIENT_TOLERANCE)


def test_per_token_cotangents():
    """Any function of the terms differentiates, not only their sum."""
    student, teacher, targets, mask = problem(15)
    factors = np.random.default_rng(1).standard_normal(mask.shape).astype(np.float32)
    expected = reference.loss(*student, targets, mask, teacher, weight=0.3)
    scaled = reference.loss(*student, targets, mask * 2 * expected.total * factors, teacher, weight=0.3)

    def fn(hidden, head):
        loss = blocked.distillation(
            hidden, head, *teacher, targets, mask, weight=0.3, per_token=True, block_bytes=5 * 512
        )
        return jnp.sum(factors * loss.total**2)

    gradient = jax.jit(jax.grad(fn, (0, 1)))(*student)
    close(gradient[0], scaled.dhidden, GRADIENT_TOLERANCE)
    close(gradient[1], scaled.dhead, GRADIENT_TOLERANCE)


@pytest.mark.parametrize("tokens", [None, 5])
def test_token_stats(tokens):
    """Small integers: the logits are exact in float32 and full of ties."""
    rng = np.random.default_rng(0)
    hidden = rng.integers(-1, 2, (4, 6, 3)).astype(np.float32)
    head = rng.integers(-2, 3, (3, 40)).astype(np.float32)
    targets = rng.integers(0, 40, (4, 6)).astype(np.int32)
    stats = blocked.token_stats(hidden, head, targets, block_bytes=ALL if tokens is None else tokens * 160)
    z = hidden.astype(np.float64) @ head
    assert stats.rank.dtype == jnp.int32 and stats.loss.dtype == jnp.float32
    for at in np.ndindex(targets.shape):
        assert stats.rank[at] == reference.rank(z[at], targets[at])
        np.testing.assert_allclose(stats.loss[at], -reference.log_softmax(z[at])[targets[at]], rtol=1e-5, atol=1e-5)
        top = jax.lax.top_k(jnp.asarray(z[at], jnp.float32), 10)[1]
        assert (stats.rank[at] < 10) == (targets[at] in np.asarray(top))
    loss = blocked.cross_entropy(hidden, head, targets, np.ones_like(targets, np.float32), per_token=True)
    np.testing.assert_array_equal(loss.parts["correct"], z.argmax(-1) == targets)
    np.testing.assert_array_equal(dense.rank(jnp.asarray(z, jnp.float32), targets), stats.rank)


def test_only_the_student_gets_a_gradient():
    student, teacher, targets, mask = problem(16)
    weights = np.full(mask.shape, 0.5, np.float32)

    for weight in (None, weight_of_info):

        def loss(hidden, head, teacher_hidden, teacher_head, mask, weights, weight=weight):
            return blocked.distillation(
                hidden, head, teacher_hidden, teacher_head, targets, mask, weight=weight or weights, block_bytes=2048
            )

        args = (*student, *teacher, mask, weights)
        gradient = jax.jit(jax.grad(lambda *a: loss(*a).mean, range(6)))(*args)
        assert all(np.abs(g).max() > 0 for g in gradient[:2])
        assert all(np.abs(g).max() == 0 for g in gradient[2:])
        parts = jax.jit(jax.grad(lambda *a: sum(loss(*a).parts.values()), (0, 1)))(*args)
        assert all(np.abs(g).max() == 0 for g in parts)


def test_weight_may_be_traced():
    student, teacher, targets, mask = problem(17)
    expected = reference.loss(*student, targets, mask, teacher, weight=0.4)

    @jax.jit
    def gradients(w):
        args = (*teacher, targets, mask)
        closed = [w, lambda info: w * jnp.ones_like(info.loss), lambda info: w]
        return [
            jax.grad(lambda h, p, w=w: blocked.distillation(h, p, *args, weight=w, block_bytes=2048).total, (0, 1))(
                *student
            )
            for w in closed
        ]

    for gradient in gradients(0.4):
        close(gradient[0], expected.dhidden, GRADIENT_TOLERANCE)
        close(gradient[1], expected.dhead, GRADIENT_TOLERANCE)


def test_misfits_are_named():
    student, teacher, targets, mask = problem(0)
    with pytest.raises(UserError, match="teacher_head"):
        blocked.distillation(*student, teacher[0], teacher[1][:, :50], targets, mask, weight=0.5)
    with pytest.raises(UserError, match="mask"):
        blocked.cross_entropy(*student, targets, mask[:, :3])
    with pytest.raises(UserError, match="hidden"):
        blocked.cross_entropy(student[0][:, 1:], student[1], targets, mask)
    with pytest.raises(UserError, match="temperature"):
        blocked.distillation(*student, *teacher, targets, mask, weight=0.5, temperature=0.0)

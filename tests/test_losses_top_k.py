"""Soft labels of the teacher's k likeliest tokens, and ranks, against sorting in float64."""

import jax
import jax.numpy as jnp
import losses_reference as reference
import numpy as np
import pytest
from test_losses import ALL, SHAPES, WEIGHTS, check, close, dense_distillation, problem, value_and_grad

from slm_assist import sharding
from slm_assist.errors import UserError
from slm_assist.losses import blocked, dense, distribution


def integers(seed, *, batch=4, length=6, vocab=64):
    """As `problem`, with logits that are small integers, exact in float32 and full of ties."""
    rng = np.random.default_rng(seed)
    models = [
        (rng.integers(-1, 2, (batch, length, 3)).astype(np.float32), rng.integers(-2, 3, (3, vocab)).astype(np.float32))
        for _ in range(2)
    ]
    mask = np.ones((batch, length), np.float32)
    mask[-1, -2:] = 0
    return *models, rng.integers(0, vocab, (batch, length)).astype(np.int32), mask


@pytest.mark.parametrize(
    "top_k, weight, temperature, shaped, tokens, per_token",
    [
        (1, "scalar", 1.0, False, None, False),
        (3, "array", 0.25, True, 4, False),
        (10, "function", 4.0, False, 9, False),
        (63, "scalar", 0.25, True, 5, True),
    ],
)
def test_distillation_is_the_reference(top_k, weight, temperature, shaped, tokens, per_token):
    vocab, forms = 64, SHAPES if shaped else {}
    student, teacher, targets, mask = problem(top_k, vocab=vocab)
    weight, reference_weight = WEIGHTS[weight]
    options = {"temperature": temperature, "top_k": top_k, "z_loss": 1e-2} | forms
    expected = reference.loss(*student, targets, mask, teacher, weight=reference_weight, **options)
    options |= {"weight": weight, "per_token": per_token}
    args = (*student, *teacher, targets, mask)
    block_bytes = ALL if tokens is None else tokens * vocab * 8
    result, gradient = value_and_grad(lambda *a: blocked.distillation(*a, **options, block_bytes=block_bytes), *args)
    check(result, gradient, expected, per_token=per_token)
    result, gradient = value_and_grad(lambda *a: dense_distillation(*a, **options), *args)
    check(result, gradient, expected, per_token=per_token)


@pytest.mark.parametrize("top_k", [1, 2, 10, 31])
def test_ties_go_to_the_lower_index(top_k):
    student, teacher, targets, mask = integers(0)
    expected = reference.loss(*student, targets, mask, teacher, weight=0.8, top_k=top_k)
    for fn in (blocked.distillation, dense_distillation):
        result, gradient = value_and_grad(
            lambda *a, fn=fn: fn(*a, weight=0.8, temperature=1.0, top_k=top_k), *student, *teacher, targets, mask
        )
        check(result, gradient, expected)


@pytest.mark.parametrize("shape, top_k", [((2, 1, 4), 5), ((1, 1, 8), 5), ((1, 1, 8), 20), ((2, 2, 2), 33)])
@pytest.mark.parametrize("make", [integers, problem])
def test_sharded_is_the_reference(make, shape, top_k):
    """20 is more than a shard of 8 has; the integers tie across shards."""
    student, teacher, targets, mask = make(1, batch=4, vocab=64)
    options = {"weight": 0.7, "temperature": 0.5, "top_k": top_k}
    expected = reference.loss(*student, targets, mask, teacher, **options)
    with jax.set_mesh(sharding.make_mesh(*shape)):
        result, gradient = value_and_grad(
            lambda *a: blocked.distillation(*a, **options, block_bytes=3 * 64 * 8), *student, *teacher, targets, mask
        )
    check(result, gradient, expected)


def test_largest_vocabulary():
    student, teacher, targets, mask = problem(5, batch=1, length=2, vocab=262144)
    options = {"weight": 0.5, "temperature": 0.5, "top_k": 20}
    expected = reference.loss(*student, targets, mask, teacher, **options)
    result, gradient = value_and_grad(lambda *a: blocked.distillation(*a, **options), *student, *teacher, targets, mask)
    check(result, gradient, expected)


@pytest.mark.parametrize("vocab, k", [(2048, 10), (1000, 3), (517, 4), (256, 2), (130, 1), (31, 5), (64, 64)])
@pytest.mark.parametrize("levels, largest", [(3, 3), (1000, 1000), (3, 0)])
def test_kth_largest_is_that_of_sorting(vocab, k, levels, largest):
    """By groups and without, with entries left over, many ties and few, and zeros of both signs on top."""
    rng = np.random.default_rng(vocab)
    x = rng.integers(-levels, largest + 1, (9, vocab)).astype(np.float32) * rng.choice([-0.0, 1.0], (9, vocab))
    x = x.astype(np.float32)
    value, index = jax.jit(lambda x: distribution.kth_largest(distribution.without_negative_zeros(x), k))(x)
    order = np.argsort(-x, axis=-1, kind="stable")[:, k - 1]
    np.testing.assert_array_equal(index, order)
    np.testing.assert_array_equal(value, np.take_along_axis(x, order[:, None], 1)[:, 0])


def test_all_tokens_are_no_truncation():
    student, teacher, targets, mask = problem(6)
    args = (*student, *teacher, targets, mask)
    for fn in (blocked.distillation, dense_distillation):
        both = [value_and_grad(lambda *a, k=k, fn=fn: fn(*a, weight=0.6, temperature=0.5, top_k=k), *args)
                for k in (0, 64)]  # fmt: skip
        jax.tree.map(np.testing.assert_array_equal, *both)


def test_divergence_of_identical_models_is_what_truncation_leaves_out():
    student, _, targets, mask = problem(2, sharpness=2.0)
    loss = blocked.distillation(*student, *student, targets, mask, weight=1.0, top_k=3, per_token=True)
    p = np.exp(reference.log_softmax(student[0][0, 0].astype(np.float64) @ student[1]))
    close(loss.parts["distillation_kl"][0, 0], -np.log(np.sort(p)[-3:].sum()), 1e-5)


def test_what_is_left_out_may_be_infinite():
    """A student that excludes tokens the teacher does not name has a finite loss, and so has its gradient."""
    student, teacher, targets, mask = problem(7)
    z, u = student[0] @ student[1], teacher[0] @ teacher[1]
    top = np.argsort(-u, axis=-1, kind="stable")[..., :3]
    targets = top[..., 0].astype(np.int32)
    z[np.broadcast_to(np.arange(64) == 5, z.shape) & ~(top == 5).any(-1, keepdims=True)] = -np.inf
    result, gradient = value_and_grad(
        lambda z, u: dense.distillation(z, u, targets, mask, weight=0.5, top_k=3), jnp.asarray(z), jnp.asarray(u)
    )
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((result, gradient)))
    sharp, gradient = value_and_grad(
        lambda *a: blocked.distillation(*a, weight=0.5, temperature=1e-4, top_k=3), *student, *teacher, targets, mask
    )
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((sharp, gradient)))


def test_means_leave_out_what_is_infinite():
    logits = jnp.array([[3.0, 1.0, 2.0, 1.0]])
    (whole,) = distribution.distributions([logits], jnp.array([0]), distribution.Span())
    soft = whole.tempered(0.5, 3)
    q = np.exp(reference.log_softmax(np.array([6.0, 2.0, 4.0])))
    normaliser, product = soft.products(jnp.array([[1.0, -2.0, 5.0, -jnp.inf]]))
    mean = product / normaliser
    np.testing.assert_allclose(mean, [q @ [1, -2, 5]], rtol=1e-6)


def test_masked_values_change_nothing():
    student, teacher, targets, mask = problem(8)

    def loss(hidden, head, teacher_hidden):
        return blocked.distillation(hidden, head, teacher_hidden, teacher[1], targets, mask, weight=0.5, top_k=4)

    gone = (mask == 0)[..., None]
    clean = value_and_grad(loss, *student, teacher[0])
    dirty = value_and_grad(loss, np.where(gone, np.nan, student[0]), student[1], np.where(gone, np.inf, teacher[0]))
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)


@pytest.mark.parametrize("top_k", [65, -1])
def test_mistakes_are_named(top_k):
    student, teacher, targets, mask = problem(0)
    for fn in (blocked.distillation, dense_distillation):
        with pytest.raises(UserError, match=f"assist.top_k={top_k}: .* 64 tokens"):
            fn(*student, *teacher, targets, mask, weight=0.5, temperature=1.0, top_k=top_k)


@pytest.mark.parametrize("vocab", [262144, 50257])
def test_token_stats_of_large_vocabularies(vocab):
    """Ties in the thousands, and a size that does not divide into runs."""
    (hidden, head), _, targets, _ = integers(3, batch=1, length=4, vocab=vocab)
    stats = blocked.token_stats(hidden, head, targets)
    z = hidden.astype(np.float64) @ head
    for at in np.ndindex(targets.shape):
        assert stats.rank[at] == reference.rank(z[at], targets[at])
        np.testing.assert_allclose(stats.loss[at], -reference.log_softmax(z[at])[targets[at]], rtol=1e-6)

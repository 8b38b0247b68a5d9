"""Blocked soft labels whose teacher's head, or whose weight, is somebody's function."""

import functools
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import losses_reference as reference
import numpy as np
import pytest
from test_losses import check, problem, value_and_grad, weight_of_descriptions, weight_of_info
from test_losses_sharded import equations, same
from test_steps import STUDENT, make_batch

from slm_assist import sharding
from slm_assist.assist import labels, own_teacher, token_weight
from slm_assist.errors import UserError
from slm_assist.losses import blocked, dense

VOCAB, KINDS = 64, 9
CASES = {  # weight, temperature, top_k, tokens in a tile, per_token
    "scalar": (0.667, 1.0, 0, 4, False),
    "sharp": (0.5, 0.25, 0, None, True),
    "top": (0.8, 2.0, 5, 6, False),
    "function": (weight_of_info, 0.5, 0, 9, False),
}


@functools.cache
def tables():
    """(student, its targets and mask, which row of a table each token reads, the table): row 0 is for masked tokens."""
    student, _, targets, mask = problem(5, batch=8, length=6, vocab=VOCAB)
    rng = np.random.default_rng(0)
    table = 2 * rng.standard_normal((KINDS, VOCAB)).astype(np.float32)
    row = np.where(mask > 0, rng.integers(1, KINDS, mask.shape), KINDS + 5).astype(np.int32)[..., None]
    return student, targets, mask, row, table


def ask(hidden, head, row, table, targets, mask, weight=0.667, temperature=1.0, top_k=0, tokens=4, per_token=False):
    """The loss where the table answers; it is traced, and what it says of row 0 is no number."""

    def answers(table, row_Nx1):
        assert row_Nx1.ndim == 2 and row_Nx1.dtype == jnp.int32
        return table.at[0].set(jnp.nan)[row_Nx1[:, 0]]

    answers = jax.tree_util.Partial(answers, table)
    block_bytes = tokens and tokens * VOCAB * 8
    return blocked.distillation(
        hidden, head, row, answers, targets, mask, weight=weight, temperature=temperature, top_k=top_k, z_loss=1e-2,
        block_bytes=block_bytes, per_token=per_token,
    )  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_head_that_is_a_function_is_the_reference_and_dense(case):
    (hidden, head), targets, mask, row, table = tables()
    weight, temperature, top_k, tokens, per_token = CASES[case]
    options = {"temperature": temperature, "top_k": top_k}
    one_hot = np.eye(2 * KINDS)[row[..., 0]][..., :KINDS]
    expected = reference.loss(
        hidden, head, targets, mask, (one_hot, table), z_loss=1e-2, **options,
        weight=weight_of_descriptions if callable(weight) else weight,
    )  # fmt: skip
    run = functools.partial(ask, weight=weight, tokens=tokens, per_token=per_token, **options)
    found, gradient = value_and_grad(run, hidden, head, row, table, targets, mask)
    check(found, gradient, expected, per_token=per_token)

    def whole(hidden, head):
        logits = table[np.minimum(row[..., 0], KINDS - 1)]
        return dense.distillation(
            hidden @ head, logits, targets, mask, weight=weight, z_loss=1e-2, per_token=per_token, **options
        )

    if not per_token:  # which the reference does
        same((found, gradient), value_and_grad(whole, hidden, head))


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 1, 8)])
def test_head_that_is_a_function_on_a_mesh(shape):
    (hidden, head), targets, mask, row, table = tables()
    arguments, run = (hidden, head, row, table, targets, mask), functools.partial(ask, weight=weight_of_info, top_k=7)
    plain = value_and_grad(run, *arguments)
    mesh = sharding.make_mesh(*shape)
    rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    with jax.set_mesh(mesh):
        sharded = value_and_grad(run, *jax.device_put(arguments, (rows, whole, rows, whole, rows, rows)))
    same(sharded, plain)


def test_head_that_is_a_function_makes_no_whole_logits():
    arguments = tables()
    for tokens, most in ((16, 16), (48, 48)):  # the second shows that the first can tell
        run = functools.partial(ask, tokens=tokens)
        jaxpr = jax.make_jaxpr(lambda *a: run(*a).total)(*arguments[0], *arguments[3:], *arguments[1:3]).jaxpr  # noqa: B023
        sizes = [out.aval.size for eqn, _ in equations(jaxpr) for out in eqn.outvars if out.aval.shape[-1:] == (VOCAB,)]
        assert max(sizes) == most * VOCAB


def test_probability_zero_costs_no_gradient():
    (hidden, head), targets, mask, row, table = tables()
    never = table.copy()
    never[:, ::3] = -np.inf
    found, gradient = value_and_grad(ask, hidden, head, row, never, targets, mask)
    expected = reference.loss(
        hidden, head, targets, mask, (np.eye(2 * KINDS)[row[..., 0]][..., :KINDS], np.maximum(never, -1e30)),
        weight=0.667, z_loss=1e-2,
    )  # fmt: skip
    check(found, gradient, expected)


def test_weight_of_each_token_is_the_functions():
    halved = token_weight.of_update(lambda info, w: w * jnp.where(info.teacher_loss < info.loss, 0.5, 0.0), 0.6)
    assert token_weight.of_update(None, 0.6) == 0.6
    student, teacher, targets, mask = problem(3, batch=4)
    found = jax.jit(lambda: blocked.distillation(*student, *teacher, targets, mask, weight=halved, block_bytes=4096))()
    stats = [blocked.token_stats(*model, targets).loss for model in (student, teacher)]
    weights = np.where(stats[1] < stats[0], 0.3, 0.0)
    assert 0 < (weights * mask).sum() < 0.3 * mask.sum()
    assert float(found.parts["token_weight"]) == pytest.approx((weights * mask).sum(), rel=1e-5)
    plain = jax.jit(lambda: blocked.distillation(*student, *teacher, targets, mask, weight=weights))()
    assert float(found.total) == pytest.approx(float(plain.total), rel=1e-5) and "token_weight" not in plain.parts


def test_head_of_another_shape_is_refused():
    (hidden, head), targets, mask, row, table = tables()
    for bad, message in (
        ((row[:, :3], table), r"teacher_hidden \(8, 3, 1\) does not fit targets \(8, 6\)"),
        ((row, table[:, :60]), r"of hidden states \(48, 1\) it makes logits \(48, 60\), not \(48, 64\)"),
    ):
        with pytest.raises(UserError, match=message):
            ask(hidden, head, *bad, targets, mask)


def test_teacher_without_tables_and_with_a_matrix(monkeypatch):
    """In the step, outside the gradient, as a small LM would be."""
    batch, params = make_batch(), jax.jit(STUDENT.init)(jax.random.key(0))
    table = np.random.default_rng(0).standard_normal((VOCAB, VOCAB)).astype(np.float32)

    def bigram(tokens, batch):
        return jax.nn.one_hot(tokens, VOCAB) * (batch["positions"] % 2)[..., None], table

    monkeypatch.setitem(sys.modules, "matrix_lab", SimpleNamespace(bigram=bigram))
    rows, vocabulary = SimpleNamespace(seq_len=12), SimpleNamespace(size=VOCAB)
    teacher = own_teacher.find("matrix_lab:bigram", rows, vocabulary)
    loaded, nothing = teacher.load(sharding.make_mesh(1, 1, 1), lambda line: None)
    assert (loaded.entries, loaded.size, nothing) == (0, 0, None) and teacher.takes == ("batch",)

    @jax.jit
    def loss(params, batch):
        soft = labels.teach(loaded, nothing, batch)
        view, options = labels.see(STUDENT, params, batch), {"weight": 0.5, "temperature": 0.5}
        return labels.soft_label_loss(STUDENT, view, batch, batch["mask"], loaded, soft, **options)

    view = labels.hidden_and_head(STUDENT, params, batch)
    logits = table[batch["tokens"]] * (batch["positions"] % 2)[..., None]
    targets, mask = batch["targets"], batch["mask"]
    same(loss(params, batch), dense.distillation(view[0] @ view[1], logits, targets, mask, weight=0.5, temperature=0.5))

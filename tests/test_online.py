"""Selection inside the step: the right rows, on any mesh, and nothing more of the pool than its scores."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_steps import LENGTH, ROWS, SCHEDULE, STUDENT, TEACHER, assert_close, make_batch, make_student

from slm_assist import sharding, steps
from slm_assist import state as state_lib
from slm_assist.assist import labels, online, scores

POOL = 3  # candidates a row


def candidates(seed: int = 0) -> dict[str, np.ndarray]:
    parts = [make_batch(10 * seed + part) for part in range(POOL)]
    rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return rows | {"domain": np.arange(len(rows["tokens"]), dtype=np.int32) % 4}


def make_filter(kind: str = "salt", **changes) -> online.Filter:
    models = {"scorer": TEACHER, "reference": TEACHER, "learner": STUDENT}
    made = scores.make(kind, k=20, masked="zero", statistic="mean")
    return dataclasses.replace(online.Filter(made, models, keep=ROWS, parts=POOL, domains=4), **changes)


@functools.cache
def params_by_role() -> dict:
    scorer, reference = (jax.jit(TEACHER.init)(jax.random.key(seed)) for seed in (1, 2))
    return {"scorer": scorer, "reference": reference, "learner": jax.jit(STUDENT.init)(jax.random.key(3))}


def choose(chooser: online.Filter, rows: dict, mesh=None, assist=None, step: int = 0) -> online.Chosen:
    mesh = mesh or sharding.make_mesh(1, 1, 1)
    params = jax.device_put(params_by_role(), sharding.replicated(mesh))
    with jax.set_mesh(mesh):
        rows = jax.device_put(rows, sharding.batch_sharding(mesh))
        return jax.jit(functools.partial(online.choose, chooser))(rows, params, assist or {}, jnp.int32(step))


def reference_scores(score: str, rows: dict) -> np.ndarray:
    """float64, row by row, from sorted probabilities."""
    params, mask, result = params_by_role(), rows["mask"], []

    def log_p(role: str, model) -> np.ndarray:
        hidden, head = jax.jit(functools.partial(labels.hidden_and_head, model))(params[role], rows)
        logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    pick = functools.partial(np.take_along_axis, indices=rows["targets"][..., None], axis=-1)
    by_role = {role: log_p(role, STUDENT if role == "learner" else TEACHER) for role in params}
    for row in range(len(mask)):
        loss = {role: -pick(by_role[role])[row, :, 0][mask[row] > 0] for role in params}
        if score == "salt":
            in_top = (by_role["scorer"][row] > pick(by_role["scorer"])[row]).sum(-1)[mask[row] > 0] < 20
            result.append(np.where(in_top, loss["scorer"], 0).mean())
        else:
            result.append((loss["learner"] - loss["reference"]).mean())
    return np.array(result)


@pytest.mark.parametrize(
    ("score", "shape"),
    [pytest.param("salt", (1, 1, 1), marks=pytest.mark.slow), ("learnability", (8, 1, 1)), ("salt", (2, 2, 2))],
)
def test_the_best_rows_are_kept(score, shape):
    rows = candidates()
    expected = np.sort(np.argsort(-reference_scores(score, rows), kind="stable")[:ROWS])
    chosen = choose(make_filter(score), rows, sharding.make_mesh(*shape))
    np.testing.assert_array_equal(chosen.rows["index"], expected)
    for name in ("tokens", "targets", "segment_ids", "positions", "mask"):
        np.testing.assert_array_equal(chosen.batch[name], rows[name][expected])
    np.testing.assert_array_equal(chosen.rows["kept"], np.bincount(rows["domain"][expected], minlength=4))
    np.testing.assert_array_equal(chosen.rows["candidates"], np.bincount(rows["domain"], minlength=4))
    means = {name: float(total) / float(weight) for name, (total, weight) in chosen.metrics.items()}
    values = reference_scores(score, rows)
    assert means["score_kept_mean"] == pytest.approx(values[expected].mean(), rel=1e-4)
    assert means["score_std"] == pytest.approx(values.std(), rel=1e-4)
    assert means["score_max"] == pytest.approx(values.max(), rel=1e-4)


def test_scores_are_causal_whatever_the_objective():
    rows = candidates()
    straight = choose(make_filter(), rows).rows["index"]
    other = {online.CAUSAL + name: x for name, x in rows.items() if name != "domain"}
    other |= candidates(seed=5) | {"prefix_mask": rows["positions"] < 3}
    chosen = choose(make_filter(), other)
    np.testing.assert_array_equal(chosen.rows["index"], straight)
    np.testing.assert_array_equal(chosen.batch["tokens"], other["tokens"][straight])
    np.testing.assert_array_equal(chosen.batch["prefix_mask"], other["prefix_mask"][straight])


@pytest.mark.parametrize("rule", ["random", "gumbel"])
def test_noise_is_that_of_the_step(rule):
    chooser = make_filter(rule=rule, noise=5.0, score=None if rule == "random" else make_filter().score)
    first, again, later = (choose(chooser, candidates(), step=step).rows["index"] for step in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.any(np.asarray(first) != np.asarray(later))


def test_running_threshold_masks_the_slots_it_cannot_fill():
    chooser = make_filter(rule="threshold", decay=0.5)
    memory = online.initial_state("threshold") | {"stage1_steps": jnp.int32(7)}
    kept = []
    for seed in range(4):
        chosen = choose(chooser, candidates(seed), assist=memory)
        memory = chosen.assist
        kept.append(int(chosen.rows["valid"].sum()))
        slots = np.asarray(chosen.batch["mask"]).any(axis=1)
        assert slots.sum() == kept[-1]
    assert kept[0] == ROWS and min(kept) < ROWS  # the first bar is its own pool's
    assert int(memory["pools"]) == 4 and int(memory["stage1_steps"]) == 7


def step_of(chooser: online.Filter):
    step = functools.partial(
        steps.assisted_step, student=make_student(2), teacher=TEACHER, schedule=SCHEDULE, temperature=1.0
    )
    return functools.partial(steps.choosing_step, chooser=chooser, then=step)


def updated(chooser: online.Filter, mesh=None):
    mesh = mesh or sharding.make_mesh(1, 1, 1)
    student, assist = make_student(2), {"stage1_steps": jnp.int32(5)}
    layout = state_lib.state_shardings(student.model, student.optimizer, assist, mesh)
    init = functools.partial(state_lib.init, student.model, student.optimizer, 0, assist)
    whole, params = sharding.replicated(mesh), params_by_role()
    helpers = jax.device_put({"teacher": params["scorer"], "scorer": params["scorer"]}, whole)
    with jax.set_mesh(mesh):
        state = jax.jit(init, out_shardings=layout)()
        rows = jax.device_put(candidates(), sharding.batch_sharding(mesh))
        compiled = jax.jit(step_of(chooser), out_shardings=(layout, whole)).lower(state, rows, helpers).compile()
        state, metrics = compiled(state, rows, helpers)
    return jax.device_get(state.params), metrics, compiled


@pytest.mark.slow
def test_one_forward_pass_for_scorer_and_teacher():
    two, one = updated(make_filter()), updated(make_filter(share_teacher=True))
    assert_close(two[0], one[0], rtol=2e-4, atol=1e-5)
    flops = [result[2].cost_analysis()["flops"] for result in (two, one)]
    assert flops[1] < flops[0]


def test_eight_devices_exchange_kept_rows_and_not_the_pool():
    chooser = make_filter(share_teacher=True)
    one = updated(chooser)
    params, metrics, compiled = updated(chooser, sharding.make_mesh(8, 1, 1))
    assert_close(one[0], params, rtol=2e-4, atol=1e-5)
    np.testing.assert_array_equal(one[1][online.ROWS]["index"], metrics[online.ROWS]["index"])
    results = re.findall(r" = (.*) (?:all-gather|all-reduce|all-to-all|collective-permute)\(", compiled.as_text())
    exchanged = [tuple(map(int, dims.split(","))) for result in results for dims in re.findall(r"\[([\d,]+)\]", result)]
    assert (ROWS, LENGTH, TEACHER.config.d_model) in exchanged  # the kept rows' hidden states
    assert (POOL * ROWS,) in exchanged  # the scores
    assert not [shape for shape in exchanged if shape[0] == POOL * ROWS and len(shape) > 1]


@pytest.mark.parametrize("microbatches", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_rho1_learns_from_the_top_share_of_tokens(microbatches):
    share, batch, student = 0.6, make_batch(), make_student(microbatches)
    reference = TEACHER.init(jax.random.key(1))
    state = state_lib.init(STUDENT, student.optimizer, 0, {"stage1_steps": jnp.int32(0)})
    focus = steps.Focus(TEACHER, share)
    state_after, metrics = jax.jit(functools.partial(steps.plain_step, student=student, focus=focus))(
        state, batch, {"reference": reference}
    )
    learner, known = (
        np.asarray(labels.token_stats(model, params, batch).loss, np.float64)
        for model, params in ((STUDENT, state.params), (TEACHER, reference))
    )
    mask = np.zeros_like(batch["mask"])
    for part in range(microbatches):  # every microbatch takes every M-th row
        rows = slice(part, None, microbatches)
        excess = np.where(batch["mask"][rows] > 0, (learner - known)[rows], -np.inf).ravel()
        count = int(np.ceil(share * batch["mask"][rows].sum() - 1e-9))
        chosen = np.zeros(excess.size)
        chosen[np.argsort(-excess, kind="stable")[:count]] = 1
        mask[rows] = chosen.reshape(mask[rows].shape)
    expected, _ = jax.jit(functools.partial(steps.plain_step, student=student))(state, batch | {"mask": mask})
    assert_close(expected.params, state_after.params, rtol=2e-4, atol=1e-5)
    total, weight = metrics["selected_tokens"]
    assert float(total) == mask.sum() and float(weight) == batch["mask"].sum()

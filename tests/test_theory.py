"""Sources, risks, increments and bounds against enumeration, Monte-Carlo and closed limits."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from slm_assist.errors import UserError
from slm_assist.losses import dense
from slm_assist.theory import bounds, checks, martingale, risk, simulate, sources, students, teachers


def tiny(length=4, order=1, seed=0):
    """Two symbols, few tokens: every row can be listed."""
    law = sources.random_law(2**order, 2, sharpness=1.0, floor=0.05, seed=seed)
    source = sources.markov(law, length=length, order=order)
    start = np.random.default_rng(seed).dirichlet(np.ones(2**order))  # not stationary, so positions differ
    return sources.Source(source.law_CxV, source.follow_CxV, start, length, source.bucket_C)


def every_row(source):
    """(probability, contexts, tokens) of each row, by a loop that shares nothing with the package."""
    vocab = source.law_CxV.shape[1]
    for first in range(len(source.start_C)):
        for tokens in itertools.product(range(vocab), repeat=source.length):
            p, context, contexts = source.start_C[first], first, []
            for token in tokens:
                contexts.append(context)
                p *= source.law_CxV[context, token]
                context = int(source.follow_CxV[context, token])
            yield p, contexts, tokens


def model(source, seed):
    return sources.random_law(*source.law_CxV.shape, sharpness=1.2, floor=0.02, seed=seed)


# Sources.


@pytest.mark.parametrize("order", [1, 2])
def test_positions_occupation_and_risk_are_those_of_all_rows(order):
    source = tiny(order=order)
    p, q = model(source, 1), model(source, 2)
    loss = risk.token_loss(p, q, 0.3)
    position, total, mixed = np.zeros((source.length, 2**order)), 0.0, 0.0
    for mass, contexts, tokens in every_row(source):
        for t, c in enumerate(contexts):
            position[t, c] += mass
        total += mass * np.mean([-np.log(p[c, y]) for c, y in zip(contexts, tokens, strict=True)])
        mixed += mass * np.mean([loss[c, y] for c, y in zip(contexts, tokens, strict=True)])
    np.testing.assert_allclose(source.position_TxC, position, atol=1e-12)
    np.testing.assert_allclose(source.occupation_C, position.mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(risk.risk(source, p), total, rtol=1e-12)
    np.testing.assert_allclose(risk.mixed_risk(source, p, q, 0.3), mixed, rtol=1e-12)


def test_rows_are_drawn_from_the_law():
    source = tiny(length=3, order=2)
    rows = source.sample(40_000, seed=3)
    code = rows.context_NxT[:, 0] * 8 + rows.token_NxT @ [4, 2, 1]
    found = np.bincount(code, minlength=32) / len(code)
    expected = np.array([mass for mass, *_ in every_row(source)])
    assert np.abs(found - expected).max() < 5 * np.sqrt(expected.max() / len(code))
    again = source.sample(40_000, seed=3)
    np.testing.assert_array_equal(again.token_NxT, rows.token_NxT)
    assert (source.sample(40_000, seed=4).token_NxT != rows.token_NxT).any()


def test_contexts_follow_tokens_and_counts_count():
    source = sources.markov(sources.random_law(9, 3, seed=1), length=6, order=2)
    rows = source.sample(5, seed=0)
    np.testing.assert_array_equal(rows.context_NxT[:, 2], rows.token_NxT[:, 0] * 3 + rows.token_NxT[:, 1])
    counts = source.counts(rows)
    for n in range(5):
        expected = np.zeros((9, 3))
        for c, y in zip(rows.context_NxT[n], rows.token_NxT[n], strict=True):
            expected[c, y] += 1
        np.testing.assert_array_equal(counts[n], expected)


def test_a_stationary_source_has_one_law_of_contexts():
    source = sources.easy_and_hard(6, length=9, seed=2)
    np.testing.assert_allclose(source.position_TxC, np.tile(source.start_C, (9, 1)), atol=1e-10)
    entropy = -(source.law_CxV * np.log(source.law_CxV)).sum(axis=1)
    assert risk.mean_over(source, entropy, "easy") < risk.mean_over(source, entropy, "hard") - 0.3
    assert source.law_CxV.min() >= 0.01


def test_kinds_of_rows_never_meet():
    kinds = {n: sources.markov(sources.random_law(3, 3, seed=i), length=5) for i, n in enumerate("ab")}
    source = sources.mixture(kinds, (0.25, 0.75))
    rows = source.sample(4000, seed=0)
    bucket = source.bucket_C[rows.context_NxT]
    assert (bucket == bucket[:, :1]).all()
    assert abs(bucket[:, 0].mean() - 0.75) < 0.04
    np.testing.assert_allclose(source.occupation_C[source.bucket_C == 0].sum(), 0.25)


# Teachers and students.


@pytest.mark.parametrize(
    "measure, between", [("total_variation", risk.total_variation), ("chi_square", risk.chi_square)]
)
def test_a_teachers_bias_is_what_was_asked_for(measure, between):
    source = sources.easy_and_hard(6, length=5, seed=1)
    other = sources.random_law(6, 6, sharpness=1.5, seed=5)
    teacher = teachers.towards(source, other, {"easy": 0.02, "hard": 0.1}, measure)
    by_hand = np.abs(teacher - source.law_CxV) / 2 if measure == "total_variation" else None
    for bucket, distance in (("easy", 0.02), ("hard", 0.1)):
        np.testing.assert_allclose(risk.mean_over(source, between(teacher, source.law_CxV), bucket), distance)
        if by_hand is not None:
            np.testing.assert_allclose(risk.mean_over(source, by_hand.sum(axis=1), bucket), distance)
    np.testing.assert_allclose(teachers.towards(source, other, 0.0), source.law_CxV)


def test_temperature_and_memory():
    source = tiny(order=2)
    np.testing.assert_allclose(teachers.tempered(source.law_CxV, 1.0), source.law_CxV)
    np.testing.assert_allclose(teachers.tempered(source.law_CxV, 1e6), 0.5, atol=1e-5)
    forgetful = teachers.forgetful(source, np.arange(4) % 2)
    np.testing.assert_array_equal(forgetful[0], forgetful[2])
    other = np.array(forgetful)
    for step in (-0.01, 0.01):  # it is the best of all that see only the last token
        other[[0, 2]] = forgetful[0] + [step, -step]
        assert risk.risk(source, other) > risk.risk(source, forgetful)
    np.testing.assert_allclose(teachers.forgetful(source, np.arange(4)), source.law_CxV)


def test_the_mixture_minimises_the_mixed_loss():
    rng = np.random.default_rng(0)
    counts, q = rng.integers(0, 5, (3, 4)).astype(float), sources.random_law(3, 4, seed=1)
    counts[2] = 0
    for w in (0.2, 0.667, 1.0):
        best = students.tabular(counts, q, w)

        def loss(p, w=w):
            return (counts * risk.token_loss(p, q, w)).sum()

        for _ in range(50):
            noisy = best * np.exp(0.05 * rng.normal(size=best.shape))
            assert loss(noisy / noisy.sum(axis=1, keepdims=True)) > loss(best)
        np.testing.assert_allclose(best[2], 0.25)
    np.testing.assert_allclose(students.tabular(counts, q, 0.0)[0], counts[0] / counts[0].sum())
    np.testing.assert_allclose(students.tabular(counts, q, 1.0)[:2], q[:2])


def test_the_loss_is_the_packages_own():
    source, w = sources.easy_and_hard(6, length=5, seed=1), 0.3
    p, q = model(source, 1), model(source, 2)
    rows = source.sample(7, seed=0)
    c, y = rows.context_NxT, rows.token_NxT
    own = dense.distillation(jnp.log(p)[c], jnp.log(q)[c], y, np.ones(y.shape), weight=w, per_token=True)
    np.testing.assert_allclose(risk.token_loss(p, q, w)[c, y], own.total, rtol=2e-5)


def test_variance_at_a_context():
    source, rng = sources.easy_and_hard(6, length=5, seed=1), np.random.default_rng(0)
    p, q = model(source, 1), model(source, 2)
    plain = risk.context_variance(source, -np.log(p))
    for w in (0.0, 0.4, 1.0):
        loss = risk.token_loss(p, q, w)
        np.testing.assert_allclose(risk.context_variance(source, loss), (1 - w) ** 2 * plain, atol=1e-14)
    drawn = rng.choice(6, size=200_000, p=source.law_CxV[2])
    np.testing.assert_allclose(np.log(p[2, drawn]).var(), plain[2], rtol=0.02)


# The martingale.


@pytest.mark.parametrize("order", [1, 2])
def test_increments_are_differences_of_conditional_expectations(order):
    source = tiny(order=order)
    loss = risk.token_loss(model(source, 1), model(source, 2), 0.4)
    found, all_rows = martingale.increments(source, loss), list(every_row(source))
    of = np.array([np.mean([loss[c, y] for c, y in zip(cs, ys, strict=True)]) for _, cs, ys in all_rows])
    mass = np.array([p for p, *_ in all_rows])

    def given(contexts, tokens, t):
        """E[L | first context and t tokens], by summing over the rows that begin so; t = -1: no condition."""
        alike = [t < 0 or (cs[0] == contexts[0] and ys[:t] == tokens[:t]) for _, cs, ys in all_rows]
        return (mass * of)[alike].sum() / mass[alike].sum()

    variance = np.zeros(source.length + 1)
    for p, contexts, tokens in all_rows:
        xi = [given(contexts, tokens, t) - given(contexts, tokens, t - 1) for t in range(source.length + 1)]
        rows = sources.Rows(np.array([contexts]), np.array([tokens]))
        np.testing.assert_allclose(found.of(rows)[0], xi, atol=1e-12)
        variance += p * np.square(xi)
    np.testing.assert_allclose(found.mean_variance_T, variance, atol=1e-14)
    np.testing.assert_allclose(variance.sum(), (mass * of**2).sum() - (mass * of).sum() ** 2, atol=1e-14)
    assert (found.largest_variance_T >= found.mean_variance_T - 1e-15).all()


def test_the_law_of_an_increment():
    source = tiny()
    loss = risk.token_loss(model(source, 1), model(source, 2), 0.4)
    found = martingale.increments(source, loss)
    for t in range(source.length + 1):
        values, mass = found.law(source, t)
        np.testing.assert_allclose(mass.sum(), 1)
        np.testing.assert_allclose(mass @ values, 0, atol=1e-15)
        np.testing.assert_allclose(mass @ values**2, found.mean_variance_T[t], atol=1e-15)
        np.testing.assert_allclose(np.abs(values).max(), found.largest_T[t])
    both = martingale.increments(source, np.stack([loss, 2 * loss]))
    np.testing.assert_allclose(both.largest_variance_T, [found.largest_variance_T, 4 * found.largest_variance_T])


def test_what_cannot_happen_does_not_count():
    source = sources.markov(sources.random_law(3, 3, seed=0), length=2)
    certain = sources.Source(source.law_CxV, source.follow_CxV, np.array([1.0, 0, 0]), 1, source.bucket_C)
    loss = np.zeros((3, 3))
    loss[1] = [0, 100, 0]
    found = martingale.increments(certain, loss)
    np.testing.assert_array_equal(found.largest_T, 0)
    assert martingale.increments(source, loss).largest_T.max() > 10


# The bounds.


def setting(members=10):
    source = sources.easy_and_hard(4, length=6, floor=0.05, seed=1)
    other = 0.5 * teachers.tempered(source.law_CxV, 0.25) + 0.5 * sources.random_law(4, 4, floor=0.05, seed=5)
    teacher = teachers.towards(source, other, 0.1)
    tables = students.finite_class(source, teacher, perturbed=members, floor=0.01)
    return simulate.Setting(source, teacher, tables)


def test_bias_and_its_half():
    s = setting()
    for w in (0.1, 1.0):
        ratio = simulate.bias_ratios(s, w)
        gap = np.abs(risk.risk(s.source, s.class_KxCxV) - risk.mixed_risk(s.source, s.class_KxCxV, s.teacher_CxV, w))
        np.testing.assert_allclose(ratio, gap / (2 * np.log(1 / s.class_KxCxV.min()) * w * s.total_variation))
        assert 0 < ratio.max() <= 0.5
    worst = np.where(s.teacher_CxV > s.source.law_CxV, 1.0, 1e-30)
    worst = students.floored(worst / worst.sum(axis=1, keepdims=True), 1e-9)[None]
    assert 0.45 < simulate.bias_ratios(s._replace(class_KxCxV=worst), 1.0).max() <= 0.5


def test_excess_risk_term_by_term():
    rng = np.random.default_rng(0)
    hat, best = rng.random(50) * 3, rng.random(50) * 3
    common = {"members": 7, "largest_loss": 3.0, "weight": 0.25, "total_variation": 0.2, "delta": 0.1}
    found = bounds.excess_risk(hat, best, **common)
    spread = {
        "hat": sum((x - hat.mean()) ** 2 for x in hat) / 49,
        "best": sum((x - best.mean()) ** 2 for x in best) / 49,
    }
    assert found["bias"] == pytest.approx(4 * 3.0 * 0.25 * 0.2)
    assert found["variance_hat"] == pytest.approx((18 * spread["hat"] * np.log(2 * 70 / 0.1) / 50) ** 0.5)
    assert found["variance_best"] == pytest.approx((2 * spread["best"] * np.log(40) / 50) ** 0.5)
    assert found["remainder"] == pytest.approx(3 * (15 * np.log(1400) + 7 / 3 * np.log(40)) / 49)
    assert found["total"] == pytest.approx(sum(found[k] for k in found if k != "total"))
    less = bounds.excess_risk(hat, best, form="finite", **common)
    assert less["variance_hat"] == pytest.approx((2 * spread["hat"] * np.log(4 * 7 / 0.1) / 50) ** 0.5)
    assert less["remainder"] == pytest.approx(3 * 7 / 3 * (np.log(280) + np.log(40)) / 49)


def test_finite_class_term_by_term_and_its_normalisation():
    s = setting()
    loss = risk.token_loss(s.class_KxCxV[3], s.teacher_CxV, 0.5)
    steps, common = martingale.increments(s.source, loss), s.common(0.5)
    found, log = bounds.finite_class(steps, rows=30, **common), np.log(len(s.class_KxCxV) / 0.05)
    assert found["bias"] == pytest.approx(2 * s.largest_loss * 0.5 * s.total_variation)
    assert found["variance"] == pytest.approx((2 * steps.largest_variance_T.sum() * log / 30) ** 0.5)
    assert found["remainder"] == pytest.approx(2 * steps.largest_T.max() * log / 90)
    rows = bounds.finite_class(steps, rows=30, form="rows", **common)
    sampled = loss[s.source.sample(40_000, 0)].mean(axis=1).var()
    assert rows["variance"] == pytest.approx((2 * sampled * log / 30) ** 0.5, rel=0.03)
    summed = martingale.increments(s.source, s.source.length * loss)  # of the sum over tokens: T times the bound
    assert bounds.finite_class(summed, rows=30, **common)["variance"] == pytest.approx(6 * found["variance"])


def test_both_bounds_hold_as_often_as_they_say():
    s = setting()._replace(delta=0.2)
    for r in simulate.repeat(s, (0.0, 0.5), (20, 80), 150, seed=0):
        for form in simulate.FORMS["excess"]:
            hits = int((r.excess <= r.excess_bound[form]["total"]).sum())
            assert checks.share_interval(hits, 150)[1][0] >= 0.8
        for form in simulate.FORMS["class"]:
            assert checks.share_interval(int((r.class_excess[form] <= 0).sum()), 150)[1][0] >= 0.8
            np.testing.assert_array_equal(r.class_excess[form] <= 0, r.class_ratio[form] <= 1)
        assert (r.excess >= 0).all() and (r.rows > 20 or r.excess.max() > 0)
        assert (r.gap > r.class_excess["rows"]).all()


def test_without_the_bias_term_a_bound_fails():
    s = setting()
    (r,) = simulate.repeat(s, (1.0,), (2000,), 30, seed=0)
    assert (r.class_excess["martingale"] <= 0).all() and (r.class_unbiased["martingale"] > 0).all()


def test_a_single_models_bound_fails_no_more_often_than_delta():
    s = setting()
    fails = simulate.single(s, 2, 0.3, 40, (0.9, 0.05), 1500, seed=0)
    assert 0 < fails["martingale"][0.9] < 0.9 * 1500  # near delta = 1 it can be seen to fail
    assert all(checks.share_interval(by[0.05], 1500)[1][1] < 0.05 for by in fails.values())


def test_deviations_have_the_spread_the_increments_say():
    s = setting()
    found = simulate.deviations(s, 0.3, 25, 1500, seed=0)
    assert found["deviation"].std() == pytest.approx(found["exact_sd"], rel=0.08)
    assert abs(found["deviation"].mean()) < 4 * found["exact_sd"] / 1500**0.5
    assert (found["sup"] >= np.abs(found["deviation"])).all() and found["width"] > found["sup"].mean()


# Intervals and verdicts.


def test_share_interval_is_clopper_and_pearsons():
    share, (low, high) = checks.share_interval(8, 10)
    assert (share, round(low, 4), round(high, 4)) == (0.8, 0.4439, 0.9748)
    assert checks.share_interval(10, 10)[1] == (pytest.approx(0.025**0.1), 1.0)
    assert checks.share_interval(0, 10)[1] == (0.0, pytest.approx(1 - 0.025**0.1))


def test_verdicts_follow_from_the_numbers():
    assert checks.contains("", 1.0, 1.1, (0.9, 1.3)).agrees and not checks.contains("", 0.8, 1.1, (0.9, 1.3)).agrees
    assert checks.near("", 10.0, 10.9, tolerance=0.1).agrees and not checks.near("", 10.0, 11.1, tolerance=0.1).agrees
    assert checks.at_most("", 1.0, 0.9).agrees and not checks.at_most("", 1.0, 0.9, (0.7, 1.1)).agrees
    assert checks.at_least("", 1.0, 1.1).agrees and not checks.at_least("", 1.0, 1.1, (0.9, 1.3)).agrees
    assert not checks.contains("", 1.0, float("nan"), (float("nan"), float("nan"))).agrees
    assert checks.slope([1, 10, 100], [5, 0.5, 0.05]) == pytest.approx(-1)
    assert checks.largest_z(1) == pytest.approx(1.96, abs=1e-3)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: sources.random_law(3, 4, floor=0.3), "floor=0.3: with 4 symbols"),
        (lambda: sources.markov(sources.random_law(3, 4), length=2), "has 4 contexts, not 3"),
        (lambda: sources.markov(sources.random_law(4, 4) * 2, length=2), "sum to 1"),
        (lambda: sources.markov(sources.random_law(4, 4), length=0), "length=0"),
        (lambda: sources.mixture({"a": tiny()}, (0.5, 0.5)), "one share for each"),
        (lambda: teachers.towards(tiny(), tiny().law_CxV, 0.1), "total_variation=0.1 in all: .*0 to 0"),
        (lambda: teachers.towards(tiny(), tiny().law_CxV, {"easy": 0.1}), "the source's buckets are all"),
        (lambda: teachers.towards(tiny(), tiny().law_CxV, 0.1, "kl"), "measure='kl'"),
        (lambda: teachers.tempered(tiny().law_CxV, 0.0), "temperature=0.0"),
        (lambda: teachers.forgetful(tiny(), np.zeros(3, int)), "kept_C"),
        (lambda: risk.token_loss(tiny().law_CxV, tiny().law_CxV, 1.5), "weight=1.5"),
        (lambda: risk.mean_over(tiny(), np.ones(2), "hard"), "bucket='hard'"),
        (lambda: students.tabular(np.ones((1, 2)), np.ones((1, 2)) / 2, 0.1, smoothing=-1), "smoothing=-1"),
        (lambda: students.floored(np.ones((1, 2)) / 2, 0.6), "floor=0.6"),
        (lambda: simulate.repeat(setting(), (0.0,), (8,), 3, 0), "at least 16 rows"),
        (lambda: bounds.bias(1.0, 2.0, 0.1), "weight=2.0"),
        (lambda: checks.mean_interval([1.0]), "at least two"),
        (lambda: checks.share_interval(3, 2), "3 of 2"),
    ],
)
def test_what_is_wrong_is_named(call, message):
    with pytest.raises(UserError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_the_bounds_refuse_what_the_theorems_do_not_cover():
    common = {"members": 2, "largest_loss": 1.0, "weight": 0.5, "total_variation": 0.1}
    with pytest.raises(UserError, match="15 rows; Theorem 6"):
        bounds.excess_risk(np.ones(15), np.ones(15), **common, delta=0.1)
    with pytest.raises(UserError, match="delta=1.0"):
        bounds.excess_risk(np.ones(20), np.ones(20), **common, delta=1.0)
    with pytest.raises(UserError, match="form='covring'.*did you mean covering"):
        bounds.excess_risk(np.ones(20), np.ones(20), **common, delta=0.1, form="covring")
    steps = martingale.increments(tiny(), np.ones((2, 2)))
    with pytest.raises(UserError, match="rows=0"):
        bounds.finite_class(steps, rows=0, **common, delta=0.1)

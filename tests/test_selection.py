"""Rows from scores on the host and on the device, against sorting; RHO-1's tokens; and what the devices exchange."""

import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_assist import sharding
from slm_assist.assist import selection
from slm_assist.errors import UserError

MESHES = [(8, 1, 1), (2, 2, 2), (1, 4, 2)]


def tied(n=97, seed=0):
    return np.random.default_rng(seed).integers(-3, 4, n).astype(np.float32)


def by_score(scores):
    """Indices by falling score, ties by rising index."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


# On the host.


def test_top_is_the_sorted_reference():
    for seed in range(20):
        scores = tied(int(np.random.default_rng(seed).integers(1, 50)), seed)
        scores[scores == 0] *= np.random.default_rng(seed).choice([-1, 1], (scores == 0).sum())  # both zeros
        for m in range(1, len(scores) + 1):
            chosen = selection.top(scores, m)
            assert chosen.dtype == np.int64
            assert chosen.tolist() == sorted(by_score(scores)[:m])
    assert selection.top([3, 1, 2], 1).tolist() == [0]
    assert selection.top(np.array([-np.inf, 0, np.inf, -np.inf]), 3).tolist() == [0, 1, 2]


def test_bands_are_the_sorted_reference_and_share_no_row():
    scores = tied()
    ranked = np.argsort(scores, kind="stable")
    edges = [0, 0.07, 0.3, 0.31, 0.55, 0.8, 1]
    parts = [selection.band(scores, low, high) for low, high in zip(edges, edges[1:], strict=False)]
    for part, low, high in zip(parts, edges, edges[1:], strict=False):
        places = [place for place in range(97) if low <= place / 97 < high]
        assert part.tolist() == sorted(ranked[places])
    assert sorted(np.concatenate(parts)) == list(range(97))


def test_a_band_counts_in_decimals():
    assert len(selection.band(np.arange(100.0), 0, 0.07)) == 7  # 0.07 * 100 is above 7 in floating point
    assert len(selection.band(np.arange(100.0), 0.29, 0.57)) == 28


def test_gumbel_top_lies_between_top_and_random():
    scores = np.random.default_rng(0).standard_normal(1000)
    assert selection.gumbel_top(scores, 200, 0.0, 1).tolist() == selection.top(scores, 200).tolist()
    assert selection.gumbel_top(scores, 200, 1e-9, 1).tolist() == selection.top(scores, 200).tolist()
    blind, other = selection.gumbel_top(scores, 200, 1e9, 1), selection.random(1000, 200, 1)
    assert 20 < len(set(blind.tolist()) & set(other.tolist())) < 60  # 40 by chance: noises of their own
    some = selection.gumbel_top(scores, 200, 1.0, 1)
    assert len(set(some)) == 200 and scores[some].mean() > 0.3
    assert some.tolist() == selection.gumbel_top(scores, 200, 1.0, 1).tolist()
    assert some.tolist() != selection.gumbel_top(scores, 200, 1.0, 2).tolist()


def test_gumbel_top_one_is_the_softmax():
    scores = np.log(np.array([1.0, 2.0, 5.0]))
    first = np.bincount([selection.gumbel_top(scores, 1, 1.0, seed)[0] for seed in range(4000)], minlength=3) / 4000
    np.testing.assert_allclose(first, [1 / 8, 2 / 8, 5 / 8], atol=0.03)
    sharp = np.bincount([selection.gumbel_top(scores, 1, 0.5, seed)[0] for seed in range(4000)], minlength=3) / 4000
    np.testing.assert_allclose(sharp, [1 / 30, 4 / 30, 25 / 30], atol=0.03)


def test_random_is_uniform_and_the_same_on_every_machine():
    often = np.zeros(20)
    for seed in range(1000):
        often[selection.random(20, 5, seed)] += 1
    np.testing.assert_allclose(often / 1000, 0.25, atol=0.06)
    assert selection.random(20, 5, 7).tolist() == [0, 9, 10, 13, 15]
    np.testing.assert_array_equal(selection.uniform(5, 3), selection.uniform(9, 3)[:5])
    assert selection.uniform(10000, 0).min() > 0 and selection.uniform(10000, 0).max() < 1


def test_per_domain_is_top_inside_each():
    scores, domains = tied(), np.random.default_rng(1).integers(0, 4, 97)
    quotas = {0: 3, 1: 0, 2: 10}
    expected = []
    for domain, quota in quotas.items():
        expected += [i for i in by_score(scores) if domains[i] == domain][:quota]
    assert selection.per_domain(scores, domains, quotas).tolist() == sorted(expected)
    even = np.arange(97) % 2 == 0
    allowed = [i for i in by_score(scores) if domains[i] == 3 and even[i]][:4]
    assert selection.per_domain(scores, domains, {3: 4}, even).tolist() == sorted(allowed)
    for quotas, has in (({2: 98}, (domains == 2).sum()), ({9: 1}, 0)):
        with pytest.raises(UserError, match=f"it has {has}"):
            selection.per_domain(scores, domains, quotas)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: selection.top(np.ones(5), 0), "m=0.*5"),
        (lambda: selection.top(np.ones(5), 6), "m=6.*5"),
        (lambda: selection.top(np.array([1, np.nan, 2, np.nan]), 1), "2 of 4 scores are NaN.*row 1"),
        (lambda: selection.band(np.array([np.nan]), 0, 1), "1 of 1 scores are NaN.*row 0"),
        (lambda: selection.band(np.ones(5), 0.5, 0.5), "0 <= low < high <= 1"),
        (lambda: selection.band(np.ones(5), 0.5, 1.1), "0 <= low < high <= 1"),
        (lambda: selection.gumbel_top(np.ones(5), 1, -1.0, 0), "tau=-1"),
        (lambda: selection.gumbel_top(np.ones(5), 1, np.nan, 0), "tau=nan"),
        (lambda: selection.gumbel_top(np.full(5, np.nan), 1, 1.0, 0), "5 of 5 scores are NaN"),
        (lambda: selection.random(5, 6, 0), "m=6"),
    ],
)
def test_what_cannot_be_chosen_is_said(call, message):
    with pytest.raises(UserError, match=message):
        call()


# Rows on the device.


def keep(scores, count, **options):
    return jax.jit(lambda s, key: selection.keep_rows(s, count, key=key, **options))(scores, jax.random.key(5))


@pytest.fixture
def package(monkeypatch):
    module = types.ModuleType("somebodys_package")
    module.last = lambda scores, keep, key: jnp.arange(len(scores))[::-1][:keep]
    module.short = lambda scores, keep, key: jnp.arange(keep - 1)
    module.fractions = lambda scores, keep, key: jnp.linspace(0, 1, keep)
    monkeypatch.setitem(sys.modules, "somebodys_package", module)


def test_top_and_bands_are_the_sorted_reference():
    for seed in range(5):
        scores = tied(32, seed)
        scores[scores == 0] *= np.random.default_rng(seed).choice([-1, 1], (scores == 0).sum())  # both zeros
        kept = keep(scores, 9)
        assert kept.index.dtype == jnp.int32 and kept.valid.dtype == jnp.float32
        assert kept.index.tolist() == sorted(by_score(scores)[:9]) and kept.valid.tolist() == [1] * 9
        ranked = np.argsort(scores, kind="stable")
        for band in (0.0, 0.3, 0.5, 1.0):
            first = round((32 - 9) * band)
            assert keep(scores, 9, rule="band", band=band).index.tolist() == sorted(ranked[first : first + 9])
    assert keep(tied(32), 32).index.tolist() == list(range(32))


def test_nan_is_never_preferred():
    scores = np.array([1, np.nan, 3, -5, np.nan, 2], np.float32)
    for rule in ("top", "gumbel"):
        assert keep(scores, 4, rule=rule, noise=1e-6).index.tolist() == [0, 2, 3, 5]
    assert keep(scores, 2, rule="band", band=0.0).index.tolist() == [1, 4]
    assert keep(scores, 5).index.tolist() == [0, 1, 2, 3, 5]
    assert keep(scores, 6, rule="threshold", threshold=-10.0).valid.tolist() == [1, 0, 1, 1, 0, 1]


def test_gumbel_and_random_follow_their_key():
    scores = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    assert keep(scores, 9, rule="gumbel", noise=1e-9).index.tolist() == keep(scores, 9).index.tolist()
    fn = jax.jit(
        lambda key, rule: jax.vmap(lambda k: selection.keep_rows(scores, 16, rule=rule, key=k, noise=1.0).index)(
            jax.random.split(key, 500)
        ),
        static_argnums=1,
    )
    for rule in ("gumbel", "random"):
        index = np.asarray(fn(jax.random.key(0), rule))
        assert (np.diff(index, axis=1) > 0).all() and len(np.unique(index, axis=0)) > 490
        mean = scores[index].mean()
        assert mean > 0.4 if rule == "gumbel" else abs(mean - scores.mean()) < 0.05
        if rule == "random":
            np.testing.assert_allclose(np.bincount(index.ravel(), minlength=64) / 500, 0.25, atol=0.09)


def test_threshold_keeps_the_highest_that_reach_the_bar():
    scores = np.array([1, 5, 3, 5, 2, 4, 9, 3], np.float32)
    kept = keep(scores, 3, rule="threshold", threshold=4.0)
    assert kept.index.tolist() == [1, 3, 6] and kept.valid.tolist() == [1, 1, 1]
    kept = keep(scores, 6, rule="threshold", threshold=4.0)
    assert kept.index.tolist() == sorted(set(kept.index.tolist())) and len(kept.index) == 6
    assert {int(i) for i, ok in zip(*kept, strict=True) if ok} == {1, 3, 5, 6}
    assert keep(scores, 3, rule="threshold", threshold=10.0).valid.tolist() == [0, 0, 0]


def test_the_running_threshold_is_an_exponential_mean():
    rng, state = np.random.default_rng(0), selection.initial_threshold()
    assert {name: x.dtype.name for name, x in state.items()} == {"threshold": "float32", "pools": "int32"}
    update = jax.jit(lambda s, x: selection.running_threshold(s, x, 4, 0.9))
    expected, pools = None, []
    for n in range(30):
        pool = rng.standard_normal(20).astype(np.float32)
        state = update(state, pool)
        bar = np.sort(pool.astype(np.float64))[-4]
        expected = bar if n == 0 else 0.9 * expected + 0.1 * bar
        np.testing.assert_allclose(state["threshold"], expected, rtol=1e-5)
        pools.append(pool)
        if n == 0:
            kept = keep(pool, 4, rule="threshold", threshold=state["threshold"])
            assert kept.index.tolist() == keep(pool, 4).index.tolist() and kept.valid.tolist() == [1] * 4
    assert state["pools"] == 30
    broken = update(state, np.full(20, np.nan, np.float32))
    jax.tree.map(np.testing.assert_array_equal, broken, state)
    assert update(selection.initial_threshold(), np.full(20, np.nan, np.float32))["pools"] == 0
    assert np.mean([(pool >= expected).sum() for pool in pools]) == pytest.approx(4, abs=1)


def test_a_rule_from_another_package(package):
    kept = keep(tied(16), 5, rule="somebodys_package:last")
    assert kept.index.tolist() == [11, 12, 13, 14, 15] and kept.valid.tolist() == [1] * 5
    for name in ("short", "fractions"):
        with pytest.raises(UserError, match=f"select.rule='somebodys_package:{name}'.*5 distinct indices"):
            keep(tied(16), 5, rule=f"somebodys_package:{name}")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rule": "topp"}, "select.rule='topp'.*did you mean top"),
        ({"rule": "nobodys_package:fn"}, "select.rule=.*no module"),
        ({"rule": "threshold"}, "needs a threshold"),
        ({"rule": "gumbel"}, "needs a random key"),
        ({"rule": "random"}, "needs a random key"),
        ({"keep": 0}, "keep=0"),
        ({"keep": 17}, "keep=17.*16"),
    ],
)
def test_what_a_rule_lacks_is_said(options, message):
    options = {"keep": 4} | options
    with pytest.raises(UserError, match=message):
        selection.keep_rows(tied(16), **options)


@pytest.mark.parametrize("mesh_shape", MESHES)
@pytest.mark.parametrize("rule", selection.RULES)
def test_a_mesh_keeps_the_same_rows(mesh_shape, rule):
    scores = np.where(np.arange(64) % 3 > 0, tied(64), np.random.default_rng(3).standard_normal(64)).astype(np.float32)
    options = {"rule": rule, "threshold": 0.5, "noise": 0.5}
    plain = keep(scores, 16, **options)
    mesh = sharding.make_mesh(*mesh_shape)
    with jax.set_mesh(mesh):
        sharded = keep(jax.device_put(scores, sharding.batch_sharding(mesh)), 16, **options)
    jax.tree.map(np.testing.assert_array_equal, sharded, plain)


# Tokens.


def reference_share(values, mask, share):
    values = np.where(np.isnan(values), -np.inf, values).ravel()
    counted = np.flatnonzero(np.ravel(mask) != 0)
    best = sorted(counted, key=lambda i: (-values[i], i))[: int(np.ceil(round(share * len(counted), 9)))]
    out = np.zeros(values.size, bool)
    out[best] = True
    return out.reshape(np.shape(mask))


def tokens(seed, batch=8, length=31):
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((batch, length)).astype(np.float32)
    if seed % 3 == 0:
        values = np.round(values)  # ties, and both zeros
    if seed % 3 == 1:
        values = (values * np.exp(rng.uniform(-80, 80, values.shape))).astype(np.float32)
        values[rng.random(values.shape) < 0.2] = rng.choice([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40])
    mask = (rng.random(values.shape) < rng.random()).astype(np.float32)
    return values, mask


@pytest.mark.parametrize("share", [0.6, 0.07, 1.0, 0.333, 1e-4])
def test_top_share_is_the_sorted_reference(share):
    fn = jax.jit(lambda v, m: selection.top_share(v, m, share))
    for seed in range(40):
        values, mask = tokens(seed)
        mask = [mask, np.ones_like(mask), 0 * mask, (np.arange(mask.size) == 7).reshape(mask.shape) * 1.0][
            seed % 4 if seed > 20 else 0
        ]
        expected = reference_share(values, mask, share)
        actual = fn(values, mask.astype(np.float32))
        assert actual.dtype == bool
        np.testing.assert_array_equal(actual, expected)
    assert fn(np.ones((8, 31), np.float32), np.ones((8, 31), np.float32)).sum() == int(np.ceil(share * 248))
    np.testing.assert_array_equal(fn(values.astype(jnp.bfloat16), mask != 0), reference_share(
        np.asarray(values.astype(jnp.bfloat16), np.float32), mask, share))  # fmt: skip


def test_masked_values_choose_nothing():
    values, mask = tokens(2)
    clean = selection.top_share(values, mask, 0.5)
    for bad in (np.nan, np.inf, -np.inf):
        np.testing.assert_array_equal(selection.top_share(np.where(mask == 0, bad, values), mask, 0.5), clean)


def test_the_share_of_many_tokens_is_exact():
    """float32 would give 1,677,721.6 for 0.1 of 2^24, and int32 products would overflow."""
    for count in (2**24, 2**24 + 1, 10**9, 2**31 - 1, 10, 0):
        for share in (0.1, 0.667, 0.0001, 0.9999, 1.0, 0.6):
            numerator, denominator = round(share * 10**4), 10**4
            assert selection._share_of(jnp.int32(count), share) == -(-count * numerator // denominator)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01, float("nan")])
def test_a_share_out_of_range_is_named(share):
    with pytest.raises(UserError, match="select.token_share="):
        selection.top_share(np.ones((2, 2)), np.ones((2, 2)), share)


@pytest.mark.parametrize("mesh_shape", MESHES)
def test_devices_exchange_counts_only(mesh_shape):
    mesh = sharding.make_mesh(*mesh_shape)
    fn = jax.jit(lambda v, m: selection.top_share(v, m, 0.6))
    with jax.set_mesh(mesh):
        placed = jax.device_put(tokens(0), sharding.batch_sharding(mesh))
        compiled = fn.lower(*placed).compile()
        for seed in range(6):
            values, mask = tokens(seed)
            sharded = compiled(*jax.device_put((values, mask), sharding.batch_sharding(mesh)))
            np.testing.assert_array_equal(sharded, reference_share(values, mask, 0.6))
    assert sharded.sharding.is_equivalent_to(sharding.batch_sharding(mesh), 2)
    text = compiled.as_text()
    for word in ("sort(", "TopK", "all-gather", "all-to-all", "collective-permute"):
        assert word not in text
    exchanged = re.findall(r"^\s*%\S+ = (.*?) all-reduce", text, flags=re.M)
    assert exchanged
    assert all(set(re.findall(r"[a-z]+\d+\[[\d,]*\]", shapes)) <= {"s32[]", "s32[15]"} for shapes in exchanged)

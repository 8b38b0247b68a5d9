"""Scores against a float64 reference that indexes and sorts, from given statistics and from hidden states."""

import sys
import types

import jax
import jax.numpy as jnp
import losses_reference
import numpy as np
import pytest

from slm_assist import plugins, sharding
from slm_assist.assist import scores
from slm_assist.errors import UserError
from slm_assist.losses import TokenStats, blocked

QUANTILES = {"median": 0.5, "upper_quartile": 0.75, "lower_quartile": 0.25}
OPTIONS = {"k": 10, "masked": "zero", "statistic": "median"}


def reference(loss, rank, mask, *, k, masked, statistic):
    """Row by row: leave tokens out, sort, pick."""
    out = []
    for row_loss, row_rank, row_mask in zip(np.asarray(loss, np.float64), rank, np.asarray(mask), strict=True):
        keep = row_mask != 0
        values, member = row_loss[keep], row_rank[keep] < k
        values = values[member] if masked == "drop" else np.where(member, values, 0.0)
        if not values.size:
            out.append(0.0)
        elif statistic == "mean":
            out.append(values.mean())
        else:
            out.append(np.median(values) if statistic == "median" else np.quantile(values, QUANTILES[statistic]))
    return np.array(out)


def problem(seed, rows=12, length=17, vocab=40):
    """Losses with ties, ranks up to `vocab`, masks from full to empty."""
    rng = np.random.default_rng(seed)
    loss = (rng.integers(0, 12, (rows, length)) / 4).astype(np.float32)
    loss[rows // 2 :] = rng.exponential(2, (rows - rows // 2, length))
    rank = rng.integers(0, vocab, (rows, length)).astype(np.int32)
    mask = (rng.random((rows, length)) < rng.random((rows, 1))).astype(np.float32)
    mask[0], mask[1], mask[2] = 0, 1, np.arange(length) == 3
    return loss, rank, mask


@pytest.mark.parametrize("statistic", scores.STATISTICS)
@pytest.mark.parametrize("masked", scores.MASKED)
@pytest.mark.parametrize("k", [1, 10, 25, 40])
def test_salt_is_the_reference(statistic, masked, k):
    options = {"k": k, "masked": masked, "statistic": statistic}
    fn = jax.jit(lambda *a: scores.salt(*a, **options))
    for seed in range(8):
        loss, rank, mask = problem(seed)
        actual = fn(loss, rank, mask)
        assert actual.dtype == jnp.float32
        np.testing.assert_allclose(actual, reference(loss, rank, mask, **options), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(scores.salt(loss, rank, mask != 0, **options), actual)


def test_rows_of_one_token():
    loss, rank = np.array([[3.0], [4.0]], np.float32), np.array([[9], [10]])
    for statistic in scores.STATISTICS:
        np.testing.assert_array_equal(scores.salt(loss, rank, np.ones((2, 1)), statistic=statistic), [3, 0])


def test_the_median_of_an_even_count_is_between_the_middle_two():
    loss, rank = np.array([[5.0, 1.0, 2.0, 9.0]], np.float32), np.array([[0, 0, 99, 0]])
    ones = np.ones_like(loss)
    assert scores.salt(loss, rank, ones)[0] == 3.0  # of 0, 1, 5, 9
    assert scores.salt(loss, rank, ones, masked="drop")[0] == 5.0  # of 1, 5, 9
    assert scores.salt(loss, rank + 10, ones, masked="drop")[0] == 0.0
    assert scores.salt(loss, rank, ones, statistic="upper_quartile")[0] == 6.0  # of 0, 1, 5, 9


def test_the_other_scores_are_means_over_the_mask():
    (a, _, mask), (b, *_) = problem(1), problem(2)
    with np.errstate(invalid="ignore"):
        mean = lambda x: np.nan_to_num((x.astype(np.float64) * mask).sum(1) / mask.sum(1))  # noqa: E731
        expected = {"a": mean(a), "a-b": mean(a - b)}
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)  # noqa: E731
    close(scores.perplexity(a, mask), expected["a"])
    close(scores.difference(a, b, mask), expected["a-b"])  # the reference's minus the larger model's
    close(scores.learnability(a, b, mask), expected["a-b"])
    np.testing.assert_array_equal(scores.excess(a, b), a - b)
    first, second = TokenStats(a, None), TokenStats(b, None)
    for name, stats in (
        ("difference", {"reference": first, "scorer": second}),
        ("excess", {"scorer": first, "reference": second}),
        ("learnability", {"learner": first, "reference": second}),
    ):
        score = scores.make(name, **OPTIONS)
        assert set(score.roles) == set(stats)
        close(score(stats, mask), expected["a-b"])


def test_masked_values_and_other_rows_change_no_bit():
    loss, rank, mask = problem(3)
    other_loss, other_rank, other_mask = problem(4)
    for options in ({}, {"masked": "drop"}, {"statistic": "mean"}, {"statistic": "upper_quartile"}):
        fn = jax.jit(lambda *a, o=options: scores.salt(*a, **o))
        clean = np.asarray(fn(loss, rank, mask))
        gone = mask == 0
        for value in (np.nan, np.inf, -np.inf):
            np.testing.assert_array_equal(fn(np.where(gone, value, loss), np.where(gone, 0, rank), mask), clean)
        for row in range(len(loss)):
            mixed = [x.copy() for x in (other_loss, other_rank, other_mask)]
            for x, y in zip(mixed, (loss, rank, mask), strict=True):
                x[row] = y[row]
            assert fn(*mixed)[row] == clean[row]


def test_a_nan_loss_that_counts_is_seen():
    """A broken model has rank V everywhere, so that its losses would otherwise be taken for 0."""
    loss, rank, mask = problem(5)
    loss[1, 0], rank[1, 0] = np.nan, 40
    for masked in scores.MASKED:
        assert np.flatnonzero(np.isnan(scores.salt(loss, rank, mask, masked=masked))).tolist() == [1]
    assert np.flatnonzero(np.isnan(scores.perplexity(loss, mask))).tolist() == [1]


def large(seed=0, batch=4, length=6, d=4, vocab=262144, k=10):
    """Small integers: logits are exact and tie by the thousand; targets straddle the edge of the top k."""
    rng = np.random.default_rng(seed)
    hidden = rng.integers(-1, 2, (batch, length, d)).astype(np.float32)
    head = rng.integers(-2, 3, (d, vocab)).astype(np.float32)
    mask = (rng.random((batch, length)) < 0.8).astype(np.float32)
    loss, rank, targets = np.zeros(mask.shape), np.zeros(mask.shape, int), np.zeros(mask.shape, np.int32)
    for at in np.ndindex(mask.shape):
        z = hidden[at].astype(np.float64) @ head
        order = np.argsort(-z, kind="stable")
        rank[at] = rng.choice([0, k - 2, k - 1, k, k + 1, vocab - 1])
        targets[at] = order[rank[at]]
        loss[at] = -losses_reference.log_softmax(z)[targets[at]]
        if rank[at] in (k - 1, k):
            assert z[order[k - 1]] == z[order[k]]  # only the index decides
    return hidden, head, targets, mask, loss, rank


@pytest.mark.parametrize("mesh_shape", [None, (1, 1, 8), (2, 1, 4)])
def test_salt_from_hidden_states_with_ties_at_the_largest_vocabulary(mesh_shape):
    hidden, head, targets, mask, loss, rank = large()
    variants = [
        {"k": 10, "masked": masked, "statistic": statistic} for masked in scores.MASKED for statistic in QUANTILES
    ]

    @jax.jit
    def score(*args):
        stats = blocked.token_stats(*args, block_bytes=8 * 4 * 262144)
        salt = [scores.make("salt", **o, vocab_size=262144)({"scorer": stats}, mask) for o in variants]
        return stats.rank, salt

    if mesh_shape is None:
        actual_rank, actual = score(hidden, head, targets)
    else:
        with jax.set_mesh(sharding.make_mesh(*mesh_shape)):
            actual_rank, actual = score(hidden, head, targets)
    np.testing.assert_array_equal(actual_rank, rank)
    for options, value in zip(variants, actual, strict=True):
        np.testing.assert_allclose(value, reference(loss, rank, mask, **options), rtol=1e-5, atol=1e-5)


def test_rows_stay_on_their_devices():
    mesh = sharding.make_mesh(4, 2, 1)
    arrays = [x[:8] for x in problem(6)]
    plain = jax.jit(scores.salt)(*arrays)
    with jax.set_mesh(mesh):
        placed = jax.device_put(arrays, sharding.batch_sharding(mesh))
        compiled = jax.jit(scores.salt).lower(*placed).compile()
        np.testing.assert_array_equal(compiled(*placed), plain)
    for word in ("all-gather", "all-to-all", "all-reduce", "collective-permute"):
        assert word not in compiled.as_text()


# Names and plugins.


@pytest.fixture
def package(monkeypatch):
    """A module of somebody else's."""
    module = types.ModuleType("somebodys_package")
    module.entry = lambda stats, mask: stats["scorer"].loss[:, 0]
    module.pair = lambda stats, mask: (stats["learner"].loss - stats["reference"].loss).max(axis=1)
    module.pair.roles = ["learner", "reference"]
    module.wrong_roles = lambda stats, mask: 0
    module.wrong_roles.roles = ("student",)
    module.whole = lambda stats, mask: stats["scorer"].loss
    module.number = 3
    monkeypatch.setitem(sys.modules, "somebodys_package", module)
    return module


def test_a_score_from_another_package(package):
    loss, rank, mask = problem(7)
    score = scores.make("somebodys_package:entry", **OPTIONS)
    assert score.roles == ("scorer",)
    np.testing.assert_array_equal(jax.jit(score)({"scorer": TokenStats(loss, rank)}, mask), loss[:, 0])
    score = scores.make("somebodys_package:pair", **OPTIONS)
    assert score.roles == ("learner", "reference")
    stats = {"learner": TokenStats(loss, rank), "reference": TokenStats(loss - 1, rank)}
    np.testing.assert_allclose(score(stats, mask), 1)
    with pytest.raises(UserError, match="one number a row"):
        scores.make("somebodys_package:whole", **OPTIONS)({"scorer": TokenStats(loss, rank)}, mask)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("sallt", {}, "select.score='sallt': choose one of .*did you mean salt"),
        ("salt", {"k": 0}, "select.k=0"),
        ("salt", {"k": 41}, "select.k=41: the vocabulary has only 40"),
        ("salt", {"masked": "dropped"}, "select.masked='dropped'.*drop"),
        ("salt", {"statistic": "medain"}, "select.statistic='medain'.*did you mean median"),
        ("somebodys_package:wrong_roles", {}, "select.score=.*roles.*student"),
        ("somebodys_package:entri", {}, "select.score=.*no 'entri'.*did you mean entry"),
        ("somebodys_package:number", {}, "select.score=.*int, not a function"),
        ("nobodys_package:entry", {}, "select.score=.*no module 'nobodys_package'"),
        ("json.nothing:entry", {}, "select.score=.*no module 'json.nothing'"),
        (":entry", {}, "select.score=.*package.module:function"),
        ("json:", {}, "select.score=.*package.module:function"),
    ],
)
def test_what_is_wrong_is_named(package, name, options, message):
    with pytest.raises(UserError, match=message) as caught:
        scores.make(name, **(OPTIONS | options), vocab_size=40)
    assert "\n" not in str(caught.value)


def test_a_k_as_large_as_the_vocabulary_is_one():
    assert scores.make("salt", **(OPTIONS | {"k": 40}), vocab_size=40).roles == ("scorer",)


def test_a_module_that_fails_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import surely_not_installed\n")
    (tmp_path / "fails.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="importing needs_more fails.*surely_not_installed"):
        plugins.load("select.rule", "needs_more:fn")
    with pytest.raises(UserError, match="select.rule='fails:fn': importing fails fails.*ZeroDivision"):
        plugins.load("select.rule", "fails:fn")
    assert plugins.load("key", "json:JSONDecoder.decode") is __import__("json").JSONDecoder.decode

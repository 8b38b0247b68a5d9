"""Bits a byte of documents against loops that count them, and comparisons of points against figures that are known."""

import json
import math
import statistics
from types import SimpleNamespace

import evidence_made
import numpy as np
import pytest

from slm_assist.errors import UserError

DOMAINS = ("Wiki", "Code", "Speeches", "Mail")
SHARES = (0.6, 0.3, 0.0, 0.1)


@pytest.fixture(scope="module")
def evidence():
    with evidence_made.scripts() as found:
        yield found


@pytest.fixture(scope="module")
def compare(evidence):
    return evidence.compare


@pytest.fixture(scope="module")
def held(evidence):
    """40 documents of one to four rows, in four domains of which one is not trained on, in an order of no kind."""
    rng = np.random.default_rng(0)
    domain_of = rng.permutation(np.repeat(np.arange(4), 10))
    document = np.repeat(np.arange(40), rng.integers(1, 5, 40))
    domain = domain_of[document]
    bucket = rng.integers(0, 3, len(document))  # of the unseen domain too, where it must not count
    size = rng.integers(20, 400, len(document)).astype(float)
    return evidence.measures.Held(document, domain, bucket, size, DOMAINS, np.array(SHARES))


@pytest.fixture(scope="module")
def nats(held):
    return np.random.default_rng(1).uniform(50, 300, (2, len(held.document)))


# Measures


def ratio(held, nats, times, chosen):
    """Bits a byte of the rows that `chosen` says, each document counted as often as it was drawn, one by one."""
    bits = size = 0.0
    for document, count in enumerate(times):
        for _ in range(int(count)):
            for row in range(len(nats)):
                if held.document[row] == document and chosen(row):
                    bits += nats[row] / math.log(2)
                    size += held.bytes[row]
    return bits / size


def test_measures_are_those_of_a_loop_over_the_documents_drawn(held, nats):
    draws = held.draws(replicates=3, seed=5)
    found = held.measure(nats, draws)
    names = {"bits_per_byte", "domain_mean", "unseen", "domain:Wiki", "domain:Code", "domain:Mail", "bucket:easy",
             "bucket:medium", "bucket:hard"}  # fmt: skip
    assert found.keys() == names and all(value.shape == (4, 2) for value in found.values())
    for b, point in np.ndindex(4, 2):
        one, times = nats[point], draws[b]
        by_domain = [ratio(held, one, times, lambda row, i=i: held.domain[row] == i) for i in range(4)]
        expected = {f"domain:{DOMAINS[i]}": by_domain[i] for i in (0, 1, 3)} | {
            "bits_per_byte": 0.6 * by_domain[0] + 0.3 * by_domain[1] + 0.1 * by_domain[3],
            "domain_mean": (by_domain[0] + by_domain[1] + by_domain[3]) / 3,
            "unseen": by_domain[2],
        }
        for i, name in enumerate(("easy", "medium", "hard")):
            expected[f"bucket:{name}"] = ratio(
                held, one, times, lambda row, i=i: held.bucket[row] == i and held.domain[row] != 2
            )
        for name, value in expected.items():
            assert found[name][b, point] == pytest.approx(value, rel=1e-12), name


def test_weights_of_a_measure_add_up_to_1_and_the_unseen_domain_is_in_none_of_the_others(held):
    unseen = held.domain == 2
    for name, strata in held.strata().items():
        assert sum(weight for weight, _ in strata) == pytest.approx(1)
        rows = np.sum([chosen for _, chosen in strata], axis=0)
        assert rows.max() == 1
        assert (rows[unseen] == 1).all() and not rows[~unseen].any() if name == "unseen" else not rows[unseen].any()
    assert sum(len(strata[0][1].nonzero()[0]) for name, strata in held.strata().items() if ":" in name) == (
        2 * (~unseen).sum()
    )


def test_a_model_that_is_worse_on_the_unseen_domain_only_is_worse_there_only(held, nats):
    worse = nats[:1] + 100.0 * (held.domain == 2)
    found = held.measure(np.concatenate([nats[:1], worse]), held.draws(replicates=1))
    assert {name for name, value in found.items() if value[0, 0] != value[0, 1]} == {"unseen"}


def test_a_draw_has_as_many_documents_of_each_domain(held):
    draws = held.draws(replicates=2000)
    domain_of = np.array([held.domain[held.document == i][0] for i in range(40)])
    assert draws.shape == (2001, 40) and (draws[0] == 1).all() and (draws >= 0).all() and (draws % 1 == 0).all()
    for i in range(4):
        assert (draws[:, domain_of == i].sum(axis=1) == 10).all()
    np.testing.assert_allclose(draws[1:].mean(axis=0), 1, atol=6 / math.sqrt(2000))
    np.testing.assert_allclose(draws[1:].var(axis=0), 0.9, atol=0.15)  # of a multinomial of 10 in 10
    np.testing.assert_array_equal(draws, held.draws(replicates=2000))
    assert (draws[1:] != held.draws(replicates=2000, seed=1)[1:]).any()


def test_rows_that_are_held_are_cut_into_thirds_by_another_model(evidence, tmp_path):
    evidence_made.write_corpus(tmp_path)
    count = 3 * evidence_made.DOCUMENTS * evidence_made.ROWS
    losses = np.random.default_rng(0).permutation(count) + 1.0
    (tmp_path / "cutter").mkdir()
    (tmp_path / "cutter" / "documents-test.json").write_text(json.dumps({"cross_entropy": losses.tolist()}))
    held = evidence.measures.held(tmp_path, "test", tmp_path / "cutter")
    seen = np.arange(count) < 2 * count // 3
    np.testing.assert_array_equal(held.seen, seen)
    np.testing.assert_allclose(held.shares, [0.75, 0.25, 0])
    for i, third in enumerate(np.array_split(np.sort(losses[seen]), 3)):
        assert sorted(losses[held.bucket == i]) == third.tolist()
    assert (held.bucket[~seen] == -1).all() and held.count == 3 * evidence_made.DOCUMENTS
    with pytest.raises(UserError, match="rows-other.json: nothing was measured"):
        evidence.measures.held(tmp_path, "other", tmp_path / "cutter")


# Intervals


def coverage(interval, seeds, *, documents=40, by_seed=1.0, by_document=3.0, both=1.0, repetitions=300):
    """How often the interval has the truth, 0, where seeds and documents both differ."""
    rng, hits = np.random.default_rng(3), 0
    for _ in range(repetitions):
        effects = by_seed * rng.normal(size=(1, seeds)) + by_document * rng.normal(size=(documents, 1))
        values = effects + both * rng.normal(size=(documents, seeds))
        draws = np.concatenate(
            [np.ones((1, documents)), rng.multinomial(documents, np.full(documents, 1 / documents), size=200)]
        )
        low, high = interval(draws @ values / documents)
        hits += low <= 0 <= high
    return hits / repetitions


@pytest.mark.parametrize("seeds", [3, 5, 30])
@pytest.mark.parametrize("effects", [(1.0, 3.0, 1.0), (1.0, 0.2, 0.2), (0.1, 3.0, 1.0)])
def test_intervals_have_the_truth_as_often_as_they_say(evidence, seeds, effects):
    by_seed, by_document, both = effects
    found = coverage(evidence.measures.interval, seeds, by_seed=by_seed, by_document=by_document, both=both)
    assert 0.91 <= found <= (0.98 if seeds == 30 else 0.995)  # 0.95, of 300 repetitions: 0.013 of noise


def test_an_interval_has_the_spread_of_both_and_one_seed_has_none(evidence):
    rng = np.random.default_rng(0)
    documents, seeds = 0.3 * rng.normal(size=20_001), rng.normal(size=12)
    documents -= documents.mean()
    by_seed = 2.201 * seeds.std(ddof=1) / math.sqrt(12)
    for weights in ((1, 1), (1, 0), (0, 1)):
        values = weights[0] * seeds + weights[1] * documents[:, None]
        low, high = evidence.measures.interval(values)
        assert (high - low) / 2 == pytest.approx(math.hypot(weights[0] * by_seed, weights[1] * 1.96 * 0.3), rel=0.03)
        assert (low + high) / 2 == pytest.approx(weights[0] * seeds.mean(), abs=0.02)
        assert evidence.measures.interval(-values) == pytest.approx([-high, -low])
    assert evidence.measures.interval(values[:, :1]) is None


# Points that are known


def point(evidence, steps, flops, value, helper=0.0, replicates=200, noise=0.0, seed=0, key="x"):
    draws = value + noise * np.random.default_rng(seed).normal(size=replicates + 1) * (np.arange(replicates + 1) > 0)
    row = evidence.matrix.Row(key, key.title(), "main", "salt")
    return evidence.points.Point(
        row, seed, steps, "", flops, helper, {}, 0.0, 0.0, 1.0, None, 0, {"bits_per_byte": draws}
    )


def curve(evidence, values, *, per_step=1.0, helper=0.0, steps=(40, 70, 100), **more):
    return [point(evidence, n, per_step * n, value, helper, **more) for n, value in zip(steps, values, strict=True)]


def test_baseline_at_flops_is_its_own_at_its_points_and_on_the_line_between(evidence, compare):
    base = curve(evidence, (3.0, 2.0, 1.0))
    at = lambda flops: compare.at_flops(base, flops, "bits_per_byte")  # noqa: E731
    for flops, value in ((40.0, 3.0), (70.0, 2.0), (100.0, 1.0), (100 * (1 + 1e-12), 1.0), (40 * (1 - 1e-12), 3.0)):
        np.testing.assert_array_equal(at(flops), np.full(201, value))
    for flops in (41.0, 50.0, 69.0, 85.0):
        left, right, value = (40, 70, 3.0) if flops < 70 else (70, 100, 2.0)
        expected = value - math.log(flops / left) / math.log(right / left)
        np.testing.assert_allclose(at(flops), expected, rtol=1e-12)
    assert at(math.sqrt(40 * 70))[0] == pytest.approx(2.5)
    assert at(39.9) is None and at(100.1) is None
    assert compare.at_steps(base, 70) is base[1] and compare.at_steps(base, 71) is None


def test_a_replicate_is_compared_with_the_same_replicate(evidence, compare):
    base = curve(evidence, (3.0, 2.0, 1.0), noise=5.0)
    own = {seed: curve(evidence, (2.9, 1.9, 0.9 + seed / 1000), noise=5.0) for seed in (0, 1)}
    for of in (lambda seed, at: compare.at_steps(base, 100).measures["bits_per_byte"],
               lambda seed, at: compare.at_flops(base, at.flops, "bits_per_byte")):  # fmt: skip
        found = compare.apart(own, 100, of, "bits_per_byte", 0.05)
        assert found["mean"] == pytest.approx(-0.0995) and found["seeds"] == pytest.approx([-0.1, -0.099])
        assert found["interval"][1] - found["interval"][0] < 0.05 and found["verdict"] == "better"


def test_outside_what_was_measured_nothing_is_said(evidence, compare):
    base, own = curve(evidence, (3.0, 2.0, 1.0)), {s: curve(evidence, (2.0, 1.0, 0.5), helper=1.0) for s in (0, 1)}
    found = compare.apart(
        own, 100, lambda seed, p: compare.at_flops(base, p.cost(0.5), "bits_per_byte"), "bits_per_byte", 0.1
    )
    assert found == {"mean": None, "interval": None, "seeds": [], "detectable": 0.1,
                     "verdict": "outside the measured range"}  # fmt: skip


@pytest.mark.parametrize(
    ("mean", "interval", "detectable", "expected"),
    [
        (-0.2, (-0.3, -0.1), 0.1, "better"),
        (0.2, (0.1, 0.3), 0.1, "worse"),
        (-0.2, (-0.3, -0.1), 0.25, "not resolved"),
        (0.2, (0.1, 0.3), 0.25, "not resolved"),
        (-0.2, (-0.5, 0.1), 0.1, "not resolved"),
        (0.2, (-0.1, 0.5), 0.1, "not resolved"),
        (0.2, (0.0, 0.4), 0.1, "not resolved"),
        (-0.2, None, 0.1, "one seed"),
        (-0.2, (-0.3, -0.1), None, "one seed"),
    ],
)
def test_a_verdict_needs_both_the_interval_and_the_detectable_difference(compare, mean, interval, detectable, expected):
    assert compare.verdict(mean, interval, detectable) == expected


# 97.5 % and 80 % quantiles of Student's t, from tables
QUANTILES = {1: (12.7062, 1.3764), 2: (4.3027, 1.0607), 4: (2.7764, 0.9410), 9: (2.2622, 0.8834)}
MORE = {12: (2.1788, 0.8726), 20: (2.0860, 0.8600), 39: (2.0227, 0.8511)}


@pytest.mark.parametrize("freedom", QUANTILES)
def test_detectable_difference_is_that_of_baselines_own_spread(evidence, compare, freedom):
    rng = np.random.default_rng(freedom)
    values = rng.normal(size=freedom + 1)
    base = {seed: curve(evidence, (9.0, 9.0, value)) for seed, value in enumerate(values)}
    for others in (3, 5):
        expected = sum(QUANTILES[freedom]) * statistics.stdev(values) * math.sqrt(2 / others)
        assert compare.detectable(base, 100, "bits_per_byte", others) == pytest.approx(expected, rel=1e-3)
    assert compare.detectable(base, 70, "bits_per_byte", 3) == 0
    assert compare.detectable({0: base[0]}, 100, "bits_per_byte", 3) is None
    assert compare.detectable(base, 71, "bits_per_byte", 3) is None  # it has no such models


def test_detectable_difference_with_many_seeds_is_a_little_too_large_and_never_too_small(evidence, compare):
    for freedom, quantiles in MORE.items():
        base = {seed: curve(evidence, (9.0, 9.0, float(seed))) for seed in range(freedom + 1)}
        spread = statistics.stdev(range(freedom + 1)) * math.sqrt(2 / 3)
        assert 1 <= compare.detectable(base, 100, "bits_per_byte", 3) / (sum(quantiles) * spread) < 1.015


# The cost of a quality


def to_quality(evidence, own, base, cost=lambda p: p.flops, steps=100):
    return evidence.compare.to_quality(own, base, steps, cost)


def test_cost_to_baselines_quality_is_where_the_curve_crosses_it(evidence):
    base = {s: curve(evidence, (3.0, 2.0, 1.0 + s / 10)) for s in (0, 1)}  # 1.05 in the mean, at 100
    own = {s: curve(evidence, (2.0, 1.4, 0.4), per_step=1.5) for s in (0, 1)}
    found = to_quality(evidence, own, base)
    part = (1.4 - 1.05) / (1.4 - 0.4)
    assert found["where"] == "within"
    assert found["mean"] == pytest.approx(1.5 * 70 * (100 / 70) ** part / 100)
    # by the seeds drawn, BASELINE's are 1.0 or 1.1 both, or one of each; what that changes is widened
    factor = 2**0.5 * 12.706 / 1.95996
    edges = [1.5 * 70 * (100 / 70) ** (part + factor * (1.4 - target - part)) / 100 for target in (1.1, 1.0)]
    assert found["interval"] == pytest.approx(edges, rel=1e-4)


def test_a_quality_that_is_reached_before_the_first_model_or_by_none(evidence):
    base = {s: curve(evidence, (3.0, 2.0, 1.0)) for s in (0, 1)}
    before = to_quality(evidence, {s: curve(evidence, (1.0, 0.9, 0.8), per_step=2.0) for s in (0, 1)}, base)
    assert before == {"where": "before", "mean": pytest.approx(0.8), "interval": pytest.approx([0.8, 0.8])}
    never = to_quality(evidence, {s: curve(evidence, (3.0, 2.0, 1.001)) for s in (0, 1)}, base)
    assert never == {"where": "never", "mean": None, "interval": [None, None]}
    one = to_quality(evidence, {0: curve(evidence, (3.0, 2.0, 1.0))}, base)
    assert one == {"where": "within", "mean": pytest.approx(1.0), "interval": None}
    # seeds that differ: in some draws it never gets there, so the interval has no end
    mixed = to_quality(evidence, {0: curve(evidence, (3.0, 2.0, 0.2)), 1: curve(evidence, (3.0, 2.0, 1.4))}, base)
    assert mixed["where"] == "within" and mixed["interval"][0] < mixed["mean"] and mixed["interval"][1] is None


def test_baseline_reaches_its_own_quality_at_its_own_cost(evidence):
    base = {s: curve(evidence, (3.0, 2.0, 1.0 + s / 10), noise=0.01, seed=s) for s in (0, 1, 2)}
    found = to_quality(evidence, base, base)
    assert found["where"] == "within" and found["mean"] == pytest.approx(1)
    assert found["interval"] == pytest.approx([1, 1])


def test_a_charge_for_the_small_lm_adds_to_the_cost_and_to_nothing_else(evidence, compare):
    base = {s: curve(evidence, (3.0, 2.0, 1.0)) for s in (0, 1)}
    own = {s: curve(evidence, (3.0, 2.0, 1.0), helper=50.0) for s in (0, 1)}
    assert compare.SHARES == {"full": 1.0, "shared": 0.1, "free": 0.0}
    for share in compare.SHARES.values():
        found = to_quality(evidence, own, base, lambda p, share=share: p.cost(share))
        assert found["mean"] == pytest.approx((100 + 50 * share) / 100)


# Nothing favours a method


def test_a_name_changes_nothing_and_exchanged_rows_exchange_the_verdict(evidence, compare):
    rng = np.random.default_rng(0)
    values = {name: 1 + 0.02 * rng.normal(size=5) - gain for name, gain in (("one", 0.0), ("other", 0.1))}

    def rows(name, key):
        return {s: curve(evidence, (3.0, 2.0, v), noise=0.01, seed=s, key=key) for s, v in enumerate(values[name])}

    def against(a, b):
        of = lambda seed, p: compare.at_flops(b[seed], p.flops, "bits_per_byte")  # noqa: E731
        return compare.apart(a, 100, of, "bits_per_byte", 0.05)

    named = [against(rows("other", key), rows("one", other))
             for key, other in (("salt", "baseline"), ("baseline", "salt"), ("x", "y"))]  # fmt: skip
    assert named[0] == named[1] == named[2] and named[0]["verdict"] == "better"
    back = against(rows("one", "baseline"), rows("other", "salt"))
    assert back["verdict"] == "worse" and back["mean"] == pytest.approx(-named[0]["mean"])
    assert back["interval"] == pytest.approx([-x for x in reversed(named[0]["interval"])])
    costs = [to_quality(evidence, rows("other", key), rows("one", "b")) for key in ("salt", "baseline")]
    assert costs[0] == costs[1]


def test_seconds_are_updates_times_the_medians_of_their_stages(evidence):
    def seconds_of(group="main", stages=None, share=0.0, helper_flops=7.0, key="x", **overrides):
        row = SimpleNamespace(key=key, file="salt", group=group, overrides=overrides)
        point = SimpleNamespace(row=row, stages=stages or {"assisted": 20, "plain": 80}, helper_flops=helper_flops)
        medians = {"plain": 0.1, "salt/assisted": 0.3, "rkd/assisted": 9.0, "small_lm": 0.05}
        return evidence.timing.seconds_of(point, medians, share, 100)

    assert seconds_of() == pytest.approx(20 * 0.3 + 80 * 0.1)
    assert seconds_of(share=1.0) == pytest.approx(20 * 0.3 + 80 * 0.1 + 100 * 0.05)
    assert seconds_of(share=1.0, helper_flops=0.0) == seconds_of()
    assert seconds_of(stages={"selecting": 1}) is None
    assert seconds_of(**{"assist.teacher": "{small}"}) == seconds_of()
    for teacher in ("{quarter}", "slm_assist.assist.ngram:unigram"):
        assert seconds_of("confirmation", **{"assist.teacher": teacher}) is None
        winner = seconds_of("confirmation", key=evidence.matrix.WINS[0], **{"assist.teacher": teacher})
        assert winner == seconds_of()
    assert seconds_of("controls") is None  # its teacher may cost something else
    assert seconds_of(**{"select.list": "x"}) is None  # whose scoring was not timed

"""Domain weights: what they may say, exact shares, each domain's own epochs, and purity."""

import logging

import numpy as np
import pytest

from slm_assist.data import mixture
from slm_assist.data.mixture import CYCLE, PILE, Mixture, weights
from slm_assist.errors import UserError

NAMES = ["web", "books", "code", "rare"]


def domain_of_row(counts=(900, 60, 300, 3), seed=0):
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts)).astype(np.int32)


def error(spec, domains=NAMES, source="jsonl:x"):
    with pytest.raises(UserError) as caught:
        weights(spec, domains, source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_piles_weights_are_the_published_ones():
    assert len(PILE) == 22 and abs(sum(PILE.values()) - 100) < 0.02
    # The table's other columns: raw size (GiB) times epochs, over the sum, is the weight.
    raw_epochs = {"Pile-CC": (227.12, 1), "PubMed Central": (90.27, 2), "Books3": (100.96, 1.5)}
    raw_epochs |= {"Wikipedia (en)": (6.38, 3), "Gutenberg (PG-19)": (10.88, 2.5), "Enron Emails": (0.88, 2)}
    for name, (size, epochs) in raw_epochs.items():
        assert abs(100 * size * epochs / 1254.20 - PILE[name]) < 0.011
    got = weights("pile", list(PILE))
    assert got == weights("", list(PILE), "pile:*.zst") and abs(sum(got.values()) - 1) < 1e-12
    assert abs(got["ArXiv"] - 0.0896) < 1e-5


def test_what_weights_may_say():
    assert weights("natural", NAMES, "pile:x") is None
    assert weights("", NAMES, "jsonl:x") is None
    assert weights("web=1, books=2.5,code=0,rare=1.5", NAMES) == {"web": 0.2, "books": 0.5, "code": 0, "rare": 0.3}
    assert weights("a=b=3,c=1", ["a=b", "c"]) == {"a=b": 0.75, "c": 0.25}


def test_the_piles_weights_on_a_part_of_it(caplog):
    with caplog.at_level(logging.WARNING):
        got = weights("", ["Github", "ArXiv"], "pile:x")
    assert got == {"Github": PILE["Github"] / (7.59 + 8.96), "ArXiv": PILE["ArXiv"] / (7.59 + 8.96)}
    assert "Pile-CC" in caplog.text


def test_bad_weights():
    assert "no domain 'wep' in the corpus (did you mean web?)" in error("wep=1,books=1,code=1,rare=1")
    assert "no weight for 'code', 'rare'" in error("web=1,books=1")
    assert "no domain 'web'" in error("", source="pile:x") and "natural" in error("pile")
    for bad in ("web", "web=x", "web=-1", "web=nan", "web=inf", "=1"):
        assert "is not DOMAIN=WEIGHT" in error(bad)
    assert "two weights" in error("web=1,web=2")
    assert "no weight is above 0" in error("web=0,books=0,code=0,rare=0")


SHARES = {"web": 0.1, "books": 0.47, "code": 0.43 - 1e-7, "rare": 1e-7}


def test_shares_are_exact_in_every_cycle_and_places_differ():
    domains = domain_of_row()
    drawn = Mixture(domains, NAMES, SHARES, seed=3).rows_at(np.arange(3 * CYCLE)).reshape(3, CYCLE)
    counts = [np.bincount(domains[cycle], minlength=4) for cycle in drawn]
    np.testing.assert_array_equal(counts[0], counts[1])
    np.testing.assert_array_equal(counts[0], counts[2])
    assert counts[0].sum() == CYCLE and counts[0][3] == 1  # even the smallest share has a place
    np.testing.assert_allclose(counts[0] / CYCLE, [SHARES[name] for name in NAMES], atol=2.0 / CYCLE)
    same_place = (domains[drawn[0]] == domains[drawn[1]]).mean()
    assert abs(same_place - (0.1**2 + 0.47**2 + 0.43**2)) < 0.01  # as independent draws would
    for n in (100, 1000):  # and no stretch is far off
        share = np.bincount(domains[drawn[0][:n]], minlength=4)[1] / n
        assert abs(share - 0.47) < 4 * (0.25 / n) ** 0.5


def test_each_domain_goes_through_its_rows_once_an_epoch():
    domains = domain_of_row()
    mix = Mixture(domains, NAMES, SHARES, seed=3)
    positions = np.arange(2 * CYCLE)
    drawn, epochs = mix.rows_at(positions), mix.epochs_at(positions)
    assert len(mix) == len(domains)
    for d, size in enumerate((900, 60, 300)):
        own, own_epochs = drawn[domains[drawn] == d], epochs[domains[drawn] == d]
        np.testing.assert_array_equal(own_epochs, np.arange(len(own)) // size)
        for start in (0, size, 5 * size):
            assert sorted(own[start : start + size]) == np.flatnonzero(domains == d).tolist()
        assert own[:size].tolist() != own[size : 2 * size].tolist()


def test_a_position_says_all():
    mix = Mixture(domain_of_row(), NAMES, SHARES, seed=5)
    whole = mix.rows_at(np.arange(6 * CYCLE))
    at = np.random.default_rng(0).integers(0, 6 * CYCLE, 500)
    other = Mixture(domain_of_row(), NAMES, SHARES, seed=5)
    np.testing.assert_array_equal(other.rows_at(at), whole[at])
    assert other.rows_at(at).dtype == np.int64
    np.testing.assert_array_equal(other.rows_at(np.array([10**12])), mix.rows_at(np.array([10**12])))
    assert not np.array_equal(Mixture(domain_of_row(), NAMES, SHARES, seed=6).rows_at(at), whole[at])


GOLDEN = [9, 6, 3, 1, 5, 8, 0, 10, 11, 4, 6, 3]


def test_a_mixture_is_stable_across_versions():
    """A change here would change every run that is resumed."""
    mix = Mixture(np.arange(12) % 3, ["a", "b", "c"], {"a": 0.5, "b": 0.3, "c": 0.2}, seed=0)
    assert mix.rows_at(np.arange(12)).tolist() == GOLDEN


def test_only_listed_rows(caplog):
    domains = domain_of_row()
    listed = np.sort(np.random.default_rng(1).choice(np.flatnonzero(domains != 1), 100, replace=False))
    with caplog.at_level(logging.WARNING):
        mix = Mixture(domains, NAMES, {"web": 0.25, "books": 0.5, "code": 0.25, "rare": 0}, seed=0, row_ids=listed)
    assert "books" in caplog.text
    drawn = mix.rows_at(np.arange(CYCLE))
    assert set(drawn.tolist()) == set(listed[domains[listed] != 3].tolist())
    np.testing.assert_array_equal(np.bincount(domains[drawn], minlength=4), [CYCLE // 2, 0, CYCLE // 2, 0])
    with pytest.raises(UserError, match="no row is in a domain with a weight"):
        Mixture(domains, NAMES, {"books": 1.0}, seed=0, row_ids=listed)


def test_quotas_by_largest_remainder():
    rng = np.random.default_rng(0)
    for n in (1, 2, 22, 1000, CYCLE - 1, CYCLE):
        share = rng.dirichlet(np.full(n, 0.1))
        quota = mixture._quotas(share, CYCLE)
        assert quota.sum() == CYCLE and quota.min() >= 1
        big = share * CYCLE >= 1
        assert n > 22 or np.abs(quota - share * CYCLE)[big].max() < (1 if big.all() else 2)
    assert mixture._quotas(np.array([0.5, 0.3, 0.2]), 11).tolist() == [6, 3, 2]

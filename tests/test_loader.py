"""Order and loader: every row once an epoch, and batches that depend on the step number alone."""

import random
import threading

import numpy as np
import pytest

from slm_assist.data.loader import Feed, Loader, Prefetcher
from slm_assist.data.mixture import Mixture
from slm_assist.data.objectives import causal
from slm_assist.data.order import Order, permute, row_keys
from slm_assist.data.rows import prepare
from slm_assist.data.sources import open_source

T, B = 16, 8


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    words = ["model", "token", "layer", "train", "step", "small", "large", "row", "loss", "batch"]
    text = "\n\n".join(" ".join(rng.choices(words, k=rng.randrange(5, 80))) for _ in range(800))
    (path / "a.txt").write_text(text)
    source = open_source(f"text:{path}/a.txt")
    options = {"vocab_size": 330, "validation_fraction": 0.1, "progress": False}
    return prepare(source, cache_dir=path / "cache", seq_len=T, **options).train


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
        assert a[name].dtype == b[name].dtype


@pytest.mark.parametrize("n", [*range(1, 70), 255, 256, 257, 1000, 65_537, 100_003])
def test_permutation_is_a_bijection(n):
    for epoch in (0, 1, 10**9):
        assert np.array_equal(np.sort(permute(np.arange(n), n, seed=3, epoch=epoch)), np.arange(n))


def test_permutation_is_evaluated_anywhere_and_in_any_shape():
    n = 50_000
    whole = permute(np.arange(n), n, seed=-5, epoch=2)
    at = np.random.default_rng(0).integers(0, n, (3, 40))
    np.testing.assert_array_equal(permute(at, n, seed=-5, epoch=2), whole[at])
    huge = 2**40 + 7
    image = permute(np.arange(huge - 1000, huge), huge, seed=0)
    assert image.min() >= 0 and image.max() < huge and len(set(image.tolist())) == 1000


def test_permutations_differ_between_seeds_and_epochs_and_look_shuffled():
    n = 4000
    drawn = [permute(np.arange(n), n, seed, epoch) for seed in (0, 1, 2**40) for epoch in range(4)]
    for i, a in enumerate(drawn):
        assert abs(np.corrcoef(a, np.arange(n))[0, 1]) < 0.06  # 3.8 standard deviations
        assert abs(np.corrcoef(a[1:], a[:-1])[0, 1]) < 0.06
        for b in drawn[:i]:
            assert (a == b).sum() < 10  # expected 1


def test_small_permutations_are_all_drawn_about_equally():
    orders = [tuple(permute(np.arange(4), 4, seed)) for seed in range(4800)]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 24 and min(counts) > 130 and max(counts) < 270  # expected 200, deviation 14


def test_order_is_stable_across_versions():
    """A change here would change every run that is resumed."""
    assert Order(10, seed=0).rows_at(np.arange(12)).tolist() == [8, 6, 7, 3, 5, 4, 9, 1, 2, 0, 0, 7]


def test_order_visits_each_row_once_an_epoch_and_takes_lists():
    order = Order(37, seed=1)
    epochs = order.rows_at(np.arange(37 * 3)).reshape(3, 37)
    assert all(sorted(epoch) == list(range(37)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3
    chosen = [5, 900, 7, 2**40]
    listed = Order(chosen, seed=1).rows_at(np.arange(8))
    assert sorted(listed[:4].tolist()) == sorted(listed[4:].tolist()) == sorted(chosen)
    assert listed.dtype == np.int64
    np.testing.assert_array_equal(order.rows_at(np.array([80, 3, 40])), epochs.reshape(-1)[[80, 3, 40]])
    with pytest.raises(ValueError, match="at least one row"):
        Order([], seed=0)


def test_batch_at_is_pure(rows):
    loader = Loader(rows, Order(len(rows), seed=7), B)
    steps = [0, 1, 2, 9, len(rows) // B, 10**7]  # across the end of an epoch, and far away
    forwards = [loader.batch_at(n) for n in steps]
    other = Loader(rows, Order(len(rows), seed=7), B)
    for n, batch in zip(reversed(steps), reversed(forwards), strict=True):
        same(other.batch_at(n), batch)
    assert forwards[0]["row_ids"].dtype == np.int64
    assert {k: (v.shape, v.dtype.name) for k, v in forwards[0].items()} == {
        "tokens": ((B, T), "int32"),
        "targets": ((B, T), "int32"),
        "mask": ((B, T), "float32"),
        "segment_ids": ((B, T), "int32"),
        "positions": ((B, T), "int32"),
        "domain": ((B,), "int32"),
        "row_ids": ((B,), "int64"),
    }
    assert not np.array_equal(Loader(rows, Order(len(rows), seed=8), B).batch_at(0)["row_ids"], forwards[0]["row_ids"])
    np.testing.assert_array_equal(rows.get(forwards[3]["row_ids"])["tokens"], forwards[3]["tokens"])


@pytest.mark.parametrize("held", [[[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 1, 4, 5], [2, 3], [6, 7]]])
def test_each_host_reads_its_rows_of_the_global_batch(rows, held):
    order = Order(len(rows), seed=0)
    whole = Loader(rows, order, B).batch_at(11)
    for local in map(np.asarray, held):
        same(Loader(rows, order, B, local=local).batch_at(11), {name: x[local] for name, x in whole.items()})


def test_prefetcher_serves_the_same_batches_in_order(rows):
    loader = Loader(rows, Order(len(rows), seed=0), B)
    with Prefetcher(loader, start=5, depth=3) as batches:
        for n in range(5, 30):
            same(batches.batch_at(n), loader.batch_at(n))
        with pytest.raises(ValueError, match="batch 3 asked for where 30 is next"):
            batches.batch_at(3)


class Failing:
    """A loader whose batch 2 cannot be made."""

    def __init__(self):
        self.made = []

    def batch_at(self, n):
        self.made.append(n)
        if n == 2:
            raise OSError("the disk is gone")
        return {"n": np.array(n)}


def test_an_error_in_the_thread_reaches_the_caller_and_the_thread_ends():
    before = threading.active_count()
    with Prefetcher(Failing(), depth=4) as batches:
        assert batches.batch_at(0)["n"] == 0 and batches.batch_at(1)["n"] == 1
        with pytest.raises(OSError, match="the disk is gone"):
            batches.batch_at(2)
    assert threading.active_count() == before


def test_prefetcher_makes_no_more_than_its_depth_ahead():
    loader = Failing()
    with Prefetcher(loader, start=3, depth=2) as batches:
        batches.batch_at(3)
    assert max(loader.made) <= 5


def test_epochs_count_how_often_a_row_came_before():
    order = Order([7, 3, 11], seed=4)
    positions = np.arange(30)
    rows, epochs = order.rows_at(positions), order.epochs_at(positions)
    assert epochs.tolist() == [list(rows[:i]).count(rows[i]) for i in range(30)] and epochs.dtype == np.int64


def test_row_keys_depend_on_seed_epoch_and_row_alone():
    epochs, ids = np.meshgrid(np.arange(30), np.arange(200) * 2**33)
    keys = np.concatenate([row_keys(seed, epochs.ravel(), ids.ravel()) for seed in (0, 1, 2**31)])
    assert keys.dtype == np.uint64 and len(set(keys.tolist())) == keys.size  # a clash has odds of 1e-11
    bits = np.unpackbits(keys.view(np.uint8)).reshape(len(keys), 64).mean(axis=0)
    assert np.abs(bits - 0.5).max() < 0.02  # 5 deviations
    np.testing.assert_array_equal(row_keys(0, epochs[3:5, 2], ids[3:5, 2]), row_keys(0, epochs[:, 2], ids[:, 2])[3:5])
    frozen = [9723152164400232264, 5267528338903686919, 11152160617401189963]
    assert row_keys(7, np.array([0, 1, 0]), np.array([5, 5, 2**40])).tolist() == frozen


def test_a_loader_may_start_at_any_step_and_position(rows):
    order = Order(len(rows), seed=7)
    plain, late = Loader(rows, order, B), Loader(rows, order, 2 * B, first_step=10, first_position=3 * B)
    for n, (first, second) in {10: (3, 4), 11: (5, 6), 40: (63, 64)}.items():
        halves = [plain.batch_at(first), plain.batch_at(second)]
        same(late.batch_at(n), {name: np.concatenate([half[name] for half in halves]) for name in halves[0]})
        np.testing.assert_array_equal(late.row_ids_at(n), late.batch_at(n)["row_ids"])
    with pytest.raises(ValueError, match="batch 9 asked for, the first is 10"):
        late.batch_at(9)
    second = Loader(rows, order, 2 * B, first_step=10, first_position=3 * B, local=np.arange(B, 2 * B))
    np.testing.assert_array_equal(second.row_ids_at(11), late.row_ids_at(11))  # all hosts' rows
    np.testing.assert_array_equal(second.batch_at(11)["row_ids"], late.row_ids_at(11)[B:])


def keyed(ids, starts, length, keys):
    """An objective that shows the keys it gets."""
    return {"tokens": np.asarray(ids[:, :-1], np.int32) + 1, "keys": keys}


@pytest.mark.parametrize("order_of", [Order, lambda n, seed: Mixture(np.zeros(n, int), ["x"], {"x": 1.0}, seed)])
def test_an_objective_gets_a_key_for_each_row_and_epoch(rows, order_of):
    order = order_of(len(rows), 7)
    loader = Loader(rows, order, B, objective=keyed, seed=5)
    for n in (0, 1, 2 * len(rows) // B):
        positions = np.arange(n * B, n * B + B)
        batch = loader.batch_at(n)
        np.testing.assert_array_equal(batch["keys"], row_keys(5, order.epochs_at(positions), batch["row_ids"]))
    assert set(batch) == {"tokens", "keys", "domain", "row_ids"}
    other = Loader(rows, order, B, objective=keyed, seed=6).batch_at(0)
    assert not np.isin(other["keys"], loader.batch_at(0)["keys"]).any()


def test_the_causal_form_beside_another(rows):
    order = Order(len(rows), seed=7)
    plain = Loader(rows, order, B).batch_at(4)
    both = Loader(rows, order, B, objective=keyed, causal_too=True).batch_at(4)
    np.testing.assert_array_equal(both["tokens"], plain["tokens"] + 1)
    names = causal(np.zeros((1, 2)), np.zeros((1, 2), bool), np.array([2])).keys()
    same({name: both[f"causal_{name}"] for name in names}, {name: plain[name] for name in names})
    assert set(both) == {"tokens", "keys", "domain", "row_ids"} | {f"causal_{name}" for name in names}


def test_a_feed_takes_the_loader_whose_turn_it_is(rows):
    order = Order(len(rows), seed=7)
    first, second = Loader(rows, order, B), Loader(rows, order, 2 * B, first_step=3, first_position=3 * B)
    third = Loader(rows, Order([1, 2, 3], seed=0), B, first_step=5)
    feed = Feed([(0, first), (3, second), (5, third)])
    with Prefetcher(feed, start=1) as batches:
        for n, loader in enumerate([first, first, second, second, third, third], 1):
            same(batches.batch_at(n), loader.batch_at(n))
            np.testing.assert_array_equal(feed.row_ids_at(n), loader.row_ids_at(n))
    with pytest.raises(ValueError, match="the first is 3"):
        Feed([(3, second)]).batch_at(2)
    for spans in ([], [(0, first), (0, second)], [(4, second), (3, third)]):
        with pytest.raises(ValueError, match="must ascend"):
            Feed(spans)

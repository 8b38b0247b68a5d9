"""Teachers without a network, against dictionaries of counts and a recursion in float64."""

import functools
from collections import Counter, defaultdict
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from slm_assist.assist import ngram, own_teacher
from slm_assist.data import row_store
from slm_assist.errors import UserError

PAD, BOS, EOS = 0, 1, 2


def make_rows(path, vocab, *, documents=60, longest=40, seq_len=16, sure=0.8, marks=False, seed=0):
    """Rows of random texts: with probability `sure` one of its three tokens follows each one, else any but the last."""
    rng = np.random.default_rng(seed)
    follow = rng.integers(3, vocab - 1, (vocab, 3))

    def text(length):
        at = BOS
        for _ in range(length):
            at = follow[at, rng.integers(3)] if rng.random() < sure else int(rng.integers(3, vocab - 1))
            yield at

    texts = [np.array([*text(rng.integers(longest))], np.int64) for _ in range(documents)]
    vocabulary = SimpleNamespace(size=vocab, bos_id=BOS if marks else None, eos_id=EOS if marks else None, pad_id=PAD)
    dtype = row_store.row_dtype(seq_len, vocab)
    records, tokens = row_store.pack(texts, [0] * len(texts), vocabulary, dtype)
    records.tofile(path)
    meta = {"domains": ["random"], "tokens": tokens, "fingerprint": "", "rows": len(records)}
    return row_store.Rows(path, meta, seq_len, vocabulary)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """(rows to count, others to ask about): many short texts of 11 tokens, with nothing between them."""
    tmp = tmp_path_factory.mktemp("ngram")
    return make_rows(tmp / "a", 11), make_rows(tmp / "b", 11, documents=30, seed=1)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """The same of 200 tokens, so that some have more successors than a block, and long texts between BOS and EOS."""
    tmp = tmp_path_factory.mktemp("ngram")
    more = {"longest": 400, "seq_len": 32, "sure": 0.3, "marks": True}
    return make_rows(tmp / "a", 200, documents=200, **more), make_rows(tmp / "b", 200, documents=8, seed=1, **more)


def pieces(rows):
    """The ids of each row's documents, as lists."""
    ids, starts = map(np.concatenate, zip(*rows.all_ids(), strict=True))
    return [part.tolist() for part in np.split(ids, np.flatnonzero(starts)[1:])]


class Counts:
    """Interpolated absolute discounting by its definition."""

    def __init__(self, rows, vocab, order):
        self.after, self.vocab = defaultdict(Counter), vocab
        for piece in pieces(rows):
            for at in range(1, len(piece)):
                for n in range(min(at, order - 1) + 1):
                    self.after[tuple(piece[at - n : at])][piece[at]] += 1
        self.discounts = []
        for n in range(order):
            every = Counter(c for context, counts in self.after.items() if len(context) == n for c in counts.values())
            self.discounts.append(every[1] / (every[1] + 2 * every[2]) if every[1] else 0.5)

    def probabilities(self, context):
        lower = self.probabilities(context[1:]) if context else np.full(self.vocab, 1 / self.vocab)
        counts, discount = self.after.get(tuple(context)), self.discounts[len(context)]
        if not counts:
            return lower
        total = sum(counts.values())
        p = discount * len(counts) / total * lower
        for v, count in counts.items():
            p[v] += max(count - discount, 0) / total
        return p


@functools.partial(jax.jit, static_argnums=0)
def answer(function, params, batch):
    """(hidden [B, T, E], logits [B, T, V])."""
    given = {"params": params} if function is ngram.uniform else {"params": params, "batch": batch}
    hidden, head = function(batch["tokens"], **given)
    logits = head(hidden.reshape(-1, hidden.shape[-1])) if callable(head) else hidden @ head
    return hidden, logits.reshape(*batch["tokens"].shape, -1)


def ask(function, rows, batch):
    """(tables, contexts, logits) after training on `rows`."""
    params = function.prepare(rows, rows.vocabulary)
    return params, *map(np.asarray, answer(function, jax.tree.map(jnp.asarray, params), batch))


def batch_of(rows):
    batch = rows.get(np.arange(30))
    return {name: x for name, x in batch.items() if name != "domain"}


@pytest.mark.parametrize("case", ["few-5", "few-2", "many-3"])
def test_is_the_definition(case, request):
    which, order = case.split("-")
    (rows, others), order = request.getfixturevalue(which), int(order)
    vocab, function = rows.vocabulary.size, ngram.five_gram if order == 5 else ngram.teacher(order)
    model, seen = Counts(rows, vocab, order), Counter()
    for batch in map(batch_of, (rows, others)):
        tables, _, found = ask(function, rows, batch)
        p = np.exp(found.astype(np.float64))
        assert (batch["mask"] == 0).any() and np.isfinite(found).all()
        np.testing.assert_allclose(p.sum(-1), 1, atol=3e-6)
        for row, t in np.argwhere(batch["mask"] > 0):
            length = min(order - 1, batch["positions"][row, t] + 1)
            context = tuple(batch["tokens"][row, t + 1 - length : t + 1].tolist())
            seen[length, context in model.after] += 1
            np.testing.assert_allclose(p[row, t], model.probabilities(context), rtol=3e-5, atol=1e-9)
    # Contexts of every length that the training rows have, and longer ones that they lack.
    assert all(seen[n, True] > 10 for n in range(1, order)) and all(seen[n, False] > 5 for n in range(3, order))
    np.testing.assert_allclose(tables["discount"], model.discounts[1:], rtol=1e-6)
    for n, level in enumerate(tables["levels"], start=2):
        counts = [x for context, x in model.after.items() if len(context) == n - 1]
        assert len(level.tokens) - 1 == sum(len(x) for x in counts)
        assert level.before[-1] == sum(sum(x.values()) for x in counts)
    longest = np.diff(tables["levels"][0].start).max()
    assert longest > 2 * ngram.BLOCK if which == "many" else longest < ngram.BLOCK


def test_the_same_with_and_without_jit(many):
    rows, others = many
    batch, function = {name: jnp.asarray(x[:4]) for name, x in batch_of(others).items()}, ngram.teacher(3)
    params, *compiled = ask(function, rows, batch)
    hidden, head = function(batch["tokens"], batch, jax.tree.map(jnp.asarray, params))
    plain = hidden, head(hidden.reshape(-1, 2)).reshape(compiled[1].shape)
    for a, b in zip(compiled, plain, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_context_ends_at_a_start(few):
    rows, others = few
    batch = batch_of(others)
    _, hidden, logits = ask(ngram.five_gram, rows, batch)
    for n in range(1, 4):
        assert (hidden[..., n][batch["positions"] < n] == -1).all() and (hidden[..., n] >= 0).any()
    # What stands before a segment changes nothing in it.
    row = np.flatnonzero((batch["positions"][:, 1:] == 0).any(axis=1))[0]
    start = np.flatnonzero(batch["positions"][row] == 0)[1]
    changed = batch | {"tokens": batch["tokens"].copy()}
    changed["tokens"][row, :start] = 5
    _, again, logits_again = ask(ngram.five_gram, rows, changed)
    np.testing.assert_array_equal(again[row, start:], hidden[row, start:])
    np.testing.assert_array_equal(logits_again[row, start:], logits[row, start:])
    assert (again[row, :start] != hidden[row, :start]).any()


def test_unigram_and_uniform(many):
    rows, others = many
    vocab, batch = rows.vocabulary.size, batch_of(others)
    counts = np.ones(vocab)
    np.add.at(counts, [v for piece in pieces(rows) for v in piece[1:]], 1)
    assert counts.sum() == rows.tokens + vocab and counts[BOS] == 1
    tables, _, found = ask(ngram.unigram, rows, batch)
    assert tables["levels"] == []
    np.testing.assert_allclose(np.exp(found), np.broadcast_to(counts / counts.sum(), found.shape), rtol=2e-6)
    _, _, found = ask(ngram.uniform, rows, batch)
    assert found.shape[-1] == vocab and (found == 0).all()
    for name in ("unigram", "uniform"):
        assert own_teacher.find(f"slm_assist.assist.ngram:{name}", rows, rows.vocabulary).size <= 4 * vocab + 4


@pytest.mark.parametrize(
    ("ids", "starts", "size"),
    [
        ([9, 69_999, 65_537, 69_999, 1, 69_999, 65_537], [1, 0, 0, 0, 0, 0, 0], 70_000),  # ids beyond 16 bits
        ([3, 4, 5], [1, 1, 1], 7),  # no targets
        ([3, 4], [1, 0], 7),  # no three tokens
    ],
)
def test_large_ids_and_hardly_any_text(ids, starts, size):
    portion = np.array(ids, np.int32), np.array(starts, bool)
    rows = SimpleNamespace(all_ids=lambda: iter([portion]), vocabulary=SimpleNamespace(size=size))
    batch = {"tokens": np.array([[1, ids[1], 6]]), "positions": np.array([[0, 1, 2]])}
    _, hidden, logits = ask(ngram.teacher(3), rows, batch)
    np.testing.assert_allclose(np.exp(logits).sum(-1), 1, atol=1e-5)
    if size == 70_000:
        assert logits[0, 1].argmax() == 65_537 and (hidden[0, 1] >= 0).tolist() == [True, True]
    if len(ids) == 3:
        np.testing.assert_allclose(logits, -np.log(7), rtol=1e-6)


def test_counting_twice_gives_the_same_tables(few):
    rows, _ = few
    first, second = (own_teacher.find("slm_assist.assist.ngram:five_gram", rows, rows.vocabulary) for _ in range(2))
    assert first.identity == second.identity
    other_portions = SimpleNamespace(all_ids=lambda: rows.all_ids(3))
    for a, b in zip(
        *map(jax.tree.leaves, (first.tables, ngram.count(other_portions, rows.vocabulary, 5))), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_refusals():
    for order in (0, -1, 2.0, "5"):
        with pytest.raises(UserError, match="give a positive integer"):
            ngram.teacher(order)


@pytest.mark.parametrize(
    "devices",
    [{}, pytest.param({"mesh__data": 2, "mesh__tensor": 2, "model__num_kv_heads": 2}, marks=pytest.mark.slow)],
)
def test_a_run_is_taught_by_it(tmp_path, devices):
    run = tiny.run(
        tmp_path, "run", assist__teacher="slm_assist.assist.ngram:five_gram", assist__schedule="step", assist__steps=4,
        steps=4, validation__every=0, **devices,
    )  # fmt: skip
    train = [line for line in tiny.records(run) if line["kind"] == "train"]
    assert [line["stage"] for line in train] == ["assisted"] * 4
    for line in train:
        assert 0 < line["distillation_kl"] < 10 and line["teacher_cross_entropy"] < 2 < line["cross_entropy"]

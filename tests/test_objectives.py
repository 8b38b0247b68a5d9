"""Objectives: what is cut out comes back, nothing that is predicted is seen, and the draws are as they should be."""

import hashlib
import math
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_assist import config as config_lib
from slm_assist.data import objectives
from slm_assist.data.objectives import causal, make, sentinels_needed
from slm_assist.errors import UserError
from slm_assist.models import ModelConfig, Transformer

BOS, EOS, PAD, TEXT, SENTINEL = 1, 2, 0, 3, 300  # text is 3 to 299
VOCABULARY = SimpleNamespace(
    size=SENTINEL + 64, sentinel_ids=np.arange(SENTINEL, SENTINEL + 64), bos_id=BOS, eos_id=EOS, pad_id=PAD
)
NO_EOS = SimpleNamespace(sentinel_ids=np.arange(SENTINEL + 63, SENTINEL - 1, -1), bos_id=None, eos_id=None, pad_id=PAD)
NAMES = ("tokens", "targets", "segment_ids", "positions", "mask")


def data(objective, seq_len=64, **keys):
    section = config_lib.get_config().data
    section.update({"objective": objective, "seq_len": seq_len} | keys)
    return section


def rows(n=40, seq_len=64, seed=0, framed=True):
    """Rows of documents of 1 to 90 ids and padding, as `Rows` hands them to an objective, with a key each."""
    rng = np.random.default_rng(seed)
    ids, starts = np.full((n, seq_len + 1), PAD, np.uint16), np.zeros((n, seq_len + 1), bool)
    length = rng.choice([seq_len + 1, seq_len + 1, seq_len // 2], n)
    for row in range(n):
        stream = list(rng.integers(TEXT, SENTINEL, rng.integers(0, 60)))  # the end of a document from before
        begins = [False] * len(stream)
        while len(stream) < length[row]:
            body = list(rng.integers(TEXT, SENTINEL, rng.choice([rng.integers(1, 12), rng.integers(1, 90)])))
            document = [BOS, *body, EOS] if framed else body
            stream, begins = stream + document, begins + [True] + [False] * (len(document) - 1)
        ids[row, : length[row]], starts[row, : length[row]] = stream[: length[row]], begins[: length[row]]
    return ids, starts, length, rng.integers(0, 2**63, n).astype(np.uint64)


def segments_of(ids, starts, length):
    """(row, first, ids) of every segment."""
    for row in range(len(ids)):
        at = [t for t in range(length[row]) if t == 0 or starts[row, t]] + [length[row]]
        for first, end in zip(at, at[1:], strict=False):
            yield row, first, [int(i) for i in ids[row, first:end]]


def full(arrays):
    """ids and prefix flags of all T + 1 places, the mask of each id as a target, segments, positions."""
    ids = np.concatenate([arrays["tokens"], arrays["targets"][:, -1:]], axis=1)
    np.testing.assert_array_equal(ids[:, 1:], arrays["targets"])
    mask = np.concatenate([np.zeros((len(ids), 1)), arrays["mask"]], axis=1)
    return ids, mask


def slow_plan(text, corrupted=0.15, span_length=3.0):
    """T5's number of tokens that are cut out of a text, and of spans."""
    cut = min(max(round(text * corrupted), 1), text - 1)
    return cut, min(max(round(cut / span_length), 1), cut, text - cut)


def read_back(ids, mask, eos):
    """(the text before corruption, spans' lengths) from one segment's inputs and targets; checks their form."""
    sentinels = [int(i) for i in (VOCABULARY if eos else NO_EOS).sentinel_ids]
    inputs, targets = (
        [i for i, m in zip(ids, mask, strict=True) if not m],
        [i for i, m in zip(ids, mask, strict=True) if m],
    )
    assert list(mask) == sorted(mask)  # first the inputs, then the targets
    if eos:
        assert targets.pop() == EOS
    spans = {}
    for i in targets:
        if i in sentinels:
            assert i == sentinels[len(spans)]
            spans[i] = []
        else:
            spans[sentinels[len(spans) - 1]].append(i)
    assert [i for i in inputs if i in sentinels] == list(spans)
    text = [part for i in inputs for part in spans.get(i, [i])]
    return text, [len(span) for span in spans.values()], inputs


@pytest.mark.parametrize("framed", [True, False])
@pytest.mark.parametrize("corrupted, span_length", [(0.15, 3.0), (0.5, 1.0), (0.9, 2.0)])
def test_spans_give_the_text_back(framed, corrupted, span_length):
    ids, starts, length, key = rows(framed=framed)
    vocabulary = VOCABULARY if framed else NO_EOS
    arrays = make(data("span", corrupted=corrupted, span_length=span_length), vocabulary)(ids, starts, length, key)
    plain = causal(ids, starts, length)
    after, mask = full(arrays)
    dropped, short, seen = np.zeros(len(ids), int), 0, 0
    for row, first, before in segments_of(ids, starts, length):
        here = slice(first, first + len(before))
        inside = slice(first, min(first + len(before), 64))
        if len(before) < objectives.SHORTEST_SPAN:
            short += 1
            assert after[row, here].tolist() == before
            for name in NAMES[2:]:
                np.testing.assert_array_equal(arrays[name][row, inside], plain[name][row, inside])
            assert not arrays["prefix_mask"][row, inside].any()
            continue
        seen += 1
        text = before[:-1] if framed and before[-1] == EOS else before
        sizes = [n for n in range(2, len(before)) if n + 2 * slow_plan(n, corrupted, span_length)[1] + framed
                 <= len(before)]  # fmt: skip
        cut, spans = slow_plan(max(sizes), corrupted, span_length)
        used = max(sizes) + 2 * spans + framed
        got, lengths, inputs = read_back(after[row, here][:used], mask[row, here][:used], framed)
        assert got == text[: max(sizes)]
        assert sum(lengths) == cut and len(lengths) == spans and min(lengths) >= 1 < len(inputs)
        assert inputs[0] == before[0]  # BOS stays
        dropped[row] += len(text) - max(sizes)
        assert len(before) - used <= 2
        left = slice(first + used, min(first + len(before), 64))
        assert (arrays["segment_ids"][row, left] == 0).all() and (after[row, left] == PAD).all()
        assert (arrays["positions"][row, left] == 0).all()
        laid = slice(first, min(first + used, 64))
        np.testing.assert_array_equal(arrays["segment_ids"][row, laid], plain["segment_ids"][row, laid])
        np.testing.assert_array_equal(arrays["positions"][row, laid], plain["positions"][row, laid])
        bidirectional = np.arange(laid.stop - first) < len(inputs)
        np.testing.assert_array_equal(arrays["prefix_mask"][row, laid], bidirectional)
    assert seen > 30 and short > 5
    np.testing.assert_array_equal(arrays["dropped"], dropped)
    assert arrays["dropped"].dtype == np.int32


def test_prefixes_are_neither_changed_nor_predicted():
    ids, starts, length, key = rows(200)
    arrays, plain = make(data("prefix"), VOCABULARY)(ids, starts, length, key), causal(ids, starts, length)
    for name in NAMES[:4]:
        np.testing.assert_array_equal(arrays[name], plain[name])
    splits = []
    for row, first, before in segments_of(ids, starts, length):
        end = min(first + len(before), 64)
        prefix = arrays["prefix_mask"][row, first:end]
        if len(before) == 1:
            assert not prefix.any()
            continue
        split = int(prefix.sum())
        assert prefix[:split].all() and 1 <= split < len(before)
        expected = plain["mask"][row, first:end] * (np.arange(first, end) - first + 1 >= split)
        np.testing.assert_array_equal(arrays["mask"][row, first:end], expected)
        assert expected.sum() == len(before) - split
        if len(before) > 20:
            splits.append((split - 0.5) / (len(before) - 1))
    assert "dropped" not in arrays
    assert len(splits) > 100 and abs(np.mean(splits) - 0.5) < 4 / math.sqrt(12 * len(splits))
    assert np.histogram(splits, 4, (0, 1))[0].min() > len(splits) / 8


def kinds(arrays, ids, starts, length):
    """What the objective did to each segment that is long enough to tell."""
    after, _ = full(arrays)
    for row, first, before in segments_of(ids, starts, length):
        if len(before) >= objectives.SHORTEST_SPAN and first + len(before) <= 64:
            if after[row, first : first + len(before)].tolist() != before:
                yield "span"
            else:
                yield "prefix" if arrays["prefix_mask"][row, first : first + len(before)].any() else "causal"


def test_ul2_draws_by_segment_in_the_proportions_that_are_set():
    ids, starts, length, key = rows(1500)
    objective = make(data("ul2"), VOCABULARY)
    found = list(kinds(objective(ids, starts, length, key), ids, starts, length))
    for kind, share in (("causal", 0.6), ("prefix", 0.2), ("span", 0.2)):
        sigma = math.sqrt(share * (1 - share) / len(found))
        assert abs(found.count(kind) / len(found) - share) < 4 * sigma, kind
    only = make(data("ul2", ul2_causal=1.0, ul2_prefix=0.0, ul2_span=0.0), SimpleNamespace(**vars(NO_EOS)))
    plain, arrays = causal(ids, starts, length), only(ids, starts, length, key)
    for name in NAMES:
        np.testing.assert_array_equal(arrays[name], plain[name])
    assert not arrays["prefix_mask"].any() and not arrays["dropped"].any()


def chi_square(values, weights):
    """How far counts of 0, 1, ... are from `weights`: about its degrees of freedom if they agree."""
    expected = len(values) * np.array(weights) / sum(weights)
    counts = np.bincount(values, minlength=len(weights))
    assert len(counts) == len(weights)
    return ((counts - expected) ** 2 / expected).sum()


def test_places_of_spans_are_drawn_uniformly():
    n, seq_len = 6000, 27
    ids = np.tile(np.arange(TEXT, TEXT + seq_len + 1), (n, 1))
    starts, length = np.zeros((n, seq_len + 1), bool), np.full(n, seq_len + 1)
    key = np.arange(n, dtype=np.uint64)
    one = make(data("span", seq_len, span_length=4.0), NO_EOS)(ids, starts, length, key)
    assert slow_plan(26, 0.15, 4.0) == (4, 1)  # 22 places for it, of which the first is not allowed
    at = np.argmax(one["tokens"] == NO_EOS.sentinel_ids[0], axis=1)
    assert at.min() == 1 and chi_square(at - 1, [1] * 22) < 21 + 5 * math.sqrt(42)

    two = make(data("span", seq_len, corrupted=0.4, span_length=5.0), NO_EOS)(ids, starts, length, key)
    assert slow_plan(24, 0.4, 5.0) == (10, 2)  # 14 are kept: a before, b between, c behind; a, b >= 1, c >= 0
    laid, _ = full(two)
    first = np.argmax(laid == NO_EOS.sentinel_ids[0], axis=1)
    second = np.argmax(laid == NO_EOS.sentinel_ids[1], axis=1) - first - 1
    size = np.argmax(laid[:, 14 + 2 + 1 :] == NO_EOS.sentinel_ids[1], axis=1)  # of the first span, 1 to 9
    ways = [14 - a for a in range(1, 14)]  # of choosing b and c
    for values, weights in ((first, ways), (second, ways), (size, [1] * 9)):
        assert values.min() == 1 and chi_square(values - 1, weights) < len(weights) + 5 * math.sqrt(2 * len(weights))
    assert abs(np.corrcoef(first, size)[0, 1]) < 4 / math.sqrt(n)


def test_draws_follow_from_the_key_alone():
    ids, starts, length, key = rows(60)
    for name in ("prefix", "span", "ul2"):
        objective = make(data(name), VOCABULARY)
        whole = objective(ids, starts, length, key)
        order = np.random.default_rng(1).permutation(60)
        shuffled = objective(ids[order], starts[order], length[order], key[order])
        alone = [objective(*(x[i : i + 1] for x in (ids, starts, length, key))) for i in range(60)]
        for array, values in whole.items():
            np.testing.assert_array_equal(shuffled[array], values[order])
            np.testing.assert_array_equal(np.concatenate([one[array] for one in alone]), values)
        other = objective(ids, starts, length, key + np.uint64(1))  # another epoch
        assert any((other[array] != whole[array]).any(axis=1).mean() > 0.5 for array in ("tokens", "mask"))


def test_a_batch_is_what_it_was_in_earlier_versions():
    """Frozen: a change of these bytes makes another run of every config."""
    ids, starts, length, _ = rows(8)
    ids = (np.arange(8 * 65).reshape(8, 65) * 7 % 290 + TEXT).astype(np.uint16)
    starts[:] = np.arange(65) % 23 == 5
    length[:] = 65
    arrays = make(data("ul2"), VOCABULARY)(ids, starts, length, np.arange(8, dtype=np.uint64) * 977)
    assert sorted(arrays) == sorted([*NAMES, "prefix_mask", "dropped"])
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(arrays):
        digest.update(np.ascontiguousarray(arrays[name]).astype("<i4").tobytes())
    assert digest.hexdigest() == "0ed1e5dab668761b"


def test_dtypes_and_shapes():
    for name in objectives.NAMES:
        objective = make(data(name), VOCABULARY)
        arrays = objective(*rows(3))
        assert objective.name == name and objective.has_prefix == ("prefix_mask" in arrays) == (name != "causal")
        for key in NAMES:
            assert arrays[key].shape == (3, 64)
            assert arrays[key].dtype == (np.float32 if key == "mask" else np.int32)
        assert name == "causal" or arrays["prefix_mask"].dtype == bool
    assert len({make(data(name), VOCABULARY).fingerprint for name in objectives.NAMES}) == 4
    assert make(data("span", corrupted=0.2), VOCABULARY).fingerprint != make(data("span"), VOCABULARY).fingerprint


@pytest.fixture(scope="module")
def hidden():
    """tokens, ... -> the hidden states of a tiny decoder."""
    config = ModelConfig(vocab_size=400, num_layers=2, d_model=16, d_ff=32, num_heads=2, num_kv_heads=1, head_dim=8)
    model = Transformer(config)
    params = model.init(jax.random.key(0))

    @jax.jit
    def apply(arrays):
        out = model.apply(
            params,
            arrays["tokens"],
            segment_ids=arrays["segment_ids"],
            positions=arrays["positions"],
            prefix_mask=arrays["prefix_mask"],
        )
        return (out[0] if isinstance(out, tuple) else out).astype(jnp.float32)

    return lambda arrays: np.asarray(apply({k: v for k, v in arrays.items() if k != "dropped"}))


def test_no_hidden_state_knows_what_it_predicts(hidden):
    """Another id for one target changes neither the state that predicts it nor any earlier prediction's."""
    ids, starts, length, key = rows(12, seed=3)
    arrays = make(data("ul2", ul2_causal=0.2, ul2_prefix=0.4, ul2_span=0.4), VOCABULARY)(ids, starts, length, key)
    before = hidden(arrays)
    rng = np.random.default_rng(0)
    rows_, at = np.nonzero(arrays["mask"])
    for pick in rng.permutation(len(at))[:40]:
        row, t = rows_[pick], at[pick]  # position t predicts the id at t + 1
        if t == 63:
            continue
        changed = dict(arrays, tokens=arrays["tokens"].copy())
        changed["tokens"][row, t + 1] = (changed["tokens"][row, t + 1] + 17) % 290 + TEXT
        difference = np.abs(hidden(changed) - before).max(axis=-1)
        np.testing.assert_array_equal(difference[np.arange(12) != row], 0)
        same = arrays["segment_ids"][row] == arrays["segment_ids"][row, t]
        np.testing.assert_array_equal(difference[row, : t + 1], 0)  # the state that predicts, and all before it
        np.testing.assert_array_equal(difference[row, ~same], 0)
        assert difference[row, t + 1] > 0


def test_inputs_see_each_other_both_ways(hidden):
    ids, starts, length, key = rows(6, seed=4)
    for name in ("prefix", "span"):
        arrays = make(data(name), VOCABULARY)(ids, starts, length, key)
        before = hidden(arrays)
        row, segment = next(
            (r, s)
            for r in range(6)
            for s in range(1, 9)
            if ((arrays["segment_ids"][r] == s) & arrays["prefix_mask"][r]).sum() > 5
        )
        at = np.flatnonzero((arrays["segment_ids"][row] == segment) & arrays["prefix_mask"][row])
        changed = dict(arrays, tokens=arrays["tokens"].copy())
        changed["tokens"][row, at[-1]] = (changed["tokens"][row, at[-1]] + 17) % 290 + TEXT
        assert (np.abs(hidden(changed) - before).max(axis=-1)[row, at] > 0).all()


def test_sentinels_that_are_too_few(monkeypatch):
    need = sentinels_needed(data("ul2", 1280))
    assert need == max(slow_plan(n)[1] for n in range(2, 1281) if n + 2 * slow_plan(n)[1] <= 1281)
    few = SimpleNamespace(**vars(VOCABULARY) | {"sentinel_ids": np.arange(300, 300 + need - 1)})
    with pytest.raises(UserError, match=rf"objective=ul2 needs .* {need} spans .* has {need - 1}: set data.sentinels"):
        make(data("ul2", 1280), few)
    none = SimpleNamespace(**vars(VOCABULARY) | {"sentinel_ids": np.arange(0)})
    with pytest.raises(UserError, match="has 0: set data.sentinels=3"):
        make(data("span"), none)
    assert sentinels_needed(data("prefix")) == sentinels_needed(data("causal")) == 0
    assert sentinels_needed(data("ul2", ul2_causal=0.8, ul2_prefix=0.2, ul2_span=0.0)) == 0
    assert make(data("prefix"), none).has_prefix


def test_options_out_of_range():
    for keys, message in (
        ({"objective": "ul3"}, "data.objective='ul3': choose one of causal, prefix, span, ul2"),
        ({"objective": "ul2", "ul2_span": 0.3}, "data.ul2_span=0.3: the shares .* add up to 1"),
        ({"objective": "ul2", "ul2_span": -0.2, "ul2_causal": 1.0}, "must not be negative"),
        ({"objective": "ul2", "ul2_span": float("nan")}, "add up to 1"),
        ({"objective": "span", "corrupted": 0.0}, "data.corrupted=0.0: must lie between"),
        ({"objective": "span", "corrupted": 1.0}, "data.corrupted=1.0: must lie between"),
        ({"objective": "span", "span_length": 0.5}, "data.span_length=0.5: must be at least 1"),
        ({"objective": "no_such_package:f"}, "data.objective='no_such_package:f'"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            make(data(**keys), VOCABULARY)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="draws from a key"):
        make(data("prefix"), VOCABULARY)(*rows(2)[:3])


def test_an_objective_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_objectives.py").write_text(
        "from slm_assist.data.objectives import causal\n"
        "def last_half(ids, starts, length, key):\n"
        "    arrays = causal(ids, starts, length)\n"
        "    arrays['mask'][:, : arrays['mask'].shape[1] // 2] = 0\n"
        "    return arrays\n"
        "def bare(ids, starts, length, key):\n"
        "    return {'tokens': ids[:, :-1]}\n"
        "def prefixed(ids, starts, length, key):\n"
        "    return causal(ids, starts, length)\n"
        "prefixed.has_prefix = True\n"
        "def short(ids):\n"
        "    return causal(ids)\n"
        "def fails(ids, starts, length, key):\n"
        "    return {}['nothing']\n"
        "def beyond(ids, starts, length, key):\n"
        "    return causal(ids, starts, length) | {'targets': ids[:, 1:] + 10**6}\n"
        "def broken(ids, starts, length, key):\n"
        "    arrays = causal(ids, starts, length)\n"
        "    return arrays | {'mask': arrays['mask'] * float('nan')}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    given = rows(3)
    mine = make(data("my_objectives:last_half"), VOCABULARY)
    assert (mine.name, mine.has_prefix, mine.fingerprint) == ("my_objectives:last_half", False) + (mine.name,)
    assert mine(*given)["mask"][:, :32].sum() == 0 < mine(*given)["mask"].sum()
    with pytest.raises(UserError, match=r"my_objectives:bare'.*each \[2, 8\] here; targets is missing"):
        make(data("my_objectives:bare"), VOCABULARY)
    with pytest.raises(UserError, match="prefix_mask is missing"):
        make(data("my_objectives:prefixed"), VOCABULARY)
    for name, words in {
        "short": "it takes .*; write it for", "fails": "the function fails: KeyError", "beyond": "targets from 1000000",
        "broken": "mask is not finite",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=f"data.objective='my_objectives:{name}': .*{words}") as caught:
            make(data(f"my_objectives:{name}"), VOCABULARY)
        assert "\n" not in str(caught.value)
    sys.modules.pop("my_objectives")


def test_rows_of_padding_and_of_one_token():
    ids, starts = np.full((3, 65), 7), np.zeros((3, 65), bool)
    for name in ("prefix", "span", "ul2"):
        arrays = make(data(name), VOCABULARY)(ids, starts, np.array([0, 1, 2]), np.arange(3, dtype=np.uint64))
        assert arrays["mask"].sum(axis=1).tolist() == [0, 0, 1]
        assert make(data(name, 1), VOCABULARY)(
            ids[:, :2], starts[:, :2], np.array([2, 2, 1]), np.arange(3, dtype=np.uint64)
        )["mask"].ravel().tolist() == [1, 1, 0]  # fmt: skip

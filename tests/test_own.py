"""What plugs in from another package: the README's examples, and what is refused."""

import functools
import importlib
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_documents import PYTHON
from test_steps import STUDENT, make_batch

from slm_assist import plan, steps
from slm_assist.assist import own_teacher, token_weight
from slm_assist.assist.own_teacher import OwnTeacher
from slm_assist.data import rows as rows_lib
from slm_assist.data.sources import open_source
from slm_assist.errors import UserError
from slm_assist.evals import token_metrics
from slm_assist.evals.perplexity import Perplexity
from slm_assist.report import compare, words

# The README's 5-gram model.


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    """A directory with the README's my_lab.py in it, which can be imported."""
    directory = tmp_path_factory.mktemp("own")
    blocks = [code for code in PYTHON if code.startswith("# my_lab.py")]
    assert len(blocks) == 6
    (directory / "my_lab.py").write_text("\n".join(blocks))
    sys.path.insert(0, str(directory))
    yield directory
    sys.path.remove(str(directory))
    sys.modules.pop("my_lab")


@pytest.fixture(scope="module")
def lab(tmp):
    return importlib.import_module("my_lab")


@pytest.fixture(scope="module")
def prepared(tmp):
    """Short rows of short documents, so that many contexts end at a start."""
    lines = Path(tiny.corpus(tmp / "all").removeprefix("jsonl:")).read_text().splitlines()
    documents = [json.loads(line)["text"][:300] for line in lines[:120]]
    (tmp / "few.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents))
    return rows_lib.prepare(
        open_source(f"jsonl:{tmp}/few.jsonl"), vocab_size=330, seq_len=24, validation_fraction=0.2, cores=1,
        cache_dir=tmp / "few", progress=False,
    )  # fmt: skip


def raw(rows):
    return rows.get(
        np.arange(len(rows)), lambda ids, starts, length, _: {"ids": ids, "starts": starts, "length": length}
    )


def pieces(rows):
    """The ids of each row's documents, as lists."""
    found = raw(rows)
    for ids, starts, length in zip(found["ids"], found["starts"], found["length"], strict=True):
        cuts = [0, *(i for i in range(1, length) if starts[i]), int(length)]
        yield from (ids[a:b].tolist() for a, b in zip(cuts, cuts[1:], strict=False))


def test_all_ids_of_rows(prepared):
    rows = prepared.train
    for at_once in (4096, 7):
        found = list(rows.all_ids(at_once))
        assert len(found) == -(-len(rows) // at_once)
        ids, starts = map(np.concatenate, zip(*found, strict=True))
        assert ids.dtype == np.int32 and starts.dtype == bool
        split = [part.tolist() for part in np.split(ids, np.flatnonzero(starts)[1:])]
        assert split == list(pieces(rows))


class WittenBell:
    """The same model in float64, from dictionaries."""

    def __init__(self, rows, vocab, top):
        self.unigram, self.after = np.ones(vocab), defaultdict(Counter)
        for piece in pieces(rows):
            for at, v in enumerate(piece):
                self.unigram[v] += 1
                for n in range(1, min(at, 4) + 1):
                    self.after[tuple(piece[at - n : at])][v] += 1
        self.top = top

    def probabilities(self, context):
        p = self.unigram / self.unigram.sum()
        for n in range(1, len(context) + 1):
            counts = self.after.get(tuple(context[-n:]))
            if counts:
                c, distinct = sum(counts.values()), len(counts)
                kept = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[: self.top]
                if distinct <= self.top:  # nothing is left out: the formula itself
                    assert sum(count for _, count in kept) / (c + distinct) == pytest.approx(c / (c + distinct))
                p = p * (1 - sum(count for _, count in kept) / (c + distinct))
                for v, count in kept:
                    p[v] += count / (c + distinct)
        return p


def test_five_gram_is_witten_bell_and_beats_a_unigram(prepared, lab):
    vocab = prepared.vocabulary.size
    teacher = own_teacher.find("my_lab:five_gram", prepared.train, prepared.vocabulary)
    params = jax.tree.map(jnp.asarray, teacher.tables)
    assert len(teacher.tables["longer"]) == 4

    @jax.jit
    def log_p(params, batch):
        hidden, head = teacher.answer(params, batch)
        assert hidden.shape == (*batch["tokens"].shape, 4)
        return head(hidden.reshape(-1, 4)).reshape(*batch["tokens"].shape, vocab)

    model, losses, contexts = WittenBell(prepared.train, vocab, lab.TOP), [], Counter()
    for rows in (prepared.validation, prepared.train):
        batch = rows.get(np.arange(8))
        found = np.asarray(log_p(params, {k: v for k, v in batch.items() if k != "domain"}), np.float64)
        np.testing.assert_allclose(np.exp(found).sum(-1), 1, atol=2e-6)
        for row, t in np.ndindex(batch["tokens"].shape):
            if not batch["mask"][row, t]:
                continue
            context = batch["tokens"][row, max(0, t - min(3, batch["positions"][row, t])) : t + 1].tolist()
            contexts[len(context)] += 1
            p = model.probabilities(context)
            np.testing.assert_allclose(np.exp(found[row, t]), p, rtol=2e-4, atol=1e-7)
            y = batch["targets"][row, t]
            if rows is prepared.validation:
                losses.append((-found[row, t, y], -np.log(model.unigram[y] / model.unigram.sum())))
    assert min(contexts[n] for n in (1, 2, 3, 4)) > 10
    five, one = np.mean(losses, axis=0)
    assert five < one - 0.5


# Runs.

OWN = {
    "assist__teacher": "my_lab:five_gram", "assist__token_weight": "my_lab:where_it_knows", "assist__schedule": "auto",
    "assist__steps": 6, "validation__metric": "my_lab:in_top_five", "model__d_model": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def own(tmp, lab):
    """(run, its messages): killed in stage 1, which `auto` ends at its cap, and in stage 2."""
    messages: list[str] = []
    return tiny.run(tmp, "own", messages=messages, killed=(4, 5, 8), **OWN), messages


def test_run_with_functions_for_teacher_weight_and_metric(own):
    run, messages = own
    lines, facts = tiny.records(run), json.loads(run.config.read_text())["facts"]
    train = [line for line in lines if line["kind"] == "train"]
    assert [line["stage"] for line in train] == ["assisted"] * 6 + ["plain"] * 6
    for line in train[:6]:
        assert line["assist_weight"] == pytest.approx(0.667) and 0.05 < line["token_weight"] < 0.6
        assert line["teacher_cross_entropy"] < 2 < line["cross_entropy"] and line["distillation_kl"] > 0
    assert not any("weight" in name or "teacher" in name for name in train[6])
    for line in (line for line in lines if line["kind"] == "validation"):
        parts = line["domains"].values()
        assert line["accuracy"] <= line["in_top_five"] <= 1 and line["in_top_five"] > 0
        mean = sum(part["in_top_five"] * part["tokens"] for part in parts) / line["tokens"]
        assert mean == pytest.approx(line["in_top_five"])
    teacher = facts["helpers"]["teacher"]
    assert (teacher["run"], teacher["step"], teacher["train_flops"]) == ("my_lab:five_gram", -1, 0.0)
    assert teacher["bytes"] == 4 * teacher["parameters"] > 10**6 and len(teacher["identity"]) == 32
    assert json.loads(run.summary.read_text())["flops"]["teacher"] == 0
    assert messages.count("the FLOPs of my_lab:five_gram are not counted") == 1
    assert any(line.startswith("teacher: my_lab:five_gram, ") and "on every device" in line for line in messages)
    said = [line.text for line in words.first_lines(compare([run.path]))]
    assert "The FLOPs of my_lab:five_gram, a function that taught, are not counted." in said


def test_resumes_bit_for_bit_and_needs_no_tables_in_stage_2(tmp, own, lab, monkeypatch):
    count, calls = lab.count, []
    monkeypatch.setattr(lab.five_gram, "prepare", lambda rows, vocabulary: calls.append(1) or count(rows, vocabulary))
    tiny.assert_same_run(own[0], tiny.run(tmp, "own-killed-4", **OWN))
    assert calls == [1]
    tiny.assert_same_run(own[0], tiny.run(tmp, "own-killed-8", **OWN))
    assert calls == [1]
    monkeypatch.setattr(lab.five_gram, "prepare", lambda *a: count(*a) | {"unigram": np.ones(384, np.float32) / 384})
    with pytest.raises(UserError, match="assist.teacher=my_lab:five_gram: not what .*own-killed-5 began with"):
        tiny.run(tmp, "own-killed-5", **OWN)


@pytest.mark.slow
def test_mesh_microbatches_top_k_and_temperature(tmp, lab):
    keys = OWN | {"assist__schedule": "linear", "assist__steps": 3, "assist__temperature": 0.5, "assist__top_k": 5}
    keys |= {"steps": 4, "model__num_kv_heads": 2, "loss__block_bytes": 8 * 384 * 8}
    one = tiny.run(tmp, "one", **keys)
    four = tiny.run(tmp, "four", **keys, microbatches=2, mesh__data=2, mesh__tensor=2)
    names = {"loss", "token_weight", "teacher_cross_entropy", "in_top_five", "log_perplexity"}
    for a, b in zip(tiny.records(one), tiny.records(four), strict=True):
        assert a.keys() == b.keys() and a.keys() & names
        for name in a.keys() & names:
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=2e-3), name
    assert tiny.records(one)[1]["assist_weight"] < 0.667


def test_every_kind_at_once_from_another_package(tmp, lab):
    """The README's page of functions, each named by a config."""
    poems = {"data__source": "my_lab:poems", "data__vocab_size": 330}
    small = str(tiny.run(tmp, "small", steps=3, checkpoint__keep_fraction=0.3, **poems))
    keys = {
        "data__source": "my_lab:poems",  # and the scorer's vocabulary
        "steps": 4, "assist__schedule": "my_lab:waves", "assist__steps": 2, "select__rows": "online",
        "select__score": "my_lab:certain", "select__rule": "my_lab:alternate", "data__objective": "my_lab:second_half",
    }  # fmt: skip
    with pytest.raises(UserError, match="needs select.scorer.*five_gram is a function, which scores no rows"):
        tiny.run(tmp, "all", **OWN | keys)
    run = tiny.run(tmp, "all", **OWN | keys, select__scorer=small)
    train = [line for line in tiny.records(run) if line["kind"] == "train"]
    assert [line["assist_weight"] for line in train[:2]] == pytest.approx([0.5, 0.5 + 0.1 * np.sin(1)])
    assert len(train[0]["rows"]) == 8 and train[0]["score_max"] <= 1
    assert train[0]["tokens"] <= 8 * 16 + 8 and "token_weight" in train[0]
    assert (
        list(tiny.records(run)[-1]["domains"]) == ["poems"] and run.read(run.config)["facts"]["vocabulary_size"] == 330
    )


# Metrics.


def test_metric_is_the_mean_of_what_the_function_gives(prepared):
    params, batch = jax.jit(STUDENT.init)(jax.random.key(0)), make_batch()
    metrics = {"place": lambda stats, batch: stats.rank * (batch["positions"] + 1.0)}
    sums = jax.jit(functools.partial(steps.eval_step, model=STUDENT, metrics=metrics))(params, batch)
    where = {"segment_ids": batch["segment_ids"], "positions": batch["positions"]}
    logits = np.asarray(STUDENT.apply(params, batch["tokens"], **where) @ STUDENT.head(params))
    at_target = np.take_along_axis(logits, batch["targets"][..., None], -1)
    values = (logits > at_target).sum(-1) * (batch["positions"] + 1.0) * batch["mask"]
    np.testing.assert_allclose(sums["place"], values.sum(1))
    assert (values.sum(1) > 0).all()

    def fake(batch):
        mask = batch["mask"]
        return {"cross_entropy": mask.sum(1), "correct": 0 * mask.sum(1), "tokens": mask.sum(1),
                "place": (batch["targets"] * mask).sum(1)}  # fmt: skip

    rows = prepared.validation
    evaluation = Perplexity(rows, limit=0, batch_rows=4, token_bytes=prepared.vocabulary.token_bytes)
    evaluation.buckets = np.arange(len(rows)) % 3
    record, batch = evaluation.record(evaluation.row_sums(fake)), rows.get(np.arange(len(rows)))
    assert record["place"] == pytest.approx(batch["targets"][batch["mask"] > 0].mean())
    hard = batch["mask"] * (np.arange(len(rows)) % 3 == 2)[:, None] > 0
    assert record["buckets"]["hard"]["place"] == pytest.approx(batch["targets"][hard].mean())


def test_metric_that_is_not_finite_stops_the_run():
    sums = {"cross_entropy": np.zeros(3), "place": np.array([0.0, np.nan, np.inf])}
    with pytest.raises(UserError, match="step 7: validation.metric: place is not finite in 2 of 3"):
        token_metrics.refuse_not_finite(sums, 7)
    token_metrics.refuse_not_finite({"cross_entropy": np.zeros(3), "place": np.zeros(3)}, 7)


# What is refused.

BAD = """
import jax.numpy as jnp
import numpy as np

def one(x): return x
def number(stats, w): return 1.0
def wide(stats, w): return jnp.ones(3)
def fails(stats, w): raise ValueError("told\\nyou")
def fine(stats, batch): return stats.loss
class other:
    def fine(stats, batch): return stats.loss
def accuracy(stats, batch): return stats.loss

def hidden_only(tokens): return tokens
def flat(tokens): return jnp.ones((2, 3)), jnp.ones((3, 11))
def narrow(tokens): return jnp.ones((*tokens.shape, 3)), jnp.ones((3, 10))
def of_ints(tokens): return tokens[..., None], jnp.ones((1, 11))
def answers_wide(tokens): return tokens[..., None], lambda hidden: jnp.ones((len(hidden), 12))
def answers_badly(tokens): return tokens[..., None], lambda hidden: hidden @ jnp.ones((3, 11))
def looks(tokens): return tokens[..., None], lambda hidden: jnp.ones((len(hidden), 11)) * tokens.sum()
def misnamed(batch): return None
def unprepared(tokens, params): return None
def deaf(tokens): return None
deaf.prepare = lambda rows, vocabulary: None

def tabled(tokens, params): return jnp.ones((*tokens.shape, 3)), jnp.ones((3, 11))
def takes_rows(tokens, params): return None
takes_rows.prepare = lambda rows: None
"""

TEACHERS = [
    ("hidden_only", r"gave \w+; return a tuple \(hidden \[B, T, E\], head\)"),
    ("flat", r"gave hidden of shape \(2, 3\); return \[B, T, E\], here \(2, 5, 'E'\)"),
    ("narrow", r"head of shape \(3, 10\) for float32 hidden; return \[E, V\] of floats, here \(3, 11\)"),
    ("of_ints", "for int32 hidden; return"),
    ("answers_wide", r"gave shape \(10, 12\); return .*logits \[N, V\], here of shape \(10, 11\)"),
    ("answers_badly", "the function fails"),
    ("looks", "its head reads the batch, of which a tile sees some tokens only"),
    ("misnamed", r"it takes \(batch\); write it for \(tokens, batch\)"),
    ("unprepared", "has no .prepare that makes them"),
    ("deaf", "has a .prepare but no parameter for its arrays"),
    ("takes_rows", r"takes_rows.prepare': it takes \(rows\); write it for \(rows, vocabulary\)"),
    ("nothing", "bad_lab has no 'nothing'"),
]
OTHERS = [
    (token_weight.find, "one", r"assist.token_weight='bad_lab:one': it takes \(x\); write it for \(info, w\)"),
    (token_weight.find, "number", r"gave float; return a weight for each token, here of shape \(7,\)"),
    (token_weight.find, "wide", r"gave shape \(3,\); return a weight for each token"),
    (token_weight.find, "fails", "the function fails: ValueError: told"),
    (token_weight.find, "missing", "bad_lab has no 'missing'"),
    (token_metrics.find, "one", r"validation.metric='bad_lab:one': it takes \(x\); write it for \(stats, batch\)"),
    (
        token_metrics.find,
        "wide",
        r"gave shape \(3,\); return a number for each token, \[B, T\], here of shape \(2, 3\)",
    ),
    (token_metrics.find, "accuracy", "validation has a 'accuracy' already"),
    (token_metrics.find, "fine,bad_lab:other.fine", "validation has a 'fine' already"),
]


@pytest.fixture(scope="module")
def bad(tmp):
    (tmp / "bad_lab.py").write_text(BAD)
    yield importlib.import_module("bad_lab")
    sys.modules.pop("bad_lab")


def teacher_of(name, rows=None):
    rows = rows or SimpleNamespace(seq_len=5, all_ids=None)
    return own_teacher.find(f"bad_lab:{name}", rows, SimpleNamespace(size=11))


def test_refusals_are_one_line(bad):
    cases = [(lambda name: teacher_of(name.partition(":")[2]), *case) for case in TEACHERS] + OTHERS
    for find, name, message in cases:
        with pytest.raises(UserError, match=message) as error:
            find(f"bad_lab:{name}")
        assert "\n" not in str(error.value), name
    assert list(token_metrics.find("bad_lab:fine, ")) == ["fine"] and token_metrics.find("") == {}


def test_tables_that_no_device_can_hold(bad, monkeypatch):
    def prepared(tables):
        monkeypatch.setattr(bad.tabled, "prepare", lambda rows, vocabulary: tables, raising=False)
        return teacher_of("tabled")

    for table, message in (
        (np.array([1.0, np.nan, np.inf]), r"of what .prepare gave, \['x'\] has 2 of 3 values that are not finite"),
        (np.array([2**31]), "has values beyond int32"),
        (np.array([2**32], np.uint64), "has values beyond uint32"),
        (np.array(["a"]), "is of dtype <U1; make it numbers"),
    ):
        with pytest.raises(UserError, match=message):
            prepared({"x": table})
    fits = prepared({"x": np.array([2**31 - 1]), "y": [np.float64(0.1), np.uint64(2**32 - 1)]})
    assert [x.dtype.name for x in jax.tree.leaves(fits.tables)] == ["int32", "float32", "uint32"]
    assert fits.entries == 3 and fits.size == 12 and fits.identity == prepared(fits.tables).identity
    assert fits.identity != prepared(fits.tables | {"x": np.int32([7])}).identity
    with pytest.raises(UserError, match="not a stream"):
        teacher_of("tabled", SimpleNamespace(seq_len=5))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"assist__teacher": "no_lab:five_gram"}, "assist.teacher='no_lab:five_gram': there is no module 'no_lab'"),
        ({"assist__teacher": "my_lab:five_gram", "assist__teacher_step": 3}, "is a function and has no steps"),
        ({"assist__teacher": "my_lab:count"}, r"it takes \(rows, vocabulary\); write it for \(tokens\)"),
        ({"assist__token_weight": "my_lab:waves"}, "assist.token_weight='my_lab:waves': it takes"),
        ({"validation__metric": "my_lab:waves"}, "validation.metric='my_lab:waves': it takes"),
        ({"assist__schedule": "none", "assist__teacher": ""}, "assist.token_weight=.*schedule=none"),
    ],
)
def test_refusals_come_before_the_data(tmp, lab, keys, message):
    with pytest.raises(UserError, match=message) as error:
        tiny.run(tmp, "refused", **OWN | keys, data__vocab_size=777)
    assert "\n" not in str(error.value) and not (tmp / "refused").exists()
    assert not any("777" in file.read_text() for file in (tmp / "cache").glob("*/meta.json"))


def test_what_is_a_function_and_what_a_directory(lab):
    assert own_teacher.is_own("teacher", "my_lab:five_gram") and not own_teacher.is_own("teacher", "runs/a:b")
    assert not own_teacher.is_own("scorer", "my_lab:five_gram") and not own_teacher.is_own("teacher", "runs")
    found = OwnTeacher("my_lab:a", len, (), 1, 0, 0, "", None)
    assert found.same(found) and not found.same(SimpleNamespace(run="my_lab:a"))


def test_plan_says_that_it_cannot(tmp):
    config = tiny.config_lib.resolve("", tiny.overrides(tmp, **OWN))[0]
    with pytest.raises(UserError, match="assist.teacher=my_lab:five_gram: what a function needs is not known"):
        plan.plan(config, plan.parse_devices("h100:1"))

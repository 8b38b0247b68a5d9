"""Benchmarks run at tiny shapes and give their fields; timing in turn and ratios, by a clock that is known."""

import functools
import importlib
import itertools
import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from slm_assist import sharding
from slm_assist.assist.score_store import Writer

SCRIPTS = Path(__file__).resolve().parents[1] / "experiments" / "benchmarks"
SHAPE = ["--rows", "2", "--seq_len", "16"]


@pytest.fixture
def common(monkeypatch):
    """The benchmarks' own `import common`, with a matmul that takes no time, on one device."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    module = importlib.import_module("common")
    monkeypatch.setattr(module, "peak_matmul", functools.partial(module.peak_matmul, sizes=(64,), rounds=1))
    made = sharding.make_mesh
    monkeypatch.setattr(  # one device, unless a benchmark says how many: it compiles in half the time
        sharding, "make_mesh", lambda data=1, *rest, **_: made(data, *rest, devices=jax.devices()[: max(data, 1)])
    )
    setting = importlib.import_module("setting")
    monkeypatch.setattr(setting, "compile_all", functools.partial(compiled_once, setting.compile_all))
    return module


def compiled_once(compile_all, made, names, compiled={}):  # noqa: B006 - what benchmarks have in common
    key = (made.student.model, made.teacher, made.rows, made.seq_len, made.mesh.size)
    keys = {name: (*key, name) if name != "plain" else (key[0], *key[2:]) for name in names}
    new = tuple(name for name in names if keys[name] not in compiled)
    compiled |= {keys[name]: program for name, program in compile_all(made, new)[0].items()}
    return {name: compiled[keys[name]] for name in names}, 1.0


@pytest.fixture
def run(common, monkeypatch, tmp_path, capsys):
    """Runs a benchmark's `main` with arguments; returns what it wrote, which is also what it printed."""

    def call(name, *arguments):
        out = tmp_path / "out" / f"{name}.json"
        script = SCRIPTS / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(script), *arguments, "--out", str(out)])
        capsys.readouterr()
        assert not importlib.import_module(name).main()
        written = json.loads(out.read_text())
        assert written == json.loads(capsys.readouterr().out)
        assert written["command"].startswith(f"python experiments/benchmarks/{name}.py {arguments[0]}")
        assert written["environment"]["versions"]["jax"] == jax.__version__
        return written

    return call


def test_calls_take_turns_and_ratios_are_taken_within_a_round(common):
    now, order = [0.0], []
    spans = {"a": itertools.cycle([9.0, 2.0, 6.0, 30.0]), "b": itertools.cycle([9.0, 1.0, 2.0, 3.0])}

    def call(name):
        order.append(name)
        now[0] += next(spans[name])

    calls = {name: functools.partial(call, name) for name in spans}
    times = common.interleave(calls, 3, warmup=1, clock=lambda: now[0])
    assert order == ["a", "b"] * 4
    assert times["a"] == (6.0, 2.0, 30.0, (2.0, 6.0, 30.0))
    assert common.ratio(times["a"], times["b"]) == (3.0, 2.0, 10.0, (2.0, 3.0, 10.0))  # of medians: also 3
    assert common.difference(times["a"], times["b"]).all == (1.0, 4.0, 27.0)
    uneven = common.Times.of([1.0, 10.0, 4.0])
    assert common.ratio(uneven, common.Times.of([1.0, 2.0, 5.0])).median == 1.0  # of medians: 2
    with pytest.raises(ValueError):
        common.ratio(uneven, times["b"]._replace(all=(1.0,)))


def test_a_result_is_waited_for_and_a_state_is_handed_on(common, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(jax, "block_until_ready", lambda result: now.__setitem__(0, now[0] + result))
    assert common.interleave({"slow": lambda: 3.0}, 2, clock=lambda: now[0])["slow"].all == (3.0, 3.0)
    add = jax.jit(lambda state: (state + 1, state * 1), donate_argnums=0)
    calls = common.keep(jnp.int32(5), {"one": add, "two": add})
    assert [int(calls[name]()[1]) for name in ("one", "two", "one")] == [5, 6, 7]


def test_rates_and_json(common, tmp_path, capsys):
    assert 1e6 < common.peak_matmul(jnp.float32) < 1e15
    options = SimpleNamespace(out=str(tmp_path / "new" / "x.json"))
    whole = common.finish(options, {"times": common.Times.of([3.14159265, 1, 2]), 7: 123456789})
    assert whole["times"] == {"median": 2.0, "low": 1.0, "high": 3.1416, "all": [3.1416, 1.0, 2.0]}
    assert whole["7"] == 123456789 and whole["environment"]["hardware"]["devices"] == jax.device_count()
    with pytest.raises(ValueError):
        common.finish(options, {"rate": math.nan})
    assert json.loads((tmp_path / "new" / "x.json").read_text()) == whole  # what was there stays


@pytest.mark.slow
def test_representations(run):
    found = run("representations", "--pair", "1x16/1x8", "--vocab", "64", *SHAPE, "--rounds", "2")["settings"][0]
    layer, head = {d: 26 * d * d + 4 * 16 * d for d in (16, 8)}, 2 * 16 * 64
    expected = 1 + layer[8] / (3 * (layer[16] + head))
    assert found["flops_ratio"] == pytest.approx(expected, rel=1e-4)
    assert found["compiled_flops_ratio"] == found["flops_ratio"], "rounded alike"
    seconds = found["seconds"]
    assert found["ratio"]["median"] > 0 and set(seconds) == {"plain", "aligned", "trunk"}


@pytest.mark.slow
def test_assistance_and_memory(run):
    found = run("assistance", "--pair", "1x16/1x8", "--vocab", "64", *SHAPE, "--rounds", "2")["settings"][0]
    counted, seconds = found["compiled_flops"], found["seconds"]
    # One layer of width d, heads of d, d_ff 3 d: 2 (4 d^2 + 9 d^2) + 4 T d, and the head's 2 d V.
    forward = {d: 26 * d * d + 4 * 16 * d + 2 * d * 64 for d in (16, 8)}
    assert found["model_flops"] == {
        "plain": 2 * 16 * 3 * forward[16],
        "forward": 2 * 16 * forward[8],
        "assisted": 2 * 16 * (3 * forward[16] + forward[8]),
    }
    assert counted["plain"] == found["model_flops"]["plain"] and counted["assisted"] == found["model_flops"]["assisted"]
    assert found["flops_overhead"] == 1 and counted["forward"] == counted["forward_tiled"]
    assert found["flops_ratio"] == pytest.approx(1 + forward[8] / (3 * forward[16]), rel=1e-4)
    assert len(found["ratio"]["all"]) == 2 and found["utilisation"]["plain"]["of_peak"] is None
    assert found["overhead"]["forward"]["all"][0] == pytest.approx(
        (seconds["assisted"]["all"][0] - seconds["plain"]["all"][0]) / seconds["forward"]["all"][0], rel=0.05, abs=0.05
    )

    found = run("memory", "--pair", "1x16/1x8", "--vocab", "64", *SHAPE)["settings"][0]
    temporary = found["temporary_bytes"]
    assert found["ratio"] == pytest.approx(
        temporary["assisted"] / (temporary["plain"] + found["trunk_bytes"]), rel=1e-4
    )
    assert found["helper_bytes"] == 4 * found["setting"]["teacher_parameters"]
    assert found["dense"] > 0 and found["state_bytes"] >= 12 * found["setting"]["student_parameters"]

    memory, setting = importlib.import_module("memory"), importlib.import_module("setting")
    made = setting.build("1x16", "1x8", 64, 2, 16)
    batch, helpers = setting.new_batch(made), setting.new_helpers(made)
    compiled = [setting.compile_all(made, ("assisted",))[0]["assisted"], memory.compile_dense(made)]
    ours, theirs = (step(setting.new_state(made), batch, helpers)[0].opt_state for step in compiled)
    moment = jax.tree.leaves(ours)[1]  # the gradients, scaled
    assert float(jnp.abs(moment).max()) > 1e-4
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-7), ours, theirs)


def test_plain_step_and_online_filter(run):
    found = run("plain_step", "--size", "1x16", "--vocab", "64", *SHAPE, "--rounds", "1")
    assert found["model_flops"] == found["compiled_flops"] > 0 and found["utilisation"]["of_matmul"] > 0
    assert found["tokens_per_second"] == pytest.approx(2 * 16 / found["seconds"]["median"], rel=1e-3)

    found = run("online_filter", "--pair", "1x16/1x8", "--vocab", "64", *SHAPE, "--pool_factor", "2", "--rounds", "1")
    assert found["flops_overhead"] == 1 and found["forward_flops"] == found["compiled_flops"]["forward"]
    assert found["candidate_tokens_per_second"] and found["overhead"]["forward"]["all"]


@pytest.mark.slow
def test_import_memory(run):
    found = run("import_memory", "--gigabytes", "0.002", "--rounds", "1")["read"]
    assert found["fsdp_1"]["bytes"] == found["fsdp_8"]["bytes"] and 0 < found["fsdp_1"]["largest"]["median"] < 1


@pytest.mark.slow
def test_generate(run):
    found = run(
        "generate", "--size", "1x16", "--vocab", "64", "--rows", "2", "--prompt", "5", "--new", "3", "--rounds", "2"
    )
    (row,) = found["settings"]
    cache = 2 * 8 * 2 * 16  # rows, slots, keys and values of the width
    assert row["bound"]["bytes"] == 4 * (found["parameters"] + cache)
    assert row["tokens_per_second"] == pytest.approx(2 / row["seconds"]["step"]["median"], rel=1e-3)
    assert row["of_bound"] > 0 and len(row["speedup"]["all"]) == 2


@pytest.mark.slow
def test_growth(run, common, monkeypatch, tmp_path):
    """With steps whose FLOPs are known: 2 B^2 T of a batch, 2 B a token, on each of n devices 2 B / n."""
    growth, setting = importlib.import_module("growth"), importlib.import_module("setting")
    asked = []

    def step(state, batch, helpers):
        return state, batch["mask"] @ batch["mask"].T

    def compile_all(made, names):
        asked.append((made.rows, made.mesh.size, made.teacher.config.num_layers))
        where = {"out_shardings": sharding.batch_sharding(made.mesh)}
        with jax.set_mesh(made.mesh):
            return {name: jax.jit(step, **where).lower({}, made.batch(), {}).compile() for name in names}, 1.0

    monkeypatch.setattr(setting, "compile_all", compile_all)
    monkeypatch.setattr(setting, "new_state", lambda made: {})
    monkeypatch.setattr(setting, "new_helpers", lambda made: {})
    picture = tmp_path / "growth.png"
    shape = ["--rows", "2", "--seq_len", "16", "--vocab", "64", "--layers", "4", "--width", "16"]
    rest = ["--teacher_width", "8", "--rounds", "1", "--doublings", "1", "--plot", str(picture)]
    axes = run("growth", "--axes", "devices", "batch", "length", *shape, *rest)["axes"]
    assert asked == [(4, 1, 2), (4, 2, 2), (2, 1, 2), (2, 1, 2)], "the axes share their points"
    flops = {axis: found["exponents"]["assisted"]["flops"] for axis, found in axes.items()}
    assert flops == pytest.approx({"devices": -1, "batch": 1, "length": 0}, abs=1e-6)
    assert axes["batch"]["values"] == [2, 4] and axes["batch"]["a_token"]["plain"]["flops"] == [4, 8]
    assert "seconds" in axes["batch"]["exponents"]["plain"] and "seconds" not in axes["devices"]["a_token"]["plain"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert growth.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2) and growth.exponent([1], [3]) is None


def test_startup(run, common, tmp_path, monkeypatch, capsys):
    startup = importlib.import_module("startup")
    keys = tiny.overrides(tmp_path, compute__cache_dir="") | {"model.num_layers": 1, "mesh.data": 1}
    startup.child(time.time() - 1, str(tmp_path / "run"), keys)
    marks = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 1 <= marks["imported"] <= marks["compiled"] <= marks["first_step"] < 600

    asked = []

    def start(directory, number, cache, keys):
        asked.append((number, cache.name))
        return dict.fromkeys(startup.MARKS, 5.0 if number % 2 == 0 else 2.0)

    monkeypatch.setattr(startup, "start", start)
    found = run("startup", "--rounds", "2", "--set", *[f"{key}={value}" for key, value in keys.items() if value])
    assert asked == [(0, "compiled0"), (1, "compiled0"), (2, "compiled1"), (3, "compiled1")]
    assert found["saved"]["first_step"]["median"] == 3 and found["config"]["batch_rows"] == 8


def test_data_scoring_and_overlap(run, tmp_path):
    text = tmp_path / "corpus.jsonl"
    text.write_text("".join(json.dumps({"text": f"{n} squared is {n * n}. " * 3}) + "\n" for n in range(1200)))
    source = ["--source", f"jsonl:{text}", "--vocab_size", "320", "--seq_len", "16"]
    found = run("data_pipeline", *source, "--batch_rows", "8", "--cores", "1", "--rounds", "2")
    low, high = found["loader_tokens_per_second_range"]["batch_rows=8"]
    assert 0 < low <= found["loader_tokens_per_second"]["batch_rows=8"] <= high
    assert found["prepare_tokens_per_second"] == pytest.approx(found["tokens"] / found["seconds"]["prepare"], rel=1e-3)

    sizes = ["--num_layers", "1", "--d_model", "16", "--d_ff", "32", "--batch_rows", "8", "--batches", "1"]
    found = run("scoring", *source, *sizes, "--repeats", "1")
    assert found["throughput_ratio"]["score to forward"] > 0 and found["batches"] == 1

    scores = np.arange(40, dtype=np.float32)
    meta = {"vocabulary": "v", "corpus": "c", "rows": 40, "seq_len": 8, "domains": ["all"], "score": {"name": "salt"}}
    meta |= {"helpers": {}, "dtype": "float32", "batch_rows": 4, "span_rows": 40}
    with Writer(tmp_path / "scores", meta, (0, 1)) as writer:
        writer.append(0, np.column_stack([scores, scores * 0, scores * 0, scores * 0 + 1, scores * 0]))
    found = run("selection_overlap", str(tmp_path / "scores"), "--batches", "4,8")
    assert found["pools"]["8"]["rows"] == 40 and found["pools"]["8"]["jaccard"] == 1  # one pool: all rows


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("loss", ["--rounds", "0"], "give an integer of at least 1"),
        ("loss", ["--shapes", "0x8x8x64"], "every size must be at least 1"),
        ("assistance", ["--pair", "4x256"], "write STUDENT/TEACHER"),
        ("plain_step", ["--size", "banana"], "banana: use LAYERSxWIDTH"),
        ("plain_step", ["--size", "1x16", "--optimizer", "foo"], "optimizer.name='foo'"),
    ],
)
def test_mistakes_are_one_line(common, monkeypatch, capsys, name, words, message):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
    with pytest.raises(SystemExit) as ended:
        common.run(importlib.import_module(name).main)
    assert ended.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]

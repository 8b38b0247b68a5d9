"""The measurement of the gifts: its plan treats all methods alike, and its figures are those of runs that are known."""

import dataclasses
import importlib
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from slm_assist import config, optim
from slm_assist.errors import UserError

SCRIPTS = Path(__file__).resolve().parents[1] / "experiments" / "gifts"
STEPS, SEEDS = 40, 3
BASE, PASS = 3.0, 0.4  # FLOPs of an update of BASELINE, and of a helper's forward passes in one, in the made-up runs
HELPER_FLOPS = 24.0  # of training a small LM in them
GAINS = {"baseline": (0, 0, 0), "salt": (0.10, 0.11, 0.12), "salt_ds": (0.3, 0.4, 0.5), "grow": (-0.1, -0.11, -0.12),
         "grow_salt": (0.3, -0.1, 0.1), "let": (0.01, -0.01, 0.0)}  # fmt: skip


@pytest.fixture
def gifts(monkeypatch):
    """The scripts' modules, as a script imports them."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    names = ("planning", "measure", "collect", "page")
    return dataclasses.make_dataclass("Gifts", names)(*map(importlib.import_module, names))


@pytest.fixture
def settings(gifts, tmp_path):
    return gifts.planning.Settings("text:train", "text:held", str(tmp_path / "out"), seeds=SEEDS, steps=STEPS)


# The plan


def test_all_methods_are_treated_alike(gifts, settings):
    planned = gifts.planning.plan(settings)
    assert planned.budgets == (20, 28, 40) and planned.stage_1 == 7
    shared = {}
    for run in planned.students():
        own = ("name", "seed", "data.order_seed", "checkpoint.keep", "branch.run", "branch.step", "assist.", "grow.",
               "represent.", "select.scorer_step")  # fmt: skip
        everyones = {key: value for key, value in run.overrides.items() if not key.startswith(own)}
        assert shared.setdefault(run.steps, everyones) == everyones
        assert config.read_experiment(run.file)["optimizer.peak_learning_rate"] == 8e-3
        assert {run.overrides.get(key, 7) for key in ("assist.steps", "represent.steps")} == {7}
        assert run.overrides["model.scan_layers"] == "false" and run.overrides["seed"] == run.seed
    ends = {
        (m, s): {r.steps for r in planned.runs if (r.method, r.seed) == (m, s)} for m in GAINS for s in range(SEEDS)
    }
    assert len(ends) == 18 and planned.longest > planned.longer > STEPS
    for (method, _), steps in ends.items():
        assert steps == {20, 28, 40} | ({planned.longer, planned.longest} if method == "baseline" else set())


def test_branches_leave_a_kept_checkpoint_before_anything_differs(gifts, settings):
    planned = gifts.planning.plan(settings)
    by_path = {run.path: run for run in planned.runs}
    branches = [run for run in planned.runs if run.trunk]
    assert len(by_path) == len(planned.runs) == SEEDS * (1 + 6 * 3 + 2) and len(branches) == SEEDS * (6 * 2 + 2)

    def rates(run):
        keys = {name: run.overrides[f"optimizer.{name}"] for name in ("warmup_steps", "decay_fraction")}
        schedule = optim.learning_rate(run.overrides["optimizer.schedule"], peak=1.0, steps=run.steps, **keys)
        return np.asarray(schedule(np.arange(run.steps + 1)))

    for run in branches:
        trunk = by_path[run.trunk]
        first = run.overrides["branch.step"]
        assert run.first == first < run.steps < trunk.steps
        assert first in trunk.overrides["checkpoint.keep"] and run.overrides["checkpoint.keep"] == ()
        np.testing.assert_array_equal(rates(run)[:first], rates(trunk)[:first])
        assert rates(run)[first - 1] == 1.0 and rates(run)[-1] == pytest.approx(0.1)
        assert planned.stage_1 < first
        differing = {k for k in run.overrides if run.overrides[k] != trunk.overrides.get(k)}
        assert differing == {"name", "steps", "checkpoint.keep", "branch.run", "branch.step"}


def test_a_seed_has_a_helper_an_order_and_rows_of_its_own(gifts, settings):
    planned = gifts.planning.plan(settings)
    for i, run in enumerate(planned.runs):
        assert run.overrides["data.order_seed"] == run.overrides["seed"] == run.seed and f"seed-{run.seed}/" in run.path
        before = {other.path: other for other in planned.runs[:i]}
        assert all(before[path].seed == run.seed for path in run.needs)
        helpers = {value for key, value in run.overrides.items() if key in gifts.planning.HELPER_KEYS}
        assert helpers == {path for path in run.needs if before[path].method == "small_lm"}
        assert bool(helpers) == (run.method not in ("small_lm", "baseline"))
        if run.method == "small_lm":
            assert run.steps == STEPS and run.overrides["model.size"] == "laptop-small"


def test_longer_baseline_covers_what_the_others_cost(gifts, settings):
    def forward(layers, d, ff, heads, head_dim, vocab=2048, length=256):
        matrices = 4 * d * heads * head_dim + 3 * d * ff
        return layers * (2 * matrices + 4 * length * heads * head_dim) + 2 * d * vocab

    small, large = forward(4, 64, 192, 2, 32), forward(4, 128, 384, 4, 32)
    planned = gifts.planning.plan(settings)
    assert planned.relative == pytest.approx(small / large)
    extra = (planned.longer - STEPS) * 3 * large
    assert extra - 3 * large < STEPS * 3 * small <= extra
    salt_ds = STEPS * 3 * small + 7 * (5 + 1) * small  # the helper's training, candidates and soft labels
    extra = (planned.longest - STEPS) * 3 * large
    assert extra - 3 * large < salt_ds <= extra


def test_planned_runs_are_configs(gifts, settings):
    for run in gifts.planning.plan(dataclasses.replace(settings, seeds=1)).runs:
        resolved, _ = config.resolve(run.file, run.overrides)
        assert resolved.steps == run.steps and resolved.name == run.overrides["name"]


def test_plans_that_cannot_be(gifts, settings):
    def refuses(words, **changes):
        with pytest.raises(UserError, match=words):
            gifts.planning.plan(dataclasses.replace(settings, **changes))

    refuses("--steps at least 20", steps=19)
    refuses("--seeds must be at least 1", seeds=0)
    refuses("--methods", methods=("salt",))
    refuses("let", methods=("baseline", "lett"))
    for key in ("steps", "optimizer.schedule", "assist.steps", "grow.helper", "checkpoint.keep", "branch.run"):
        refuses(f"--{key}: the plan sets it", given={key: "1"})
    given = gifts.planning.plan(dataclasses.replace(settings, given={"batch_rows": "8"}))
    assert {run.overrides["batch_rows"] for run in given.runs} == {"8"}


# Running


def test_processes_share_the_runs(gifts, settings):
    planned = gifts.planning.plan(dataclasses.replace(settings, seeds=1))
    helper, trained = planned.runs[0], []

    def train_one(run):
        assert all(gifts.measure.finished(path) for path in run.needs) and not gifts.measure.finished(run.path)
        trained.append(run.path)
        Path(run.path).mkdir(parents=True)
        (Path(run.path) / "summary.json").write_text("{}")

    with gifts.measure.claim(helper.path) as mine:  # as another process would have it
        assert mine
        waited = []

        def wait(seconds):
            waited.append(len(trained))
            train_one(helper)

        gifts.measure.train_all(planned.runs, train_one, wait)
    assert waited == [5]  # BASELINE needs no helper, the others wait for it
    assert sorted(trained) == sorted(run.path for run in planned.runs)

    def never(_):
        raise AssertionError

    gifts.measure.train_all(planned.runs, never, never)  # all have ended
    (Path(helper.path) / "summary.json").unlink()
    with gifts.measure.claim(helper.path):
        gifts.measure.train_all(planned.runs, never, never)  # what is left is another's: nothing to wait for


def test_only_brings_what_it_needs(gifts, settings):
    runs = gifts.planning.plan(settings).runs
    chosen = gifts.measure.only(runs, "seed=1")
    assert {run.seed for run in chosen} == {1} and len(chosen) * SEEDS == len(runs)
    chosen = gifts.measure.only(runs, "method=salt")
    assert {run.method for run in chosen} == {"small_lm", "salt"} and len(chosen) == SEEDS * 4
    assert gifts.measure.only(runs, "") == list(runs)
    for text in ("seed=7", "seed", "sed=1"):
        with pytest.raises(UserError, match="--only"):
            gifts.measure.only(runs, text)


def arguments(settings, *more):
    return ["--data", "text:train", "--validation", "text:held", "--out", settings.out, "--steps", str(STEPS), *more]


def test_dry_run_trains_nothing(gifts, settings, capsys):
    assert gifts.measure.main(arguments(settings, "--dry_run")) == 0
    out = capsys.readouterr().out
    planned = gifts.planning.plan(settings)
    large = sum(run.updates for run in planned.students())
    per_seed = planned.longest + 4 + 6 + 8 + round(planned.longer * 0.2) + 5 * (40 + 4 + 6)
    assert large == SEEDS * per_seed and f"{large:,} updates of the large LM and 120 of the small one" in out
    assert not Path(settings.out).exists()


# The figures, from runs that are made up: BASELINE's loss is 5 - ln(FLOPs) / 2, others gain the same at every budget


def loss(flops, gain):
    return 5 - 0.5 * math.log(flops) - gain


def write_run(planned, run, *, restart=False, gains=GAINS, facts=None):
    """A run's directory as training leaves it, with a counter that restarts at a branch or goes on."""
    helped = run.method not in ("small_lm", "baseline")
    update = {"small_lm": HELPER_FLOPS / STEPS}.get(run.method, BASE)
    cost = [update + (PASS if helped and n < planned.stage_1 and run.method != "grow" else 0) for n in range(run.steps)]
    total, written = np.cumsum(cost), np.cumsum(cost[run.first :] if restart else cost)
    path = Path(run.path)
    path.mkdir(parents=True)
    own = {"vocabulary": "v", "validation_rows": "r", "objective": "causal", "train_rows": "t", "train_tokens": 10**6,
           "parameters": 100 if run.method == "small_lm" else 1000, "train_rows_count": 4000, "seq_len": 256,
           "batch_rows": 16, "vocabulary_size": 2048, "validation_rows_count": 9, "hardware": "an abacus",
           "devices": 1, "dtype": "float32", "versions": {"jax": "1"}, "helpers": {}}  # fmt: skip
    if helped and not run.trunk:  # a branch's stages may need none
        steps = {"run": "/" + next(iter(run.needs)), "step": STEPS, "train_flops": HELPER_FLOPS}
        roles = ["parent"] if run.method == "grow" else ["teacher", "scorer"]
        own["helpers"] = dict.fromkeys(roles, steps)
    settings = {"name": run.overrides["name"], "seed": run.seed, "steps": run.steps, "batch_rows": 16,
                "optimizer": {"name": "adamw", "warmup_steps": 4, "peak_learning_rate": 8e-3, "final_fraction": 0.1,
                              "decay_fraction": 0.2}}  # fmt: skip
    (path / "config.json").write_text(json.dumps({"config": settings, "facts": own | (facts or {})}))
    with open(path / "metrics.jsonl", "w", encoding="utf-8") as lines:
        for n in range(run.first, run.steps):
            i = n - run.first if restart else n
            record = {"kind": "train", "step": n + 1, "flops": written[i], "tokens": 100.0 * (i + 1)}
            record |= {"candidates": 80.0} if run.method == "salt_ds" and n < planned.stage_1 else {}
            lines.write(json.dumps(record) + "\n")
        reached = loss(total[-1], 0) - gains.get(run.method, (0,) * 3)[run.seed] + 0.01 * run.seed
        record = {"kind": "validation", "step": run.steps, "log_perplexity": reached, "bits_per_byte": reached / 2}
        lines.write(json.dumps(record) + "\n")
    (path / "summary.json").write_text("{}")
    return total[-1]


@pytest.fixture
def made(gifts, settings):
    planned = gifts.planning.plan(settings)
    flops = {run.path: write_run(planned, run, restart=run.seed == 1) for run in planned.runs}
    by_budget = {(run.method, run.seed, run.steps): flops[run.path] for run in planned.runs}
    return planned, by_budget


def interval(values):
    """Mean and half-width of the 95 % t-interval of three values."""
    return np.mean(values), 4.303 * np.std(values, ddof=1) / math.sqrt(3)


def check(figure, values):
    mean, half = interval(values)
    np.testing.assert_allclose(figure["seeds"], values, atol=1e-9)
    np.testing.assert_allclose(figure["mean"], mean, atol=1e-9)
    np.testing.assert_allclose(figure["interval_95"], [mean - half, mean + half], atol=1e-9)


def test_equal_steps_and_equal_flops(gifts, made):
    planned, flops = made
    results = gifts.collect.collect(planned)
    assert list(results["methods"]) == list(GAINS)
    for method, steps in itertools.product(tuple(GAINS)[1:], planned.budgets):
        row = next(row for row in results["methods"][method]["budgets"] if row["steps"] == steps)
        own = [flops[method, seed, steps] for seed in range(SEEDS)]
        gains = np.array(GAINS[method])
        assert row["flops"]["seeds"] == pytest.approx(own) and row["helper_flops"]["mean"] == HELPER_FLOPS
        steps_apart = -gains - 0.5 * np.log(np.array(own) / (BASE * steps))
        check(row["log_perplexity_at_equal_steps"], steps_apart)
        check(row["bits_per_byte_at_equal_steps"], steps_apart / 2)
        for share, part in {"free": 0, "shared": 0.1, "full": 1}.items():
            # BASELINE's loss is linear in log FLOPs, so that interpolation has no error
            expected = -gains + 0.5 * np.log((np.array(own) + part * HELPER_FLOPS) / np.array(own))
            check(row["at_equal_flops"][share], expected)
        longer = -gains - 0.5 * np.log(np.array(own) / (BASE * planned.longer))
        if steps == STEPS:
            check(row["against_longer"], longer)
        assert ("against_longer" in row) == (steps == STEPS)
    last = {method: results["methods"][method]["budgets"][-1]["at_equal_flops"] for method in tuple(GAINS)[1:]}
    verdicts = {method: figures["free"]["verdict"] for method, figures in last.items()}
    assert verdicts == {"salt": "better", "salt_ds": "better", "grow": "worse", "grow_salt": "not resolved",
                        "let": "not resolved"}  # fmt: skip
    assert last["let"]["full"]["verdict"] == "worse"


def test_baselines_rows_have_no_difference_but_a_spread(gifts, made):
    planned, _ = made
    results = gifts.collect.collect(planned)
    rows = results["methods"]["baseline"]["budgets"]
    assert [row["steps"] for row in rows] == [20, 28, 40, planned.longer, planned.longest]
    assert not any("at_equal_flops" in row for row in rows)
    expected = 4.303 * 0.01 * math.sqrt(2 / 3)  # seeds are 0.01 apart
    assert results["detectable"] == {str(steps): pytest.approx(expected) for steps in planned.budgets}


def test_cost_to_baselines_quality(gifts, made):
    planned, flops = made
    found = {name: method["to_quality"] for name, method in gifts.collect.collect(planned)["methods"].items()}
    assert found["baseline"]["where"] == ["within"] * 3
    check(found["baseline"]["steps"], [STEPS] * 3)
    check(found["baseline"]["flops_over_baseline"]["full"], [1, 1, 1])
    # salt's loss falls by the same law, so its FLOPs to a loss are BASELINE's times exp(-2 gain)
    ratio = np.exp(-2 * np.array(GAINS["salt"]))
    charged = HELPER_FLOPS / (BASE * STEPS)
    for share, part in {"free": 0, "shared": 0.1, "full": 1}.items():
        check(found["salt"]["flops_over_baseline"][share], ratio + part * charged)
    assert found["salt"]["where"] == ["within"] * 3
    steps = [28 * (40 / 28) ** _part(flops, seed) for seed in range(SEEDS)]
    check(found["salt"]["steps"], steps)
    assert found["grow"]["where"] == ["never"] * 3 and found["grow"]["steps"]["mean"] is None
    assert found["salt_ds"]["where"] == ["within", "before", "before"]
    assert found["salt_ds"]["flops_over_baseline"]["free"]["mean"] is None


def _part(flops, seed):
    """How far SALT is from its model of 28 steps to that of 40, in loss, when it is as good as BASELINE's."""
    lower, upper = (loss(flops["salt", seed, steps], GAINS["salt"][seed]) for steps in (28, 40))
    return (lower - loss(BASE * STEPS, 0)) / (lower - upper)


def test_beyond_baselines_range_is_said(gifts, settings):
    planned = gifts.planning.plan(settings)
    dear = {"teacher": {"run": "/x", "step": STEPS, "train_flops": 100 * HELPER_FLOPS}}
    for run in planned.runs:
        write_run(planned, run, facts={"helpers": dear} if run.method == "let" else None)
    row = gifts.collect.collect(planned)["methods"]["let"]["budgets"][-1]["at_equal_flops"]
    assert row["full"]["verdict"] == "outside the measured range" and row["full"]["mean"] is None
    assert row["free"]["verdict"] != row["full"]["verdict"] and row["shared"]["mean"] is None


def test_a_helper_in_two_roles_is_charged_once_and_two_helpers_twice(gifts, settings):
    planned = gifts.planning.plan(settings)
    other = {"teacher": {"run": "/a", "step": 9, "train_flops": 7.0}, "parent": {"run": "/b", "train_flops": 5.0},
             "scorer": {"run": "/a", "step": 3, "train_flops": 2.0}}  # fmt: skip
    for run in planned.runs:
        write_run(planned, run, facts={"helpers": other} if run.method == "grow_salt" else None)
    methods = gifts.collect.collect(planned)["methods"]
    assert methods["grow_salt"]["budgets"][0]["helper_flops"]["seeds"] == [12.0] * 3
    assert methods["salt_ds"]["budgets"][0]["helper_flops"]["seeds"] == [HELPER_FLOPS] * 3
    assert methods["baseline"]["budgets"][0]["helper_flops"]["seeds"] == [0.0] * 3


def test_runs_that_are_missing_unfinished_or_others(gifts, made):
    planned, _ = made

    def refuses(words):
        with pytest.raises(UserError, match=words) as error:
            gifts.collect.collect(planned)
        assert "\n" not in str(error.value)

    first, second = (Path(run.path) for run in planned.students()[3:5])
    config_text, metrics_text = ((first / name).read_text() for name in ("config.json", "metrics.jsonl"))
    ends = '"kind": "validation", "step": '
    (first / "config.json").write_text(config_text.replace('"validation_rows": "r"', '"validation_rows": "q"'))
    refuses("validation rows")
    (first / "config.json").write_text(config_text.replace('"train_rows": "t"', '"train_rows": "q"'))
    refuses("its train_rows")
    (first / "config.json").write_text(config_text)
    (first / "metrics.jsonl").write_text(metrics_text.split("\n", 1)[1])
    refuses("not one record for each")
    (first / "metrics.jsonl").write_text(metrics_text.replace(f"{ends}40", f"{ends}30"))
    refuses("ended at step 30")
    (first / "metrics.jsonl").write_text(metrics_text)
    gifts.collect.collect(planned)
    (first / "summary.json").unlink()
    refuses(f"1 of 63 runs are missing or unfinished .{first}.")
    for file in second.iterdir():
        file.unlink()
    refuses("2 of 63 runs")


def test_page_from_end_to_end(gifts, settings, monkeypatch, capsys):
    """`measure.py` on made-up training: the first call stops half way, the second goes on and writes the page."""
    planned, trained = gifts.planning.plan(settings), []

    def train_one(run):
        trained.append(run.path)
        write_run(planned, run)

    monkeypatch.setattr(gifts.measure, "_train", train_one)
    assert gifts.measure.main(arguments(settings, "--only", "seed=2")) == 0
    assert len(trained) == 21 and "42 of 63 runs have not ended" in capsys.readouterr().out
    assert gifts.measure.main(arguments(settings)) == 0
    assert len(trained) == len(set(trained)) == 63
    out = Path(settings.out)
    results = json.loads((out / "results.json").read_text())
    assert results["command"].startswith("python experiments/gifts/measure.py --data text:train")
    text = (out / "README.md").read_text()
    for name in ("BASELINE", "SALT", "SALT_DS", "grow", "grow then SALT", "LET"):
        assert f"| {name} | {STEPS} |" in text
    assert f"| SALT | {STEPS} | " in text and "not resolved" in text and "None" not in text and "nan" not in text
    png = (out / "gifts.png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) < 200_000
    salt_ds = next(line for line in text.split("What each row")[1].splitlines() if f"| SALT_DS | {STEPS} |" in line)
    epochs = (7 * 80 + 33 * 16) / 4000
    assert salt_ds == f"| SALT_DS | {STEPS} | 4,000 | 4,000 | {epochs:.3f} | 4.00 | 3 |"


def test_one_seed_has_no_interval(gifts, settings):
    planned = gifts.planning.plan(dataclasses.replace(settings, seeds=1))
    for run in planned.runs:
        write_run(planned, run)
    results = gifts.collect.collect(planned)
    row = results["methods"]["salt"]["budgets"][0]["log_perplexity_at_equal_steps"]
    assert row["verdict"] == "one seed" and row["interval_95"] is None
    assert "One seed does not say" in gifts.page.markdown(results)

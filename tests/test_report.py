import json
import math
import random
import re
import statistics
from pathlib import Path

import pytest

from slm_assist import report
from slm_assist.errors import UserError
from slm_assist.report import stats
from slm_assist.report.tables import WIDTH

KINDS = {"baseline": "none", "small": "none", "rkd": "constant", "salt": "step"}
BASE = {100: 3.0, 200: 2.4, 300: 2.0}
BETTER = {100: 2.8, 200: 2.1, 300: 1.9}  # reaches 2.0 half-way between 200 and 300
DOMAINS = {"stdlib": 300, "numpy": 200, "jax": 500}


def fabricate(path, curve=BASE, *, finished=True, config=(), facts=(), seed=0, speed=1.0):
    """A run directory as training writes it.

    A step costs 10 FLOPs and 0.1/speed seconds; with the small LM, in SALT's first 100 steps, 12 FLOPs.
    """
    path = Path(path)
    kind = KINDS.get(path.name, "none")
    stop = {"none": 0, "constant": max(curve), "step": 100}[kind]
    parameters = 500 if path.name == "small" else 2000
    helper = {"run": str(path.parent / "small"), "step": 200, "parameters": 500, "train_flops": 600.0}
    path.mkdir(parents=True)
    written = {
        "config": {"name": "", "seed": seed, "steps": 300, "assist": {"schedule": kind}, **dict(config)},
        "facts": {
            "vocabulary": "aa11", "validation_rows": "bb22", "objective": "causal", "parameters": parameters,
            "train_tokens": 50000, "train_rows_count": 500, "seq_len": 100, "batch_rows": 4,
            "hardware": "CPU", "devices": 1, "dtype": "float32", "versions": {"jax": "0.10.2"},
            "helpers": {"teacher": helper} if stop else {}, **dict(facts),
        },
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(written))
    records = []
    for step in range(10, max(curve) + 1, 10):
        flops, seconds = 10.0 * step + 2.0 * min(step, stop), 0.1 * step / speed
        stage = "assisted" if step <= stop else "plain"
        records.append({"kind": "train", "step": step, "stage": stage, "loss": 9.0, "tokens": 400 * step,
                        "flops": flops, "seconds": seconds})  # fmt: skip
        if step in curve:
            records.append(_validation(step, curve[step], flops, seconds))
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if finished:
        seconds = {"compile": 2.0, "stage1": 0.1 * stop, "stage2": 0.1 * (max(curve) - stop), "validation": 1.0}
        stages = [{"name": "assisted", "start": 0, "stop": stop}, {"name": "plain", "start": stop, "stop": 300}]
        summary = {"steps": max(curve), "tokens": 400 * max(curve), "seconds": seconds, "peak_bytes": None,
                   "flops": {"student": 10.0 * max(curve), "teacher": 2.0 * stop},
                   "stages": [stage for stage in stages if stage["start"] < stage["stop"]]}  # fmt: skip
        (path / "summary.json").write_text(json.dumps(summary))
    return str(path)


def _validation(step, loss, flops, seconds):
    def figures(value, tokens):
        return {"log_perplexity": value, "bits_per_byte": value / 2, "accuracy": 1 / value, "tokens": tokens}

    record = {"kind": "validation", "step": step} | figures(loss, 1000)
    record["domains"] = {name: figures(loss + i / 10, n) for i, (name, n) in enumerate(DOMAINS.items())}
    record["buckets"] = {name: figures(loss + i - 1, 333) for i, name in enumerate(("easy", "medium", "hard"))}
    return record | {"train_flops": flops, "train_seconds": seconds, "validation_seconds": 0.5}


def by_name(comparison):
    return {method.name: method for method in comparison.methods}


def said(comparison):
    """The first lines as one, whatever the wrapping."""
    return re.sub(r"\s+", " ", report.text_table(comparison).split("\n\n")[0])


@pytest.fixture
def four(tmp_path):
    return [
        fabricate(tmp_path / "salt", BETTER),
        fabricate(tmp_path / "rkd", {100: 2.8, 200: 2.3, 300: 2.05}),
        fabricate(tmp_path / "baseline"),
        fabricate(tmp_path / "small", {100: 3.2, 200: 2.6, 300: 2.5}, speed=2.0),
    ]


def test_methods_are_told_by_their_config_and_ordered(four):
    comparison = report.compare(four)
    assert [m.name for m in comparison.methods] == ["small", "baseline", "rkd", "salt"]
    assert [m.kind for m in comparison.methods] == ["small LM", "BASELINE", "RKD", "SALT"]
    assert comparison.baseline.name == "baseline"
    assert by_name(comparison)["small"].difference is None


def test_cost_to_the_target_by_hand(four):
    salt = by_name(report.compare(four))["salt"]
    assert salt.to_target["steps"].mean == pytest.approx(250)
    assert salt.to_target["flops"].mean == pytest.approx(2700)  # 100 * 12 + 150 * 10
    assert salt.to_target["seconds"].mean == pytest.approx(25)
    assert salt.ratio["steps"]["free"].mean == pytest.approx(250 / 300)
    assert salt.ratio["flops"]["free"].mean == pytest.approx(2700 / 3000)
    assert salt.difference.mean == pytest.approx(-0.1)
    assert salt.runs[0].switch_step == 100


def test_the_small_lm_is_charged_free_shared_and_in_full(four):
    salt = by_name(report.compare(four))["salt"]
    # 600 FLOPs by config.json, and 200 steps of 0.05 seconds by the small LM's own files
    assert (salt.helper["flops"].mean, salt.helper["seconds"].mean) == (600, pytest.approx(10))
    assert salt.ratio["flops"]["shared"].mean == pytest.approx((2700 + 60) / 3000)
    assert salt.ratio["flops"]["full"].mean == pytest.approx((2700 + 600) / 3000)
    assert salt.ratio["seconds"]["full"].mean == pytest.approx((25 + 10) / 30)
    assert salt.whole["flops"]["full"].mean == pytest.approx((3200 + 600) / 3000)


def test_a_small_lm_that_was_moved_is_still_found_and_one_that_is_absent_is_not_timed(four, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    moved = Path(four[3]).rename(tmp_path / "elsewhere" / "small")
    moved_too = by_name(report.compare([*four[:3], moved]))
    assert moved_too["small"].kind == "small LM"
    assert moved_too["salt"].helper["seconds"].mean == pytest.approx(10)
    alone = report.compare(four[:3])
    assert by_name(alone)["salt"].helper["seconds"].mean is None
    assert "salt loses on FLOPs: 1.10 of baseline's FLOPs to the same quality" in said(alone)


def test_says_where_salt_wins_and_where_it_loses(four):
    text = said(report.compare(four))
    assert "salt ends better than baseline: log-perplexity 1.900 against 2.000, -0.100" in text
    assert "salt reaches baseline's final quality at 0.83 of its steps, 0.90 of its FLOPs, 0.83" in text
    assert "counted in full, salt loses on FLOPs and seconds: 1.10 of baseline's FLOPs and 1.17" in text
    assert "(shared over 10 students: 0.92 and 0.87)" in text
    assert text.index("salt ends") < text.index("rkd loses on final quality")
    assert "rkd loses on cost: it never reaches baseline's final quality." in text


def test_a_salt_that_never_reaches_baseline_loses(tmp_path):
    runs = [fabricate(tmp_path / "baseline"), fabricate(tmp_path / "salt", {100: 2.5, 200: 2.2, 300: 2.01})]
    comparison = report.compare(runs)
    assert by_name(comparison)["salt"].to_target["steps"].values == (None,)
    assert "salt loses on final quality: log-perplexity 2.010 against 2.000, +0.010" in said(comparison)
    assert "salt loses on cost: it never reaches baseline's final quality." in said(comparison)
    assert "not reached" in report.text_table(comparison)


def test_a_salt_with_fewer_steps_and_more_seconds_loses_on_seconds(tmp_path):
    runs = [fabricate(tmp_path / "baseline"), fabricate(tmp_path / "salt", BETTER, speed=0.5)]
    assert "1.67 of its seconds, the small LM taken as given: it loses on seconds." in said(report.compare(runs))


def test_first_lines_say_data_tokens_seeds_and_noise(four, tmp_path):
    text = said(report.compare(four))
    assert "Data: 50 K training tokens in 500 rows of 100." in text
    assert "baseline (2,000 parameters) saw 120 K tokens: 60 a parameter, 2.4 epochs." in text
    assert "small (500 parameters) saw 120 K tokens: 240 a parameter" in text
    assert "One seed" in text and "run --seeds 3" in text


def test_noise_of_one_seed_is_paired_by_row(tmp_path):
    runs = [fabricate(tmp_path / "baseline"), fabricate(tmp_path / "salt", BETTER)]
    rng, tokens = random.Random(0), [100, 50, 80, 100, 120, 40]
    base = [n * rng.uniform(1, 9) for n in tokens]
    d = [0.1, 0.12, 0.08, 0.11, 0.1, 0.05]
    for run, sums in zip(
        map(Path, runs), (base, [b - n * x for b, n, x in zip(base, tokens, d, strict=True)]), strict=True
    ):
        rows = {"step": 300, "cross_entropy": sums, "tokens": tokens}
        (run / "validation_rows.json").write_text(json.dumps(rows))
    comparison = report.compare(runs)
    mean = sum(n * x for n, x in zip(tokens, d, strict=True)) / sum(tokens)
    squares = sum((n * (x - mean)) ** 2 for n, x in zip(tokens, d, strict=True))
    assert comparison.noise["source"] == "rows"
    assert comparison.noise["threshold"] == pytest.approx(1.96 * math.sqrt(6 / 5 * squares) / sum(tokens))
    assert "paired by row" in said(comparison)


def test_noise_falls_back_on_domains(tmp_path):
    comparison = report.compare([fabricate(tmp_path / "baseline"), fabricate(tmp_path / "salt", BETTER)])
    assert comparison.noise["source"] == "domains"
    assert comparison.noise["threshold"] == pytest.approx(0, abs=1e-12)  # every domain differs by the same 0.1
    d, w = [0.3, -0.1, 0.2], [1.0, 2.0, 5.0]
    mean = (0.3 - 0.2 + 1.0) / 8
    by_hand = math.sqrt(1.5 * ((0.3 - mean) ** 2 + 4 * (-0.1 - mean) ** 2 + 25 * (0.2 - mean) ** 2)) / 8
    assert stats.clustered_standard_error(d, w) == pytest.approx(by_hand)


def seeds(tmp_path, baselines, salts):
    runs = []
    for name, finals in (("baseline", baselines), ("salt", salts)):
        for seed, final in finals.items():
            curve = {100: 3.0, 200: 2.4, 300: final}
            runs.append(fabricate(tmp_path / f"seed-{seed}" / name, curve, seed=seed))
    return runs


def test_seeds_are_paired_and_give_t_intervals(tmp_path):
    base, salt = {0: 2.00, 1: 2.10, 2: 2.05}, {0: 1.95, 1: 2.02, 2: 2.02}
    comparison = report.compare(seeds(tmp_path, base, salt))
    method = by_name(comparison)["salt"]
    differences = [-0.05, -0.08, -0.03]
    half = 4.303 * statistics.stdev(differences) / math.sqrt(3)
    assert method.difference.mean == pytest.approx(statistics.fmean(differences))
    assert method.difference.half_width == pytest.approx(half)
    assert method.final["log_perplexity"].half_width == pytest.approx(4.303 * statistics.stdev(salt.values()) / 3**0.5)
    # each seed is timed to its own baseline's quality
    expected = [200 + 100 * (2.4 - base[s]) / (2.4 - salt[s]) for s in range(3)]
    assert method.to_target["steps"].values == pytest.approx(expected)
    assert comparison.noise == {"threshold": pytest.approx(half), "source": "pairs", "seeds": 3}
    assert f"holds 0; the widest is ±{half:.3f}" in said(comparison)
    assert "which cannot be told from noise" in said(comparison)


def test_one_seed_against_three_is_judged_by_the_spread_of_the_three(tmp_path):
    base = {0: 2.00, 1: 2.10, 2: 2.05}
    comparison = report.compare(seeds(tmp_path, base, {0: 1.95}))
    limit = 4.303 * statistics.stdev(base.values()) * math.sqrt(1 / 3 + 1)
    assert comparison.noise == {"threshold": pytest.approx(limit), "source": "seeds", "seeds": 3}
    assert f"3 seeds: a difference in final log-perplexity below {limit:.3f}" in said(comparison)


def test_a_target_that_some_seeds_miss_has_no_mean(tmp_path):
    comparison = report.compare(seeds(tmp_path, {0: 2.0, 1: 2.0}, {0: 1.9, 1: 2.1}))
    method = by_name(comparison)["salt"]
    assert method.to_target["steps"].values == (pytest.approx(280), None)
    assert method.to_target["steps"].mean is None
    assert "salt loses on cost in 1 of 2 seeds: it never reaches" in said(comparison)
    assert "in 1 of 2" in report.text_table(comparison)


def test_difference_without_pairs():
    apart = stats.difference({3: 1.0, 4: 1.2}, {0: 2.0, 1: 2.1, 2: 2.2})
    assert apart.mean == pytest.approx(-1.0)
    assert apart.half_width == pytest.approx(12.706 * math.sqrt(0.02 / 2 + 0.01 / 3))
    assert stats.difference({3: 1.0}, {0: 2.0, 1: 2.1}).half_width is None


def test_t_quantiles_and_crossings():
    assert [stats.t_975(n) for n in (1, 2, 10, 30)] == [12.706, 4.303, 2.228, 2.042]
    assert [stats.t_975(n) for n in (31, 60, 1000)] == pytest.approx([2.0395, 2.0003, 1.9623], abs=1e-3)
    assert stats.first_crossing([0, 10, 20, 30], [4, 2, 3, 1], 2.5) == 7.5  # the first, though it rises again
    assert stats.first_crossing([5, 10], [1, 0], 2) == 5
    assert stats.first_crossing([5, 10], [4, 3], 2) is None


@pytest.mark.parametrize("fact, words", [("vocabulary", "vocabulary"), ("validation_rows", "validation rows"),
                                         ("objective", "objective")])  # fmt: skip
def test_runs_that_differ_are_not_ranked(tmp_path, fact, words):
    runs = [fabricate(tmp_path / "baseline"), fabricate(tmp_path / "salt", facts={fact: "other"})]
    with pytest.raises(UserError, match=f"salt: its {words} \\(other\\) differs from that of .*baseline") as error:
        report.compare(runs)
    assert "\n" not in str(error.value)


def test_other_differences_are_noted(tmp_path):
    runs = [fabricate(tmp_path / "baseline"), fabricate(tmp_path / "salt", BETTER, facts={"hardware": "TPU"})]
    assert "hardware differs, so seconds do not compare (baseline CPU, salt TPU)" in said(report.compare(runs))


def test_one_name_means_seeds_of_one_method(tmp_path):
    first = fabricate(tmp_path / "a" / "baseline")
    with pytest.raises(UserError, match="both called baseline and have seed 0"):
        report.compare([first, fabricate(tmp_path / "b" / "baseline")])
    other = fabricate(tmp_path / "c" / "baseline", seed=1, config={"batch_rows": 8})
    with pytest.raises(UserError, match="both called baseline but differ in batch_rows"):
        report.compare([first, other])
    assert len(report.compare([first, first]).baseline.runs) == 1


def test_names_come_from_config_and_equal_configs_are_seeds(tmp_path):
    plain = [fabricate(tmp_path / f"plain-{seed}", seed=seed) for seed in (0, 1)]
    named = fabricate(tmp_path / "salt", BETTER, config={"name": "Mine"})
    comparison = report.compare([*plain, named])
    assert {m.name: len(m.runs) for m in comparison.methods} == {"plain-0": 2, "Mine": 1}
    assert comparison.baseline.name == "plain-0"


def test_the_baseline_can_be_named(tmp_path):
    runs = [fabricate(tmp_path / n, config={"batch_rows": i}) for i, n in enumerate(("one", "two"))]
    with pytest.raises(UserError, match="one, two could each be the baseline"):
        report.compare(runs)
    assert report.compare(runs, baseline="two").baseline.name == "two"
    assert report.compare(runs, baseline=runs[0]).baseline.name == "one"
    with pytest.raises(UserError, match="did you mean two"):
        report.compare(runs, baseline="tow")


def test_an_unfinished_run_is_shown_and_not_ranked(tmp_path):
    runs = [fabricate(tmp_path / "baseline"), fabricate(tmp_path / "salt", {100: 2.8, 200: 1.9}, finished=False)]
    with open(tmp_path / "salt" / "metrics.jsonl", "a") as file:
        file.write('{"kind": "validation", "step": 300, "log_per')
    comparison = report.compare(runs)
    salt = by_name(comparison)["salt"]
    assert salt.final["log_perplexity"].mean == 1.9 and salt.difference is None
    assert salt.runs[0].switch_step == 100
    assert "salt is unfinished (step 200 of 300): its figures are those so far" in said(comparison)
    assert "200 so far" in report.text_table(comparison)
    report.write(comparison, tmp_path / "out")
    unfinished_base = report.compare([fabricate(tmp_path / "b" / "baseline", finished=False), *runs[1:]])
    assert "baseline is unfinished: nothing is ranked." in said(unfinished_base)


def test_unfinished_seeds_are_left_out_of_the_mean(tmp_path):
    runs = [fabricate(tmp_path / "seed-0" / "baseline"),
            fabricate(tmp_path / "seed-1" / "baseline", {100: 3.0}, seed=1, finished=False)]  # fmt: skip
    comparison = report.compare(runs)
    assert comparison.baseline.final["log_perplexity"].values == (2.0,)
    assert "(step 100 of 300): left out" in said(comparison)


def test_load_flattens_and_ignores_a_half_written_line(tmp_path):
    run = fabricate(tmp_path / "salt", BETTER)
    whole = report.load(run)
    with open(tmp_path / "salt" / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')
    frame = report.load(run)
    assert len(frame) == len(whole) == 33
    validation = frame[frame.kind == "validation"].set_index("step")
    assert validation.loc[200, "domains.jax.log_perplexity"] == pytest.approx(2.3)
    assert validation.loc[300, "buckets.easy.log_perplexity"] == pytest.approx(0.9)


def test_bad_run_directories_get_one_line(tmp_path):
    run = Path(fabricate(tmp_path / "all" / "baseline"))
    with pytest.raises(UserError, match="no config.json.*the runs in it are .*baseline"):
        report.compare([tmp_path / "all"])
    with pytest.raises(UserError, match="no runs"):
        report.compare([])
    lines = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text("{broken\n" + lines)
    with pytest.raises(UserError, match="line 1: not a JSON object"):
        report.compare([run])
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="no validation record yet"):
        report.compare([run])
    (run / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="metrics.jsonl: cannot be read"):
        report.load(run)
    (run / "config.json").write_text('{"config": {}, "facts": {"vocabulary": 1}}')
    with pytest.raises(UserError, match="lacks facts.validation_rows"):
        report.read_run(run)


def test_the_page_stands_alone(four, tmp_path, capsys):
    comparison = report.run_report(four, tmp_path / "out")
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith("out/report.html")
    files = {file.name: file for file in (tmp_path / "out").iterdir()}
    assert set(files) == {"report.html", "results.json", "validation.png", "seconds.png", "buckets.png", "cost.png"}
    page = files["report.html"].read_text()
    assert page.count("data:image/png;base64,") == 4
    assert not re.search(r"https?:|src=\"(?!data:)|<link|<script|url\(", page)
    assert page.index("salt loses on FLOPs and seconds") < page.index("<img")
    for name, file in files.items():
        if name.endswith(".png"):
            assert file.read_bytes()[:4] == b"\x89PNG" and file.stat().st_size < 200_000
    results = json.loads(files["results.json"].read_text())
    salt = results["methods"]["salt"]
    assert salt["ratio"]["flops"]["full"]["mean"] == pytest.approx(1.1)
    assert salt["runs"][0]["facts"]["versions"] == {"jax": "0.10.2"}
    assert results["noise"] == comparison.noise


def test_names_are_escaped_on_the_page_and_cut_in_the_terminal(tmp_path):
    name = "<b>a long name for a method & its friends</b> that would not fit into any table of the terminal"
    runs = seeds(tmp_path, {0: 2.0, 1: 2.1}, {0: 1.9, 1: 2.2})
    for seed in (0, 1):
        runs.append(fabricate(tmp_path / f"seed-{seed}" / "rkd", BETTER, seed=seed, config={"name": name}))
    comparison = report.compare(runs)
    assert max(map(len, report.text_table(comparison).splitlines())) <= WIDTH
    page = report.write(comparison, tmp_path / "out").read_text()
    assert "<b>a long" not in page and "&lt;b&gt;a long" in page


def test_an_unwritable_place_is_named(four, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: the report cannot be written there"):
        report.write(report.compare(four), tmp_path / "file")


def test_runs_without_buckets_domains_or_baseline_still_make_a_page(tmp_path):
    run = Path(fabricate(tmp_path / "salt", BETTER))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record.pop("buckets", None)
        record.pop("domains", None)
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    comparison = report.compare([run])
    assert comparison.baseline is None
    assert "No BASELINE among the runs" in said(comparison)
    assert "buckets.png" not in report.write(comparison, tmp_path / "out").read_text()

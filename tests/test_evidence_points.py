"""Points and figures from made-up runs: FLOPs, what small LMs cost, what is not there, and equal figures for all."""

import dataclasses
import json
import math
from pathlib import Path

import evidence_made
import numpy as np
import pytest
from evidence_made import HELPER, PASS, SCORING, UPDATE, law

from slm_assist.errors import UserError

FULL, STAGE_1 = 112, 19
GAINS = {"salt": (0.10, 0.11, 0.12), "rkd": (-0.1, -0.11, -0.12), "grow": (0.3, -0.1, 0.1)}
COMMAND = "python experiments/evidence/run.py --data x --collect"


def gain(job):
    """By key and seed; the same at every end."""
    return GAINS.get(job.key, (0.0,) * 3)[job.seed % 100 % 3] if job.seed < 200 else 0.0


def spread(job):
    """The same, with seeds that differ, as they do."""
    return gain(job) + (0, 0.01, 0.02)[job.seed % 3]


@pytest.fixture(scope="module")
def evidence():
    with evidence_made.scripts() as found:
        evidence_made.fewer_replicates(found)
        yield found


def make(evidence, out, of=spread, rows=None):
    setting = evidence.planning.Setting(str(out), evidence_made.tier(evidence))
    jobs = evidence.planning.plan(setting, rows or evidence_made.rows(evidence))
    evidence_made.write_corpus(out)
    return setting, jobs, evidence_made.write_all(evidence, jobs, of)


@pytest.fixture(scope="module")
def made(evidence, tmp_path_factory):
    return make(evidence, tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def found(evidence, made):
    return evidence.points.read(made[0], made[1], "validation")


@pytest.fixture(scope="module")
def results(evidence, made):
    return evidence.collect.collect(made[0], made[1], COMMAND)


def row_of(results, key, part="validation"):
    return next(row for row in results[part]["rows"] if row["key"] == key)


def cost(key, steps):
    """FLOPs of a made-up run, in full."""
    helped = {"salt": STAGE_1, "grow_salt": STAGE_1, "salt_ds_offline": STAGE_1, "rkd": steps, "salt-40": 45}.get(
        key, 0
    )
    return UPDATE * steps + PASS * min(helped, steps) + SCORING * (key == "salt_ds_offline")


# Points


def test_flops_of_a_branch_are_the_trunks_to_where_it_leaves_and_its_own(found):
    """With counters that go on from the trunk's (even seeds) and that begin again (odd ones)."""
    assert {seed % 2 for _, _, seed in found.points} == {0, 1}
    for (_, key, _), points in found.points.items():
        assert [point.steps for point in points] == sorted({point.steps for point in points})
        for point in points:
            assert point.flops == pytest.approx(cost(key, point.steps)), point.path
            assert point.tokens == pytest.approx(2000 * point.steps)
            assert point.rows == 16 * point.steps
            assert sum(point.stages.values()) == point.steps
            if key == "salt":
                assert point.stages == {"assisted": STAGE_1, "plain": point.steps - STAGE_1} and point.switch == STAGE_1


def test_training_a_small_lm_is_charged_once_whatever_it_does(found):
    expected = {"baseline": 0.0, "unigram": 0.0, "grow_salt": HELPER, "salt": HELPER, "salt_ds_offline": HELPER}
    seen = set()
    for (_, key, _), points in found.points.items():
        for point in points:
            if key in expected:
                assert point.helper_flops == pytest.approx(expected[key])
                seen.add(key)
                for share in (0.0, 0.1, 1.0):
                    assert point.cost(share) == pytest.approx(point.flops + share * expected[key])
    assert seen == set(expected)


def test_two_small_lms_are_both_charged_to_the_latest_step_of_each(evidence, made, tmp_path):
    setting, jobs, _ = made
    runs = {job.path: evidence.points.read_run(job.path) for job in jobs if job.key == "grow_salt" and job.seed == 0}
    path = next(job.path for job in jobs if job.path in runs and not job.trunk)
    facts = {"teacher": {"run": "/a", "train_flops": 7.0}, "parent": {"run": "/b", "train_flops": 5.0},
             "scorer": {"run": "/a", "train_flops": 2.0},
             "reference": {"run": "slm_assist.assist.ngram:unigram", "train_flops": None}}  # fmt: skip
    run = dataclasses.replace(runs[path], facts=runs[path].facts | {"helpers": facts})
    assert evidence.points._helper_flops(run, None) == 12.0
    branch = dataclasses.replace(run, facts=run.facts | {"helpers": {}})
    assert evidence.points._helper_flops(branch, run) == 12.0


def test_measures_are_those_of_the_documents(found):
    for (_, key, seed), points in found.points.items():
        for point in points:
            own = law(cost(key, point.steps) - SCORING * (key == "salt_ds_offline"))
            expected = own - spread(_Job(key, seed))
            for name in ("bits_per_byte", "domain_mean", "unseen", "domain:Wiki"):
                assert point.measures[name].shape == (1 + evidence_made.REPLICATES,)
                assert point.measures[name][0] == pytest.approx(expected, abs=1e-9)


@dataclasses.dataclass
class _Job:
    key: str
    seed: int


def test_rows_of_both_parts_are_kept_apart(evidence, made, found):
    test = evidence.points.read(made[0], made[1], "test")
    assert {seed for *_, seed in test.points} == {100, 101, 102}
    assert {key for _, key, _ in test.points} == {"baseline", "salt", "rkd"}
    assert {seed for *_, seed in found.points} == {0, 1, 2, 200}
    assert all("cutter" not in key for key in found.points)


# What is not there, and what is damaged


def copy(evidence, made, tmp_path):
    """The made-up runs again, where they may be damaged."""
    rows = [row for row in evidence_made.rows(evidence) if row.key in ("baseline", "salt", "cutter") and not row.test]
    return make(evidence, tmp_path / "out", rows=rows)


def test_seeds_without_a_last_model_are_left_out_and_named(evidence, made, tmp_path):
    setting, jobs, _ = copy(evidence, made, tmp_path)
    full = jobs[-1].full
    for key, seed in (("salt", 1), ("baseline", 2)):
        job = next(job for job in jobs if (job.key, job.seed, job.steps) == (key, seed, full))
        (Path(job.path) / ("evidence.json" if key == "salt" else "documents-validation.json")).unlink()
    found = evidence.points.read(setting, jobs, "validation")
    assert found.seeds(2, "salt") == [0, 2] and found.seeds(2, "baseline") == [0, 1]
    results = evidence.collect.collect(setting, jobs, COMMAND)
    missing = [tuple(entry[name] for name in ("row", "seeds", "planned", "models"))
               for entry in results["validation"]["missing"]]  # fmt: skip
    assert missing == [("baseline", [0, 1], 3, 9), ("salt", [0, 2], 3, 6)]
    salt = row_of(results, "salt")
    assert salt["seeds"] == [0, 2] and len(salt["ends"][-1]["equal_steps"]["bits_per_byte"]["seeds"]) == 1
    assert "| BASELINE | validation | 2 | 2 of 3 | 9 |" in evidence.page.markdown(results)


def test_a_row_has_the_ends_that_all_of_its_seeds_have(evidence, made, tmp_path):
    setting, jobs, _ = copy(evidence, made, tmp_path)
    ends = sorted({job.steps for job in jobs if job.key == "salt"})
    branch = next(job for job in jobs if (job.key, job.seed, job.steps) == ("salt", 1, ends[0]))
    (Path(branch.path) / "evidence.json").unlink()
    trunk = next(job for job in jobs if (job.key, job.seed) == ("baseline", 2) and not job.trunk)
    (Path(trunk.path) / "documents-validation.json").unlink()
    found = evidence.points.read(setting, jobs, "validation")
    assert {tuple(point.steps for point in found.points[2, "salt", seed]) for seed in (0, 1, 2)} == {tuple(ends[1:])}
    results = evidence.collect.collect(setting, jobs, COMMAND)
    salt = row_of(results, "salt")
    assert [end["steps"] for end in salt["ends"]] == ends[1:] and "against_longest" not in salt
    assert "| SALT | validation | 2 | 3 of 3 | 3 |" in evidence.page.markdown(results)
    assert evidence.pictures.all_pictures(results)


def test_a_pair_without_a_seed_in_common_is_no_pair(evidence, tmp_path):
    rows = [row for row in evidence_made.rows(evidence) if not row.test and row.key in ("baseline", "salt", "salt-40",
            "cutter")]  # fmt: skip
    setting, jobs, _ = make(evidence, tmp_path / "out", rows=rows)
    for job in jobs:
        if job.key == "salt" and job.seed == 0:
            (Path(job.path) / "evidence.json").unlink()
    results = evidence.collect.collect(setting, jobs, COMMAND)
    assert "against_pair" not in row_of(results, "salt-40") and row_of(results, "salt")["seeds"] == [1, 2]
    assert evidence.page.markdown(results)


def test_runs_that_are_damaged_or_anothers_are_refused_in_one_line(evidence, made, tmp_path):
    setting, jobs, _ = copy(evidence, made, tmp_path)
    run = Path(next(job.path for job in jobs if (job.key, job.seed) == ("salt", 1) and not job.trunk))
    texts = {name: (run / name).read_text() for name in ("config.json", "metrics.jsonl")}

    def refuses(words, name, change):
        (run / name).write_text(change(texts[name]))
        with pytest.raises(UserError, match=words) as error:
            evidence.points.read(setting, jobs, "validation")
        assert "\n" not in str(error.value) and str(run) in str(error.value)
        (run / name).write_text(texts[name])

    def without(line):
        return lambda text: "\n".join(part for i, part in enumerate(text.splitlines()) if i != line)

    refuses("not one record for each of the 112 updates with seed 1", "metrics.jsonl", without(0))
    refuses("not one record for each", "metrics.jsonl", without(60))
    refuses("not one record for each", "metrics.jsonl", without(111))
    refuses("not one record for each", "metrics.jsonl", lambda text: text.splitlines()[0] + "\n" + text)
    refuses("metrics.jsonl, line 3", "metrics.jsonl", lambda text: text.replace('"step": 3,', '"step" 3,'))
    refuses("not one record for each", "config.json", lambda text: text.replace('"seed": 1', '"seed": 2'))
    for fact in ('"train_rows": "t"', '"vocabulary": "v"', '"objective": "causal"', '"parameters": 115000',
                 '"seq_len": 128'):  # fmt: skip
        name, _, value = fact.partition(": ")
        other = {"t": "u"}.get(value, '"q"' if value.startswith('"') else "7")
        refuses(f"its {name[1:-1]} .*cannot be compared", "config.json",
                lambda text, fact=fact, name=name, other=other: text.replace(fact, f"{name}: {other}"))  # fmt: skip
    refuses("helper teacher does not say what training it cost", "config.json",
            lambda text: text.replace(f'"train_flops": {HELPER}', '"train_flops": null'))  # fmt: skip
    evidence.points.read(setting, jobs, "validation")


def test_a_list_that_does_not_say_what_scoring_cost_is_refused(evidence, made):
    _, jobs, _ = made
    run = evidence.points.read_run(next(job.path for job in jobs if job.key == "salt_ds_offline"))
    assert evidence.points._scoring(run) == SCORING
    lists = json.loads(json.dumps(run.facts["data"]))
    lists["lists"]["list"]["made"]["scoring_flops"] = None
    with pytest.raises(UserError, match="does not say what scoring it cost"):
        evidence.points._scoring(dataclasses.replace(run, facts=run.facts | {"data": lists}))
    lists["lists"]["list"]["made"] = {"rule": "random", "seed": 3}
    assert evidence.points._scoring(dataclasses.replace(run, facts=run.facts | {"data": lists})) == 0


def test_without_runs_or_the_one_that_cuts_there_is_nothing(evidence, tmp_path):
    setting = evidence.planning.Setting(str(tmp_path), evidence_made.tier(evidence))
    jobs = evidence.planning.plan(setting, evidence_made.rows(evidence))
    with pytest.raises(UserError, match="the run that cuts the buckets is not there yet"):
        evidence.collect.collect(setting, jobs, COMMAND)
    evidence_made.write_corpus(tmp_path)
    evidence_made.write_all(evidence, [job for job in jobs if job.key == "cutter"])
    with pytest.raises(UserError, match="no run of the plan has ended; train first"):
        evidence.collect.collect(setting, jobs, COMMAND)


# Figures


def test_equal_steps_and_equal_flops(results):
    for key in ("salt", "rkd", "grow", "unigram", "salt_ds_offline"):
        for end in row_of(results, key)["ends"]:
            own = cost(key, end["steps"])
            assert end["flops"] == pytest.approx(own)
            gains = np.array(GAINS.get(key, (0.0,) * 3))
            updates = own - SCORING * (key == "salt_ds_offline")
            helper = HELPER if key not in ("unigram",) else 0.0
            expected = {"equal_steps": law(updates) - law(UPDATE * end["steps"]) - gains}
            for share, part in {"full": 1.0, "shared": 0.1, "free": 0.0}.items():
                # BASELINE's law is linear in the logarithm of FLOPs, so that interpolation has no error
                expected[share] = law(updates) - law(own + part * helper) - gains
            for name, values in expected.items():
                apart = (end["equal_steps"] if name == "equal_steps" else end["equal_flops"][name])["bits_per_byte"]
                np.testing.assert_allclose(apart["seeds"], values, atol=1e-9)
                assert apart["mean"] == pytest.approx(values.mean(), abs=1e-9)
                low, high = apart["interval"]
                assert low <= apart["mean"] <= high and high - low <= 6 * np.ptp(gains) + 1e-9


def test_verdicts_follow(results):
    def verdicts(key, part="validation"):
        end = row_of(results, key, part)["ends"][-1]
        return [end["equal_flops"][share]["bits_per_byte"]["verdict"] for share in ("full", "shared", "free")]

    for part in ("validation", "test"):
        assert verdicts("salt", part) == ["better"] * 3
        assert verdicts("rkd", part) == ["worse"] * 3
    assert verdicts("grow") == ["not resolved"] * 3
    assert verdicts("unigram") == ["not resolved"] * 3
    assert verdicts("salt_ds_offline")[2] == "not resolved"
    assert verdicts("salt-40") == ["one seed"] * 3


def test_detectable_difference_is_of_baselines_seeds(results):
    deviation = 0.01  # of 0, 0.01, 0.02
    for end in row_of(results, "baseline")["ends"]:
        expected = (4.303 + 1.061) * deviation * math.sqrt(2 / 3)
        assert end["detectable"]["bits_per_byte"] == pytest.approx(expected)
        assert "equal_flops" not in end
    salt = row_of(results, "salt-40")["ends"][-1]["equal_steps"]["bits_per_byte"]
    assert salt["detectable"] == pytest.approx((4.303 + 1.061) * deviation * math.sqrt(2))


def test_cost_to_baselines_quality(results):
    salt = row_of(results, "salt")["to_quality"]
    steps, ends = 0, [end["steps"] for end in row_of(results, "salt")["ends"]]
    target = law(UPDATE * FULL)
    values = [law(cost("salt", n)) - np.mean(GAINS["salt"]) for n in ends]
    i = next(i for i, value in enumerate(values) if value <= target)
    for name, x in {"steps": ends, "flops_free": [cost("salt", n) for n in ends],
                    "flops_full": [cost("salt", n) + HELPER for n in ends],
                    "flops_shared": [cost("salt", n) + HELPER / 10 for n in ends]}.items():  # fmt: skip
        part = (values[i - 1] - target) / (values[i - 1] - values[i])
        reached = x[i - 1] * (x[i] / x[i - 1]) ** part
        assert i > 0 and salt[name]["where"] == "within"
        steps += 1
        assert salt[name]["mean"] == pytest.approx(reached / (FULL if name == "steps" else UPDATE * FULL))
    assert steps == 4 and "seconds" not in salt
    assert row_of(results, "rkd")["to_quality"]["steps"]["where"] == "never"


def test_against_baseline_of_twice_the_steps_and_against_the_pair(results):
    salt = row_of(results, "salt")["against_longest"]
    expected = law(cost("salt", FULL)) - np.array(GAINS["salt"]) - law(UPDATE * 2 * FULL)
    np.testing.assert_allclose(salt["seeds"], expected, atol=1e-9)
    pair = row_of(results, "grow_salt")["against_pair"]
    expected = law(cost("grow_salt", FULL)) - law(cost("grow", FULL)) + np.array(GAINS["grow"])
    np.testing.assert_allclose(pair["seeds"], expected, atol=1e-9)
    assert row_of(results, "salt-40")["against_pair"]["verdict"] == "one seed"
    assert "against_pair" not in row_of(results, "salt")


def test_epochs_tokens_and_models_are_counted(results):
    for row in results["validation"]["rows"]:
        for end in row["ends"]:
            assert end["epochs"] == 1 and end["read"] == pytest.approx(16 * end["steps"] / evidence_made.TRAIN_ROWS)
            assert end["tokens"] == pytest.approx(2000 * end["steps"])
    models = results["setting"]["updates"]["test"]
    assert models["models"] == 3 * (9 + 6 + 6)
    assert results["grid"] == [{"title": "baseline, peak 0.004, weight decay 0.1", "key": "grid-baseline",
                                "method": "baseline", "peak": 4e-3, "decay": 0.1,
                                "bits_per_byte": pytest.approx(law(UPDATE * FULL) - 0.02)}]  # fmt: skip


def test_a_methods_name_changes_no_figure(evidence, results, tmp_path):
    """All but BASELINE's, by which it is found; nothing else in the figures goes by what a method is called."""
    names = {"salt": "aaa", "rkd": "salt"}
    rows = [
        dataclasses.replace(
            row, key=names.get(row.key, row.key), title=f"T {row.title}", pair=names.get(row.pair, row.pair)
        )
        for row in evidence_made.rows(evidence)
        if not row.test and row.key in ("baseline", "cutter", "salt", "rkd")
    ]
    back = {new: old for old, new in names.items()}
    setting = evidence.planning.Setting(str(tmp_path), evidence_made.tier(evidence))
    jobs = evidence.planning.plan(setting, rows)
    evidence_made.write_corpus(tmp_path)
    evidence_made.write_all(evidence, jobs, lambda job: spread(_Job(back.get(job.key, job.key), job.seed)))
    renamed = evidence.collect.collect(setting, jobs, COMMAND)

    def figures(row):
        return {name: value for name, value in row.items() if name not in ("key", "title", "pair")}

    for old, new in (("salt", "aaa"), ("rkd", "salt"), ("baseline", "baseline")):
        assert figures(row_of(renamed, new)) == figures(row_of(results, old))

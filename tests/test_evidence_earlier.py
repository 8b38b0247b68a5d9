"""Pages of runs that were not all on one machine: rows of an earlier `results.json` beside those at hand."""

import json
from pathlib import Path

import evidence_made
import pytest

from slm_assist.errors import UserError

GAINS = {"salt": (0.10, 0.11, 0.12), "rkd": (-0.1, -0.11, -0.12)}
COMMAND = "python experiments/evidence/run.py --data x --collect --earlier e.json --page=p"


@pytest.fixture(scope="module")
def evidence():
    with evidence_made.scripts() as found:
        evidence_made.fewer_replicates(found)
        yield found


def gain(job):
    return GAINS.get(job.key, (0.0,) * 3)[job.seed % 100 % 3] + 0.01 * (job.seed % 3)


def collect(evidence, out, keys, before=None, of=gain, leave=lambda job: False, parts=("validation", "test")):
    """The results of a matrix of which only the runs of rows with these keys are there."""
    setting = evidence.planning.Setting(str(out), evidence_made.tier(evidence))
    jobs = evidence.planning.plan(setting, evidence_made.rows(evidence))
    evidence_made.write_corpus(out)
    there = [job for job in jobs if job.row and job.key in (*keys, "baseline", "cutter") and not leave(job)]
    there = [job for job in there if ("test" if job.row.test else "validation") in parts]
    evidence_made.write_all(evidence, there, of)
    if before is None:
        return evidence.collect.collect(setting, jobs, COMMAND)
    for job in there:  # other runs than the earlier ones
        note = Path(job.path) / "evidence.json"
        note.write_text(json.dumps(json.loads(note.read_text()) | {"seconds": 61.0}))
    kept = out / "earlier.json"
    kept.write_text(json.dumps(before))
    return evidence.collect.collect(setting, jobs, COMMAND, evidence.earlier.read(str(kept)))


def figures(results, part):
    """All of a part's rows but how their runs were made."""
    return [{name: value for name, value in row.items() if name != "runs"} for row in results[part]["rows"]]


def row_of(results, key, part="validation"):
    return next(row for row in results[part]["rows"] if row["key"] == key)


@pytest.fixture(scope="module")
def whole(evidence, tmp_path_factory):
    keys = [row.key for row in evidence_made.rows(evidence)]
    return collect(evidence, tmp_path_factory.mktemp("whole"), keys)


@pytest.fixture(scope="module")
def first(evidence, tmp_path_factory):
    return collect(evidence, tmp_path_factory.mktemp("first"), ("salt", "rkd", "unigram", "grid-baseline"))


def test_rows_of_two_machines_are_the_page_of_one(evidence, first, whole, tmp_path):
    keys = ("grow", "grow_salt", "salt_ds_offline", "salt-40", "salt")
    found = collect(evidence, tmp_path, keys, first, parts=("validation",))
    assert {row["key"] for row in first["validation"]["rows"]} < {row["key"] for row in whole["validation"]["rows"]}
    assert found.pop("again") == {"models": 3 * (9 + 6), "largest": 0.0}
    assert figures(found, "validation") == figures(whole, "validation") and found["test"] == whole["test"]
    same = whole.keys() - {"validation", "command"}
    assert {name: found[name] for name in same} == {name: whole[name] for name in same}
    assert not found["validation"]["missing"] and len(first["validation"]["missing"]) == 4


def test_what_was_trained_twice_is_compared_and_stays_as_it_was(evidence, first, tmp_path):
    def of(job):
        return gain(job) + 0.003 * (job.key == "baseline" and job.seed == 1 and job.steps == job.full)

    found = collect(evidence, tmp_path, (), first, of)
    assert found["again"] == {"models": 2 * 3 * 9, "largest": pytest.approx(0.003)}
    assert found["validation"]["rows"] == first["validation"]["rows"] and found["test"] == first["test"]
    page = evidence.page.markdown(found)
    assert "| trained twice | 54 models, " in page and "at most 0.003 |" in page
    assert "\n`python experiments/evidence/run.py --data x` with what the line says" in page


def test_a_row_gives_way_to_one_with_all_of_its_models_and_more(evidence, whole, tmp_path, capsys):
    before = collect(evidence, tmp_path / "before", ("salt", "rkd"), of=lambda job: 0.0,
                     leave=lambda job: job.key == "salt" and job.steps < job.full)  # fmt: skip
    assert len(row_of(before, "salt")["ends"]) == 1
    found = collect(evidence, tmp_path / "after", ("salt", "rkd"), before,
                    leave=lambda job: job.key == "rkd" and job.steps < job.full)  # fmt: skip
    salt = next(row for row in figures(found, "validation") if row["key"] == "salt")
    assert salt in figures(whole, "validation") and row_of(found, "rkd") == row_of(before, "rkd")
    assert "RKD, validation: left out" not in capsys.readouterr().out  # it has no model that the earlier row lacks


def test_the_test_part_is_whole_with_the_earlier_models(evidence, first, tmp_path, capsys):
    before = first | {"test": {"rows": [row for row in first["test"]["rows"] if row["key"] != "salt"], "missing": []}}
    found = collect(evidence, tmp_path / "all", ("salt",), before)
    assert [row["key"] for row in found["test"]["rows"]] == ["baseline", "salt", "rkd"]
    assert figures(found, "test") == figures(first, "test")
    lacking = collect(evidence, tmp_path / "some", ("salt",), before, leave=lambda job: job.seed == 101)
    assert [row["key"] for row in lacking["test"]["rows"]] == ["baseline", "rkd"]
    assert "the test part at hand is held back: 1 models that are claimed lack, as " in capsys.readouterr().out


def test_models_that_stay_out_are_told_and_the_same_runs_are_not_trained_twice(evidence, whole, tmp_path, capsys):
    before = collect(evidence, tmp_path / "before", ("salt",), leave=lambda job: job.key == "salt" and job.seed > 0)
    found = collect(evidence, tmp_path / "after", ("salt",), before,
                    leave=lambda job: job.key == "salt" and job.steps < job.full)  # fmt: skip
    assert row_of(found, "salt") == row_of(before, "salt") and row_of(before, "salt")["seeds"] == [0]
    assert "SALT, validation: left out with 2 models" in capsys.readouterr().out
    assert found["again"]["models"] == 3 * 9 + 1 and len(found["earlier"]) == 12
    same = found | {"again": "none"}
    evidence.earlier.join(same, found | {"fingerprint": "f"})
    assert same["again"] == "none" and same["earlier"] == "f"


def test_a_pair_of_an_earlier_page_is_judged_by_baselines_limit(evidence, tmp_path):
    before = collect(evidence, tmp_path / "before", ("grow", "grow_salt"))
    grown = row_of(before, "grow_salt")
    changed = grown | {"against_pair": grown["against_pair"] | {"detectable": 9.0, "verdict": "of another limit"}}
    rows = [changed if row["key"] == "grow_salt" else row for row in before["validation"]["rows"]]
    found = collect(evidence, tmp_path / "after", (), before | {"validation": {"rows": rows}})
    assert row_of(found, "grow_salt")["against_pair"] == grown["against_pair"]


def test_other_hardware_is_said(evidence, first, tmp_path):
    before = json.loads(json.dumps(first)) | {"setting": first["setting"] | {"hardware": "a loom"}}
    found = collect(evidence, tmp_path, (), before)
    assert found["setting"]["unlike"] == ["hardware"]
    assert "The runs are not alike in hardware." in evidence.page.markdown(found)


def test_fine_tuned_rows_and_seconds_stay_where_there_are_none(evidence, first, tmp_path):
    tuned = [{"key": "tuned-baseline", "title": "b", "seeds": [0]}]
    before = first | {"tuned": tuned, "seconds": {"plain": 0.1}}
    found = collect(evidence, tmp_path, (), before)
    assert found["tuned"] == tuned and found["seconds"] == {"plain": 0.1} and found["grid"] == first["grid"]


def test_results_of_another_measurement_are_refused(evidence, first, tmp_path):
    before = first | {"setting": first["setting"] | {"train_rows": "other"}}
    cut = {"setting": first["setting"] | {"held": first["setting"]["held"] | {"validation": {"documents": 1}}}}
    with pytest.raises(UserError, match="its text is split in another way"):
        collect(evidence, tmp_path / "held", (), first | cut)
    with pytest.raises(UserError, match=r"its train_rows \(other\) differs from that of the runs at hand \(t\)"):
        collect(evidence, tmp_path, (), before)


def test_new_rows_are_judged_by_no_fewer_of_baselines_models(evidence, first, tmp_path):
    with pytest.raises(UserError, match=r"has 9 of BASELINE's models .* --only=row=baseline,part=validation,ratio=2"):
        collect(evidence, tmp_path, ("grow",), first, leave=lambda job: job.key == "baseline" and job.seed == 2)


@pytest.mark.parametrize("text", [None, "{}", "[1", '{"validation": {"rows": []}}', "[]"])
def test_what_is_no_results_is_told(evidence, tmp_path, text):
    path = tmp_path / "results.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match="not a results.json that --collect has written"):
        evidence.earlier.read(str(path))


def test_earlier_results_are_for_a_page(evidence, tmp_path, capsys):
    (tmp_path / "results.json").write_text("{}")
    own = ["--data", "x", "--out", str(tmp_path), "--collect", f"--earlier={tmp_path}/results.json"]
    assert evidence.run.main(own) == 2 and "the page would take its place" in capsys.readouterr().err
    assert evidence.run.main(["--data", "x", "--out", str(tmp_path), "--earlier", "e.json"]) == 2
    assert "--earlier: it is for --collect" in capsys.readouterr().err

"""The plan of the measurement: all rows are treated alike but for what the matrix says, and time goes by rank."""

import dataclasses

import evidence_made
import numpy as np
import pytest

from slm_assist import config, optim
from slm_assist.config_rules import flatten
from slm_assist.errors import UserError

OUT = "/nowhere/out"
ENDS = {0.4, 0.5, 0.6, 0.7, 0.8, 1.0}
SET_BY_PLAN = ("name", "steps", "checkpoint.keep", "branch.run", "branch.step", "assist.steps", "select.steps",
               "represent.steps")  # fmt: skip
METHOD = ("assist.", "select.", "grow.", "represent.")  # what may tell a method of experiments/ from BASELINE


@pytest.fixture(scope="module")
def evidence():
    with evidence_made.scripts() as found:
        yield found


@pytest.fixture(scope="module", params=["cpu", "gpu", "gpu-100m"])
def tier(request, evidence):
    return evidence.tiers.TIERS[request.param]


@pytest.fixture(scope="module")
def setting(evidence, tier):
    return evidence.planning.Setting(OUT, tier, tuning="/nowhere/tuning")


@pytest.fixture(scope="module")
def jobs(evidence, setting):
    return evidence.planning.plan(setting)


@pytest.fixture(scope="module")
def students(jobs):
    """Training jobs of rows that are measured on the held-out text."""
    return [job for job in jobs if job.kind == "train" and job.row and job.row.group != "tuned"]


def trunks(students):
    return [job for job in students if not job.trunk]


def whole(value, number=0.5):
    """Overrides with a number for what an earlier job will have measured."""
    return {key: number if type(one).__name__ == "Number" else one for key, one in value.items()}


# All rows alike


def test_every_row_differs_from_baseline_only_in_what_it_is(evidence, students):
    base = {(job.ratio, job.seed): job for job in trunks(students) if job.key == "baseline"}
    plain = evidence.planning.read_file("baseline")
    compared = 0
    for job in trunks(students):
        other = base.get((job.ratio, job.seed))
        file = evidence.planning.read_file(job.file)
        own = {key for key in file.keys() | plain.keys() if file.get(key) != plain.get(key)} - {"name"}
        assert all(key.startswith(METHOD) for key in own), job.file
        if other is None:  # seeds on which choices are made have a grid, and no row to compare with
            assert job.row.group in ("grid", "buckets")
            continue
        may = {*job.row.overrides, *own, *SET_BY_PLAN}
        theirs, ours = plain | other.overrides, file | job.overrides
        assert {key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key)} <= may, job.path
        compared += 1
    assert compared > 100


def test_a_rows_own_keys_are_its_methods(evidence, tier):
    """Only rows that say so have other rates or rows than BASELINE's, and none another size, batch or order."""
    for row in evidence.matrix.rows(tier):
        rates = {key for key in row.overrides if key.startswith("optimizer.")}
        assert rates <= {"optimizer.peak_learning_rate", "optimizer.weight_decay"}
        if rates and row.group != "grid":
            assert row.group == "epochs" or (row.key.endswith("-own") and row.title.endswith("its own best rates"))
        looks = {"validation.every", "validation.rows"} if row.key == "schedule-auto" else set()
        assert all(key.startswith(METHOD) for key in set(row.overrides) - rates - looks), row.key


def test_what_is_tuned_is_tuned_for_all_by_one_grid(evidence, tier):
    grid = [row for row in evidence.matrix.rows(tier) if row.group == "grid"]
    pairs = {}
    for row in grid:
        keys = ("optimizer.peak_learning_rate", "optimizer.weight_decay")
        pairs.setdefault(row.pair, []).append(tuple(row.overrides[key] for key in keys))
    assert pairs.keys() == {"baseline", "salt", *evidence.matrix.WINS}
    assert all(found == pairs["baseline"] for found in pairs.values()) and len(set(pairs["baseline"])) >= 9
    assert (tier.peak, tier.weight_decay) in pairs["baseline"]
    assert set(tier.own_best.values()) <= set(pairs["baseline"])
    decays = {}
    for row in evidence.matrix.rows(tier):
        if row.group == "epochs":
            decays.setdefault(row.file, set()).add(row.overrides["optimizer.weight_decay"])
    assert decays["salt"] == decays["baseline"] and len(decays["salt"]) >= 3


def test_a_baseline_and_a_method_are_compared_at_the_same_ends(evidence, setting, students):
    found = {}
    for job in students:
        found.setdefault((job.ratio, job.key, job.seed), set()).add(job.steps)
    for (ratio, key, seed), steps in found.items():
        row = next(job.row for job in students if (job.ratio, job.key, job.seed) == (ratio, key, seed))
        full = evidence.planning.steps_of(setting, ratio)
        six = {round(part * full) for part in ENDS}
        if row.key.endswith("-own") or (row.key == "uniform" and row.test):
            assert steps == {full}
        elif row.group in ("main", "gifts", "controls", "helper's data", "confirmation"):
            assert steps >= six
            assert (steps == six) == (key != "baseline")
        else:
            assert steps in ({full}, {round(0.7 * full), full})
        if key != "baseline":
            assert (full in steps) and steps <= found.get((ratio, "baseline", seed), steps)


def test_stage_1_is_as_long_for_all_that_do_not_say_otherwise(evidence, setting, students):
    seen = set()
    for job in students:
        lengths = {job.overrides[key] for key in ("assist.steps", "select.steps", "represent.steps") if
                   key in job.overrides}  # fmt: skip
        full = evidence.planning.steps_of(setting, job.ratio)
        assert lengths <= {round(job.row.stage_1 * full)} and max(lengths, default=0) <= job.steps, job.path
        if job.row.group in ("main", "gifts", "controls", "helper's data", "confirmation"):
            assert job.row.stage_1 == 0.173 or job.file == "rkd"
            seen |= lengths
    assert seen == {round(0.173 * evidence.planning.steps_of(setting, ratio)) for ratio in setting.tier.ratios}


def test_help_that_ends_is_counted_in_updates_so_that_branches_have_what_their_trunk_had(evidence, students):
    """A length in parts of a run would be shorter in a branch, which is a shorter run."""
    for job in students:
        values = evidence.planning.read_file(job.file) | dict(job.overrides)
        for kind in ("assist", "represent"):
            if values.get(f"{kind}.schedule", "none") not in ("none", "constant"):
                assert 0 < job.overrides[f"{kind}.steps"] <= job.full
        if values.get("select.rows", "all") != "all" or values.get("select.token_share", 1) < 1:
            assert values.get("select.fraction") == 1.0 or 0 < job.overrides["select.steps"] <= job.full


def test_files_and_keys_exist(evidence, tier, jobs):
    known, tried = set(flatten(config.get_config())), set()
    for job in jobs:
        assert set(job.overrides) <= known, job.path
        if job.kind != "train":
            continue
        assert (evidence.planning.FILES / f"{job.file}.py").is_file()
        shape = (job.file, frozenset(job.overrides), bool(job.trunk))
        if shape not in tried and (tier.name == "cpu" or (job.row and job.row.group == "main")):  # as resolving is slow
            tried.add(shape)
            resolved, _ = config.resolve(str(evidence.planning.FILES / f"{job.file}.py"), whole(job.overrides))
            assert resolved.steps == job.steps and resolved.name == job.overrides["name"]
    assert len(tried) > (30 if tier.name == "cpu" else 4)


def test_each_job_stands_once_behind_what_it_needs(jobs):
    seen = set()
    for job in jobs:
        assert job.path not in seen
        assert set(job.needs) <= seen, job.path
        named = {value for value in whole(job.overrides).values() if isinstance(value, str) and value.startswith(OUT)}
        assert {value for value in named if "/corpus/" not in value} <= set(job.needs), job.path
        seen.add(job.path)


def test_what_a_row_is_compared_with_is_there(evidence, students):
    """For each of its seeds, at all of the steps; and the page's questions about pairs have theirs."""
    ends = {}
    for job in students:
        ends.setdefault((job.ratio, job.key, job.seed), set()).add(job.steps)
    pairs = {}
    for job in students:
        pairs[job.key] = job.row.pair
        if job.row.group not in ("grid", "buckets"):
            assert job.full in ends[job.ratio, job.row.pair, job.seed], job.path
    assert pairs["grow_salt"] == "grow" and pairs["random"] == "salt" and pairs["unseen"] == "salt_ds_offline"
    assert {row.pair for row in evidence.matrix._adaptive()} == {"salt"}
    assert not set(pairs.values()) - set(pairs)


def test_titles_tell_rows_apart(students):
    found = {}
    for job in students:
        assert found.setdefault((job.row.test, job.ratio, job.row.group, job.row.title), job.key) == job.key


# Seeds


def test_sets_of_seeds_share_none(students):
    tuning = {job.seed for job in students if job.row.group in ("grid", "buckets")}
    fresh = {job.seed for job in students if job.row.test}
    rest = {job.seed for job in students} - tuning - fresh
    assert tuning and fresh and rest
    assert not {job.seed for job in students if not job.row.test} & fresh
    assert not {job.seed for job in students if job.row.group not in ("grid", "buckets")} & tuning
    cutter = next(job for job in students if job.row.group == "buckets")
    assert [job.key for job in students if job.seed == cutter.seed] == ["cutter"]


def test_the_test_part_is_named_by_the_confirmation_only(students):
    for job in students:
        assert job.row.test == (job.row.group == "confirmation")
        assert "test" not in job.overrides["data.source"] + job.overrides["data.validation"]


def test_seeds_are_as_many_as_was_asked(evidence, jobs, students):
    seeds = {}
    for job in students:
        seeds.setdefault((job.row.test, job.ratio, job.key), set()).add(job.seed)
    for (test, ratio, key), found in seeds.items():
        group = next(job.row.group for job in students if (job.ratio, job.key) == (ratio, key))
        least = {"main": 5, "gifts": 3, "controls": 3}.get(group, 1)
        assert len(found) >= (5 if test else least)
    for job in jobs:
        assert f"seed-{job.seed}/" in job.path and f"ratio-{job.ratio}/" in job.path
        assert all(f"seed-{job.seed}/" in path for path in job.needs)
        if job.overrides:
            assert job.overrides["seed"] == job.overrides["data.order_seed"] == job.seed


# Branches


def test_a_branch_leaves_a_kept_checkpoint_where_its_own_decay_begins(evidence, students):
    by_path = {job.path: job for job in students}
    for job in students:
        if not job.trunk:
            assert job.first == 0
            continue
        trunk = by_path[job.trunk]
        first = job.overrides["branch.step"]
        assert job.first == first < job.steps < trunk.steps and first in trunk.overrides["checkpoint.keep"]
        differing = {key for key in job.overrides if job.overrides[key] != trunk.overrides.get(key)}
        assert differing == {"name", "steps", "checkpoint.keep", "branch.run", "branch.step"}


def test_nothing_of_a_branch_differs_from_its_trunk_before_it_leaves(evidence, students):
    by_path = {job.path: job for job in students}
    steps = np.arange(max(job.steps for job in students) + 1)  # of one length, so that all is compiled once

    def rates(job):
        keys = {name: job.overrides[f"optimizer.{name}"] for name in ("warmup_steps", "decay_fraction")}
        schedule = optim.learning_rate(job.overrides["optimizer.schedule"], peak=1.0, steps=job.steps, **keys)
        return np.asarray(schedule(steps))

    ends = {(job.steps, by_path[job.trunk].steps): job for job in students if job.trunk}
    assert len(ends) > 12
    for job in ends.values():
        ours, theirs = rates(job), rates(by_path[job.trunk])
        np.testing.assert_array_equal(ours[: job.first], theirs[: job.first])
        assert ours[job.first - 1] == 1.0 > ours[job.first + 1] and ours[job.steps] == pytest.approx(0.1)
        assert theirs[job.first + 1] == 1.0


def test_baseline_goes_on_until_it_has_cost_what_the_dearest_method_costs(evidence, setting):
    full = evidence.planning.steps_of(setting, setting.tier.ratios[0])
    rows = {row.key: row for row in evidence.matrix._main(1, setting.tier.ratios[0])}
    ends = evidence.planning.ends_of(setting, rows["baseline"], full)
    assert {round(1.5 * full), 2 * full} <= set(ends) and ends[-1] == 2 * full
    jobs = evidence.planning.of_row(setting, rows["rkd"], 0)
    helper, rkd = jobs[0], jobs[1]
    update = setting.sizes.tokens * setting.sizes.student
    assert rkd.steps == full
    assert helper.cost == pytest.approx(full * update * evidence.planning.relative(setting, "small"))
    longer = evidence.planning.longer(setting, full)
    assert longer in ends and -1e-6 <= longer - (full + helper.cost / update) < 1
    assert rkd.cost == pytest.approx(full * update * (1 + evidence.planning.relative(setting, "small") / 3))
    assert rkd.cost + helper.cost < 2 * full * update


def test_tokens_a_parameter(evidence, setting):
    assert max(setting.tier.ratios) >= 20 and len(setting.tier.ratios) >= 2
    for ratio in setting.tier.ratios:
        read = evidence.planning.steps_of(setting, ratio) * setting.sizes.tokens
        assert read == pytest.approx(ratio * setting.sizes.parameters, rel=5e-3)


# Time


def test_time_goes_by_rank_and_what_needs_a_dropped_job_is_dropped(evidence, setting):
    jobs = evidence.planning.plan(setting)[:60]
    seconds = [evidence.choosing.seconds_of(setting, job) for job in jobs]
    hours = sum(seconds[:25]) / 2 / 3600 + 1e-9
    kept, dropped = evidence.choosing.within(setting, jobs, hours, 2)
    assert kept == jobs[:25] and dropped == jobs[25:]
    assert evidence.choosing.within(setting, jobs, 0, 2) == (jobs, [])
    first = next(job for job in jobs if not job.row)  # a small LM of no cost, but too late
    late = [dataclasses.replace(job, cost=0.0) if job is not first else job for job in jobs]
    late = [job for job in late if job is not first and first.path in job.needs]
    free = dataclasses.replace(setting.tier, overhead=0.0)
    one = evidence.planning.Setting(OUT, free)
    dear = dataclasses.replace(first, cost=3600 * free.flops * 2)
    kept, dropped = evidence.choosing.within(one, [*late[:1], dear, *late], 1, 1)
    assert kept == late[:1] and dropped == [dear, *late]


def test_the_list_has_a_line_a_row_and_says_what_is_dropped(evidence, setting):
    jobs = evidence.planning.plan(setting)[:160]
    text = evidence.choosing.describe(setting, jobs[:120], jobs[120:], 2)
    *lines, there, gone = text.splitlines()
    ratio = setting.tier.ratios[0]
    assert [line.split()[2] for line in lines] == [f"{key}," for key in dict.fromkeys(
        job.key for job in jobs[:120] if job.row)]  # fmt: skip
    hours = [float(line.split()[0]) for line in lines]
    assert hours == sorted(hours)
    assert lines[0].endswith(f"{jobs[0].key}, ratio {ratio}, seeds 250: 1 runs, {jobs[0].steps:,} updates")
    salt = next(line for line in lines if " salt, " in line)
    runs = [job for job in jobs[:120] if job.key in ("salt", "helper-small") and job.seed < 100]
    updates = sum(job.steps - job.first for job in runs)
    assert "seeds 0, 1, 2, 3, 4: " in salt and salt.endswith(f"{updates:,} updates")
    assert there.startswith("120 jobs, about ")
    for job in jobs[120:]:
        assert f"{job.key}, ratio {job.ratio}" in gone
    hours = sum(evidence.choosing.seconds_of(setting, job) for job in jobs) / 2 / 3600
    assert f"dropped, 40 jobs (all would take {hours:.1f} hours)" in gone
    assert "dropped" not in evidence.choosing.describe(setting, jobs, [], 1)


def test_only_brings_what_it_needs(evidence, jobs):
    only = evidence.choosing.only
    chosen = only(jobs, "row=same_share")
    assert {job.kind for job in chosen} == {"train", "list", "score"}
    beside = {"baseline", "cutter", "salt_ds_offline"}  # without which there is no page
    assert {job.key for job in chosen} == beside | {"same_share", "helper-small", "scores", "top", "share"}
    assert len(chosen) == 3 * (1 + 3 + 6 + 6 + 9) + 1
    assert [job for job in jobs if job in chosen] == chosen
    assert {job.row.group for job in only(jobs, "group=grid") if job.row} == {"grid", "buckets"}
    cutter = next(job for job in jobs if job.key == "cutter")
    assert {job.seed for job in only(jobs, "seed=101")} == {101, cutter.seed}
    few = only(jobs, f"row=salt,part=validation,seed=1,ratio={jobs[0].ratio}")
    assert {(job.key, job.seed) for job in few if job != cutter} == {("salt", 1), ("helper-small", 1), ("baseline", 1)}
    assert not any(job.row and job.row.test for job in few)
    assert {job.ratio for job in only(jobs, f"ratio={jobs[0].ratio}")} == {jobs[0].ratio}
    two = only(jobs, "row=salt|rkd,part=validation,seed=1")
    assert {job.key for job in two} == {"salt", "rkd", "baseline", "helper-small", "cutter"}
    tuned = only(jobs, "row=tuned-salt")
    assert {job.key for job in tuned} == {"tuned-salt", "tuned-baseline", "salt", "baseline", "helper-small", "cutter"}
    for words in ("seed=7777", "seed", "sed=1", "row=salty", "row=salt,seed=100,part=validation", "row=salt seed=1"):
        with pytest.raises(UserError, match=f"--only={words}") as error:
            only(jobs, words)
        assert "\n" not in str(error.value)


def test_keys_that_the_plan_sets_are_refused(evidence, setting, tier, monkeypatch):
    monkeypatch.setattr(evidence.planning, "_sizes", lambda _: setting.sizes)  # which do not matter here

    def given(**keys):
        found = {key.replace("__", "."): value for key, value in keys.items()}
        return evidence.planning.Setting(OUT, tier, found)

    for key in ("seed", "data__source", "data__order_seed", "optimizer__schedule", "optimizer__peak_learning_rate",
                "steps", "name", "checkpoint__keep", "checkpoint__every", "branch__run", "branch__step",
                "assist__steps", "assist__teacher", "select__rows", "grow__helper", "represent__steps",
                "model__size"):  # fmt: skip
        with pytest.raises(UserError, match=f"--{key.replace('__', '.')}: the plan sets it"):
            evidence.planning.check(given(**{key: "1"}))
    evidence.planning.check(given(batch_rows="8", data__cache_dir="/c", compute__cache_dir="/c", optimizer__b2="0.9"))


def test_given_keys_are_in_all_runs(evidence, setting):
    one = dataclasses.replace(setting, given={"batch_rows": "8", "optimizer.b2": "0.9"})
    jobs = evidence.planning.plan(one)
    for job in jobs:
        if job.overrides:
            assert (job.overrides["batch_rows"], job.overrides["optimizer.b2"]) == ("8", "0.9")
    half = evidence.planning.steps_of(one, 20) / evidence.planning.steps_of(setting, 20)
    rows = evidence.tiers.TIERS[setting.tier.name].shared["batch_rows"]
    assert half == pytest.approx(rows / 8, rel=5e-3)

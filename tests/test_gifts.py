"""The gifts of a small LM in runs: by themselves, together, killed and gone on with, and as branches of a trunk."""

import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny import assert_same_run, final, records, run

from slm_assist import config as config_lib
from slm_assist import config_rules
from slm_assist.assist import representations
from slm_assist.assist.stages import stages
from slm_assist.errors import UserError

STUDENT = {
    "model__num_layers": 2, "model__d_model": 48, "model__d_ff": 80, "model__num_heads": 4, "model__num_kv_heads": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A directory with a small LM."""
    home = tmp_path_factory.mktemp("gifts")
    run(home, "small_lm", optimizer__peak_learning_rate=8e-3)
    return home


def gifts(home: Path, *names: str) -> dict:
    small = str(home / "small_lm")
    keys = {
        "labels": {"assist__schedule": "step", "assist__teacher": small, "assist__steps": 4},
        "data": {
            "select__rows": "online", "select__scorer": small, "select__scorer_step": 12, "select__steps": 5,
            "select__k": 200, "select__sample": 0,
        },
        "representations": {"represent__schedule": "linear", "represent__helper": small, "represent__steps": 7},
        "weights": {"grow__helper": small},
    }  # fmt: skip
    return STUDENT | {key: value for name in names for key, value in keys[name].items()}


def stage_names(made) -> list[tuple[str, int, int]]:
    summary = json.loads(made.summary.read_text())
    return [(stage["name"], stage["start"], stage["stop"]) for stage in summary["stages"]]


def test_all_gifts_in_one_run_killed_at_every_kind_of_stage(home):
    everything = gifts(home, "labels", "data", "representations", "weights")
    messages = []
    straight = run(home, "all", messages=messages, killed=(3, 8), **everything)
    assert stage_names(straight) == [
        ("assisted_aligned_selecting", 0, 4), ("aligned_selecting", 4, 5), ("aligned", 5, 7), ("plain", 7, 12),
    ]  # fmt: skip
    assert any("grown from" in line and "its logits are the small LM's" in line for line in messages)
    facts = straight.read(straight.config)["facts"]["helpers"]
    assert set(facts) == {"teacher", "scorer", "guide", "parent"} and facts["parent"]["step"] == 12
    first, *others = (line for line in records(straight) if line["kind"] == "train")
    assert first["distillation_kl"] < 1e-5, "the student begins as its teacher"
    strengths = [line.get("align_weight") for line in (first, *others)]
    np.testing.assert_allclose(strengths[:7], 0.1 * np.arange(7, 0, -1) / 7, rtol=1e-6)
    assert strengths[7:] == [None] * 5
    for step in (3, 8):
        killed = home / f"all-killed-{step}"
        assert_same_run(run(home, killed.name, **everything), straight)


@pytest.mark.slow
def test_all_gifts_on_eight_devices(home):
    """The same small LM is split for growing, whole for helping; rows and losses are those of one device."""
    everything = gifts(home, "labels", "data", "representations", "weights")
    one = records(run(home, "all", **everything))
    mesh = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
    eight = records(run(home, "eight", **everything, **mesh))
    for ours, theirs in zip(eight[:4], one[:4], strict=True):
        assert ours["rows"] == theirs["rows"]
        for name in ("loss", "cosine", "distillation_kl", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name
    assert eight[-1]["log_perplexity"] == pytest.approx(one[-1]["log_perplexity"], abs=2e-3)


def test_a_run_goes_on_without_the_small_lms_that_have_left(home, tmp_path):
    keys = gifts(home, "labels", "representations", "weights")
    straight = run(home, "left", killed=(9,), **keys)
    shutil.move(home / "small_lm", tmp_path / "elsewhere")
    try:
        gone_on = run(home, "left-killed-9", **keys)
    finally:
        shutil.move(tmp_path / "elsewhere", home / "small_lm")
    assert_same_run(gone_on, straight)


@pytest.mark.slow
def test_a_gift_that_is_off_leaves_no_trace(home):
    """Neither in the state nor in the records; and a run with all of them off is the plain one."""
    plain, grown = run(home, "plain", **STUDENT), run(home, "grown", **gifts(home, "weights"))
    assert set(records(plain)[0]) == set(records(grown)[0])
    assert [x.shape for x in final(plain)] == [x.shape for x in final(grown)]
    aligned = run(home, "aligned", **gifts(home, "representations"))
    assert {"cosine", "align_weight"} == set(records(aligned)[0]) - set(records(plain)[0])
    kernel = (48, 32)
    assert [x.shape for x in final(aligned)].count(kernel) == 3 > [x.shape for x in final(plain)].count(kernel)
    cut = run(home, "cut", represent__map="truncate", **gifts(home, "representations"))
    assert [x.shape for x in final(cut)] == [x.shape for x in final(plain)]


def test_growth_begins_where_the_small_lm_is(home):
    small = records(run(home, "small_lm", optimizer__peak_learning_rate=8e-3))
    last = [line["log_perplexity"] for line in small if line["kind"] == "validation"][-1]
    grown = run(home, "begin", grow__warmup_steps=11, optimizer__peak_learning_rate=1e-7, **gifts(home, "weights"))
    lines = records(grown)
    assert [line for line in lines if line["kind"] == "validation"][0]["log_perplexity"] == pytest.approx(
        last, abs=1e-4
    )
    rates = [line["learning_rate"] for line in lines if line["kind"] == "train"]
    np.testing.assert_allclose(rates[:11], 1e-7 * np.arange(1, 12) / 12, rtol=1e-5)
    messages = []
    run(home, "stacked", messages=messages, grow__depth="stack", steps=2, optimizer__warmup_steps=1,
        **gifts(home, "weights"))  # fmt: skip
    assert any("its logits are not the small LM's" in line for line in messages)


TRUNK = {"optimizer__schedule": "wsd", "optimizer__decay_fraction": 0.25, "checkpoint__keep": "6"}


def test_a_branch_is_the_run_that_would_have_decayed_there(home):
    keys = gifts(home, "labels", "representations", "weights") | TRUNK
    trunk = run(home, "trunk", **keys)
    straight = run(home, "shorter", steps=8, **keys)
    branch = {"steps": 8, "branch__run": str(trunk), "branch__step": 6}
    messages = []
    branched = run(home, "branch", messages=messages, killed=(7,), **keys, **branch)
    assert f"branches off from {trunk} at step 6" in messages
    for x, y in zip(final(branched), final(straight), strict=True):
        np.testing.assert_array_equal(x, y)
    assert records(branched) == [line for line in records(straight) if line["step"] > 6]
    assert_same_run(run(home, "branch-killed-7", **keys, **branch), branched)
    facts = [made.read(made.config)["facts"]["helpers"] for made in (branched, straight)]
    assert set(facts[0]) == {"teacher", "guide", "parent"} and facts[0] == facts[1]


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"branch__step": 5}, "step 5 was not kept; there are 6, 9, 12"),
        ({"assist__steps": 3}, "assist.steps: 4 -> 3"),
        ({"select__pool_factor": 2}, "select.pool_factor: 5 -> 2"),
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"optimizer__name": "muon"}, "optimizer.name: 'adamw' -> 'muon'"),
        ({"branch__step": 9}, "its checkpoint 9 leaves nothing of steps=8"),
        ({"branch__run": "nowhere"}, "branch.run=nowhere: no run was started there"),
        ({"represent__map": "truncate"}, "represent.map: 'projection' -> 'truncate'"),
    ],
)
def test_what_cannot_branch_says_why(home, changed, words):
    keys = gifts(home, "labels", "representations", "weights") | TRUNK
    trunk = run(home, "trunk", **keys)
    with pytest.raises(UserError, match=words) as caught:
        run(home, "bad", **keys | {"steps": 8, "branch__run": str(trunk), "branch__step": 6} | changed)
    assert "\n" not in str(caught.value)
    assert not (home / "bad").exists() or not (home / "bad" / "config.json").exists()


def test_a_branch_has_had_what_its_trunk_had(home):
    """Shares of the steps are others in it; and a learning rate that jumps is said."""
    keys = gifts(home, "labels") | {"assist__steps": 0, "assist__fraction": 0.34, "checkpoint__keep": "6"}
    run(home, "shares", **keys)
    branch = {"branch__run": str(home / "shares"), "branch__step": 6, "steps": 8}
    with pytest.raises(UserError, match="up to step 6 it was assisted to 4, plain to 6, and .* assisted to 3"):
        run(home, "bad", **keys, **branch)
    messages = []
    run(home, "jump", messages=messages, **keys, **branch | {"steps": 12, "optimizer__schedule": "wsd"})
    assert any("the learning rate changes where it branches, from " in line for line in messages)


def test_another_parent_is_refused_before_the_first_checkpoint(home, tmp_path):
    keys = gifts(home, "weights") | {"checkpoint__every": 0}
    run(home, "orphan", killed=(1,), **keys)
    shutil.copytree(home / "small_lm", tmp_path / "kept")
    try:
        shutil.rmtree(home / "small_lm")
        run(home, "small_lm", seed=5)
        with pytest.raises(UserError, match="grow.helper=.*small_lm: not what .* began with"):
            run(home, "orphan-killed-1", **keys)
    finally:
        shutil.rmtree(home / "small_lm")
        shutil.copytree(tmp_path / "kept", home / "small_lm")


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"represent.schedule": "linear", "represent.helper": "x", "represent.fraction": 0.0}, "leaves no update"),
        ({"represent.helper": "x"}, "represent.schedule=none and represent.helper='x'"),
        ({"represent.schedule": "linear"}, "represent.schedule=linear and represent.helper=''"),
        ({"represent.schedule": "ratio", "represent.helper": "x"}, "represent.schedule='ratio': choose one of"),
        ({"represent.map": "pad"}, "represent.map='pad': choose one of projection, truncate"),
        ({"represent.schedule": "step", "represent.helper": "x", "represent.steps": 2000}, "is beyond the run's steps"),
        ({"grow.depth": "deep"}, "grow.depth='deep'"),
        ({"grow.noise": -1}, "grow.noise=-1.0: must be"),
        ({"grow.warmup_steps": 5}, "grow.warmup_steps=5 needs grow.helper"),
        ({"grow.warmup_steps": 1000, "grow.helper": "x"}, "grow.warmup_steps=1000 leaves nothing"),
        ({"branch.step": 5}, "branch.step=5 needs branch.run"),
        ({"branch.run": "x", "data.stream": True, "data.source": "seqio:x"}, "a stream's place"),
    ],
)
def test_configs_that_make_no_sense(keys, words):
    with pytest.raises(UserError, match=re.escape(words)):
        config_lib.resolve("", keys)


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"represent__student_layer": 2}, "represent.student_layer=2: the student has the layers 0 to 1"),
        ({"represent__helper_layer": 1}, "represent.helper_layer=1: the small LM has the layers 0 to 0"),
        ({"represent__helper": "nowhere"}, "represent.helper=nowhere: there is no such directory"),
        ({"grow__helper": "nowhere"}, "grow.helper=nowhere: there is no such directory"),
        ({"model__d_model": 16}, "model.d_model=16 is below grow.helper's 32"),
        ({"model__head_dim": 8}, "head_dim"),
        ({"grow__helper_step": 5}, "step 5 was not kept"),
    ],
)
def test_what_does_not_fit_shows_before_anything_is_made(home, keys, words):
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        run(home, "unfit", **gifts(home, "representations", "weights") | keys)
    assert "\n" not in str(caught.value) and not (home / "unfit").exists()


def test_every_order_of_ends_compiles_what_will_come():
    """`auto` may end soft labels anywhere: the kinds of stages that follow were all foreseen."""
    steps = 12
    for cap, selecting, aligned in itertools.product((1, 4, 9, 12), (0, 3, 9, 12), (0, 5, 12)):
        ends = {end: stages(steps, assisted=end, selecting=selecting, aligned=aligned) for end in range(1, cap + 1)}
        foreseen = {stage.name for end in (1, cap) for stage in ends[end]}
        assert {stage.name for plan in ends.values() for stage in plan} <= foreseen


def test_the_plan_of_gifts():
    config, _ = config_lib.resolve("", {"represent.schedule": "linear", "represent.helper": "x", "steps": 100})
    assert [(stage.name, stage.stop) for stage in config_rules.plan(config)] == [("aligned", 17), ("plain", 100)]
    config.represent.schedule = "constant"
    assert [stage.name for stage in config_rules.plan(config)] == ["aligned"]
    assert representations.MAPS == ("projection", "truncate")

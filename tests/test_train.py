"""The loop: it learns, resumes bit for bit, drops the helper, and says in one line what is wrong."""

import fcntl
import gc
import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny

from slm_assist.assist import helpers as helpers_lib
from slm_assist.data.loader import Prefetcher
from slm_assist.errors import UserError
from slm_assist.train import Stopped

SALT = {"assist__schedule": "step", "assist__steps": 6}


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    """A directory with a trained small LM in it."""
    directory = tmp_path_factory.mktemp("runs")
    tiny.run(directory, "small_lm", checkpoint__keep=(4,), model__d_model=16)
    return directory


@pytest.fixture(scope="module")
def salt(tmp):
    return tiny.run(tmp, "salt", killed=(3, 5, 7, 11), assist__teacher=str(tmp / "small_lm"), **SALT)


class Killed(Exception):
    pass


def interrupt_at(monkeypatch, step, action):
    """Does `action` when the loop asks for the batch of `step`."""
    batch_at = Prefetcher.batch_at

    def interrupted(self, n):
        if n == step:
            action()
        return batch_at(self, n)

    monkeypatch.setattr(Prefetcher, "batch_at", interrupted)


def kill():
    raise Killed


@pytest.mark.parametrize("step", [2, 3, 5, 6, 7, 11])
def test_killed_and_resumed_equals_straight(tmp, salt, monkeypatch, step):
    name, teacher = f"salt-killed-{step}", str(tmp / "small_lm")
    if step in (2, 6):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            interrupt_at(patch, step, kill)
            tiny.run(tmp, name, assist__teacher=teacher, **SALT)
    resumed = tiny.run(tmp, name, assist__teacher=teacher, **SALT)
    tiny.assert_same_run(salt, resumed)


def test_identical_seeds_identical_runs_and_other_seeds_differ(tmp, salt):
    again = tiny.run(tmp, "again", assist__teacher=str(tmp / "small_lm"), **SALT)
    tiny.assert_same_run(salt, again)
    other = tiny.run(tmp, "other", assist__teacher=str(tmp / "small_lm"), seed=1, **SALT)
    assert tiny.records(other)[0]["loss"] != tiny.records(salt)[0]["loss"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_leaves(tmp, salt, monkeypatch, number):
    name, teacher = f"signal-{number}", str(tmp / "small_lm")
    with monkeypatch.context() as patch, pytest.raises(Stopped) as stop:
        interrupt_at(patch, 4, lambda: os.kill(os.getpid(), number))
        tiny.run(tmp, name, assist__teacher=teacher, **SALT)
    assert stop.value.signal == number and stop.value.step == 5
    assert (tmp / name / "checkpoints" / "5").is_dir()
    tiny.assert_same_run(salt, tiny.run(tmp, name, assist__teacher=teacher, **SALT))


def test_stages_and_metrics(tmp, salt):
    lines = tiny.records(salt)
    train = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in train] == list(range(1, 13))
    assert [line["stage"] for line in train] == ["assisted"] * 6 + ["plain"] * 6
    assert all("distillation_kl" in line for line in train[:6])
    assert not any("teacher" in key or "assist" in key for line in train[6:] for key in line)
    assert train[0]["assist_weight"] == pytest.approx(0.667)
    first = train[0]
    assert first["cross_entropy"] == pytest.approx(np.log(384), rel=0.05)
    mixture = first["distillation_kl"]
    assert mixture > 0
    assert train[-1]["cross_entropy"] < first["cross_entropy"] - 0.15
    checks = [line for line in lines if line["kind"] == "validation"]
    assert [line["step"] for line in checks] == [5, 10, 12]
    assert set(checks[0]["domains"]) == {"json", "email"}
    assert sum(domain["tokens"] for domain in checks[0]["domains"].values()) == checks[0]["tokens"]


def test_teacher_is_gone_after_stage_1_and_resume_does_not_need_it(tmp, salt, monkeypatch):
    shutil.copytree(tmp / "small_lm", tmp / "leaving")
    alive = {}
    load = helpers_lib.Helper.load

    def live_embeddings():  # the student is 32 wide, the teacher 16
        gc.collect()
        return sum(x.shape == (384, 16) for x in jax.live_arrays())

    before = live_embeddings()

    def remember(self, *args, **options):
        helper, alive["params"] = load(self, *args, **options)
        return helper, alive["params"]

    def look():
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(alive.pop("params")))
        assert live_embeddings() == before, "the teacher's embedding is still on the device"
        shutil.rmtree(tmp / "leaving")
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(helpers_lib.Helper, "load", remember)
        interrupt_at(patch, 8, look)
        tiny.run(tmp, "gone", assist__teacher=str(tmp / "leaving"), **SALT)
    resumed = tiny.run(tmp, "gone", assist__teacher=str(tmp / "leaving"), **SALT)
    assert tiny.records(resumed)[-1] == tiny.records(salt)[-1]


def test_plain_step_takes_no_helper(tmp, monkeypatch):
    seen = {}
    lower = jax.stages.Lowered.compile

    def spy(self, *args, **options):
        seen[len(seen)] = jax.tree.leaves(self.args_info)
        return lower(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(jax.stages.Lowered, "compile", spy)
        tiny.run(tmp, "inputs", assist__teacher=str(tmp / "small_lm"), steps=3, assist__schedule="step",
                 assist__steps=1, validation__every=0, checkpoint__every=0)  # fmt: skip
    widths = [sorted({info.shape for info in infos if len(info.shape) == 2}) for infos in seen.values()]
    with_teacher = [shapes for shapes in widths if (384, 16) in shapes]
    assert len(with_teacher) == 1 and len(widths) >= 3, "only the assisted step has the teacher's embedding"


def test_teacher_step_is_fixed_when_the_run_starts(tmp, monkeypatch):
    with pytest.raises(UserError, match=r"step 5 was not kept; there are .*4.*12"):
        tiny.run(tmp, "nostep", assist__teacher=str(tmp / "small_lm"), assist__teacher_step=5, **SALT)
    assert not (tmp / "nostep").exists()
    early = tiny.run(tmp, "early", assist__teacher=str(tmp / "small_lm"), assist__teacher_step=4, **SALT)
    assert json.loads(early.config.read_text())["facts"]["helpers"]["teacher"]["step"] == 4


def test_half_written_teacher_falls_back_to_the_newest_whole_one(tmp):
    shutil.copytree(tmp / "small_lm", tmp / "half")
    (tmp / "half" / "checkpoints" / "12" / "_CHECKPOINT_METADATA").unlink()
    messages: list[str] = []
    run = tiny.run(tmp, "of-half", messages=messages, assist__teacher=str(tmp / "half"), **SALT)
    step = json.loads(run.config.read_text())["facts"]["helpers"]["teacher"]["step"]
    assert step == 9 and any("checkpoint 12 is not whole; using 9" in message for message in messages)
    for file in (tmp / "half" / "checkpoints" / "9" / "params").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    run = tiny.run(tmp, "of-damaged", assist__teacher=str(tmp / "half"), **SALT)
    assert json.loads(run.config.read_text())["facts"]["helpers"]["teacher"]["step"] == 4


def test_damaged_newest_checkpoint_goes_on_from_the_one_before(tmp, salt):
    shutil.copytree(salt.path, tmp / "damaged")
    damaged = tiny.RunDir(tmp / "damaged")
    damaged.summary.unlink()
    for file in (damaged.checkpoints / "12" / "params").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    messages: list[str] = []
    resumed = tiny.run(tmp, "damaged", messages=messages, assist__teacher=str(tmp / "small_lm"), **SALT)
    assert any("checkpoint 12 cannot be restored" in message and "from checkpoint 9" in message for message in messages)
    tiny.assert_same_run(salt, resumed)


def test_finished_run_is_left_alone_and_fresh_starts_beside(tmp, salt):
    before = salt.metrics.read_bytes()
    messages: list[str] = []
    tiny.run(tmp, "salt", messages=messages, assist__teacher=str(tmp / "small_lm"), **SALT)
    assert salt.metrics.read_bytes() == before and "finished before" in messages[0]
    assert salt.beside().path == tmp / "salt-2"


def test_goes_on_with_another_mesh(tmp, salt, monkeypatch):
    teacher = str(tmp / "small_lm")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        interrupt_at(patch, 4, kill)
        tiny.run(tmp, "mesh", assist__teacher=teacher, **SALT)
    sharded = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
    resumed = tiny.run(tmp, "mesh", assist__teacher=teacher, **sharded, **SALT)
    for one, eight in zip(tiny.records(salt), tiny.records(resumed), strict=True):
        for key in ("loss", "log_perplexity"):
            if key in one:
                assert eight[key] == pytest.approx(one[key], rel=1e-3)


def test_tensorboard_has_the_same_numbers(tmp):
    run = tiny.run(tmp, "events", steps=3, optimizer__warmup_steps=1, log__tensorboard=True)
    events = b"".join(file.read_bytes() for file in run.tensorboard.iterdir())
    for name in (b"train/loss", b"train/accuracy", b"validation/log_perplexity", b"validation/domains/json/accuracy"):
        assert name in events


def test_a_span_of_updates_is_traced_and_what_the_run_waited_for_is_said(tmp):
    messages: list[str] = []
    run = tiny.run(tmp, "traced", messages=messages, steps=5, optimizer__warmup_steps=1, log__profile="2,3",
                   validation__every=0, checkpoint__every=0)  # fmt: skip
    assert list(run.profile.rglob("*.xplane.pb")) and any("traced updates up to 3" in line for line in messages)
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    waits = [line["input_wait_seconds"] for line in lines if line["kind"] == "train"]
    summary = json.loads(run.summary.read_text())
    assert len(waits) == 5 and min(waits) >= 0
    assert summary["input_wait_share"] == pytest.approx(sum(waits) / lines[-1]["train_seconds"])
    seconds = summary["seconds"]
    assert summary["compile_seconds"] == seconds["compile"] < summary["start_to_first_step_seconds"]
    for span in ("2", "3,2", "0,2", "2,6", "1,2,3"):
        with pytest.raises(UserError, match=f"log.profile={span}: give the first and the last update"):
            tiny.run(tmp, "bad", steps=5, optimizer__warmup_steps=1, log__profile=span)
    assert not (tmp / "bad").exists()


def test_resume_with_other_settings_names_the_keys(tmp, salt):
    with pytest.raises(UserError, match=r"optimizer.peak_learning_rate: 0.002 -> 0.1.*--fresh"):
        tiny.run(tmp, "salt", assist__teacher=str(tmp / "small_lm"), optimizer__peak_learning_rate=0.1, **SALT)
    with pytest.raises(UserError, match=r"model.num_layers: 1 -> 4"):
        tiny.run(tmp, "salt", assist__teacher=str(tmp / "small_lm"), model__num_layers=4, **SALT)


def test_a_second_process_is_kept_out(tmp):
    (tmp / "locked").mkdir()
    with open(tmp / "locked" / "LOCK", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is training in this directory"):
            tiny.run(tmp, "locked")


def test_vocabularies_must_be_the_same_piece_by_piece(tmp):
    tiny.run(tmp, "other-words", data__vocab_size=400, steps=3, optimizer__warmup_steps=1)
    with pytest.raises(UserError, match="its vocabulary is not the student's"):
        tiny.run(tmp, "mixed", assist__teacher=str(tmp / "small_lm"),
                 data__vocabulary=str(tmp / "other-words"), **SALT)  # fmt: skip
    assert not (tmp / "mixed").exists()


def test_nan_stops_and_keeps_the_last_good_checkpoint(tmp, monkeypatch):
    with pytest.raises(UserError, match=r"step \d+: .* is (nan|inf)"):
        tiny.run(tmp, "nan", optimizer__peak_learning_rate=1e6, optimizer__clip_norm=0.0, steps=40,
                 checkpoint__every=1)  # fmt: skip
    kept = [int(path.name) for path in (tmp / "nan" / "checkpoints").iterdir() if path.name.isdecimal()]
    last = tiny.records(tiny.RunDir(tmp / "nan"))[-1]
    assert kept and max(kept) <= last["step"]
    assert all(np.isfinite(leaf).all() for leaf in tiny.final(tiny.RunDir(tmp / "nan")))


def test_buckets_are_cut_once_and_cover_the_rows(tmp):
    run = tiny.run(tmp, "buckets", validation__buckets=str(tmp / "small_lm"))
    line = tiny.records(run)[-1]
    buckets = line["buckets"]
    assert buckets["easy"]["log_perplexity"] < buckets["hard"]["log_perplexity"]
    assert sum(bucket["tokens"] for bucket in buckets.values()) == line["tokens"]
    messages: list[str] = []
    tiny.run(tmp, "buckets-2", messages=messages, validation__buckets=str(tmp / "small_lm"))
    assert not any("cut" in message for message in messages)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"mesh__data": 3}, "not divisible by the 3 parts"),
        ({"mesh__data": 4, "mesh__tensor": 4}, "needs 16 devices and there are 8"),
        ({"assist__schedule": "step", "assist__steps": 13, "assist__teacher": "x"}, "beyond the run's steps=12"),
        ({"assist__schedule": "step"}, "needs assist.teacher"),
        ({"assist__schedule": "step", "assist__teacher": "/nowhere"}, "there is no such directory"),
        ({"microbatches": 3}, "not divisible by microbatches"),
        ({"model__size": "laptop-smal"}, "did you mean laptop-small"),
        ({"data__source": "text:/nowhere/*.txt"}, "/nowhere"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp, keys, message):
    with pytest.raises(UserError, match=message) as error:
        tiny.run(tmp, "bad", **keys)
    assert "\n" not in str(error.value)
    assert not (tmp / "bad").exists()


def test_the_core_does_without_tensorflow(tmp):
    code = (
        "import pathlib, sys, tiny; "
        f"tiny.run(pathlib.Path({str(tmp)!r}), 'core', steps=3); "
        "assert 'tensorflow' not in sys.modules and 'torch' not in sys.modules"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(["tests", *sys.path])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=300)

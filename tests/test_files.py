"""Metrics files, run directories, locks, checkpoints on a full disk, FLOPs, and the command line."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny

from slm_assist import checkpoint, cli, flops, metrics
from slm_assist.errors import UserError
from slm_assist.models import Transformer
from slm_assist.models.sizes import named
from slm_assist.run_dir import RunDir


def test_metrics_file_is_cut_back_to_its_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = metrics.MetricsFile(path)
    file.write({"step": 1})
    offset = file.sync()
    file.write({"step": 2})
    file.close()
    again = metrics.MetricsFile(path, offset)
    again.write({"step": 2, "again": True})
    again.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1}, {"step": 2, "again": True}]
    with pytest.raises(UserError, match="shorter than its checkpoint says"):
        metrics.MetricsFile(path, 10_000)


def test_means_weigh_and_nothing_counts_as_nothing():
    pairs = {"a": (np.float32(6), np.float32(4)), "b": (np.float32(0), np.float32(0))}
    assert metrics.means(pairs) == {"a": 1.5, "b": 0.0}
    assert not metrics.all_finite({"a": 1.0, "b": float("nan")})


def test_json_is_written_whole_or_not_at_all(tmp_path):
    metrics.write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(ValueError):
        metrics.write_json(tmp_path / "x.json", {"a": float("nan")})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}


def test_lock_keeps_others_out_and_leaves_nothing(tmp_path):
    run = RunDir(tmp_path / "run")
    with run.lock(), pytest.raises(UserError, match="another process"), run.lock():
        pass
    assert not run.path.exists()
    with run.lock():
        (run.path / "something").touch()
    with run.lock():
        assert (run.path / "something").exists()


def test_beside_finds_the_next_free_name(tmp_path):
    run = RunDir(tmp_path / "run")
    assert run.beside().path == run.path
    run.path.mkdir()
    (tmp_path / "run-2").mkdir()
    assert run.beside().path == tmp_path / "run-3"


def test_what_is_not_a_run_is_said(tmp_path):
    with pytest.raises(UserError, match="not a run directory, it has no model.json"):
        RunDir(tmp_path).read(RunDir(tmp_path).model)
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        RunDir(tmp_path).read(RunDir(tmp_path).model)
    with pytest.raises(UserError, match="no whole checkpoint"):
        checkpoint.restore_params(tmp_path, {})


@pytest.mark.skipif(sys.platform != "linux" or os.getuid() != 0, reason="mounting a small disk needs root on Linux")
def test_full_disk_keeps_the_last_good_checkpoint(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("cannot mount here")
    try:
        overrides = {"checkpoint__keep_last": 100, "checkpoint__every": 1, "validation__every": 0, "steps": 60}
        (tmp_path / "run").symlink_to(disk)
        with pytest.raises(UserError, match="could not be saved .the disk is full.*checkpoint \\d+ is whole") as error:
            tiny.run(tmp_path, "run", **overrides)
        assert "\n" not in str(error.value)
        assert np.isfinite(tiny.final(RunDir(disk))[0]).all()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_flops_are_those_of_the_matrices():
    """Against XLA's own count of a forward pass, attention at its full length."""
    config = named("laptop-small", 512, num_layers=2, scan_layers=False)
    model, length = Transformer(config), 32
    tokens = jax.ShapeDtypeStruct((1, length), "int32")

    def forward(params, tokens):
        return model.apply(params, tokens) @ model.head(params)

    cost = jax.jit(forward).lower(model.shapes(), tokens).compile().cost_analysis()
    assert length * flops.forward(config, length) == pytest.approx(cost["flops"], rel=0.1)
    paper = flops.assisted(named("paper-2.8b", 262144), named("paper-1.5b", 262144), 1280)
    assert paper / flops.plain(named("paper-2.8b", 262144), 1280) == pytest.approx(1.18, abs=0.01)


def test_command_line(tmp_path, capsys, monkeypatch):
    assert cli.main([]) == 0 and "train" in capsys.readouterr().out
    assert cli.main(["train", "--print_config", "--steps=70"]) == 0
    assert "steps = 70" in capsys.readouterr().out
    assert cli.main(["train"]) == 2 and "--run_dir" in capsys.readouterr().err
    assert cli.main(["train", "--run_dir", str(tmp_path / "x"), "--stesp=1"]) == 2
    assert "did you mean steps" in capsys.readouterr().err
    assert cli.main(["train", "--run_dir", str(tmp_path / "x"), "--steps"]) == 2
    assert "keys are set with --key=value" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path / "nothing")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("slm-assist: error:") and error.count("\n") == 1
    assert not (tmp_path / "x").exists()

"""kill -9 at random moments, the same command again, and in the end the bits of a run that nobody killed."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

from slm_assist.run_dir import RunDir

pytestmark = pytest.mark.slow
SWITCH = 20
KEYS = {
    "steps": 40,
    "assist__schedule": "step",
    "assist__steps": SWITCH,
    "checkpoint__every": 2,
    "validation__every": 7,
}


def command(tmp: Path, name: str) -> list[str]:
    overrides = tiny.overrides(tmp, assist__teacher=str(tmp / "small_lm"), **KEYS)
    keys = [f"--{key}={value}" for key, value in overrides.items()]
    return [sys.executable, "-m", "slm_assist.cli", "train", f"--run_dir={tmp / name}", *keys]


def lines(run: RunDir) -> int:
    return len(run.metrics.read_bytes().splitlines()) if run.metrics.is_file() else 0


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_moments(tmp_path, seed):
    rng = random.Random(seed)
    tiny.run(tmp_path, "small_lm", steps=6)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(command(tmp_path, "straight"), check=True, env=environment, timeout=300, capture_output=True)
    run = RunDir(tmp_path / "killed")
    kills, moments = 0, []
    while not run.summary.is_file():
        process = subprocess.Popen(
            command(tmp_path, "killed"), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        # A number of lines further on, and a little later: in a step, in a save, at the stage switch, at the end.
        at = lines(run) + rng.choice([1, 2, 3, 5, 8, 13])
        deadline = time.monotonic() + 240
        while process.poll() is None and lines(run) < at and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.15)
        if process.poll() is None:
            process.kill()
            kills += 1
            moments.append(lines(run))
        output = process.communicate()[0].decode()
        assert process.returncode in (0, -9), output
        assert kills < 60, moments
    assert kills >= 3, "nothing was tested"
    tiny.assert_same_run(RunDir(tmp_path / "straight"), run)

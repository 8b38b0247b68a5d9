"""The paper's own runs as experiment files, and their launch scripts."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from slm_assist import config as config_lib
from slm_assist import config_rules, corpus, plan
from slm_assist.models.sizes import NAMED, named
from slm_assist.models.transformer import Transformer

SCALE = Path(__file__).parents[1] / "experiments" / "scale"
RUNS = sorted(path for path in SCALE.glob("*.py") if path.name != "paper.py")


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_runs_are_the_papers(path):
    config, _ = config_lib.resolve(str(path))
    assert config.steps * config.batch_rows * config.data.seq_len == pytest.approx(545e9, rel=1e-3)
    assert config.data.vocab_size + corpus.sentinels(config) == 262144
    assert config.data.sentinels >= corpus.objectives.sentinels_needed(config.data)
    billions = Transformer(named(config.model.size, 262144)).num_params() / 1e9
    assert f"{billions:.1f}b" in ("8.5b", path.stem.split("_")[-1])  # the paper's 8.6B is 8.46B by this shape
    helped = path.stem.startswith(("salt", "rkd"))
    assert (plan.teacher_size(str(path)) in NAMED) == helped == bool(config.assist.teacher)
    expected = config.steps if path.stem.startswith("rkd") else 36_000 * helped
    assert config_rules.assisted_steps(config) == expected
    assert f"experiments/scale/{path.name}" in path.read_text()


@pytest.mark.parametrize("script", sorted(SCALE.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_pass_their_arguments_on(script, tmp_path):
    """With stand-ins for the cluster's own commands: each argument arrives whole, quotes and all."""
    for name in ("srun", "gcloud"):
        (tmp_path / name).write_text('#!/bin/sh\nfor word in "$@"; do echo "<$word>"; done\n')
        (tmp_path / name).chmod(0o755)
    bash = shutil.which("bash")
    short = subprocess.run([bash, script, "one"], capture_output=True, text=True)
    assert short.returncode == 2 and f"experiments/scale/{script.name}" in short.stderr and "SBATCH" not in short.stderr
    given = ["--data.source=jsonl:a b/*.gz", "--mesh.fsdp=4"]
    first = ["name", "zone"] if "tpu" in script.name else []
    done = subprocess.run(
        [bash, script, *first, "x.py", "/runs/x", *given],
        capture_output=True, text=True, check=True, env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
    )  # fmt: skip
    if first:
        command = next(line for line in done.stdout.splitlines() if line.startswith("<--command="))
        inner = command.removeprefix("<--command=").removesuffix(">").replace("cd ~/slm_assist", "cd /")
        (tmp_path / "slm-assist").symlink_to(tmp_path / "srun")
        env = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
        done = subprocess.run([bash, "-c", inner], capture_output=True, text=True, check=True, env=env)
    for word in ("train", "x.py", "--run_dir=/runs/x", *given):
        assert f"<{word}>" in done.stdout.splitlines()


PRETRAINED = sorted((SCALE.parent / "pretrained").glob("*.py"))


@pytest.mark.parametrize("path", PRETRAINED, ids=lambda path: path.stem)
def test_runs_with_pretrained_small_lms_resolve_without_a_network(path):
    config, _ = config_lib.resolve(str(path))
    students = re.search(r"\d+m", path.stem)[0]
    assert config.model.size == f"hf:EleutherAI/pythia-{students}"
    assert config.assist.schedule == "step" and config.assist.teacher.startswith("hf:EleutherAI/pythia-")
    assert bool(config.grow.helper) == ("grown" in path.stem)
    text = path.read_text()
    assert f"slm-assist train experiments/pretrained/{path.name}" in text and "ot run" in text
    alone, _ = config_lib.resolve(str(path), {"assist.schedule": "none", "assist.teacher": ""})
    assert alone.data.vocabulary.startswith("hf:EleutherAI/pythia-")  # so that BASELINE reads the same rows

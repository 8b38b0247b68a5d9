"""The paper's steps compiled ahead of time for TPU slices that are not there; needs libtpu (extra `[tpu]`)."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
]
SCALE = Path(__file__).parents[1] / "experiments" / "scale"


@pytest.mark.parametrize(("run", "devices"), [("salt_2.8b", "v5e:16x16"), ("salt_8.6b", "v5p:4x4x4")])
def test_both_steps_of_the_paper_compile(run, devices, tmp_path):
    out = tmp_path / "plan.json"
    code = (
        "import sys; from slm_assist import plan; "
        "plan.run(sys.argv[1], {'compute.attention': 'splash'}, sys.argv[2], json_file=sys.argv[3])"
    )
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    words = [sys.executable, "-c", code, str(SCALE / f"{run}.py"), devices, str(out)]
    done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=1500)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text())
    assert found["stages"].keys() == {"assisted", "plain"}
    for stage in found["stages"].values():
        memory = stage["memory"]
        assert memory["how"] == "compiled" and memory["fits"], memory
        # XLA compiled the model's work, split evenly; recomputing adds, masked blocks of attention are left out.
        share = memory["counted_flops"] * found["devices"]["count"] / sum(stage["flops"].values())
        assert 0.9 < share < 1.5
    plain, assisted = (found["stages"][name]["memory"]["total"] for name in ("plain", "assisted"))
    assert assisted > plain

"""BASELINE of the second pair: 8.6B by itself.

slm-assist train experiments/scale/baseline_8.6b.py --run_dir=runs/scale/baseline_8.6b
"""

import runpy
from pathlib import Path

PAPER = runpy.run_path(str(Path(__file__).with_name("paper.py")))["OVERRIDES"]
OVERRIDES = PAPER | {
    "name": "BASELINE 8.6B",
    "model.size": "paper-8.6b",
    "mesh.fsdp": 16,
}

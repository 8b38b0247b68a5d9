"""The small LM of the second pair: the 2.8B of `baseline_2.8b.py`, its checkpoint at 12 % kept for scoring.

slm-assist train experiments/scale/small_2.8b.py --run_dir=runs/scale/small_2.8b
"""

import runpy
from pathlib import Path

PAPER = runpy.run_path(str(Path(__file__).with_name("paper.py")))["OVERRIDES"]
OVERRIDES = PAPER | {
    "name": "small 2.8B",
    "model.size": "paper-2.8b",
    "checkpoint.keep_fraction": 0.12,
}

"""SALT of the first pair: 1.5B helps 2.8B for the first 36K updates.

    slm-assist train experiments/scale/salt_2.8b.py --run_dir=runs/scale/salt_2.8b

The paper: held-out accuracy 59.10 %, log-perplexity 1.863 (read off; not confirmed).
"""

import runpy
from pathlib import Path

PAPER = runpy.run_path(str(Path(__file__).with_name("paper.py")))["OVERRIDES"]
TEACHER_SIZE = "paper-1.5b"  # for `slm-assist plan`, until the run is there
OVERRIDES = PAPER | {
    "name": "SALT 2.8B",
    "model.size": "paper-2.8b",
    "assist.schedule": "step",
    "assist.teacher": "runs/scale/small_1.5b",
    "assist.steps": 36_000,
    "assist.weight": 0.667,
    "assist.temperature": 0.25,
}

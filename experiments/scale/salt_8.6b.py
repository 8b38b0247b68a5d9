"""SALT of the second pair: 2.8B helps 8.6B for the first 36K updates.

    slm-assist train experiments/scale/salt_8.6b.py --run_dir=runs/scale/salt_8.6b

That the 8.6B had the same number of assisted updates, w and temperature is assumed.
"""

import runpy
from pathlib import Path

PAPER = runpy.run_path(str(Path(__file__).with_name("paper.py")))["OVERRIDES"]
TEACHER_SIZE = "paper-2.8b"  # for `slm-assist plan`, until the run is there
OVERRIDES = PAPER | {
    "name": "SALT 8.6B",
    "model.size": "paper-8.6b",
    "mesh.fsdp": 16,
    "assist.schedule": "step",
    "assist.teacher": "runs/scale/small_2.8b",
    "assist.steps": 36_000,
    "assist.weight": 0.667,
    "assist.temperature": 0.25,
}

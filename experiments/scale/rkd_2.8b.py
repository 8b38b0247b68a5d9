"""RKD of the first pair: soft labels of the 1.5B for the whole run.

    slm-assist train experiments/scale/rkd_2.8b.py --run_dir=runs/scale/rkd_2.8b

The paper: held-out accuracy 58.46 %, log-perplexity 2.071 (read off; not confirmed).
"""

import runpy
from pathlib import Path

PAPER = runpy.run_path(str(Path(__file__).with_name("paper.py")))["OVERRIDES"]
TEACHER_SIZE = "paper-1.5b"  # for `slm-assist plan`, until the run is there
OVERRIDES = PAPER | {
    "name": "RKD 2.8B",
    "model.size": "paper-2.8b",
    "assist.schedule": "constant",
    "assist.teacher": "runs/scale/small_1.5b",
    "assist.weight": 0.667,
    "assist.temperature": 0.25,
}

"""BASELINE of the first pair: 2.8B by itself.

    slm-assist train experiments/scale/baseline_2.8b.py --run_dir=runs/scale/baseline_2.8b

The paper: held-out accuracy 58.99 %, log-perplexity 1.868 (read off; not confirmed).
"""

import runpy
from pathlib import Path

PAPER = runpy.run_path(str(Path(__file__).with_name("paper.py")))["OVERRIDES"]
OVERRIDES = PAPER | {
    "name": "BASELINE 2.8B",
    "model.size": "paper-2.8b",
}

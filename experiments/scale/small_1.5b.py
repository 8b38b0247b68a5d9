"""The small LM of the first pair: 1.5B, trained by itself on the same budget.

    slm-assist train experiments/scale/small_1.5b.py --run_dir=runs/scale/small_1.5b

Its checkpoint at 12 % of the run (believed, not confirmed) is kept: the judge of data of `salt_ds_2.8b.py`.
"""

import runpy
from pathlib import Path

PAPER = runpy.run_path(str(Path(__file__).with_name("paper.py")))["OVERRIDES"]
OVERRIDES = PAPER | {
    "name": "small 1.5B",
    "model.size": "paper-1.5b",
    "checkpoint.keep_fraction": 0.12,
}

"""SALT_DS of the first pair: SALT, with the rows of stage 1 chosen beforehand by an early 1.5B.

    slm-assist score experiments/scale/salt_ds_2.8b.py --out=runs/scale/scores --select.scorer=runs/scale/small_1.5b
    slm-assist select runs/scale/scores --ratio=0.2 --out=runs/scale/top_fifth.npz
    slm-assist train experiments/scale/salt_ds_2.8b.py --run_dir=runs/scale/salt_ds_2.8b

Stage 1 reads the fifth of the rows with the highest scores (share believed, not confirmed), stage 2 all of them.
`score` shares its work among processes with --part=I/N. --select.rows=online --select.list= chooses on the device
instead, while it trains. The paper: held-out accuracy 59.17 %, log-perplexity 1.857 (read off; not confirmed).
"""

import runpy
from pathlib import Path

PAPER = runpy.run_path(str(Path(__file__).with_name("paper.py")))["OVERRIDES"]
TEACHER_SIZE = "paper-1.5b"  # for `slm-assist plan`, until the run is there
OVERRIDES = PAPER | {
    "name": "SALT_DS 2.8B",
    "model.size": "paper-2.8b",
    "assist.schedule": "step",
    "assist.teacher": "runs/scale/small_1.5b",
    "assist.steps": 36_000,
    "assist.weight": 0.667,
    "assist.temperature": 0.25,
    "select.rows": "list",
    "select.list": "runs/scale/top_fifth.npz",
    "select.score": "salt",
    "select.k": 10,
}

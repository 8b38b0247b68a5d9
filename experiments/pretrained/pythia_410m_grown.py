"""Grown and assisted: a model of the shape of Pythia 410M begins as Pythia 70M, and Pythia 160M gives it soft labels.

    slm-assist train experiments/pretrained/pythia_410m_grown.py --run_dir=runs/pythia_410m_grown

The pair can be grown because heads have one width (64) and 1024 is a multiple of 512; of 160M to 410M this is not so,
and the error says why. The first logits are those of the 70M model. Growing costs no FLOPs in the run: by `slm-assist
plan` it takes what pythia_410m.py takes, with whose runs it is to be compared.

Not run: no accelerator was at hand.
"""

import runpy
from pathlib import Path

SALT = runpy.run_path(str(Path(__file__).with_name("pythia_410m.py")))["OVERRIDES"]
OVERRIDES = SALT | {
    "name": "410M grown, SALT",
    "grow.helper": "hf:EleutherAI/pythia-70m",
}

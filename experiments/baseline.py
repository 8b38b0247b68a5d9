"""BASELINE: the large LM by itself; w = 0 throughout.

slm-assist train experiments/baseline.py --run_dir=runs/baseline
"""

OVERRIDES = {
    "name": "BASELINE",
    "steps": 1000,
    "model.size": "laptop-large",
}

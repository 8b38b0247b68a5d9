"""BASELINE: the large LM by itself; w = 0 throughout.

slm-assist train experiments/baseline.py --run_dir=runs/baseline

In the quickstart (240 steps): 4.100 nats a token. See experiments/results/quickstart/.
"""

OVERRIDES = {
    "name": "BASELINE",
    "steps": 1000,
    "model.size": "laptop-large",
    "optimizer.peak_learning_rate": 8e-3,
}

"""grow then SALT: grown from the small LM as by `grow.py`, and its soft labels for the first 17.3 % of the run.

    slm-assist train experiments/grow_salt.py --run_dir=runs/grow_salt

A student that begins as its own teacher has nothing to learn from it at first: another small LM as assist.teacher, or
an earlier checkpoint as grow.helper_step, may serve better.

In a first measurement (300 steps, three seeds) 0.025 nats a token better than BASELINE, no better than growth
alone. See experiments/results/gifts/.
"""

OVERRIDES = {
    "name": "grow then SALT",
    "steps": 1000,
    "model.size": "laptop-large",
    "optimizer.peak_learning_rate": 8e-3,
    "grow.helper": "runs/small_lm",
    "assist.schedule": "step",
    "assist.teacher": "runs/small_lm",
}

"""SALT_DS with as many rows drawn at random from the same candidates: what is left when the score says nothing.

    slm-assist train experiments/salt_random.py --run_dir=runs/salt_random

It reads the corpus at the pace of SALT_DS, but nothing is scored and the rows cost nothing.
"""

OVERRIDES = {
    "name": "SALT, random rows",
    "steps": 1000,
    "model.size": "laptop-large",
    "optimizer.peak_learning_rate": 8e-3,
    "assist.schedule": "step",
    "assist.teacher": "runs/small_lm",
    "select.rows": "online",
    "select.rule": "random",
    "select.pool_factor": 5,
}

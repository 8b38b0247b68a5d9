"""The rows of SALT_DS without the soft labels: what selection gives by itself.

    slm-assist train experiments/select_only.py --run_dir=runs/select_only

Stage 1 is as long as SALT's, 17.3 % of the run. Reviewers of the paper asked for this one.
"""

OVERRIDES = {
    "name": "selection only",
    "steps": 1000,
    "model.size": "laptop-large",
    "optimizer.peak_learning_rate": 8e-3,
    "select.rows": "online",
    "select.score": "salt",
    "select.pool_factor": 5,
    "select.scorer": "runs/small_lm",
    "select.fraction": 0.173,
}

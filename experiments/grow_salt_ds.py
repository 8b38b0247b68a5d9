"""grow then SALT_DS: grown from the small LM as by `grow.py`, then its soft labels on rows of its choice.

    slm-assist train experiments/grow_salt_ds.py --run_dir=runs/grow_salt_ds

Stage 1 is that of `salt_ds.py`: each update scores five batches of candidates by an early checkpoint of the small LM
and learns from the best fifth.
"""

OVERRIDES = {
    "name": "grow then SALT_DS",
    "steps": 1000,
    "model.size": "laptop-large",
    "optimizer.peak_learning_rate": 8e-3,
    "grow.helper": "runs/small_lm",
    "assist.schedule": "step",
    "assist.teacher": "runs/small_lm",
    "select.rows": "online",
    "select.score": "salt",
    "select.pool_factor": 5,
}

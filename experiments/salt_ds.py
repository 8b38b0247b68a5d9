"""SALT_DS: SALT, with the rows of stage 1 chosen by an early checkpoint of the small LM, on the device.

    slm-assist train experiments/salt_ds.py --run_dir=runs/salt_ds

Each update of stage 1 scores five batches of candidates and learns from the best fifth (select.pool_factor): the median
loss of a row's tokens, where those outside the scorer's top 10 count as 0. High means challenging yet learnable. The
scorer is the checkpoint at 12 % of the small LM's run, the teacher its last one. `salt_ds_offline.py` chooses from the
whole corpus beforehand, as the paper did.

In the quickstart (240 steps, the small LM's last checkpoint scoring): 3.957 nats a token against BASELINE's 4.100 and
SALT's 4.007, at 1.11 of BASELINE's FLOPs. See experiments/results/quickstart/.
"""

OVERRIDES = {
    "name": "SALT_DS",
    "steps": 1000,
    "model.size": "laptop-large",
    "optimizer.peak_learning_rate": 8e-3,
    "assist.schedule": "step",
    "assist.teacher": "runs/small_lm",
    "select.rows": "online",
    "select.score": "salt",
    "select.pool_factor": 5,
}

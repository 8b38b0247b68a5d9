"""SALT_DS as in the paper: the whole corpus is scored beforehand, and stage 1 reads the top fifth of its rows.

    slm-assist score experiments/salt_ds_offline.py --out=runs/scores
    slm-assist select runs/scores --ratio=0.2 --out=runs/top_fifth.npz
    slm-assist train experiments/salt_ds_offline.py --run_dir=runs/salt_ds_offline

The list is for this corpus, vocabulary and data.seq_len only; it is refused elsewhere. Stage 2 reads everything;
--select.then=unseen leaves out what stage 1 has read.
"""

OVERRIDES = {
    "name": "SALT_DS offline",
    "steps": 1000,
    "model.size": "laptop-large",
    "optimizer.peak_learning_rate": 8e-3,
    "assist.schedule": "step",
    "assist.teacher": "runs/small_lm",
    "select.rows": "list",
    "select.score": "salt",
    "select.list": "runs/top_fifth.npz",
}

"""Difference sampling of MiniPLM (arXiv 2410.17215): rows that a larger LM finds easier than a smaller one does.

    slm-assist train experiments/miniplm.py --run_dir=runs/miniplm

A row's score is its mean loss under `select.reference` (small) minus that under `select.scorer` (larger); the better
half of the candidates is learnt from, in their order, for the whole run and without soft labels. Here the early
checkpoint of the small LM plays the small one and its last checkpoint the larger; name two runs for the real thing.
"""

OVERRIDES = {
    "name": "MiniPLM",
    "steps": 1000,
    "model.size": "laptop-large",
    "optimizer.peak_learning_rate": 8e-3,
    "select.rows": "online",
    "select.score": "difference",
    "select.pool_factor": 2,
    "select.scorer": "runs/small_lm",
    "select.scorer_step": -1,
    "select.reference": "runs/small_lm",
    "select.reference_step": -2,
    "select.fraction": 1.0,
}

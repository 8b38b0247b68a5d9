"""Learnability, as in JEST (arXiv 2406.17711): rows where the learner is furthest behind a trained reference.

    slm-assist train experiments/learnability.py --run_dir=runs/learnability

A row's score is the learner's mean loss, at this very step, minus the reference's; the best fifth of the candidates is
learnt from, for the whole run. The learner's forward pass over the candidates costs more than the update itself: it is
in the FLOPs.
"""

OVERRIDES = {
    "name": "learnability",
    "steps": 1000,
    "model.size": "laptop-large",
    "optimizer.peak_learning_rate": 8e-3,
    "select.rows": "online",
    "select.score": "learnability",
    "select.pool_factor": 5,
    "select.reference": "runs/small_lm",
    "select.fraction": 1.0,
}

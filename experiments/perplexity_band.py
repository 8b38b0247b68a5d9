"""Perplexity pruning (arXiv 2405.20541): rows from a band of a small LM's loss, here the middle.

    slm-assist train experiments/perplexity_band.py --run_dir=runs/perplexity_band

--select.band=0 takes the rows that the small LM finds easiest, 1 the hardest. For the whole run, half of the candidates
are kept.
"""

OVERRIDES = {
    "name": "perplexity band",
    "steps": 1000,
    "model.size": "laptop-large",
    "optimizer.peak_learning_rate": 8e-3,
    "select.rows": "online",
    "select.score": "perplexity",
    "select.rule": "band",
    "select.band": 0.5,
    "select.pool_factor": 2,
    "select.scorer": "runs/small_lm",
    "select.scorer_step": -1,
    "select.fraction": 1.0,
}

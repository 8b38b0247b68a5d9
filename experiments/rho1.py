"""RHO-1 (arXiv 2404.07965): the loss counts the 60 % of tokens where the learner is furthest behind a reference.

    slm-assist train experiments/rho1.py --run_dir=runs/rho1

Tokens are ranked by learner loss minus reference loss, over each microbatch on all devices. The reference's forward
pass and a second pass over the learner's head are in the FLOPs.
"""

OVERRIDES = {
    "name": "RHO-1",
    "steps": 1000,
    "model.size": "laptop-large",
    "optimizer.peak_learning_rate": 8e-3,
    "select.token_share": 0.6,
    "select.reference": "runs/small_lm",
    "select.fraction": 1.0,
}

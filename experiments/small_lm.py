"""The small LM: trained once, by itself, it then helps the others.

    slm-assist train experiments/small_lm.py --run_dir=runs/small_lm

Its checkpoint at 12 % of the run is kept beside the last ones: the early judge of data that SALT_DS scores with.

In the quickstart (240 steps): 4.373 nats a token, at 0.35 of BASELINE's FLOPs. See experiments/results/quickstart/.
"""

OVERRIDES = {
    "name": "small LM",
    "steps": 1000,
    "model.size": "laptop-small",
    "optimizer.peak_learning_rate": 8e-3,
    "checkpoint.keep_fraction": 0.12,
}

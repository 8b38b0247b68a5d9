"""RKD: the large LM learns the small one's soft labels, with the same weight for the whole run.

    slm-assist train experiments/rkd.py --run_dir=runs/rkd

The paper's second baseline: early it is ahead, at the end the small LM holds the large one back.

In the quickstart (240 steps): 4.181 nats a token against BASELINE's 4.100, at 1.12 of its FLOPs. See
experiments/results/quickstart/. With 20 tokens a parameter 0.20 bits a byte worse than BASELINE:
experiments/evidence/.
"""

OVERRIDES = {
    "name": "RKD",
    "steps": 1000,
    "model.size": "laptop-large",
    "optimizer.peak_learning_rate": 8e-3,
    "assist.schedule": "constant",
    "assist.teacher": "runs/small_lm",
}

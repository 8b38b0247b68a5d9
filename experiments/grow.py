"""grow: the large LM begins as the small one, made wider and deeper so that it computes the same, then trains alone.

    slm-assist train experiments/grow.py --run_dir=runs/grow

How layers are added is grow.depth, how far copies are pushed apart grow.noise, and how long the learning rate rises
again grow.warmup_steps (HyperCloning, arXiv 2409.12903; stacking, 2405.15319). It costs no FLOPs in the run itself.

In a first measurement (300 steps, three seeds) 0.036 nats a token better than BASELINE, 0.26 at 150 steps
(experiments/results/gifts/). With 20 tokens a parameter, and small LMs trained as long, it ended behind BASELINE
(experiments/evidence/).
"""

OVERRIDES = {
    "name": "grow",
    "steps": 1000,
    "model.size": "laptop-large",
    "optimizer.peak_learning_rate": 8e-3,
    "grow.helper": "runs/small_lm",
}

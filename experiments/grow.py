"""grow: the large LM begins as the small one, made wider and deeper so that it computes the same, then trains alone.

    slm-assist train experiments/grow.py --run_dir=runs/grow

How layers are added is grow.depth, how far copies are pushed apart grow.noise, and how long the learning rate rises
again grow.warmup_steps (HyperCloning, arXiv 2409.12903; stacking, 2405.15319). It costs no FLOPs in the run itself.

In a first measurement (300 steps, three seeds, grow.noise 0.01) 0.036 nats a token better than BASELINE, 0.26 at 150
steps (experiments/results/gifts/). With 20 tokens a parameter that little noise ended far behind BASELINE, and 1, the
default now, led it early and not at the end (experiments/evidence/).
"""

OVERRIDES = {
    "name": "grow",
    "steps": 1000,
    "model.size": "laptop-large",
    "optimizer.peak_learning_rate": 8e-3,
    "grow.helper": "runs/small_lm",
}

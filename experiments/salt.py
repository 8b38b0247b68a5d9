"""SALT: soft labels of the small LM for the first 17.3 % of the run (the paper's 36K of 208K), then none.

    slm-assist train experiments/salt.py --run_dir=runs/salt

Each of w, temperature, n_KD and how w ends is a key: --assist.weight, .temperature, .fraction, .schedule=linear.

In the quickstart (240 steps): 4.007 nats a token against BASELINE's 4.100, at 1.02 of its FLOPs. See
experiments/results/quickstart/. With 20 tokens a parameter, eight fresh seeds and test documents: 0.027 bits a byte
better than BASELINE at equal steps, 0.040 worse at equal FLOPs with the small LM's training charged in full
(experiments/evidence/). salt_soft.py has softer labels, salt_unigram.py counts for a teacher.
"""

OVERRIDES = {
    "name": "SALT",
    "steps": 1000,
    "model.size": "laptop-large",
    "optimizer.peak_learning_rate": 8e-3,
    "assist.schedule": "step",
    "assist.teacher": "runs/small_lm",
}

"""SALT: soft labels of the small LM for the first 17.3 % of the run (the paper's 36K of 208K), then none.

    slm-assist train experiments/salt.py --run_dir=runs/salt

Each of w, temperature, n_KD and how w ends is a key: --assist.weight, .temperature, .fraction, .schedule=linear.
"""

OVERRIDES = {
    "name": "SALT",
    "steps": 1000,
    "model.size": "laptop-large",
    "assist.schedule": "step",
    "assist.teacher": "runs/small_lm",
}

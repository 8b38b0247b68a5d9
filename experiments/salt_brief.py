"""SALT whose small LM was trained for an eighth of the large one's steps (`small_lm_brief.py`), else as `salt.py`.

slm-assist train experiments/salt_brief.py --run_dir=runs/salt_brief
"""

OVERRIDES = {
    "name": "SALT, brief small LM",
    "steps": 1000,
    "model.size": "laptop-large",
    "optimizer.peak_learning_rate": 8e-3,
    "assist.schedule": "step",
    "assist.teacher": "runs/small_lm_brief",
}

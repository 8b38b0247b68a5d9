"""A small LM trained for an eighth of the large one's steps, for `salt_brief.py`.

slm-assist train experiments/small_lm_brief.py --run_dir=runs/small_lm_brief
"""

OVERRIDES = {
    "name": "small LM, brief",
    "steps": 125,
    "model.size": "laptop-small",
    "optimizer.peak_learning_rate": 8e-3,
}

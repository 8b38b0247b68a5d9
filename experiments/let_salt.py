"""LET with SALT: the small LM's representations as in `let.py` and its soft labels as in `salt.py`, side by side.

    slm-assist train experiments/let_salt.py --run_dir=runs/let_salt

Both end where represent.fraction and assist.fraction say, by default after 17.3 % of the run.

With 20 tokens a parameter not resolved from SALT alone, on eight fresh seeds (experiments/evidence/).
"""

OVERRIDES = {
    "name": "LET with SALT",
    "steps": 1000,
    "model.size": "laptop-large",
    "optimizer.peak_learning_rate": 8e-3,
    "represent.schedule": "linear",
    "represent.helper": "runs/small_lm",
    "assist.schedule": "step",
    "assist.teacher": "runs/small_lm",
}

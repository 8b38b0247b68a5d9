"""LET: an early layer of the large LM is drawn towards the small LM's final hidden states (arXiv 2602.05393).

    slm-assist train experiments/let.py --run_dir=runs/let

The loss gains represent.weight * (1 - cos(early hidden states, the small LM's last)), a weight that falls linearly to
0 over represent.fraction of the run. Which layers, and the map between widths, are keys: represent.student_layer,
.helper_layer, .map.

Not told apart from BASELINE in a first measurement (300 steps, three seeds: experiments/results/gifts/), nor with 20
tokens a parameter (three seeds: experiments/evidence/).
"""

OVERRIDES = {
    "name": "LET",
    "steps": 1000,
    "model.size": "laptop-large",
    "optimizer.peak_learning_rate": 8e-3,
    "represent.schedule": "linear",
    "represent.helper": "runs/small_lm",
}

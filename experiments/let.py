"""LET: an early layer of the large LM is drawn towards the small LM's final hidden states (arXiv 2602.05393).

    slm-assist train experiments/let.py --run_dir=runs/let

The loss gains represent.weight * (1 - cos(early hidden states, the small LM's last)), a weight that falls linearly to
0 over represent.fraction of the run. Which layers, and the map between widths, are keys: represent.student_layer,
.helper_layer, .map.

In a first measurement (300 steps, three seeds) not told apart from BASELINE. See
experiments/results/gifts/.
"""

OVERRIDES = {
    "name": "LET",
    "steps": 1000,
    "model.size": "laptop-large",
    "optimizer.peak_learning_rate": 8e-3,
    "represent.schedule": "linear",
    "represent.helper": "runs/small_lm",
}

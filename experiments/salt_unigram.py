"""SALT without a small LM: for the first 17.3 % of the run the soft labels are token frequencies, flattened.

    slm-assist train experiments/salt_unigram.py --run_dir=runs/salt_unigram

The teacher is counted on the training rows, costs no FLOPs, and is the same for every token: softmax(log p / 4), the
fourth roots of the frequencies, normalised.
"""

OVERRIDES = {
    "name": "SALT, unigram",
    "steps": 1000,
    "model.size": "laptop-large",
    "optimizer.peak_learning_rate": 8e-3,
    "assist.schedule": "step",
    "assist.teacher": "slm_assist.assist.ngram:unigram",
    "assist.temperature": 4.0,
}

"""SALT without a small LM: for the first 17.3 % of the run the soft labels are token frequencies, flattened.

    slm-assist train experiments/salt_unigram.py --run_dir=runs/salt_unigram

The teacher is counted on the training rows, costs no FLOPs, and is the same for every token: softmax(log p / 4), the
fourth roots of the frequencies, normalised.

With 20 tokens a parameter, eight fresh seeds and test documents: 0.027 bits a byte better than BASELINE, at equal steps
and at equal FLOPs with nothing left out, as good as SALT at its own temperature, 1 (experiments/evidence/). With
uniform labels instead nothing was gained that is resolved.
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

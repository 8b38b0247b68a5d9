"""SALT without a small LM: for the first 17.3 % of the run the soft labels are token frequencies, flattened.

    slm-assist train experiments/salt_unigram.py --run_dir=runs/salt_unigram

The teacher is counted on the training rows, has no forward pass, and is the same for every token: softmax(log p / 4),
the fourth roots of the frequencies, normalised.

With 0.11 M parameters, 512 pieces, 20 tokens a parameter, eight fresh seeds and test documents: 0.027 bits a byte
better than BASELINE at equal steps, which is at equal FLOPs as well; at the end not resolved from SALT, which is far
ahead of it early on (experiments/evidence/). At temperature 1 it was 0.014 better, not resolved. Larger vocabularies
were not tried.
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

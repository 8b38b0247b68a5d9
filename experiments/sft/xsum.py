"""Fine-tunes on XSum (arXiv 1808.08745): news articles, each with its summary in one sentence.

    slm-assist train experiments/sft/xsum.py --run_dir=runs/xsum --init.model=runs/baseline

Data: tfds's `xsum`, prepared before (see tensorflow.org/datasets/catalog/xsum), or JSON lines with the same fields,
such as the Hugging Face set EdinburghNLP/xsum written by `to_json`: --data.source=jsonl:xsum/train.jsonl
--data.validation=jsonl:xsum/validation.jsonl. Where an article is too long for a row its end is cut, as most of
what a summary says stands at the beginning.
"""

OVERRIDES = {
    "name": "XSum",
    "steps": 5000,
    "batch_rows": 32,
    "microbatches": 8,
    "data.source": "tfds:xsum:train",
    "data.validation": "tfds:xsum:validation",
    "data.prompt": "Article: {document}\n\nSummary in one sentence:",
    "data.answer": " {summary}",
    "data.shorten": "document",
    "data.seq_len": 1024,
    "optimizer.peak_learning_rate": 2e-5,
    "optimizer.warmup_steps": 100,
    "optimizer.weight_decay": 0.0,
    "validation.every": 500,
    "checkpoint.every": 1000,
}

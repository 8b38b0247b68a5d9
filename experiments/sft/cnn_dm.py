"""Fine-tunes on CNN/DailyMail (arXiv 1704.04368): news articles and their highlights, a few sentences each.

    slm-assist train experiments/sft/cnn_dm.py --run_dir=runs/cnn_dm --init.model=runs/baseline

Data: tfds's `cnn_dailymail`, prepared before (see tensorflow.org/datasets/catalog/cnn_dailymail), or JSON lines
with the same fields, such as the Hugging Face set abisee/cnn_dailymail (3.0.0) written by `to_json`:
--data.source=jsonl:cnn/train.jsonl --data.validation=jsonl:cnn/validation.jsonl. Where an article is too long for a
row its end is cut.
"""

OVERRIDES = {
    "name": "CNN/DM",
    "steps": 10_000,
    "batch_rows": 32,
    "microbatches": 16,
    "data.source": "tfds:cnn_dailymail:train",
    "data.validation": "tfds:cnn_dailymail:validation",
    "data.prompt": "Article: {article}\n\nHighlights:",
    "data.answer": "\n{highlights}",
    "data.shorten": "article",
    "data.seq_len": 2048,
    "optimizer.peak_learning_rate": 2e-5,
    "optimizer.warmup_steps": 100,
    "optimizer.weight_decay": 0.0,
    "validation.every": 500,
    "checkpoint.every": 1000,
}

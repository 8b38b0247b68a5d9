"""Fine-tunes on ANLI (arXiv 1910.14599), natural language inference: does a hypothesis follow from a premise?

    slm-assist train experiments/sft/anli.py --run_dir=runs/anli_r1 --init.model=runs/baseline

Data: tfds's `anli` in its rounds r1, r2 and r3, prepared before (see tensorflow.org/datasets/catalog/anli). Labels
are 0, 1, 2 there as in the Hugging Face set facebook/anli; its JSON lines: --data.source=jsonl:anli/train_r1.jsonl
--data.validation=jsonl:anli/dev_r1.jsonl. In the authors' own files the premise is `context` and labels are letters:
--data.prompt=$'{context}\nQuestion: {hypothesis} True, False or Neither?\nAnswer:'
--data.choices='label:e=True|n=Neither|c=False'. The prompt is that of GPT-3's paper (arXiv 2005.14165) and of the
EleutherAI harness.
"""

OVERRIDES = {
    "name": "ANLI R1",
    "steps": 1000,
    "batch_rows": 32,
    "microbatches": 4,
    "data.source": "tfds:anli/r1:train",
    "data.validation": "tfds:anli/r1:validation",
    "data.prompt": "{premise}\nQuestion: {hypothesis} True, False or Neither?\nAnswer:",
    "data.answer": " {label}",
    "data.choices": "label:True|Neither|False",
    "data.seq_len": 512,
    "optimizer.peak_learning_rate": 2e-5,
    "optimizer.warmup_steps": 50,
    "optimizer.weight_decay": 0.0,
    "validation.every": 100,
    "checkpoint.every": 500,
}

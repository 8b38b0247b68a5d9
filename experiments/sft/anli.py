"""Fine-tunes on ANLI (arXiv 1910.14599), natural language inference: does a hypothesis follow from a context?

    slm-assist train experiments/sft/anli.py --run_dir=runs/anli_r1 --init.model=runs/baseline

Data: tfds's `anli` in its rounds r1, r2 and r3, prepared before (see tensorflow.org/datasets/catalog/anli), or the
authors' files (github.com/facebookresearch/anli): --data.source=jsonl:anli_v1.0/R1/train.jsonl
--data.validation=jsonl:anli_v1.0/R1/dev.jsonl. Labels are 0, 1, 2 in the one and letters in the other; data.choices
knows both. In the Hugging Face set facebook/anli the context is called `premise`: set data.prompt. The prompt is
that of GPT-3's paper (arXiv 2005.14165) and of the EleutherAI harness.
"""

OVERRIDES = {
    "name": "ANLI R1",
    "steps": 1000,
    "batch_rows": 32,
    "microbatches": 4,
    "data.source": "tfds:anli/r1:train",
    "data.validation": "tfds:anli/r1:validation",
    "data.prompt": "{context}\nQuestion: {hypothesis} True, False or Neither?\nAnswer:",
    "data.answer": " {label}",
    "data.choices": "label:0=True|1=Neither|2=False|e=True|n=Neither|c=False",
    "data.seq_len": 512,
    "optimizer.peak_learning_rate": 2e-5,
    "optimizer.warmup_steps": 50,
    "optimizer.weight_decay": 0.0,
    "validation.every": 100,
    "checkpoint.every": 500,
}

"""Fine-tunes on GSM8K, grade-school mathematics in words (arXiv 2110.14168): questions, solutions, "#### result".

    slm-assist train experiments/sft/gsm8k.py --run_dir=runs/gsm8k --init.model=runs/baseline
    slm-assist train experiments/sft/gsm8k.py --run_dir=runs/gsm8k_salt --init.model=runs/baseline \
        --assist.schedule=step --assist.teacher=runs/small_gsm8k     # with a small LM that was fine-tuned before

Data: train.jsonl and test.jsonl of github.com/openai/grade-school-math, in data/gsm8k/ (or name them with
--data.source=jsonl:PLACE/train.jsonl). Validation is 5 % of train.jsonl; the test set is for exact match.
Only solutions count in the loss; --data.learn='#### .*$' counts results alone. About 3 epochs of 7,100 examples.
"""

OVERRIDES = {
    "name": "GSM8K",
    "steps": 600,
    "batch_rows": 16,
    "microbatches": 2,
    "data.source": "jsonl:data/gsm8k/train.jsonl",
    "data.prompt": "Question: {question}\nAnswer:",
    "data.answer": " {answer}",
    "data.seq_len": 512,
    "data.validation_fraction": 0.05,
    "optimizer.peak_learning_rate": 2e-5,
    "optimizer.warmup_steps": 30,
    "optimizer.weight_decay": 0.0,
    "validation.every": 100,
    "checkpoint.every": 200,
}

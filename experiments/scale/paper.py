"""What all runs of the paper share (arXiv 2410.18779); the other files here add a model and its help.

Published: the Pile, a vocabulary of 256K SentencePiece pieces for all models, the UL2 mixture, 2048 rows x 1280 tokens
x 208K updates = 545B tokens, soft labels for the first 36K. Believed but not confirmed, so a key to change: the shapes
(`paper-*` in slm_assist/models/sizes.py), the mixture's 60/20/20, Adafactor with a cosine schedule, peak 1e-3 and 1K
warm-up updates, w = 0.667, and temperature 0.25, which divides the logits here. The layout is ours: not the paper's.

    SLM_ASSIST_PILE         folder with the Pile's *.jsonl.zst, by default pile/
    SLM_ASSIST_VOCABULARY   SentencePiece model or run directory; without it one is trained, and helpers bring theirs

None of these runs has been made with this code. `slm-assist plan` says what each needs and costs.
"""

import os

OVERRIDES = {
    "steps": 208_000,
    "batch_rows": 2048,
    "data.source": f"pile:{os.environ.get('SLM_ASSIST_PILE', 'pile')}/*.jsonl.zst",
    "data.vocabulary": os.environ.get("SLM_ASSIST_VOCABULARY", ""),
    "data.vocab_size": 262_144 - 64,
    "data.sentinels": 64,  # with the pieces 262144 ids, which the mesh divides; UL2 needs 58 of them
    "data.seq_len": 1280,
    "data.objective": "ul2",
    "optimizer.name": "adafactor",
    "optimizer.peak_learning_rate": 1e-3,
    "optimizer.warmup_steps": 1000,
    "optimizer.schedule": "cosine",
    "optimizer.weight_decay": 0.0,
    "mesh.fsdp": 8,
    "compute.remat": "full",
    "validation.every": 2000,
    "validation.rows": 8192,
    "checkpoint.every": 1000,
    "checkpoint.keep": (36_000, 146_000),  # where the paper's tables look
}

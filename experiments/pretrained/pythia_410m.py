"""SALT: Pythia 160M, as it is on the Hub, helps a model of the shape of Pythia 410M to train on the Pile.

    slm-assist plan experiments/pretrained/pythia_410m.py --devices=h100:8 --estimate
    slm-assist train experiments/pretrained/pythia_410m.py --run_dir=runs/pythia_410m
    slm-assist train experiments/pretrained/pythia_410m.py --run_dir=runs/pythia_410m_baseline \
        --assist.schedule=none --assist.teacher= --name='410M BASELINE'
    slm-assist report runs/pythia_410m_baseline runs/pythia_410m --out=runs/pythia_410m_report

By `slm-assist plan`: 21B tokens and 5.8e19 FLOPs, 2.0 % of them the small LM's. On eight H100 at 40 % of their peak it
is 1.0 s an assisted update and 0.9 s a plain one, 5.1 hours, in 37 GiB of each; on v5e:16 with --compute.remat=full
12.4 hours, in 9 GiB. --assist.teacher=hf:EleutherAI/pythia-70m costs less and knows less.

Not run: no accelerator was at hand. The small LM has seen all of the Pile, more than the large one will here: what it
gives is also what 300B tokens gave to it, and only a run with as many says what the method itself is worth.

    SLM_ASSIST_PILE     folder with the Pile's *.jsonl.zst, by default pile/
"""

import os

OVERRIDES = {
    "name": "410M SALT",
    "steps": 20_000,
    "batch_rows": 512,
    "microbatches": 8,
    "model.size": "hf:EleutherAI/pythia-410m",
    "data.source": f"pile:{os.environ.get('SLM_ASSIST_PILE', 'pile')}/*.jsonl.zst",
    "data.vocabulary": "hf:EleutherAI/pythia-160m",  # for runs without a small LM; it is that of all Pythias
    "data.vocab_size": 50_277,  # and for `slm-assist plan` of them
    "data.seq_len": 2048,
    "assist.schedule": "step",
    "assist.teacher": "hf:EleutherAI/pythia-160m",
    "optimizer.peak_learning_rate": 3e-4,
    "optimizer.warmup_steps": 200,
    "validation.every": 1000,
    "validation.rows": 2048,
    "checkpoint.every": 1000,
}

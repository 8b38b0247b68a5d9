"""SALT on a laptop: Pythia 14M, as it is on the Hub, helps a model of the shape of Pythia 31M on your Python sources.

    slm-assist train experiments/pretrained/pythia_31m_laptop.py --run_dir=runs/pythia_31m
    slm-assist train experiments/pretrained/pythia_31m_laptop.py --run_dir=runs/pythia_31m_baseline \
        --assist.schedule=none --assist.teacher= --name='31M BASELINE'
    slm-assist report runs/pythia_31m_baseline runs/pythia_31m --out=runs/pythia_31m_report
    slm-assist export runs/pythia_31m --out=runs/pythia_31m_hf

300 updates of 1024 tokens. With random weights of these shapes an update took 2 s on two busy CPU cores, so each run
takes about a quarter of an hour there. With --grow.helper=hf:EleutherAI/pythia-14m the student also begins as the small
one. Not run with Pythia's own weights, which could not be downloaded: what it gives is not known. The notebook
colabs/assist_with_a_pretrained_model.ipynb does the same.
"""

OVERRIDES = {
    "name": "31M SALT",
    "steps": 300,
    "batch_rows": 8,
    "model.size": "hf:EleutherAI/pythia-31m",
    "data.vocabulary": "hf:EleutherAI/pythia-14m",  # for runs without a small LM; it is that of all Pythias
    "data.vocab_size": 50_277,  # and for `slm-assist plan` of them
    "data.seq_len": 128,
    "assist.schedule": "step",
    "assist.teacher": "hf:EleutherAI/pythia-14m",
    "assist.fraction": 0.4,
    "optimizer.peak_learning_rate": 1e-3,
    "optimizer.warmup_steps": 30,
    "validation.every": 30,
    "validation.rows": 64,
}

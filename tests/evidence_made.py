"""The scripts of experiments/evidence as modules, and directories of runs that are made up, shared by their tests."""

import contextlib
import dataclasses
import functools
import importlib
import json
import math
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "experiments" / "evidence"
NAMES = tuple(sorted(path.stem for path in SCRIPTS.glob("*.py")))


REPLICATES = 300  # enough for tests


@contextlib.contextmanager
def scripts() -> Iterator[types.SimpleNamespace]:
    """The scripts' modules, as a script imports them; other modules of these names are put back in the end."""
    others = {name: sys.modules.pop(name) for name in NAMES if name in sys.modules}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        try:
            yield types.SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
        finally:
            for name in NAMES:
                sys.modules.pop(name, None)
            sys.modules.update(others)


# Made-up runs. An update of the student costs 3, help in one 0.5, training the small LM 90, and scoring for a list 25.

UPDATE, PASS, HELPER, SCORING, UNTRAINED = 3.0, 0.5, 90.0, 25.0, 1.0
DOMAINS, UNSEEN = ("Wiki", "Code", "Speeches"), "Speeches"
TRAIN_BYTES = {"Wiki": 3_000_000, "Code": 1_000_000}
DOCUMENTS, ROWS = 12, 3  # of each domain, and of each document
ROW_BYTES, BATCH, TRAIN_ROWS = 200, 16, 5000
PARAMETERS, STAGE_1 = 115_000, 0.173


def tier(scripts: types.SimpleNamespace, **changes: Any) -> Any:
    """The CPU tier with 112 steps at its main ratio and 56 at the other."""
    return dataclasses.replace(scripts.tiers.CPU, ratios=(2, 1), **changes)


def rows(scripts: types.SimpleNamespace, seeds: int = 3) -> list[Any]:
    """A matrix of a row of each kind."""
    m = scripts.matrix
    teacher = {"assist.teacher": "slm_assist.assist.ngram:unigram"}
    small = [
        *m._main(seeds, 2),
        *(row for row in m._gifts(seeds, 2) if row.key in ("grow", "grow_salt", "salt_ds_offline")),
        m.Row("unigram", "SALT, unigram teacher", m.CONTROLS, "salt", teacher, seeds),
        m.Row("salt-40", "SALT, 40 %", m.ADAPTIVE, "salt", m.LABELS, 1, ends=m.FEW_ENDS, stage_1=0.4, pair="salt"),
    ]
    fresh = {"first_seed": m.FRESH_SEEDS, "test": True, "group": m.CONFIRM}
    grid = {"optimizer.peak_learning_rate": 4e-3, "optimizer.weight_decay": 0.1}
    return [
        m.Row("grid-baseline", "baseline, peak 0.004, weight decay 0.1", m.GRID, "baseline", grid, 1, 200, (1.0,)),
        m.Row("cutter", "cuts the buckets", m.BUCKETS, "baseline", seeds=1, first_seed=250, ends=(1.0,)),
        *small,
        *(dataclasses.replace(row, **fresh) for row in m._main(seeds, 2)),
    ]


def fewer_replicates(scripts: types.SimpleNamespace) -> None:
    """For these modules, until they are imported again."""
    draws = functools.partialmethod(scripts.measures.Held.draws, replicates=REPLICATES)
    scripts.measures.Held.draws, scripts.measures.REPLICATES = draws, REPLICATES


def write_corpus(out: Path) -> None:
    """What is kept of the held-out rows, and of how the text was split."""
    folder = out / "corpus"
    folder.mkdir(parents=True)
    counts = {name: {"documents": 9, "bytes": count} for name, count in TRAIN_BYTES.items()}
    held = {name: {"documents": DOCUMENTS, "bytes": 1} for name in DOMAINS}
    parts = {"train": counts, "validation": held, "test": held}
    note = {"parts": parts, "split": {"unseen": UNSEEN}, "files": [["a.jsonl", 4]]}
    (folder / "corpus.json").write_text(json.dumps(note))
    count = len(DOMAINS) * DOCUMENTS
    facts = {
        "documents": [f"document {i}" for i in range(count)], "domains": list(DOMAINS),
        "document": np.repeat(np.arange(count), ROWS).tolist(),
        "domain": np.repeat(np.arange(len(DOMAINS)), DOCUMENTS * ROWS).tolist(),
        "bytes": [ROW_BYTES] * (count * ROWS), "tokens": [100] * (count * ROWS),
    }  # fmt: skip
    for part in ("validation", "test"):
        (folder / f"rows-{part}.json").write_text(json.dumps(facts))


def law(flops: float) -> float:
    """BASELINE's bits a byte at so many FLOPs: linear in their logarithm."""
    return 4.0 - 0.2 * math.log(flops)


Gain = Callable[[Any], float]


def write_run(scripts: types.SimpleNamespace, job: Any, gain: Gain = lambda job: 0.0, *, restart: bool = False,
              parts: Sequence[str] = ("validation",), facts: Mapping[str, Any] | None = None,
              ripple: float = 0.02) -> float:  # fmt: skip
    """A run's directory as training and measuring leave it: BASELINE's law of its FLOPs, less what it gains.

    Args:
      restart: the counters of a branch begin at 0, else they go on from its trunk's.
      ripple: documents differ by as much, in bits a byte, the same for all runs.

    Returns:
      The FLOPs of its updates from 0 on.
    """
    helped = job.row is not None and job.row.file != "baseline" and job.key not in ("grow", "unigram")
    stage_1 = scripts.planning.stage_1(job.row, job.full) if job.row else 0
    cost = [UPDATE + (PASS if helped and n < stage_1 else 0) for n in range(job.steps)]
    own = cost[job.first :] if restart else cost
    totals, path = np.cumsum(own), Path(job.path)
    path.mkdir(parents=True, exist_ok=True)
    settings = {"name": job.overrides["name"], "seed": job.seed, "steps": job.steps, "batch_rows": BATCH,
                "optimizer": {"name": "adamw", "warmup_steps": 50, "peak_learning_rate": 1.6e-2, "final_fraction": 0.1,
                              "decay_fraction": 0.2, "weight_decay": 0.03}}  # fmt: skip
    found = {"vocabulary": "v", "validation_rows": "r", "objective": "causal", "parameters": PARAMETERS,
             "train_rows": "t", "train_tokens": 640_000, "train_rows_count": TRAIN_ROWS, "seq_len": 128,
             "batch_rows": BATCH, "vocabulary_size": 512, "hardware": "an abacus", "devices": 1, "dtype": "float32",
             "versions": {"jax": "1"}, "helpers": {}}  # fmt: skip
    if job.row and not job.trunk:  # a branch's stages may need none
        found["helpers"] = helpers(job)
    if job.row and job.key == "salt_ds_offline":
        scorer = {"run": f"small {job.seed}", "train_flops": HELPER * 0.12, "parameters": 9}
        made = {"helpers": {"scorer": scorer}, "scores_fingerprint": "s", "scoring_flops": SCORING}
        found["data"] = {"lists": {"list": {"made": made}}}
    (path / "config.json").write_text(json.dumps({"config": settings, "facts": found | dict(facts or {})}))
    lines = []
    for n in range(job.first, job.steps):
        i = n - job.first if restart else n
        record = {"kind": "train", "step": n + 1, "flops": totals[i], "cross_entropy": 5.0 - n / 100,
                  "tokens": 2000.0 * (i + 1),
                  "stage": "assisted" if helped and n < stage_1 else "plain"}  # fmt: skip
        lines.append(json.dumps(record))
    reached = law(sum(cost)) - gain(job)
    lines.append(json.dumps({"kind": "validation", "step": job.steps, "log_perplexity": 2.0, "bits_per_byte": reached}))
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (path / "summary.json").write_text("{}")
    count = len(DOMAINS) * DOCUMENTS * ROWS
    waves = ripple * np.sin(np.arange(count) // ROWS * 2 * math.pi * 5 / DOCUMENTS)  # of mean 0 in every domain
    nats = (reached + waves) * math.log(2) * ROW_BYTES
    for part in parts:
        (path / f"documents-{part}.json").write_text(json.dumps({"part": part, "cross_entropy": nats.tolist()}))
    note = {"command": "c", "commit": "abc", "ended": 0, "seconds": 60.0}
    (path / "evidence.json").write_text(json.dumps(note))
    return float(sum(cost))


def helpers(job: Any) -> dict[str, dict[str, Any]]:
    """The small LMs of a run's first stages, as its config.json has them."""
    small = {"run": f"small {job.seed}", "step": 112, "train_flops": HELPER, "parameters": 36_000}
    if job.key == "unigram":
        return {"teacher": {"run": "slm_assist.assist.ngram:unigram", "step": -1, "train_flops": None, "parameters": 0}}
    if job.key in ("grow", "grow_salt"):
        return {"parent": small} | ({"teacher": small} if job.key == "grow_salt" else {})
    return {"teacher": small} if job.row.file != "baseline" else {}


def write_all(scripts: types.SimpleNamespace, jobs: Sequence[Any], gain: Gain = lambda job: 0.0) -> dict[str, float]:
    """All training runs of students among the jobs; FLOPs of their updates by path."""
    return {
        job.path: write_run(
            scripts, job, gain, restart=job.seed % 2 == 1,
            parts=("validation", "test") if job.key == "cutter" else ("test",) if job.row.test else ("validation",),
        )
        for job in jobs if job.kind == "train" and job.row
    }  # fmt: skip

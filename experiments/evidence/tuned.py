"""What is left of help after fine-tuning: every pre-trained model is fine-tuned in one way on GSM8K."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import work
from compare import T_80, verdict
from matrix import TUNED
from planning import Job

from slm_assist.report import stats

QUALITY = ("log_perplexity", "accuracy")
BASE = "tuned-baseline"


def collect(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Each fine-tuned row: its held-out figures by seed, and how far they are from fine-tuned BASELINE's."""
    values: dict[str, dict[int, dict[str, float]]] = {}
    titles: dict[str, str] = {}
    for job in jobs:
        if job.row and job.row.group == TUNED and work.done(job):
            values.setdefault(job.key, {})[job.seed] = _final(Path(job.path))
            titles[job.key] = job.row.title
    base = values.get(BASE, {})
    return [_row(key, titles[key], own, base) for key, own in values.items()]


def _row(key: str, title: str, own: dict[int, dict[str, float]], base: dict[int, dict[str, float]]) -> dict[str, Any]:
    found: dict[str, Any] = {"key": key, "title": title, "seeds": sorted(own)}
    for name in QUALITY:
        found[name] = stats.estimate([own[seed][name] for seed in sorted(own)]).to_json()
    shared = sorted(set(own) & set(base))
    if key != BASE and shared:
        apart = stats.estimate([own[seed]["log_perplexity"] - base[seed]["log_perplexity"] for seed in shared])
        found["apart"] = apart.to_json() | {"detectable": _detectable(base, len(shared))}
        found["verdict"] = verdict(apart.mean, found["apart"]["interval_95"], found["apart"]["detectable"])
    return found


def _detectable(base: dict[int, dict[str, float]], others: int) -> float | None:
    """As `compare.detectable`, in nats a token."""
    values = [found["log_perplexity"] for found in base.values()]
    if len(values) < 2:
        return None
    limit = stats.least_significant_difference(values, others)
    freedom = len(values) - 1
    return limit * (1 + T_80[min(freedom, len(T_80)) - 1] / stats.t_975(freedom))


def _final(run: Path) -> dict[str, float]:
    """The last validation record: nats a token of the solutions, and next-token accuracy."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = [record for record in records if record["kind"] == "validation"][-1]
    return {name: last[name] for name in QUALITY}

"""What is left of help after fine-tuning: every pre-trained model is fine-tuned in one way on GSM8K."""

from collections.abc import Sequence
from typing import Any

import work
from compare import of_spread, verdict
from matrix import TUNED
from planning import Job

from slm_assist.report import stats
from slm_assist.report.runs import read_run

QUALITY = ("log_perplexity", "accuracy")
BASE = "tuned-baseline"


def collect(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Each fine-tuned row: its held-out figures by seed, and how far they are from fine-tuned BASELINE's."""
    values: dict[str, dict[int, dict[str, Any]]] = {}
    titles: dict[str, str] = {}
    for job in jobs:
        if job.row and job.row.group == TUNED and work.done(job):
            values.setdefault(job.key, {})[job.seed] = read_run(job.path).final
            titles[job.key] = job.row.title
    base = values.get(BASE, {})
    return [_row(key, titles[key], own, base) for key, own in values.items()]


def _row(key: str, title: str, own: dict[int, dict[str, Any]], base: dict[int, dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"key": key, "title": title, "seeds": sorted(own)}
    for name in QUALITY:
        found[name] = stats.estimate([own[seed][name] for seed in sorted(own)]).to_json()
    shared = sorted(set(own) & set(base))
    if key != BASE and shared:
        apart = stats.estimate([own[seed]["log_perplexity"] - base[seed]["log_perplexity"] for seed in shared])
        found["apart"] = apart.to_json() | {
            "detectable": of_spread([found["log_perplexity"] for found in base.values()], len(shared))
        }
        found["verdict"] = verdict(apart.mean, found["apart"]["interval_95"], found["apart"]["detectable"])
    return found

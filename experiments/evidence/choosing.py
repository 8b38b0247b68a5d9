"""Which jobs of a plan are done: what fits into a time, what was asked for; and the plan in words."""

import itertools
from collections.abc import Iterable, Sequence

from matrix import BASELINE, BUCKETS
from planning import TRAIN, Job, Setting

from slm_assist.errors import UserError


def within(setting: Setting, jobs: Iterable[Job], hours: float, processes: int) -> tuple[list[Job], list[Job]]:
    """(jobs that fit into so many hours in the order of rank, those that are dropped); what needs a dropped one is too.

    Args:
      hours: 0 for no limit.
    """
    kept, dropped, seconds = [], [], 0.0
    gone: set[str] = set()
    for job in jobs:
        seconds += seconds_of(setting, job) / processes
        if (hours and seconds > 3600 * hours) or gone & set(job.needs):
            dropped.append(job)
            gone.add(job.path)
        else:
            kept.append(job)
    return kept, dropped


def seconds_of(setting: Setting, job: Job) -> float:
    """What a job takes, about, by one process."""
    return setting.tier.overhead + job.cost / setting.tier.flops


FIELDS = {
    "row": lambda job: job.key,
    "group": lambda job: job.row.group if job.row else "",
    "seed": lambda job: str(job.seed),
    "ratio": lambda job: str(job.ratio),
    "part": lambda job: ("test" if job.row.test else "validation") if job.row else "",
}


def only(jobs: Sequence[Job], text: str) -> list[Job]:
    """The jobs that `text` names, `FIELD=VALUE` or `FIELD=VALUE|VALUE`, or several with commas, which must all hold.

    With them comes what they need, what they are compared with, of the same seeds and part, and the run that cuts the
    buckets, so that a page can be made of them alone.

    Raises:
      UserError: it names none.
    """
    conditions = [condition.partition("=")[::2] for condition in text.split(",")]
    if any(field not in FIELDS for field, _ in conditions):
        raise UserError(f"--only={text}: write row=KEY, group=NAME, seed=N, ratio=N or part=NAME, with commas between")
    chosen = [job for job in jobs if all(FIELDS[field](job) in value.split("|") for field, value in conditions)]
    if not chosen:
        raise UserError(f"--only={text}: no such run is planned; --dry_run lists them")
    beside = {(key, job.ratio, job.seed, job.row.test) for job in chosen if job.row for key in (job.row.pair, BASELINE)}
    wanted = {job.path for job in chosen}
    wanted |= {job.path for job in jobs if job.row and (job.row.group == BUCKETS
               or (job.key, job.ratio, job.seed, job.row.test) in beside)}  # fmt: skip
    for job in reversed(jobs):  # what is needed stands before
        if job.path in wanted:
            wanted.update(job.needs)
    return [job for job in jobs if job.path in wanted]


def describe(setting: Setting, kept: Sequence[Job], dropped: Sequence[Job], processes: int) -> str:
    """A line a row in the order of rank, small LMs and lists that it needs included; what is dropped; the time.

    The hours of a line are those that have passed when all of it is there.
    """
    named, following = [], ""
    for job in reversed(kept):  # what a row needs stands before it
        following = job.key if job.row or not following else following
        named.append((f"{following}, ratio {job.ratio}", job))
    lines, seconds = [], 0.0
    for name, group in itertools.groupby(reversed(named), key=lambda pair: pair[0]):
        jobs = [job for _, job in group]
        seconds += sum(seconds_of(setting, job) for job in jobs) / processes
        seeds = ", ".join(map(str, sorted({job.seed for job in jobs})))
        updates = sum(job.steps - job.first for job in jobs if job.kind == TRAIN)
        models = sum(job.kind == TRAIN for job in jobs)
        lines.append(f"{seconds / 3600:6.2f} h  {name}, seeds {seeds}: {models} runs, {updates:,} updates")
    total = sum(seconds_of(setting, job) for job in (*kept, *dropped)) / processes / 3600
    lines.append(f"{len(kept)} jobs, about {seconds / 3600:.1f} hours with {processes} process(es)")
    if dropped:
        rows = dict.fromkeys(f"{job.key}, ratio {job.ratio}" for job in dropped)
        lines.append(f"dropped, {len(dropped)} jobs (all would take {total:.1f} hours): {'; '.join(rows)}")
    return "\n".join(lines)

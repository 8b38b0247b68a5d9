"""Doing the jobs of a plan: several processes share them, each may be killed at any moment, none is done twice."""

import contextlib
import fcntl
import functools
import gc
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import corpus
import documents
import jax
import planning
import teachers
from matrix import BUCKETS, TUNED
from planning import ENTROPY, LIST, SCORE, TRAIN, Job, Setting

from slm_assist import config, metrics, scoring
from slm_assist import corpus as prepared
from slm_assist.assist import row_list, score_store, selection
from slm_assist.errors import UserError
from slm_assist.selecting import by_domain, select
from slm_assist.train import train

WAIT = 5.0  # seconds until a process looks again whether what it needs is there
NOTE = "evidence.json"  # beside a run's files: who made it


def make_corpus(globs: str, out: Path, split: corpus.Split) -> None:
    """Splits the corpus, once, whatever number of processes wants it."""
    while True:
        with claim(str(out / "corpus")) as mine:
            if mine:
                corpus.make(globs, out / "corpus", split)
                return
        time.sleep(WAIT)


def do_all(
    setting: Setting,
    jobs: Sequence[Job],
    command: str,
    do: Callable[[Setting, Job, str], None] | None = None,
    wait: Callable[[float], None] = time.sleep,
) -> None:
    """Does every job that is not done, in turn with other processes that do the same.

    Returns when all are done, or other processes are at work on all that are left. A job that fails is left out, with
    those that need it, and the others go on.

    Raises:
      UserError: in the end, where jobs failed.
    """
    do = do or do_one
    commit()  # as it is now: the files may change while this runs
    failed: dict[str, str] = {}
    while left := [job for job in jobs if not done(job) and not _hopeless(job, failed)]:
        paths = {job.path for job in left}
        ready = [job for job in left if not paths & set(job.needs)]
        if not _do_next(setting, ready, command, do, failed):
            if len(ready) == len(left):
                break
            wait(WAIT)
    if failed:
        raise UserError(f"{len(failed)} job(s) failed, the first: {next(iter(failed.values()))}")


def _hopeless(job: Job, failed: dict[str, str]) -> bool:
    """Whether a job has failed, or needs one that has; then it joins them."""
    lacking = [path for path in job.needs if path in failed]
    if lacking and job.path not in failed:
        failed[job.path] = f"{job.path}: needs {lacking[0]}"
    return job.path in failed


def _do_next(
    setting: Setting,
    ready: Sequence[Job],
    command: str,
    do: Callable[[Setting, Job, str], None],
    failed: dict[str, str],
) -> bool:
    """Does the first job that no other process has claimed; whether there was one."""
    for job in ready:
        with claim(job.path) as mine:
            if mine and not done(job):
                try:
                    do(setting, job, command)
                except UserError as error:
                    failed[job.path] = f"{job.path}: {error}"
                    print(f"failed: {failed[job.path]}", flush=True)
                return True
    return False


def parts_of(job: Job) -> tuple[str, ...]:
    """The held-out parts that a run is measured on; the one that cuts the buckets, on both."""
    if not job.row or job.row.group == TUNED:
        return ()
    if job.row.group == BUCKETS:
        return (corpus.VALIDATION, corpus.TEST)
    return (corpus.TEST,) if job.row.test else (corpus.VALIDATION,)


def done(job: Job) -> bool:
    """Whether what a job makes is there, and for a run, measured."""
    path = Path(job.path)
    if job.kind == TRAIN:
        return (path / NOTE).is_file() and all(documents.file(path, part).is_file() for part in parts_of(job))
    return (path / "complete").is_file() if job.kind == SCORE else path.is_file()


@contextlib.contextmanager
def claim(path: str) -> Iterator[bool]:
    """Whether this process has `path` for itself now; the claim ends with the process, however that ends."""
    file = Path(f"{path}.claim")
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT)
    try:
        mine = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            mine = False
        yield mine
    finally:
        os.close(descriptor)


def do_one(setting: Setting, job: Job, command: str) -> None:
    """Does one job."""
    print(f"{job.path}: {job.kind}" + (f", {job.steps - job.first} updates" if job.kind == TRAIN else ""), flush=True)
    {TRAIN: _train, SCORE: _score, LIST: _list, ENTROPY: _entropy}[job.kind](setting, job, command)


def _train(setting: Setting, job: Job, command: str) -> None:
    path = Path(job.path)
    teachers.reads = {"folder": str(Path(setting.out) / "corpus"), "tokens": job.full * setting.sizes.tokens}
    overrides = {key: _value(value) for key, value in job.overrides.items()}
    resolved, _ = config.resolve(str(planning.FILES / f"{job.file}.py"), overrides)
    train(resolved, job.path, say=lambda line: None)
    for part in parts_of(job):
        documents.measure(path, setting, part)
    if not (path / NOTE).is_file():
        spent = json.loads((path / "summary.json").read_text(encoding="utf-8"))["seconds"]
        metrics.write_json(path / NOTE, {"command": command, "commit": commit(), "seconds": sum(spent.values())})
    jax.clear_caches()  # dozens of runs in one process
    gc.collect()


def _value(value: Any) -> Any:
    if isinstance(value, planning.Number):
        return json.loads(Path(value.path).read_text(encoding="utf-8"))["weight"]
    return value


def _score(setting: Setting, job: Job, command: str) -> None:
    resolved, _ = config.resolve(str(planning.FILES / f"{job.file}.py"), dict(job.overrides))
    scoring.score(resolved, job.path, say=lambda line: None)
    (Path(job.path) / "complete").touch()
    jax.clear_caches()


def _list(setting: Setting, job: Job, command: str) -> None:
    if job.key == "top":
        select(job.needs[0], job.path, ratio=planning.POOL, say=lambda line: None)
    elif job.key == "share":
        found, top = score_store.open_scores(job.needs[0]), row_list.read(job.needs[1])
        quotas = {name: kept for name, (_, kept) in by_domain(found, top.row_ids).items() if kept}
        select(job.needs[0], job.path, rule="random", rows=len(top), quotas=quotas, seed=job.seed,
               say=lambda line: None)  # fmt: skip
    else:
        resolved, _ = config.resolve(str(planning.FILES / f"{job.file}.py"), dict(job.overrides))
        rows = prepared.prepare(resolved, say=lambda line: None).train
        ids = selection.random(len(rows), job.steps, job.seed)
        names = {"corpus": rows.fingerprint, "rows": len(rows), "vocabulary": rows.vocabulary.fingerprint}
        row_list.write(job.path, row_list.make(ids, **names, made={"rule": "random", "seed": job.seed}))


def _entropy(setting: Setting, job: Job, command: str) -> None:
    metrics.write_json(Path(job.path), documents.matched_smoothing(job.needs[0], setting))


@functools.cache
def commit() -> str:
    """The commit of this code, with `+` behind it where files have been changed since; empty outside git."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=False).stdout.strip()

    found = git("rev-parse", "--short=10", "HEAD")
    return found + ("+" if found and git("status", "--porcelain", "--untracked-files=no") else "")

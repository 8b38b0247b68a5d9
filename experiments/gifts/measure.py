"""What is each gift of a small LM worth? Plans the runs, trains those that are not there yet, and writes the page.

    python experiments/gifts/measure.py --data 'jsonl:pile/train-*.jsonl.zst' \\
        --validation 'jsonl:pile/validation-*.jsonl.zst' --out runs/gifts --dry_run

BASELINE, SALT, SALT_DS, growth, growth then SALT, LET, and BASELINE given the small LM's FLOPs as extra steps; every
compared model is fully decayed (`planning.py`), every seed has a small LM of its own. Without --dry_run it trains. The
same command again goes on; given in several shells at once, they share the runs among them (`taskset -c 0`, `-c 1`
give each a core). The last one writes OUT/README.md, OUT/results.json and OUT/gifts.png (`collect.py`).
"""

import argparse
import contextlib
import dataclasses
import fcntl
import gc
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import collect
import jax
import planning
from planning import Plan, PlannedRun, Settings

from slm_assist import cli, config
from slm_assist.errors import UserError, one_of
from slm_assist.run_dir import RunDir
from slm_assist.train import Stopped, train

WAIT = 5.0  # seconds until a process looks again whether what it needs is there


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options, rest = _parser().parse_known_args(arguments)
    try:
        planned = planning.plan(_settings(options, cli.parse_overrides(rest)))
        chosen = only(planned.runs, options.only)
        if options.dry_run:
            print(planning.describe(planned))
            return 0
        train_all(chosen)
        _collect(planned, Path(options.out), shlex.join(["python", "experiments/gifts/measure.py", *arguments]))
    except UserError as error:
        print(f"measure: error: {error}", file=sys.stderr)
        return 2
    except Stopped as stop:
        print(f"measure: {stop}", file=sys.stderr)
        return 128 + stop.signal
    except KeyboardInterrupt:
        print("measure: stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    default = {field.name: field.default for field in dataclasses.fields(Settings)}
    parser.add_argument("--data", required=True, help="training text, as data.source")
    parser.add_argument("--validation", required=True, help="validation text, as data.validation")
    parser.add_argument("--out", default="runs/gifts", help="directory of the runs and the page")
    parser.add_argument("--seeds", type=int, default=default["seeds"], help="runs of each method; from 0 on")
    parser.add_argument("--steps", type=int, default=default["steps"], help="updates of each method, and its small LM")
    parser.add_argument("--small", default=default["small"], help="model.size of the small LM")
    parser.add_argument("--large", default=default["large"], help="model.size of the students")
    parser.add_argument("--methods", default=",".join(default["methods"]), help="files of experiments/")
    parser.add_argument("--only", default="", help="seed=N or method=NAME: train these now, and what they need")
    parser.add_argument("--dry_run", action="store_true", help="say what would be trained, and stop")
    parser.epilog = "Any other key of slm_assist/config.py is set for all runs with --key=value."
    return parser


def _settings(options: argparse.Namespace, given: dict[str, str]) -> Settings:
    names = ("data", "validation", "out", "seeds", "steps", "small", "large")
    methods = tuple(name for name in options.methods.split(",") if name)
    return Settings(**{name: getattr(options, name) for name in names}, methods=methods, given=given)


def only(runs: Sequence[PlannedRun], text: str) -> list[PlannedRun]:
    """The runs that `text` names (`seed=N`, `method=NAME`; empty: all), with those they need.

    Raises:
      UserError: it names none.
    """
    if not text:
        return list(runs)
    field, _, value = text.partition("=")
    one_of("--only", field, ("seed", "method"))
    chosen = [run for run in runs if str(getattr(run, field)) == value]
    if not chosen:
        raise UserError(f"--only={text}: no such run is planned; as seed=1 or method=salt")
    needed = {path for run in chosen for path in run.needs}
    return [run for run in runs if run in chosen or run.path in needed]


def train_all(
    runs: Sequence[PlannedRun],
    train_one: Callable[[PlannedRun], None] | None = None,
    wait: Callable[[float], None] = time.sleep,
) -> None:
    """Trains every run that has not ended, in turn with other processes that do the same.

    Returns when all have ended, or other processes are at work on all that are left.
    """
    train_one = train_one or _train
    while left := [run for run in runs if not finished(run.path)]:
        ready = [run for run in left if all(map(finished, run.needs))]
        if not _train_next(ready, train_one):
            if len(ready) == len(left):
                return
            wait(WAIT)


def _train_next(ready: Sequence[PlannedRun], train_one: Callable[[PlannedRun], None]) -> bool:
    """Trains the first run that no other process has claimed; whether there was one."""
    for run in ready:
        with claim(run.path) as mine:
            if mine and not finished(run.path):
                train_one(run)
                return True
    return False


def finished(path: str) -> bool:
    return RunDir(path).summary.is_file()


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


def _train(run: PlannedRun) -> None:
    print(f"{run.path}: {run.updates} updates", flush=True)
    resolved, _ = config.resolve(run.file, run.overrides)
    train(resolved, run.path)
    jax.clear_caches()  # dozens of runs in one process
    gc.collect()


def _collect(planned: Plan, out: Path, command: str) -> None:
    left = [run.path for run in planned.runs if not finished(run.path)]
    if left:
        print(f"{len(left)} of {len(planned.runs)} runs have not ended ({left[0]}); the same command, without --only, "
              "goes on with them and writes the page once all have")  # fmt: skip
        return
    with claim(str(out / "page")) as mine:
        if mine:
            print(collect.write(planned, out, command))


if __name__ == "__main__":
    sys.exit(main())

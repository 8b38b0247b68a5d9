"""Does a small LM's help pay, when, and why? Plans the runs, trains those that are not there yet, and writes the page.

    python experiments/evidence/run.py --data 'pile/*.jsonl.zst' --out runs/evidence --hours 3 --dry_run

prints the ranked plan and what it drops. Without --dry_run it trains. The same command again goes on; given in several
shells at once, they share the runs (`taskset -c 0`, `-c 1` give each a core). `--collect` writes OUT/README.md and what
belongs to it from the runs that are there; with `--earlier results.json`, rows of an earlier page stay beside them.
"""

import argparse
import dataclasses
import json
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import choosing
import collect
import corpus
import earlier
import page
import pictures
import planning
import timing
import work
from planning import Job, Setting
from tables import Results
from tiers import TIERS

from slm_assist import cli
from slm_assist.errors import UserError, one_of
from slm_assist.scoring import Stopped as ScoringStopped
from slm_assist.train import Stopped


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options, rest = _parser().parse_known_args(arguments)
    try:
        return _run(options, rest, shlex.join(["python", "experiments/evidence/run.py", *arguments]))
    except UserError as error:
        print(f"evidence: error: {error}", file=sys.stderr)
        return 2
    except (Stopped, ScoringStopped) as stop:
        print(f"evidence: {stop}", file=sys.stderr)
        return 128 + stop.signal
    except KeyboardInterrupt:
        print("evidence: stopped; the same command goes on", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace, rest: list[str], command: str) -> int:
    _check(options)
    given = cli.parse_overrides(rest)
    setting = Setting(options.out, TIERS[options.tier], given, options.tuning, options.seeds_from)
    planning.check(setting)
    jobs = planning.plan(setting)
    if options.collect:  # all that is there, whatever --only says: rows are compared with others
        before = earlier.read(options.earlier) if options.earlier else None
        return _collect(setting, jobs, command, Path(options.page or options.out), before)
    if options.only:
        jobs = choosing.only(jobs, ",".join(options.only))
    kept, dropped = choosing.within(setting, [job for job in jobs if not work.done(job)], options.hours,
                                    options.processes)  # fmt: skip
    if options.dry_run or options.hours:
        print(choosing.describe(setting, kept, dropped, options.processes))
    if options.dry_run:
        return 0
    if options.time:
        print(timing.measure(setting, jobs, command))
        return 0
    work.make_corpus(options.data, Path(options.out), dataclasses.replace(corpus.Split(), unseen=options.unseen))
    work.do_all(setting, kept, command)
    return 0


def _check(options: argparse.Namespace) -> None:
    """Raises `UserError` for options that nothing can be done with."""
    one_of("--tier", options.tier, TIERS)
    if not 0 <= options.hours < math.inf:
        raise UserError(f"--hours={options.hours:g}: give the hours to plan for, or 0 for all of the matrix")
    if options.seeds_from < 0:
        raise UserError(f"--seeds_from={options.seeds_from}: it is added to seeds, so 0 or more")
    if options.processes < 1:
        raise UserError(f"--processes={options.processes}: at least 1 shares the work")
    if (options.earlier or options.page) and not options.collect:
        raise UserError(f"--{'earlier' if options.earlier else 'page'}: it is for --collect; add that")
    if options.earlier and Path(options.earlier).resolve().parent == Path(options.page or options.out).resolve():
        raise UserError(f"--earlier={options.earlier}: the page would take its place; copy it elsewhere first")
    for name in ("train.jsonl", "test.jsonl") if options.tuning else ():
        if not (Path(options.tuning) / name).is_file():
            raise UserError(f"--tuning={options.tuning}: no {name} in it; give GSM8K's train.jsonl and test.jsonl")


def _collect(setting: Setting, jobs: Sequence[Job], command: str, out: Path, before: Results | None) -> int:
    """Writes the page, its figures and its pictures; what theory.py measured there becomes a part of it."""
    results = _short(collect.collect(setting, jobs, command, before))
    drawn = pictures.all_pictures(results)
    results["pictures"] = sorted(drawn)
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, separators=(",", ":")), encoding="utf-8")
    for name, picture in drawn.items():
        (out / name).write_bytes(picture)
    (out / "README.md").write_text(page.markdown(results, page.read_theory(out)), encoding="utf-8")
    print(out / "README.md")
    return 0


def _short(value: Any) -> Any:
    """Floats to seven digits."""
    if isinstance(value, dict):
        return {name: _short(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_short(part) for part in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


ONLY = "row=KEY, group=NAME, seed=N, ratio=N, part=NAME (or KEY|KEY), or some with commas: those, and what they need"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data", required=True, help="files of the corpus: JSON lines in the Pile's form")
    parser.add_argument("--out", default="runs/evidence", help="directory of the runs and the page")
    parser.add_argument("--tuning", default="", help="directory of GSM8K (train.jsonl, test.jsonl), to fine-tune on")
    parser.add_argument("--tier", default="cpu", help=" | ".join(TIERS))
    parser.add_argument("--hours", type=float, default=0.0, help="time to plan for; 0: all of the matrix")
    parser.add_argument("--processes", type=int, default=1, help="how many shells share the work, for the plan")
    parser.add_argument("--seeds_from", type=int, default=0, help="added to all seeds: the same with other seeds")
    parser.add_argument("--unseen", default=corpus.Split().unseen, help="the domain that is never trained on")
    parser.add_argument(
        "--only",
        action="append",
        help=ONLY,
    )
    parser.add_argument("--collect", action="store_true", help="write the page from the runs that are there, and stop")
    parser.add_argument("--page", default="", help="with --collect: where the page goes; else into --out")
    parser.add_argument("--earlier", default="", help="with --collect: results.json whose rows stay, too")
    parser.add_argument("--time", action="store_true", help="time updates, for seconds: when the machine is quiet")
    parser.add_argument("--dry_run", action="store_true", help="say what would be trained, and stop")
    parser.epilog = "Any other key of slm_assist/config.py is set for all runs with --key=value."
    return parser


if __name__ == "__main__":
    sys.exit(main())

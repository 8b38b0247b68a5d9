"""`slm-assist COMMAND ...`: the command line.

slm-assist train experiments/salt.py --run_dir=runs/salt --assist.teacher=runs/small_lm
slm-assist prepare --data.source='jsonl:pile/*.jsonl.zst' --data.domain_field=meta.pile_set_name
slm-assist score experiments/salt_ds_offline.py --out=runs/scores
slm-assist select runs/scores --ratio=0.2 --out=runs/top_fifth.npz
slm-assist report runs/baseline runs/salt --out=report
"""

import argparse
import functools
import os
import signal
import sys
import textwrap
import traceback
from collections.abc import Sequence
from typing import NoReturn, TextIO

from slm_assist.commands import evaluate, generate, hugging_face, plan, report, select
from slm_assist.commands.common import number
from slm_assist.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0 done, 2 a mistake that a line explains, 128 + n signal n."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _main(arguments)
    except UserError as error:
        print(f"slm-assist: error: {error}", file=sys.stderr)
        return _leave(2)
    except BrokenPipeError:  # who read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt as interrupt:
        print("slm-assist: stopped; the same command goes on, or starts again", file=sys.stderr)
        return _leave(128 + (interrupt.args[0] if interrupt.args else signal.SIGINT))
    except Exception:
        if not ("slm_assist.distributed" in sys.modules and sys.modules["slm_assist.distributed"].has_failed()):
            raise
        traceback.print_exc()
        return _leave(1)


def _main(arguments: list[str]) -> int:
    try:
        parser = _parser()
        options, rest = parser.parse_known_args(arguments)
        if options.command is None:
            if rest:
                parser.error(f"{rest[0]!r} comes before a command, or without one")
            parser.print_help()
            return 0
        signal.signal(signal.SIGTERM, _terminate)
        return options.run(options, parse_overrides(rest))
    finally:
        sys.stdout.flush()  # here, where a reader that has left is still understood


def _leave(status: int) -> int:
    """The exit status; of several processes that failed together each ends here, as JAX would wait for the others."""
    if "slm_assist.distributed" in sys.modules:
        sys.modules["slm_assist.distributed"].leave(status)
    return status


def _join(options: argparse.Namespace) -> None:
    """Finds the other processes of this job, if there are any, before anything uses a device."""
    from slm_assist import distributed

    distributed.start(options.coordinator, options.processes, options.process)
    signal.signal(signal.SIGTERM, _terminate)  # JAX has put its own in its place


def _terminate(number: int, _) -> None:
    """SIGTERM ends preparing and compiling as Ctrl-C does; the training loop has a handler of its own."""
    raise KeyboardInterrupt(number)


ABOUT = """\
`slm-assist COMMAND --help` has examples. Exit status: 0 done; 2 a mistake, which one line explains; 130 stopped by
Ctrl-C, 141 by a reader that left (as `| head`), 143 by SIGTERM; 1 anything else."""
KEYS = """\
Any key of slm_assist/config.py is set with --key=value, as --data.source='text:books/*.txt'."""
TRAIN = """\
slm-assist train experiments/salt.py --run_dir=runs/salt --assist.teacher=runs/small_lm
slm-assist train experiments/salt.py --run_dir=runs/pile --assist.teacher=hf:EleutherAI/pythia-70m \\
    --model.size=hf:EleutherAI/pythia-410m --data.source='pile:pile/*.jsonl.zst'
slm-assist train --print_config"""
PREPARE = """\
slm-assist prepare --data.source='text:books/*.txt'
slm-assist prepare experiments/salt.py --data.source='pile:pile/*.jsonl.zst' --part=0/2
slm-assist prepare --data.source='jsonl:pile/*.jsonl.zst' --beam=64 --beam_options='--runner=DirectRunner'"""
SCORE = """\
slm-assist score experiments/salt_ds_offline.py --out=runs/scores --assist.teacher=runs/small_lm
slm-assist score --out=runs/scores --select.scorer=hf:EleutherAI/pythia-70m --data.source='pile:pile/*.jsonl.zst'
slm-assist score --out=runs/scores --select.scorer=runs/small_lm --select.score=perplexity --part=0/4"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as everything here does; its subparsers too."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")

    def print_help(self, file: TextIO | None = None) -> None:
        print(self.format_help(), end="", file=file)  # argparse's own hides that the reader has left


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="slm-assist",
        description="Train a large language model with the help of a small one.",
        epilog=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, run, help_text: str, examples: str, note: str = KEYS) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=help_text,
            description=help_text[0].upper() + help_text[1:] + ".",
            epilog=f"Examples:\n{textwrap.indent(examples, '  ')}\n\n{note}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.set_defaults(run=run)
        return sub

    train = command("train", _train, "train a model, or go on with a run", TRAIN)
    train.add_argument("experiment", nargs="?", default="", help="a file of overrides (see experiments/)")
    train.add_argument("--run_dir", help="where the run lives; the same command again goes on with it")
    _add_processes(train)
    train.add_argument("--fresh", action="store_true", help="start over, beside run_dir where that exists")
    train.add_argument("--print_config", action="store_true", help="show every key and who set it, and stop")

    prepare = command("prepare", _prepare, "make the rows of a corpus, once, in the cache", PREPARE)
    prepare.add_argument("experiment", nargs="?", default="", help="a file of overrides (see experiments/)")
    prepare.add_argument("--part", help="I/N: make part I of N, counted from 0; whoever makes the last one joins them")
    prepare.add_argument("--beam", type=number(int), default=0, help="parts to make as an Apache Beam pipeline")
    prepare.add_argument(
        "--beam_options", default="", help="Beam's own options, in one word: '--runner=... --project=...'"
    )

    score = command("score", _score, "score every row of a corpus by a small LM", SCORE)
    score.add_argument("experiment", nargs="?", default="", help="a file of overrides (see experiments/)")
    score.add_argument("--out", required=True, help="directory of the scores; the same command again goes on with it")
    score.add_argument("--part", help="I/N: this process is I of N that share the work")
    _add_processes(score)
    for module in (select, plan, report, hugging_face, evaluate, generate):
        module.add(command)
    return parser


def _add_processes(command: argparse.ArgumentParser) -> None:
    """For runs of several processes; Slurm, TPU pods and GKE say the same by themselves."""
    command.add_argument("--coordinator", default="", help="HOST:PORT of process 0, where several processes run as one")
    command.add_argument("--processes", type=number(int), default=0, help="how many processes there are")
    command.add_argument("--process", type=number(int), default=-1, help="which of them this one is, from 0")


def parse_part(text: str | None) -> tuple[int, int] | None:
    """`I/N` as (I, N), 0 <= I < N."""
    if not text:
        return None
    index, slash, count = text.partition("/")
    if slash and index.isdecimal() and count.isdecimal() and int(index) < int(count):
        return int(index), int(count)
    raise UserError(f"--part={text}: give I/N, process I of N counted from 0, as 0/4")


def parse_overrides(arguments: Sequence[str]) -> dict[str, str]:
    """`--key=value` words that no parser took, as `{key: value}`."""
    overrides: dict[str, str] = {}
    for word in arguments:
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not equals:
            raise UserError(f"{word!r} is not understood: keys are set with --key=value")
        overrides[key] = value
    return overrides


def _train(options: argparse.Namespace, overrides: dict[str, str]) -> int:
    from slm_assist import config

    resolved, origins = config.resolve(options.experiment, overrides)
    if options.print_config:
        print(config.describe(resolved, origins))
        return 0
    if not options.run_dir:
        raise UserError("where shall the run live? give --run_dir=DIRECTORY")
    _join(options)
    from slm_assist.train import Stopped, train

    try:
        run = train(resolved, options.run_dir, fresh=options.fresh)
    except Stopped as stop:
        print(f"slm-assist: {stop}", file=sys.stderr)
        return 128 + stop.signal
    print(run)
    return 0


def _prepare(options: argparse.Namespace, overrides: dict[str, str]) -> int:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # preparing needs no accelerator; leave it to others
    from slm_assist import config
    from slm_assist.corpus import prepare, prepare_as_told

    part = parse_part(options.part)
    if part and options.beam:
        raise UserError("--part and --beam: Beam makes all parts; give one of the two")
    resolved, _ = config.resolve(options.experiment, overrides)
    if options.beam:
        from slm_assist.data import beam

        make = functools.partial(prepare_as_told, config.to_dict(resolved))
        beam.prepare(make, options.beam, options.beam_options.split())
    prepared = prepare(resolved, say=print, part=part)
    print(prepared.path if prepared else "this part is made; the rows are joined when all are there")
    return 0


def _score(options: argparse.Namespace, overrides: dict[str, str]) -> int:
    from slm_assist import config, distributed
    from slm_assist.scoring import Stopped, score

    part = parse_part(options.part)
    # The experiment may be one that reads the list to come.
    scoring = {"select.rows": "online", "select.list": "", "select.rule": "top"}
    resolved, _ = config.resolve(options.experiment, scoring | overrides)
    if part is None:
        _join(options)
    try:
        with distributed.together() as group:
            print(score(resolved, options.out, part=part))
            group.wait("scored")  # JAX gives up on processes that end much later than others
    except Stopped as stop:
        print(f"slm-assist: {stop}", file=sys.stderr)
        return _leave(128 + stop.signal)
    return 0


if __name__ == "__main__":
    sys.exit(main())

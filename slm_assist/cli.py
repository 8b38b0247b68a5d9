"""`slm-assist COMMAND ...`: the command line.

slm-assist train experiments/salt.py --run_dir=runs/salt --assist.teacher=runs/small_lm
slm-assist prepare --data.source='jsonl:pile/*.jsonl.zst' --data.domain_field=meta.pile_set_name
slm-assist report runs/baseline runs/salt --out=report
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from slm_assist.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0 done, 2 a mistake that a line explains, 128 + n signal n."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    try:
        signal.signal(signal.SIGTERM, _terminate)
        return options.run(options, parse_overrides(rest))
    except UserError as error:
        print(f"slm-assist: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print("slm-assist: stopped before anything was trained; the same command starts again", file=sys.stderr)
        return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)


def _terminate(number: int, _) -> None:
    """SIGTERM ends preparing and compiling as Ctrl-C does; the training loop has a handler of its own."""
    raise KeyboardInterrupt(number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="slm-assist",
        description="Train a large language model with the help of a small one.",
        epilog="Any key of slm_assist/config.py is set with --key=value, as --assist.weight=0.5.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, run, help_text: str, example: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=help_text,
            description=help_text[0].upper() + help_text[1:] + ".",
            epilog=f"Example: {example}\nAny key of slm_assist/config.py is set with --key=value.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.set_defaults(run=run)
        return sub

    train = command(
        "train",
        _train,
        "train a model, or go on with a run",
        "slm-assist train experiments/salt.py --run_dir=runs/salt --assist.teacher=runs/small_lm",
    )
    train.add_argument("experiment", nargs="?", default="", help="a file of overrides (see experiments/)")
    train.add_argument("--run_dir", help="where the run lives; the same command again goes on with it")
    train.add_argument("--fresh", action="store_true", help="start over, beside run_dir where that exists")
    train.add_argument("--print_config", action="store_true", help="show every key and who set it, and stop")

    prepare = command(
        "prepare",
        _prepare,
        "make the rows of a corpus, once, in the cache",
        "slm-assist prepare --data.source='text:books/*.txt'",
    )
    prepare.add_argument("experiment", nargs="?", default="", help="a file of overrides (see experiments/)")

    report = command(
        "report",
        _report,
        "compare runs on one page",
        "slm-assist report runs/baseline runs/salt --out=report",
    )
    report.add_argument("runs", nargs="+", metavar="RUN", help="run directories")
    report.add_argument(
        "--baseline", help="name or directory of the run to compare with; by default the one without help"
    )
    report.add_argument("--out", default="report", help="directory for report.html, PNGs and results.json")
    return parser


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
    from slm_assist.experiment import prepare

    resolved, _ = config.resolve(options.experiment, overrides)
    print(prepare(resolved, say=print).path)
    return 0


def _report(options: argparse.Namespace, overrides: dict[str, str]) -> int:
    if overrides:
        raise UserError(f"--{next(iter(overrides))} is not an option of report; see slm-assist report --help")
    from slm_assist import report

    report.run_report(options.runs, options.out, baseline=options.baseline)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`slm-assist report`: runs on one page."""

import argparse

from slm_assist.commands.common import Command, refuse

EXAMPLES = """\
slm-assist report runs/baseline runs/salt --out=report
slm-assist report runs/small_lm runs/baseline runs/rkd runs/salt --baseline=rkd --out=against_rkd
slm-assist report runs/baseline runs/salt_ds --scores=runs/scores --lists=runs/top_fifth.npz --out=report"""


def add(command: Command) -> None:
    """Adds the subcommand."""
    report = command("report", run, "compare runs on one page", EXAMPLES, "")
    report.add_argument("runs", nargs="+", metavar="RUN", help="run directories")
    report.add_argument(
        "--baseline", help="name or directory of the run to compare with; by default the one without help"
    )
    report.add_argument("--out", default="report", help="directory for report.html, PNGs and results.json")
    report.add_argument("--scores", default="", help="directories of scores to show, separated by commas")
    report.add_argument("--lists", default="", help="lists of rows to compare, separated by commas")


def run(options: argparse.Namespace, overrides: dict[str, str]) -> int:
    """Runs it and returns the exit status."""
    refuse(overrides, "report")
    from slm_assist import report

    more = {name: [word for word in getattr(options, name).split(",") if word] for name in ("scores", "lists")}
    report.run_report(options.runs, options.out, baseline=options.baseline, **more)
    return 0

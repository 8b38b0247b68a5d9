"""`slm-assist plan`: what a run needs, costs and takes."""

import argparse
import os

from slm_assist.commands.common import Command, number

EXAMPLES = """\
slm-assist plan experiments/scale/salt_2.8b.py --devices=v5p:128
slm-assist plan experiments/pretrained/pythia_410m.py --devices=h100:8 --estimate
slm-assist plan experiments/salt.py --devices=v5e:4 --teacher_size=laptop-small --batch_rows=64 --json=plan.json"""


def add(command: Command) -> None:
    """Adds the subcommand."""
    plan = command("plan", run, "say what a run needs, costs and takes, before any machine is rented", EXAMPLES)
    plan.add_argument("experiment", nargs="?", default="", help="a file of overrides (see experiments/)")
    plan.add_argument("--devices", required=True, help="KIND:N, as v5e:256 or h100:64; of TPUs also v5p:4x4x8")
    plan.add_argument("--teacher_size", default="", help="named size of the small LM, where its run is not there yet")
    plan.add_argument("--utilisation", type=number(float), default=0.0, help="assumed share of the peak FLOP/s")
    plan.add_argument("--estimate", action="store_true", help="memory by arithmetic, even where XLA could compile")
    plan.add_argument("--json", default="", help="write everything to this file")


def run(options: argparse.Namespace, overrides: dict[str, str]) -> int:
    """Runs it and returns the exit status."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # it says what others need, and takes none of this machine's
    from slm_assist import plan

    plan.run(
        options.experiment,
        overrides,
        options.devices,
        helper_size=options.teacher_size,
        utilisation=options.utilisation,
        compiling=not options.estimate,
        json_file=options.json,
    )
    return 0

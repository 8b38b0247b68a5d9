"""`slm-assist select`: from scores to a list of rows."""

import argparse
import os

from slm_assist.commands.common import Command, number, refuse

EXAMPLES = """\
slm-assist select runs/scores --ratio=0.2 --out=runs/top_fifth.npz
slm-assist select runs/scores --rule=band --low=0.4 --high=0.6 --ratio=0.2 --out=runs/middle.npz
slm-assist select runs/scores --rows=100000 --quotas=Books=2,News=1 --out=runs/books.npz"""


def add(command: Command) -> None:
    """Adds the subcommand."""
    select = command("select", run, "choose rows by their scores and write the list", EXAMPLES, "")
    select.add_argument("scores", help="a directory that `slm-assist score` wrote")
    select.add_argument("--out", required=True, help="the list, a file .npz")
    select.add_argument("--rule", default="top", help="top | band | gumbel | random")
    select.add_argument("--rows", type=number(int), default=0, help="how many rows to keep, or")
    select.add_argument("--ratio", type=number(float), default=0.0, help="which part of them")
    select.add_argument("--low", type=number(float), default=0.0, help="band: from this quantile of the scores")
    select.add_argument("--high", type=number(float), default=1.0, help="band: to this one")
    select.add_argument("--tau", type=number(float), default=0.1, help="gumbel: scale of the noise on the scores")
    select.add_argument("--seed", type=number(int), default=0, help="gumbel, random: of the draw")
    select.add_argument("--quotas", default="", help="natural | even | DOMAIN=SHARE,...: a share for each domain")


def run(options: argparse.Namespace, overrides: dict[str, str]) -> int:
    """Runs it and returns the exit status."""
    refuse(overrides, "select")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from slm_assist.assist.row_list import parse_quotas
    from slm_assist.selecting import select

    names = ("rule", "rows", "ratio", "low", "high", "tau", "seed")
    chosen = {name: getattr(options, name) for name in names}
    print(select(options.scores, options.out, quotas=parse_quotas(options.quotas), **chosen).path)
    return 0

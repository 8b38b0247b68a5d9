"""What is a small LM worth? Trains one, then a larger LM several ways, and writes it all on one page.

    python experiments/quickstart.py                                  # the Python sources you have: no download
    python experiments/quickstart.py --data 'text:books/*.txt'        # your own text
    python experiments/quickstart.py --data 'jsonl:pile/*.jsonl.zst' --domain_field meta.pile_set_name
    python experiments/quickstart.py --seeds 3                        # intervals; three times as long
    python experiments/quickstart.py --gifts labels,data,weights,representations    # twice as long

The small LM and BASELINE (no help), then a run or more for each gift. All see the same rows in the same order, but
those whose data is chosen. Each is resumable: the same command goes on. The page is OUT/report.html.

    labels           RKD (soft labels for the whole run) and SALT (soft labels at first, then none)
    data             SALT_DS: SALT, and the rows of that first part chosen by the small LM; without labels, rows only
    weights          grow: the large LM begins as the small one; with labels, also SALT after it
    representations  LET: an early layer follows the small LM's last one; with labels, also together with SALT
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from slm_assist import cli, config, report
from slm_assist.data.sources import open_source
from slm_assist.errors import UserError, one_of
from slm_assist.run_dir import RunDir
from slm_assist.train import Stopped, train

HERE = Path(__file__).parent
GIFTS = ("labels", "data", "weights", "representations")
HELPER_KEYS = ("assist.teacher", "select.scorer", "represent.helper", "grow.helper")
STEPS = 240
SMALL_TEXT = 40e6  # bytes of text below which more than 1 % is held out, so that validation is not all noise


def main(arguments: list[str] | None = None) -> int:
    options, rest = _parser().parse_known_args(arguments)
    began = time.perf_counter()
    try:
        given = cli.parse_overrides(rest)
        wanted, shared = methods(options.gifts), _shared_overrides(options, given) | given
        runs = [
            run_method(method, seed, Path(options.out), shared) for seed in range(options.seeds) for method in wanted
        ]
        report.run_report([str(run) for run in runs], options.out)
    except UserError as error:
        print(f"quickstart: error: {error}", file=sys.stderr)
        return 2
    except Stopped as stop:
        print(f"quickstart: {stop}", file=sys.stderr)
        return 128 + stop.signal
    except KeyboardInterrupt:
        print("quickstart: stopped; the same command goes on", file=sys.stderr)
        return 130
    print(f"done in {(time.perf_counter() - began) / 60:.1f} minutes")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data", default="python:", help="python: | text:GLOB | jsonl:GLOB")
    parser.add_argument("--domain_field", default="", help="jsonl: dotted field with the domain")
    parser.add_argument("--out", default="runs/quickstart", help="directory of the runs and the report")
    parser.add_argument("--scale", type=float, default=1.0, help="times as many steps")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each method; 3 give intervals")
    parser.add_argument("--gifts", default="labels,data", help=f"of {', '.join(GIFTS)}; separated by commas")
    parser.epilog = "Any key of slm_assist/config.py is set for all runs with --key=value."
    return parser


def methods(gifts: str) -> list[str]:
    """The experiment files to run for the gifts that `--gifts` names.

    Raises:
      UserError: there is no such gift.
    """
    chosen = {gift.strip() for gift in gifts.split(",") if gift.strip()}
    for gift in chosen:
        one_of("--gifts", gift, GIFTS)
    labels, found = "labels" in chosen, ["small_lm", "baseline"]
    found += ["rkd", "salt"] if labels else []
    if "data" in chosen:
        found.append("salt_ds" if labels else "select_only")
    for gift, alone, with_labels in (("weights", "grow", "grow_salt"), ("representations", "let", "let_salt")):
        if gift in chosen:
            found += [alone, with_labels] if labels else [alone]
    return found


def _shared_overrides(options: argparse.Namespace, given: dict[str, str]) -> dict[str, Any]:
    """What all runs have in common; a number of steps among `given` takes the place of --scale."""
    if not 0 < options.scale < 1e6 or options.seeds < 1:
        raise UserError("--scale must be above 0 and --seeds at least 1")
    steps = config.parse("steps", given.get("steps", max(20, round(STEPS * options.scale))), STEPS)
    return {
        "steps": steps,
        "optimizer.warmup_steps": steps // 10,
        "data.source": options.data,
        "data.domain_field": options.domain_field,
        "data.validation_fraction": _validation_fraction(options.data),
        "validation.every": -(-steps // 12),
        "validation.rows": 160,
        "checkpoint.every": max(1, steps // 4),
        "mesh.data": 1,
    }


def _validation_fraction(source: str) -> float:
    """1 % of much text, up to 10 % of little."""
    return min(0.1, max(0.01, 0.01 * SMALL_TEXT / max(open_source(source).total_bytes, 1)))


def run_method(method: str, seed: int, out: Path, shared: dict[str, Any]) -> RunDir:
    """Trains one method with one seed, or goes on with it; a seed has a small LM of its own."""
    directory = out / f"seed-{seed}"
    overrides = shared | {"seed": seed, "data.order_seed": seed}
    if method != "small_lm":
        overrides["validation.buckets"] = str(out / "seed-0" / "small_lm")  # one cut for all seeds
    file = str(HERE / f"{method}.py")
    set_there = config.read_experiment(file)
    overrides |= {key: str(directory / "small_lm") for key in HELPER_KEYS if key in set_there}
    if "select.rows" in set_there:
        overrides["select.scorer_step"] = -1  # after 12 % of so few updates, too little is in the top 10 to choose by
    resolved, _ = config.resolve(file, overrides)
    return train(resolved, str(directory / method))


if __name__ == "__main__":
    sys.exit(main())

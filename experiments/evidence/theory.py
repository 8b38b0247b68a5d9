"""Theory beside measurement: runs every figure of slm_assist/theory, writes numbers and pictures, prints Markdown.

    python experiments/evidence/theory.py --out runs/theory

About a minute on one CPU core. OUT/theory.json has every figure: what is predicted, what was measured, its interval,
whether they agree, and what is drawn; OUT/theory-NAME.png are the pictures. Sources, teachers and classes are known
exactly; what is random is said beside each figure. The same seed gives the same numbers.
"""

import argparse
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from work import commit

from slm_assist import metrics
from slm_assist.errors import UserError
from slm_assist.theory import figures, figures_tabular, pictures
from slm_assist.theory.figures import Figure

REPETITIONS = 200  # of the bounds' samples; the other figures have their own numbers, scaled with this one
SIGNS = {"at most that": "≤ ", "at least that": "≥ "}


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(arguments)
    try:
        results = measure(options.repetitions, options.seed, Path(options.out))
        results["command"] = shlex.join(["python", "experiments/evidence/theory.py", *arguments])
        metrics.write_json(Path(options.out) / "theory.json", results)
    except (UserError, OSError) as error:
        print(f"theory: error: {error}", file=sys.stderr)
        return 2
    print(markdown(results))
    return 0


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", metavar="DIR", required=True, help="where theory.json and the pictures go")
    made.add_argument("--repetitions", type=int, default=REPETITIONS, help=f"of each sample (default {REPETITIONS})")
    made.add_argument("--seed", type=int, default=0, help="of everything that is drawn (default 0)")
    return made


def measure(repetitions: int, seed: int, out: Path) -> dict[str, Any]:
    """Every figure, as it goes into theory.json; its picture is written into `out`.

    Raises:
      UserError: too few repetitions for intervals.
    """
    if repetitions < 80 or seed < 0:  # fewer than 72 samples cannot show a coverage of 0.95, even if it always holds
        raise UserError(f"--repetitions={repetitions} --seed={seed}: at least 80, and a seed of 0 or more")
    out.mkdir(parents=True, exist_ok=True)
    began, times, found = time.perf_counter(), lambda n: max(20, round(n * repetitions / REPETITIONS)), []
    for make in (
        lambda: figures.bias(),
        lambda: figures.variance(repetitions=times(200), seed=seed),
        lambda: figures.martingale(rows=times(20_000), seed=seed),
        lambda: figures.coverage(repetitions=times(200), seed=seed),
        lambda: figures.rate(repetitions=times(200), seed=seed),
        lambda: figures_tabular.best_weight(repetitions=times(6000), seed=seed),
        lambda: figures_tabular.floor(repetitions=times(400), seed=seed),
        lambda: figures_tabular.crossover(repetitions=times(2000), seed=seed),
        lambda: figures_tabular.excess(repetitions=times(20), seed=seed),
        lambda: figures_tabular.network(seed=seed),
    ):
        found.append(make())
        (out / f"theory-{found[-1].name}.png").write_bytes(pictures.picture(found[-1]))
    return {
        "command": "",
        "commit": commit(),
        "repetitions": repetitions,
        "seed": seed,
        "seconds": round(time.perf_counter() - began, 1),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": {"python": platform.python_version()} | {n: metadata.version(n) for n in ("jax", "numpy", "optax")},
        "figures": [_finite(figure) for figure in found],
    }


def _finite(value: Any) -> Any:
    """As JSON has it: what is infinite (the KL of a student that gives 0) becomes null."""
    if isinstance(value, Figure):
        return _finite(value.to_json())
    if isinstance(value, dict):
        return {str(key): _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value


def markdown(results: dict[str, Any]) -> str:
    """The section of the evidence page: of each figure what the theorem predicts, what was measured, the verdict."""
    lines = [check for figure in results["figures"] for check in figure["checks"]]
    held = [check for check in lines if check["rule"] in SIGNS]
    predicted = [check for check in lines if check["rule"] not in SIGNS]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    parts = [
        "## Theory",
        "Sources whose law is known exactly, so risks, variances, increments and every term of a bound are computed, "
        "not estimated; only rows are drawn. Intervals are of 95 %. `agrees` follows from the numbers: the interval "
        "contains the prediction (=), lies on its side of it (≤, ≥), or the measurement is within a stated share (≈). "
        "Of what is right, one in twenty of the first kind disagrees by chance.",
        f"{_agree(held)} bounds (≤, ≥), many of them loose, hold; of what is predicted (=, ≈) {_agree(predicted)} "
        f"agree. `{results['command']}`, commit {results['commit'] or 'unknown'}, {results['seconds']:g} s on "
        f"{results['cores']} core(s); {versions}; seed {results['seed']}.",
    ]
    for figure in results["figures"]:
        parts += [f"### {figure['title']}", f"Predicted: {figure['predicts']}. Drawn: {figure['drawn']}.",
                  _table(("figure", "the theorem predicts", "measured", "agrees?"), map(_row, figure["checks"])),
                  f"![{figure['title']}: predicted and measured](theory-{figure['name']}.png)"]  # fmt: skip
        if figure["note"]:
            parts.insert(-1, figure["note"])
        if figure["name"] == "coverage":
            parts.insert(-1, _terms(figure["data"]))
    return "\n\n".join(parts) + "\n"


def _agree(checks: Sequence[dict[str, Any]]) -> str:
    return f"{sum(check['agrees'] for check in checks)} of {len(checks)}"


def _row(check: dict[str, Any]) -> tuple[str, ...]:
    what = check["what"] + (f" ({check['note']})" if check["note"] else "")
    sign = SIGNS.get(check["rule"], "≈ " if check["rule"].startswith("within") else "= ")
    predicted = sign + number(check["predicted"])
    if check["rule"].startswith("within"):
        predicted += f", {check['rule']}"
    measured = number(check["measured"])
    if check["interval"] is not None:
        measured += " [{}, {}]".format(*map(number, check["interval"]))
    return what.replace("|", "\\|"), predicted, measured, "yes" if check["agrees"] else "**no**"


def _terms(data: dict[str, Any]) -> str:
    """Every term of the paper's two bounds at the largest N, and the truth beside them."""
    rows = []
    for item in data["bounds"]:
        for i, (weight, n) in enumerate(zip(item["weight"], item["rows"], strict=True)):
            if item["form"] in ("covering", "martingale") and n == max(item["rows"]):
                terms = item["terms"][i]
                variance = [terms[key] for key in ("variance", "variance_hat", "variance_best") if key in terms]
                rows.append((item["words"], f"{weight:g}", number(terms["bias"]), " + ".join(map(number, variance)),
                             number(terms["remainder"]), number(terms["total"]), number(item["truth"][i])))  # fmt: skip
    n, members = max(data["bounds"][0]["rows"]), data["members"]
    totals = [terms["total"] for item in data["bounds"] for terms in item["terms"]]
    empty = sum(total > data["log_vocab"] for total in totals)
    header = ("bound", "w", "bias", "variance", "remainder", "total", "truth, 95 % quantile")
    return (f"Every term at N = {n} rows, in nats a token; |Theta| = {members}, M = {data['largest_loss']:.3f} and TV "
            f"= {data['total_variation']:.4f} are computed, delta = {data['delta']:g}. ln V, what guessing costs, is "
            f"{data['log_vocab']:.2f}: a bound above it says nothing, as do {empty} of {len(totals)} (all forms, w and "
            "N).\n\n" + _table(header, rows))  # fmt: skip


def _table(header: Sequence[str], rows) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows])


def number(value: float | None) -> str:
    """Four digits, and no exponent where none is needed."""
    if value is None:
        return "infinite"
    if value == 0 or 1e-4 <= abs(value) < 1e4:
        return f"{value:.4g}"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.2e}"


if __name__ == "__main__":
    sys.exit(main())

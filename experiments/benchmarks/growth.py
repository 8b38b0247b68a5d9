"""How time and memory grow with batch, row length, vocabulary, depth and devices.

    python experiments/benchmarks/growth.py --out FILE.json --plot FILE.png

From one base setting each axis is doubled a few times while the others stay. For the plain and the assisted step:
seconds a token (the median of rounds in which all points of an axis take turns), temporary bytes a token on one device
(XLA's), and FLOPs a token on one device (trip-counted). An exponent is the slope of a straight line through the
logarithms. JSON to stdout, the table of exponents to stderr.

Expected exponents of FLOPs a token: batch 0; length between 0 and 1 (attention's 12 L T d beside the rest); vocabulary
and depth between 0 and 1 (6 V d beside 72 L d^2, and the other way round), so near 0 where the base is dominated by the
other; devices, the batch being shared out, -1. Time should follow FLOPs, and fall with the batch while a fixed part
(the optimizer, 28 bytes a parameter) is spread over more tokens. Memory a token: -1 to 0 with the batch (gradients are
fixed, activations are not), about 0 with the length except for attention that keeps [B, N, T, T], below 1 with the
vocabulary and the depth.

On CPUs the devices are virtual: they share the cores, so that their time says nothing and is left out; FLOPs and memory
of a device hold. About four minutes on two cores.
"""

import argparse
import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import common
import jax
import numpy as np
import setting as setting_lib

from slm_assist import compiled as compiled_lib

AXES = ("batch", "length", "vocabulary", "depth", "devices")
STEPS = ("plain", "assisted")
QUANTITIES = ("seconds", "temporary_bytes", "flops")


def points(axis: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The settings of an axis: the base, and that with one of its figures doubled again and again."""
    base = {
        "batch": options.rows,
        "length": options.seq_len,
        "vocabulary": options.vocab,
        "depth": options.layers,
        "devices": 1,
    }
    values = [base[axis] * 2**n for n in range(options.doublings + 1)]
    if axis == "devices":
        base["batch"] = options.rows * 2**options.doublings
        values = [n for n in values if n <= jax.device_count()]
    return [base | {axis: value} for value in values]


def compiler(options: argparse.Namespace) -> Callable[..., tuple[setting_lib.Setting, dict[str, Any]]]:
    """Point -> its setting and compiled steps; the axes have points in common. The teacher gets deeper too."""

    @functools.cache
    def compiled(batch: int, length: int, vocabulary: int, depth: int, devices: int):
        student, teacher = f"{depth}x{options.width}", f"{max(1, depth // 2)}x{options.teacher_width}"
        made = setting_lib.build(student, teacher, vocabulary, batch, length, scan_layers=True, mesh__data=devices)
        return made, setting_lib.compile_all(made, STEPS)[0]

    return compiled


def measure(axis: str, options: argparse.Namespace, compiled: Callable) -> dict[str, Any]:
    """Figures of each point of an axis, a token; `compiled` is that of `compiler`."""
    timed = axis != "devices" or jax.default_backend() != "cpu"
    made = [compiled(**point) for point in points(axis, options)]
    found: dict[str, dict[str, list[float]]] = {step: {name: [] for name in QUANTITIES} for step in STEPS}
    calls = {}
    for place, (setting, programs) in enumerate(made):
        for step, program in programs.items():
            found[step]["temporary_bytes"].append(compiled_lib.memory(program).temporaries / setting.tokens)
            found[step]["flops"].append(compiled_lib.flops(program) / setting.tokens)
        if timed:
            calls |= {(place, step): call for step, call in prepared(setting, programs).items()}
    times = common.interleave(calls, options.rounds) if timed else {}
    for (place, step), seconds in times.items():
        found[step]["seconds"].append(seconds.median / made[place][0].tokens)
    if not timed:
        for step in STEPS:
            del found[step]["seconds"]
    values = [point[axis] for point in points(axis, options)]
    exponents = {step: {name: exponent(values, ys) for name, ys in figures.items()} for step, figures in found.items()}
    return {"values": values, "exponents": exponents, "a_token": found, "base": setting_lib.describe(made[0][0])}


def prepared(made: setting_lib.Setting, programs: dict[str, Any]) -> dict[str, Any]:
    """Calls of both steps."""
    batch, helpers = setting_lib.new_batch(made), setting_lib.new_helpers(made)
    steps = {
        "plain": lambda state: programs["plain"](state, batch, {}),
        "assisted": lambda state: programs["assisted"](state, batch, helpers),
    }
    return common.keep(setting_lib.new_state(made), steps)


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Slope of the least-squares line through (log x, log y); None of fewer than two points, or where y is 0."""
    if len(xs) < 2 or min(ys) <= 0:
        return None
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


def table(axes: dict[str, Any]) -> str:
    """The exponents in Markdown."""
    names = [(step, name) for step in STEPS for name in QUANTITIES]
    lines = ["| axis | " + " | ".join(f"{step}, {name}" for step, name in names) + " |", "|---" * 7 + "|"]
    for axis, found in axes.items():
        values = [found["exponents"][step].get(name) for step, name in names]
        cells = ["" if value is None else f"{value:.2f}" for value in values]
        lines.append(f"| {axis}, {found['values'][0]} to {found['values'][-1]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(axes: dict[str, Any], path: str) -> None:
    """One column an axis, one line a step, logarithmic both ways; the legends have the exponents."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(axes), 8), layout="constrained")
    grid = figure.subplots(len(QUANTITIES), len(axes), squeeze=False)
    for column, (axis, found) in enumerate(axes.items()):
        for row, name in enumerate(QUANTITIES):
            panel = grid[row][column]
            for step in STEPS:
                ys, slope = found["a_token"][step].get(name), found["exponents"][step].get(name)
                if ys and min(ys) > 0:
                    label = step if slope is None else f"{step} {slope:+.2f}"
                    panel.loglog(found["values"], ys, marker="o", label=label, base=2)
                    panel.legend(fontsize=8)
            if axis == "devices" and name == "seconds" and not found["a_token"]["plain"].get(name):
                panel.text(0.5, 0.5, "virtual devices:\nnot timed", ha="center", transform=panel.transAxes)
            panel.set_xlabel(axis)
            panel.set_ylabel(f"{name.replace('_', ' ')} a token" if column == 0 else "")
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--doublings", type=int, default=3, help="of each axis (default 3)")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--seq_len", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--teacher_width", type=int, default=128)
    parser.add_argument("--plot", metavar="FILE.png", help="also draw it")
    options = parser.parse_args()
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", 2**options.doublings)  # before any device is asked for
    compiled = compiler(options)
    axes = {axis: measure(axis, options, compiled) for axis in options.axes}
    print(table(axes), file=sys.stderr)
    if options.plot:
        plot(axes, options.plot)
    common.finish(options, {"axes": axes})


if __name__ == "__main__":
    common.run(main)

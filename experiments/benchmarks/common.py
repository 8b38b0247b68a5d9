"""What every benchmark shares: timing in turn, ratios within a round, the machine, and JSON out.

A benchmark is a script; `import common` works from its directory. Ratios are taken within a round, between calls
that follow each other, so that what slows a machine for a while slows both sides.
"""

import argparse
import functools
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from slm_assist import metrics
from slm_assist.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("jax", "jaxlib", "flax", "optax")


class Times(NamedTuple):
    """Figures of several rounds, seconds or their ratios: median, lowest, highest, and each."""

    median: float
    low: float
    high: float
    all: tuple[float, ...]

    @classmethod
    def of(cls, values) -> "Times":
        """From one figure a round, at least one."""
        values = tuple(float(value) for value in values)
        return cls(statistics.median(values), min(values), max(values), values)


def interleave(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Times]:
    """Seconds of each call, where the calls take turns.

    Args:
      calls: functions without arguments; what they return is waited for.
      rounds: how often each is timed, at least once.
      warmup: rounds before that are not counted.
      clock: gives seconds.
    """
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warmup + rounds):
        for name, call in calls.items():
            began = clock()
            jax.block_until_ready(call())
            if turn >= warmup:
                spent[name].append(clock() - began)
    return {name: Times.of(seconds) for name, seconds in spent.items()}


def ratio(a: Times, b: Times) -> Times:
    """Of the rounds' own ratios a / b: their median and spread; not the ratio of the medians."""
    return Times.of(x / y for x, y in zip(a.all, b.all, strict=True))


def difference(a: Times, b: Times) -> Times:
    """a - b within each round."""
    return Times.of(x - y for x, y in zip(a.all, b.all, strict=True))


def keep(state: Any, steps: Mapping[str, Callable[[Any], tuple[Any, Any]]]) -> dict[str, Callable[[], Any]]:
    """Calls for `interleave` of steps, state -> (state, metrics), that take their state's memory.

    All of them hand one state on, each to whichever is called next.
    """
    box = [state]

    def call(step: Callable[[Any], tuple[Any, Any]]) -> Any:
        box[0], out = step(box[0])
        return box[0], out

    return {name: functools.partial(call, step) for name, step in steps.items()}


def peak_matmul(dtype: Any, sizes: tuple[int, ...] | None = None, rounds: int = 5) -> float:
    """FLOP/s of the fastest of a few square matmuls, operands in `dtype`, on one device in this process."""
    if sizes is None:
        sizes = (1024, 2048) if jax.default_backend() == "cpu" else (4096, 8192, 16384)
    device = jax.devices()[0]
    fastest = 0.0
    multiply = jax.jit(jnp.dot)
    for size in sizes:
        x = jax.device_put(jnp.full((size, size), 1 / size, dtype), device)
        seconds = interleave({"matmul": lambda x=x: multiply(x, x)}, rounds, warmup=2)["matmul"]
        fastest = max(fastest, 2 * size**3 / seconds.low)
    return fastest


def environment() -> dict[str, Any]:
    """Hardware, versions and commit, for a result to be read by."""
    device = jax.devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    return {
        "hardware": {
            "device": _cpu() if device.platform == "cpu" else device.device_kind,
            "devices": jax.device_count(),
            "device_memory_bytes": (stats or {}).get("bytes_limit"),
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "load_average": os.getloadavg()[0],
        },
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES},
        "system": f"{platform.system()} {platform.machine()}",
        "commit": commit(),
    }


def commit() -> str | None:
    """The checkout's commit, with "+" where files that git knows have changed since; None outside a checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True, timeout=20
        ).stdout.strip()

    try:
        changed = git("--no-optional-locks", "status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or 'CPU'} ({platform.machine()})"


def parser(doc: str | None, rounds: int | None = 5) -> argparse.ArgumentParser:
    """Options that every benchmark has: --out, and --rounds unless `rounds` is None: nothing is timed."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if rounds is not None:
        made.add_argument("--rounds", type=positive, default=rounds, help=f"of measurement, in turn (default {rounds})")
    made.add_argument("--out", metavar="FILE.json", help="also write the result to this file, whole or not at all")
    return made


def positive(text: str) -> int:
    """An argument that is an integer of at least 1."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text}: give an integer of at least 1")
    return int(text)


def run(main: Callable[[], Any]) -> None:
    """Calls a benchmark; a mistake in its options is one line and exit status 2."""
    try:
        main()
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)


def finish(options: argparse.Namespace, result: Mapping[str, Any]) -> dict[str, Any]:
    """Prints the result as JSON with the command and the machine, writes it to `options.out`, and returns it."""
    script = Path(sys.argv[0]).resolve()
    name = str(script.relative_to(ROOT)) if script.is_relative_to(ROOT) else script.name
    command = shlex.join(["python", name, *sys.argv[1:]])
    whole = plain({"command": command, **result, "environment": environment()})
    print(json.dumps(whole, indent=2, allow_nan=False))
    if options.out:
        out = Path(options.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        metrics.write_json(out, whole)
    return whole


def plain(value: Any) -> Any:
    """As JSON has it: Times as an object, floats to five significant digits."""
    if isinstance(value, Times):
        return plain(value._asdict())
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.5g}")
    return value

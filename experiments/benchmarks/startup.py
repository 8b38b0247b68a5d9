"""Seconds from the command to the first update: with nothing compiled before, and with the compilation cache warm.

    python experiments/benchmarks/startup.py [--out FILE.json]
    python experiments/benchmarks/startup.py --set model.size=gpu-100m batch_rows=32 data.seq_len=1024

Each start is a process of its own that trains from prepared rows, in a new run directory; of a few starts, half have an
empty `compute.cache_dir`, and half the one that the start before them filled. Medians and spread of

    imported     seconds until slm_assist and JAX are imported
    compiled     until every step of the run is compiled (or read from the cache)
    first_step   until the first update's metrics are on the host

all counted from the start of the process. `saved` is cold minus warm, within a round. The configuration is
experiments/baseline.py; --set changes any key.

Expected FLOPs: none to speak of, one update. Expected bytes: the warm start reads the compiled steps, a few MB each,
instead of making them: `compiled` should fall to tracing and reading.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

from slm_assist import config as config_lib
from slm_assist import corpus, log
from slm_assist.train import train

MARKS = ("imported", "compiled", "first_step")
ALWAYS = {"steps": 1, "optimizer.warmup_steps": 0, "log.progress": False, "log.tensorboard": False}


def config_of(keys: dict[str, Any]):
    """The experiment's config with `keys`."""
    return config_lib.resolve(str(common.ROOT / "experiments" / "baseline.py"), ALWAYS | keys)[0]


def child(began: float, run_dir: str, keys: dict[str, Any]) -> None:
    """One start: prints the marks, seconds since `began` (of time.time), as a line of JSON."""
    import jax

    marks = {"imported": time.time() - began}

    def say(line: str) -> None:
        if line.startswith("compiled "):
            marks["compiled"] = time.time() - began

    class Log(log.Log):
        def step(self, n: int, stage: Any, pairs: Any, *rest: Any) -> None:
            jax.device_get(pairs)
            marks.setdefault("first_step", time.time() - began)
            super().step(n, stage, pairs, *rest)

    sys.modules[train.__module__].Log = Log
    train(config_of(keys), run_dir, say=say)
    print(json.dumps(marks))


def start(directory: Path, number: int, cache: Path, keys: dict[str, Any]) -> dict[str, float]:
    """The marks of one start in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION_CACHE")}
    given = json.dumps(keys | {"compute.cache_dir": str(cache)})
    command = [sys.executable, __file__, "--child", str(directory / f"run{number}"), given, repr(time.time())]
    out = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(out.splitlines()[-1])


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(float(sys.argv[4]), sys.argv[2], json.loads(sys.argv[3]))
        return
    parser = common.parser(__doc__, rounds=3)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="keys of the config")
    options = parser.parse_args()
    keys = dict(pair.split("=", 1) for pair in options.set)
    marks: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        keys = {"data.cache_dir": str(directory / "data")} | keys
        corpus.prepare(config_of(keys), say=lambda line: None)
        for turn in range(options.rounds):
            cache = directory / f"compiled{turn}"
            for offset, name in enumerate(marks):
                marks[name].append(start(directory, 2 * turn + offset, cache, keys))
        size = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    seconds = {name: {mark: common.Times.of(m[mark] for m in found) for mark in MARKS} for name, found in marks.items()}
    saved = {mark: common.difference(seconds["cold"][mark], seconds["warm"][mark]) for mark in MARKS}
    common.finish(options, {"seconds": seconds, "saved": saved, "cache_bytes": size, "config": keys_shown(keys)})


def keys_shown(keys: dict[str, Any]) -> dict[str, Any]:
    """What the result says of the configuration: the keys that decide what is compiled."""
    config = config_lib.to_dict(config_of(keys))
    data = {name: config["data"][name] for name in ("source", "seq_len", "vocab_size")}
    return {"model": config["model"], "batch_rows": config["batch_rows"], "data": data, "compute": config["compute"]}


if __name__ == "__main__":
    common.run(main)

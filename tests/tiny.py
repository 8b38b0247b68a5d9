"""A corpus and a config small enough to train in seconds, shared by the tests of the loop."""

import contextlib
import json
import shutil
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp

from slm_assist import config as config_lib
from slm_assist.data.loader import Prefetcher
from slm_assist.run_dir import RunDir
from slm_assist.train import train


def corpus(directory: Path) -> str:
    """Some of the standard library's sources, as JSON lines in two domains."""
    directory.mkdir(parents=True, exist_ok=True)
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    file = directory / "corpus.jsonl"
    with open(file, "w", encoding="utf-8") as out:
        for domain in ("json", "email"):
            for path in sorted((stdlib / domain).glob("*.py")):
                for part in path.read_text(encoding="utf-8").split("\n\n\n"):
                    out.write(json.dumps({"text": part, "meta": {"pile_set_name": domain}}) + "\n")
    return f"jsonl:{file}"


# A run of 12 updates of a model with about 30 thousand parameters on one device.
KEYS = {
    "steps": 12,
    "batch_rows": 8,
    "model.size": "laptop-small",
    "model.num_layers": 1,
    "model.d_model": 32,
    "model.d_ff": 64,
    "model.num_heads": 2,
    "model.num_kv_heads": 1,
    "model.head_dim": 16,
    "data.domain_field": "meta.pile_set_name",
    "data.validation_fraction": 0.1,
    "data.seq_len": 32,
    "data.vocab_size": 384,
    "data.cores": 1,
    "optimizer.warmup_steps": 2,
    "validation.every": 5,
    "validation.rows": 12,
    "checkpoint.every": 3,
    "mesh.data": 1,
    "log.progress": False,
    "log.tensorboard": False,
    "log.samples": 0,
}


def overrides(tmp: Path, **more: Any) -> dict[str, Any]:
    """`KEYS` on the corpus, with everything under `tmp`; keys in `more` are written with `__` for the dot."""
    places = {"data.source": corpus(tmp / "corpus"), "data.cache_dir": str(tmp / "cache")}
    return KEYS | places | {key.replace("__", "."): value for key, value in more.items()}


def run(tmp: Path, name: str, *, messages: list[str] | None = None, killed: Sequence[int] = (), **more: Any) -> RunDir:
    """Trains `name` under `tmp`, or goes on with it; `more` as for `overrides`, `killed` as for `as_if_killed`."""
    config, _ = config_lib.resolve("", overrides(tmp, **more))
    with as_if_killed(tmp / name, killed):
        return train(config, str(tmp / name), say=(messages if messages is not None else []).append)


def copy_as_it_is(directory: Path, copy: Path) -> None:
    """Between the renaming of a new checkpoint and the removal of an old one, both of which go on beside this."""
    for _ in range(100):
        if not any("tmp" in path.name for path in (directory / "checkpoints").iterdir()):
            with contextlib.suppress(shutil.Error, OSError):
                shutil.copytree(directory, copy)
                return
        shutil.rmtree(copy, ignore_errors=True)
        time.sleep(0.05)
    raise TimeoutError(directory)


@contextlib.contextmanager
def as_if_killed(directory: Path, steps: Sequence[int]) -> Iterator[None]:
    """Goes on, but leaves `directory-killed-STEP` as a kill would, where the loop asks for the batch of a STEP."""
    batch_at = Prefetcher.batch_at

    def copying(self, n):
        if n in steps:
            copy_as_it_is(directory, Path(f"{directory}-killed-{n}"))
        return batch_at(self, n)

    with mock.patch.object(Prefetcher, "batch_at", copying):
        yield


def records(run_dir: RunDir) -> list[dict[str, Any]]:
    """metrics.jsonl without timings."""
    with open(run_dir.metrics, encoding="utf-8") as lines:
        return [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in lines]


def final(run_dir: RunDir) -> list[np.ndarray]:
    """Every array of the last checkpoint."""
    step = max(int(path.name) for path in run_dir.checkpoints.iterdir() if path.name.isdecimal())
    with ocp.PyTreeCheckpointer() as reader:
        trees = [
            reader.restore((run_dir.checkpoints / str(step) / item).absolute())
            for item in ("params", "optimizer", "assist")
        ]
    return [np.asarray(leaf) for leaf in jax.tree.leaves(trees)]


def assert_same_run(a: RunDir, b: RunDir) -> None:
    """Bit for bit: parameters, optimizer state, assist state and metrics, timings aside."""
    assert records(a) == records(b)
    ours, theirs = final(a), final(b)
    assert len(ours) == len(theirs)
    for x, y in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(x, y)

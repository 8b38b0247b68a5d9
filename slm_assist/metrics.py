"""Metrics as (sum, weight) pairs on the device, as lines of JSON on disk.

A mean over microbatches, devices or hosts is the sum of the sums over the sum of the weights; positions that
a mask leaves out are in neither.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from slm_assist import distributed
from slm_assist.errors import UserError

Pairs = dict[str, tuple[jax.Array, jax.Array]]
Metrics = dict[str, Any]  # Pairs, and perhaps arrays about single rows


def means(pairs: Mapping[str, tuple[Any, Any]]) -> dict[str, float]:
    """Host floats from pairs; waits for the device. A weight of 0 gives 0."""
    host = jax.device_get(dict(pairs))
    return {name: float(total) / float(weight) if weight else 0.0 for name, (total, weight) in host.items()}


def all_finite(values: Mapping[str, float]) -> bool:
    return all(math.isfinite(value) for value in values.values())


class MetricsFile:
    """metrics.jsonl: one object a line, in step order.

    `offset` is the length of the file in bytes. A checkpoint keeps it, and a run that resumes from the
    checkpoint cuts the file back to it, so that a killed run leaves no line twice.
    """

    def __init__(self, path: Path, offset: int = 0):
        self.path = path
        self._file = open(path, "ab")  # noqa: SIM115 - closed by close()
        if self._file.tell() < offset:
            self.close()
            raise UserError(
                f"{path}: shorter than its checkpoint says ({offset} bytes): it was cut or replaced; put the "
                "file back, or start over with --fresh"
            )
        self._file.truncate(offset)
        self._file.seek(offset)

    @property
    def offset(self) -> int:
        return self._file.tell()

    def write(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def sync(self) -> int:
        """Waits until every line is on the disk; returns the offset to keep in a checkpoint."""
        os.fsync(self._file.fileno())
        return self.offset

    def close(self) -> None:
        self._file.close()


class NoFile:
    """`MetricsFile` of the processes whose lines process 0 writes."""

    offset = 0

    def write(self, record: Mapping[str, Any]) -> None:
        pass

    def sync(self) -> int:
        return 0

    def close(self) -> None:
        pass


class TensorBoard:
    """The same numbers as events; does nothing where tensorboardX is not installed."""

    def __init__(self, directory: Path, step: int, enabled: bool = True):
        self._writer = None
        if not enabled:
            return
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            return
        # Events from `step` on belong to the run that was killed; TensorBoard hides them.
        self._writer = SummaryWriter(str(directory), purge_step=step + 1 if step else None)

    def write(self, record: Mapping[str, Any]) -> None:
        if self._writer is not None:
            for name, value in _scalars(record):
                self._writer.add_scalar(f"{record['kind']}/{name}", value, record["step"])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _scalars(record: Mapping[str, Any], prefix: str = ""):
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float | np.number) and name != "step":
            yield prefix + name, value


def write_json(path: Path, value: Any) -> None:
    """Writes `path` whole or not at all."""
    text = json.dumps(value, indent=2, allow_nan=False)
    temporary = path.with_name(f".{path.name}{distributed.index() or ''}.tmp")  # two processes may write the same
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)

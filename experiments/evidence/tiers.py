"""Sizes of the measurement: what two CPU cores do in hours, and what a GPU does.

A tier fixes the student, the small LMs and the text an update reads; all else is in `matrix.py`, the same for all.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Tier:
    """One size of everything.

    Attributes:
      student: config keys of the student's shape; helpers: of each small LM's, by its name in `matrix.py`.
      shared: keys of all runs.
      ratios: tokens a parameter of a whole run, the main one first.
      peak, weight_decay: BASELINE's best of the grid; all rows have them.
      own_best: (peak, weight decay) of the methods whose best of the same grid is another.
      grid: (peak, weight decay) pairs that are tried.
      flops: a second that one process computes, and `overhead`, seconds that a run takes beside, for the plan only.
    """

    name: str
    student: Mapping[str, Any]
    helpers: Mapping[str, Mapping[str, Any]]
    shared: Mapping[str, Any]
    ratios: tuple[int, ...]
    peak: float
    weight_decay: float
    grid: tuple[tuple[float, float], ...]
    flops: float
    overhead: float
    own_best: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)


def _shape(layers: int, width: int, heads: int, head_dim: int, ff: int) -> dict[str, Any]:
    return {
        "model.size": "laptop-small", "model.num_layers": layers, "model.d_model": width, "model.num_heads": heads,
        "model.num_kv_heads": heads, "model.head_dim": head_dim, "model.d_ff": ff, "model.scan_layers": "false",
    }  # fmt: skip


CPU = Tier(
    name="cpu",
    student=_shape(3, 48, 2, 24, 144),  # 0.115M parameters with 512 tokens
    helpers={
        "small": _shape(3, 24, 1, 24, 72),  # 0.31 of the student's
        "tiny": _shape(3, 18, 1, 18, 54),  # 0.19
        "medium": _shape(3, 36, 2, 18, 108),  # 0.60
        "equal": _shape(3, 48, 2, 24, 144),
    },
    shared={"batch_rows": 16, "data.seq_len": 128, "data.vocab_size": 512, "optimizer.warmup_steps": 50},
    ratios=(20, 5),
    peak=8e-3,
    weight_decay=0.03,
    own_best={"salt": (1.6e-2, 0.03), "t4-unigram": (8e-3, 0.01)},
    grid=(
        *itertools.product((4e-3, 8e-3, 1.6e-2), (0.03, 0.1, 0.3)),
        (8e-3, 0.01),
        (1.6e-2, 0.01),
        (3.2e-2, 0.01),
        (3.2e-2, 0.03),
    ),
    flops=2.5e10,
    overhead=8.0,
)

# Not run yet: its peak and weight decay are BASELINE's of experiments at that size elsewhere, until its grid says.
GPU = Tier(
    name="gpu",
    student={"model.size": "gpu-25m"},
    helpers={name: {"model.size": f"gpu-{size}"} for name, size in
             {"small": "9m", "tiny": "5m", "medium": "15m", "equal": "25m"}.items()},
    shared={"batch_rows": 128, "data.seq_len": 512, "data.vocab_size": 16384, "optimizer.warmup_steps": 50},
    ratios=(2, 20),
    peak=2e-3,
    weight_decay=0.1,
    grid=tuple(itertools.product((1e-3, 2e-3, 4e-3), (0.03, 0.1, 0.3))),
    flops=1.5e14,
    overhead=20.0,
)  # fmt: skip

GPU_100M = dataclasses.replace(
    GPU,
    name="gpu-100m",
    student={"model.size": "gpu-100m"},
    helpers={name: {"model.size": f"gpu-{size}"} for name, size in
             {"small": "35m", "tiny": "15m", "medium": "65m", "equal": "100m"}.items()},
    shared={"batch_rows": 256, "data.seq_len": 1024, "data.vocab_size": 32768, "optimizer.warmup_steps": 200},
    ratios=(20, 5),
)  # fmt: skip

TIERS = {tier.name: tier for tier in (CPU, GPU, GPU_100M)}

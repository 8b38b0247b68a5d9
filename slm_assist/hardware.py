"""What accelerators can do, in one table.

Peaks are the makers' dense bfloat16 figures; the memory of v5p is what XLA said when it compiled for one. Other
memories and the bandwidths are published figures (of GPUs what nvidia-smi shows) from memory, not looked up again; the
utilisations are guesses, to be replaced by a measurement of your own (`slm-assist plan --utilisation`).
"""

import re
from typing import NamedTuple

from slm_assist.errors import nearest


class Hardware(NamedTuple):
    """One device.

    Attributes:
      flops: dense bfloat16 FLOP/s.
      memory: bytes that a program can have: on TPUs a little below the published size, on GPUs 92 % of what is there
        (XLA_PYTHON_CLIENT_MEM_FRACTION=0.92; by default JAX takes 75 %).
      bandwidth: bytes/s between memory and chip.
      utilisation: share of `flops` that a training step is assumed to reach, where nobody has measured it.
      names: parts of `jax.Device.device_kind`.
    """

    flops: float
    memory: float
    bandwidth: float
    utilisation: float
    names: tuple[str, ...]

    @property
    def is_tpu(self) -> bool:
        return self.names[0].startswith("TPU")


GIB = 2**30
HARDWARE = {
    "v4": Hardware(275e12, 31.75 * GIB, 1.228e12, 0.5, ("TPU v4",)),
    "v5e": Hardware(197e12, 15.75 * GIB, 0.819e12, 0.5, ("TPU v5 lite", "TPU v5e")),
    "v5p": Hardware(459e12, 95.74 * GIB, 2.765e12, 0.5, ("TPU v5p", "TPU v5")),
    "v6e": Hardware(918e12, 31.25 * GIB, 1.640e12, 0.4, ("TPU v6 lite", "TPU v6e")),
    "a100-40": Hardware(312e12, 0.92 * 40 * GIB, 1.555e12, 0.5, ("A100-SXM4-40GB", "A100-PCIE-40GB")),
    "a100-80": Hardware(312e12, 0.92 * 80 * GIB, 2.039e12, 0.5, ("A100",)),
    "h100": Hardware(989e12, 0.92 * 79.6 * GIB, 3.35e12, 0.4, ("H100",)),
    "h200": Hardware(989e12, 0.92 * 140.4 * GIB, 4.8e12, 0.4, ("H200",)),
    "b200": Hardware(2250e12, 0.92 * 179 * GIB, 7.7e12, 0.35, ("B200",)),
}


def of_device(device_kind: str) -> Hardware | None:
    """What a `jax.Device.device_kind` can do, None where it is not known (CPUs)."""

    def named(name: str) -> bool:  # a GH200 is no H200
        return re.search(rf"\b{re.escape(name)}", device_kind) is not None

    return next((entry for entry in HARDWARE.values() if any(map(named, entry.names))), None)


def unknown(kind: str) -> str:
    """What to say of a kind that is not in the table."""
    return f"{kind!r} is not a known kind{nearest(kind, HARDWARE)}; known are {', '.join(HARDWARE)}"

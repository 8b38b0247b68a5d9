"""TPU slices that are not there: devices that XLA can compile for, ahead of time, without any of them."""

import importlib.util
import math
import os
from typing import Any

from slm_assist.errors import UserError

# The slices that can be rented, by chips. Those of v4 and v5p form a torus in three dimensions.
PLANE = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
TORUS = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
SHAPES = {"v4": TORUS, "v5e": PLANE, "v5p": TORUS, "v6e": PLANE}
OPTIONS = {"v4": {"chip_config_name": "megacore"}}  # both cores of a chip are one device, as JAX has them

# libtpu asks the machine what slice it belongs to; this answers for one that belongs to none, and keeps it quiet.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else one process a machine, though compiling takes no chip
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


def available() -> bool:
    """Whether libtpu, which holds XLA's compiler for TPUs, is installed (extra `[tpu]`)."""
    return importlib.util.find_spec("libtpu") is not None


def shape_of(kind: str, count: int) -> str | None:
    """The slice of so many chips, as "4x4"; None where none is known."""
    return next((shape for shape in SHAPES.get(kind, ()) if chips(shape) == count), None)


def chips(shape: str) -> int:
    """How many chips a slice of a shape like "2x2x1" has."""
    return math.prod(int(side) for side in shape.split("x"))


def devices(kind: str, shape: str) -> list[Any]:
    """Devices to compile for, in the order of the slice; nothing can be put on them.

    Needs libtpu, and leaves a TPU of this machine alone.

    Args:
      kind: one of `SHAPES`.
      shape: chips along each side, as "2x2x1".

    Raises:
      UserError: there is no such slice.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import jax
    from jax.experimental import topologies

    options = OPTIONS.get(kind, {}) | ({"chips_per_host_bounds": (1, 1, 1)} if chips(shape) == 1 else {})
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{shape}", **options).devices)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"{kind}:{shape}: libtpu cannot describe this slice ({str(error).splitlines()[0]}); name one such as "
            "v5e:4x4 or v5p:2x2x4, or leave it to arithmetic with --estimate"
        ) from None

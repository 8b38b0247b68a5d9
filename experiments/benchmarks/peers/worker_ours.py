"""slm_assist's own steps, as slm_assist/programs.py compiles them; roles "plain" and "assisted".

Every row is four packed documents, which the peers' are not: what that costs is in both of our steps.
"""

import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import protocol


def main() -> None:
    task = protocol.begin()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import jax
    import setting

    if task.device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    made = setting.build(
        task.given[0],
        task.given[1],
        task.vocab_size,
        task.rows,
        task.seq_len,
        compute__dtype=task.dtype,
        mesh__data=1,
        optimizer__name="adamw",
        optimizer__peak_learning_rate=protocol.LEARNING_RATE,
        optimizer__weight_decay=protocol.WEIGHT_DECAY,
        optimizer__clip_norm=protocol.CLIP_NORM,
    )
    step = setting.compile_all(made, (task.role,))[0][task.role]
    state, batch = setting.new_state(made), setting.new_batch(made)
    helpers = setting.new_helpers(made) if task.role == "assisted" else {}
    metrics: dict[str, Any] = {}

    def status() -> Mapping[str, Any]:
        total, weight = metrics["loss"]
        stats = jax.devices()[0].memory_stats() or {}
        return {"loss": float(total) / float(weight), "device_bytes": stats.get("peak_bytes_in_use")}

    for count in protocol.requests(versions(), status):
        for _ in range(count):
            state, metrics = step(state, batch, helpers)
        jax.block_until_ready((state, metrics))


@functools.cache
def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("jax", "jaxlib", "flax", "optax")}


if __name__ == "__main__":
    main()

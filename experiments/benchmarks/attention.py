"""What a mask costs: attention on packed rows and on rows of one document, forward and backward, by backend.

    python experiments/benchmarks/attention.py [--out FILE.json]
    python experiments/benchmarks/attention.py --rows 8 --seq_len 4096 --heads 16 --kv_heads 4 --head_dim 128

Each of `causal` (one document a row), `packed` (several, segment ids) and `prefix` (packed, with a bidirectional
prefix in each) by XLA and by the device's kernel, cuDNN or splash, where it takes the shapes; all take turns.
`packed_over_causal` is what the mask costs the kernel: a packed mask reaches cuDNN as a bias [B, 1, T, T]. Aim: at
most 1.05. `xla_over_kernel` is what the kernel gains. `flops_per_second` counts the causal half only, whatever the
mask: 3.5 forward passes, of which each is 2 matmuls, 2 B N T^2 H in all.
`temporary_bytes` is what XLA reserves beside arguments and results; the kernels keep no array [B, N, T, T].
On CPUs, where no kernel runs, the shapes are small and only XLA's lines are there.
"""

from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np

from slm_assist import compiled as compiled_lib
from slm_assist.models.attention import BACKENDS, attend, cudnn, splash

KERNELS = {"gpu": ("cudnn", cudnn.unavailable), "tpu": ("splash", splash.unavailable)}
MASKS = ("causal", "packed", "prefix")
ON_ACCELERATORS = {"rows": 8, "seq_len": 2048, "heads": 16, "kv_heads": 16, "head_dim": 128, "dtype": "bfloat16"}
ON_CPUS = {"rows": 2, "seq_len": 128, "heads": 4, "kv_heads": 2, "head_dim": 32, "dtype": "float32"}


def arrays(options: Any) -> tuple[tuple[jax.Array, ...], dict[str, dict[str, Any]]]:
    """(query, key, value), and by mask what `attend` is told of the rows: documents of random lengths, no padding."""
    rng = np.random.default_rng(0)
    heads = (options.heads, options.kv_heads, options.kv_heads)
    shapes = [(options.rows, options.seq_len, n, options.head_dim) for n in heads]
    values = tuple(jnp.asarray(rng.normal(size=shape), options.dtype) for shape in shapes)
    starts = rng.random((options.rows, options.seq_len)).argsort(axis=1) < options.documents - 1
    starts[:, 0] = False
    segment_ids = jnp.asarray(1 + np.cumsum(starts, axis=1), jnp.int32)
    # The first half of each document, by the place of its start.
    place = np.arange(options.seq_len)
    first = np.maximum.accumulate(np.where(starts, place, 0), axis=1)
    ends = np.where(np.roll(starts, -1, axis=1), place, options.seq_len)
    last = np.minimum.accumulate(ends[:, ::-1], axis=1)[:, ::-1]
    prefix = jnp.asarray(place < (first + last) / 2)
    packed = {"segment_ids": segment_ids}
    return values, {"causal": {}, "packed": packed, "prefix": {**packed, "prefix_mask": prefix}}


def compile_one(backend: str, window: int, values: tuple[jax.Array, ...], rows: dict[str, Any]) -> Any:
    """The result's gradient to query, key and value, compiled."""

    def total(values, rows):
        return attend(*values, window=window, backend=backend, **rows).astype(jnp.float32).sum()

    return jax.jit(jax.grad(total)).lower(values, rows).compile()


def error(given: tuple[jax.Array, ...], expected: tuple[jax.Array, ...]) -> float:
    """Root mean square of the difference of two gradients over that of the second."""
    given, expected = (np.concatenate([np.asarray(x, np.float32).ravel() for x in xs]) for xs in (given, expected))
    return float(np.sqrt(np.mean((given - expected) ** 2) / np.mean(expected**2)))


def kernel_of(options: Any) -> tuple[str | None, str]:
    """The device's kernel, None where it has none for these shapes; and why."""
    device = jax.devices()[0]
    name, unavailable = KERNELS.get(device.platform, (None, None))
    if name is None:
        return None, f"there is none for {device.device_kind}"
    reason = unavailable(device, options.head_dim, options.seq_len, jnp.dtype(options.dtype))
    return (None, reason) if reason else (name, "")


def main() -> None:
    parser = common.parser(__doc__, rounds=9)
    for name in ("rows", "seq_len", "heads", "kv_heads", "head_dim"):
        parser.add_argument(f"--{name}", type=common.positive)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--documents", type=int, default=4, help="of a packed row, at most (default 4)")
    parser.add_argument("--window", type=int, default=0, help="of a sliding window; 0: none")
    options = parser.parse_args()
    for name, value in (ON_CPUS if jax.default_backend() == "cpu" else ON_ACCELERATORS).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.heads % options.kv_heads:
        parser.error(f"--kv_heads={options.kv_heads} does not divide --heads={options.heads}: use a divisor")

    values, masks = arrays(options)
    kernel, reason = kernel_of(options)
    backends = [name for name in BACKENDS if name in ("xla", kernel)]
    steps = {
        (backend, mask): compile_one(backend, options.window, values, masks[mask])
        for backend in backends
        for mask in MASKS
    }
    calls = {key: lambda step=step, mask=key[1]: step(values, masks[mask]) for key, step in steps.items()}
    times = common.interleave(calls, options.rounds, warmup=2)

    flops = 3.5 * 2 * options.rows * options.heads * options.seq_len**2 * options.head_dim
    lines = {}
    for (backend, mask), spent in times.items():
        lines.setdefault(backend, {})[mask] = {
            "seconds": spent,
            "flops_per_second": flops / spent.median,
            "temporary_bytes": compiled_lib.memory(steps[backend, mask]).temporaries,
            "over_causal": common.ratio(spent, times[backend, "causal"]),
        }
    result = {
        "shape": {name: getattr(options, name) for name in (*ON_CPUS, "documents", "window")},
        "kernel": kernel,
        "no_kernel": reason,
        "backends": lines,
    }
    if kernel:
        result |= {
            "packed_over_causal": common.ratio(times[kernel, "packed"], times[kernel, "causal"]),
            "aim": 1.05,
            "xla_over_kernel": {mask: common.ratio(times["xla", mask], times[kernel, mask]) for mask in MASKS},
            "gradient_difference": {mask: error(calls[kernel, mask](), calls["xla", mask]()) for mask in MASKS},
        }
    common.finish(options, result)


if __name__ == "__main__":
    common.run(main)

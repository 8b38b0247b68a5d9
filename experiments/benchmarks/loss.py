"""The loss alone: time, memory and error of its value and gradient, beside the ways others take.

    python experiments/benchmarks/loss.py [--shapes 1024x256x128x32768 ...] [--dtype bfloat16] [--peers] [--out FILE]

A shape is TOKENSxWIDTHxTEACHER_WIDTHxVOCABULARY; `--shapes accelerator` stands for the shapes of one H100 or H200:
8192 tokens at V 128256, widths 2048 and 4096 (Liger's), 1K to 64K tokens, V from 32K to 262K. Each is run with hard
labels (`cross_entropy`) and with soft ones (`distillation`), in turn:

    blocked  `slm_assist.losses.blocked`, the gradient in the forward pass
    dense    all logits at once: `optax.softmax_cross_entropy_with_integer_labels`, `jax.nn.log_softmax`
    remat    a scan over tiles of the same size under `jax.checkpoint`, logits computed again for the gradient

`temporary_bytes` is what XLA allocates beyond arguments and results; `flops` what it compiled, over the formula's
6 V d + 2 V d_teacher a token; `error` the largest difference of a gradient from float64, over that gradient's largest
entry, on the first `--checked` tokens, the operands having been rounded. A way that the memory does not hold is "out of
memory" in the result. `--peers` adds Liger's fused linear losses on the same shapes where torch sees a GPU.
"""

import functools
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax

from slm_assist import compiled
from slm_assist.errors import UserError
from slm_assist.losses import blocked

CPU = ["256x64x32x32768", "1024x128x64x4096", "1024x256x192x32768", "512x256x192x262144"]
ACCELERATOR = [
    "8192x2048x4096x128256", "8192x4096x2048x128256", "1024x2048x1024x32768", "1024x4096x2048x128256",
    "4096x2048x1024x262144", "16384x2048x1024x128256", "65536x2048x1024x128256",
]  # fmt: skip
WEIGHT = 0.667
Shape = tuple[int, int, int, int]


def make(shape: Shape, dtype: Any) -> tuple[jax.Array, ...]:
    """(hidden, head, teacher_hidden, teacher_head, targets), logits of standard deviation 2; float32 student's head."""
    tokens, width, teacher_width, vocab = shape
    keys = jax.random.split(jax.random.key(0), 5)

    def draw(key, shape, scale, dtype):
        return (scale * jax.random.normal(key, shape, jnp.float32)).astype(dtype)

    return (
        draw(keys[0], (1, tokens, width), 1, dtype),
        draw(keys[1], (width, vocab), 2 * width**-0.5, jnp.float32),
        draw(keys[2], (1, tokens, teacher_width), 1, dtype),
        draw(keys[3], (teacher_width, vocab), 2 * teacher_width**-0.5, dtype),
        jax.random.randint(keys[4], (1, tokens), 0, vocab),
    )


def blocked_loss(soft: bool, block_bytes: int | None, hidden, head, teacher_hidden, teacher_head, targets):
    mask = jnp.ones(targets.shape)
    if soft:
        teacher = teacher_hidden, teacher_head
        return blocked.distillation(
            hidden, head, *teacher, targets, mask, weight=WEIGHT, block_bytes=block_bytes
        ).total  # fmt: skip
    return blocked.cross_entropy(hidden, head, targets, mask, block_bytes=block_bytes).total


def dense_loss(soft: bool, hidden, head, teacher_hidden, teacher_head, targets):
    z = jnp.dot(hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(z, targets)
    if soft:
        u = jnp.dot(teacher_hidden, teacher_head, preferred_element_type=jnp.float32)
        q = jax.nn.softmax(jax.lax.stop_gradient(u))
        loss = (1 - WEIGHT) * loss - WEIGHT * jnp.sum(q * jax.nn.log_softmax(z), axis=-1)
    return loss.sum()


def remat_loss(soft: bool, tile: int, hidden, head, teacher_hidden, teacher_head, targets):
    rows = [x.reshape(-1, tile, *x.shape[2:]) for x in (hidden, teacher_hidden, targets)]
    one = jax.checkpoint(lambda head, h, th, y: dense_loss(soft, h, head, th, teacher_head, y))
    return jax.lax.scan(lambda total, row: (total + one(head, *row), None), 0.0, rows)[0]


def ways(shape: Shape, soft: bool, block_bytes: int | None) -> dict[str, Callable]:
    tokens, _, _, vocab = shape
    token_bytes = 4 * vocab * (1 + soft)
    most = max(1, (block_bytes or blocked.default_block_bytes(token_bytes)) // token_bytes)
    tile = next(tile for tile in range(min(most, tokens), 0, -1) if tokens % tile == 0)
    return {
        "blocked": functools.partial(blocked_loss, soft, block_bytes),
        "dense": functools.partial(dense_loss, soft),
        "remat": functools.partial(remat_loss, soft, tile),
    }


def reference(soft: bool, arrays: tuple) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of the summed loss in float64, [tokens, width] and [width, V]."""
    dtype = arrays[0].dtype
    hidden, head, teacher_hidden, teacher_head = (np.asarray(x.astype(dtype), np.float64) for x in arrays[:4])
    hidden, teacher_hidden, targets = hidden[0], teacher_hidden[0], np.asarray(arrays[4][0])

    def softmax(logits):
        exp = np.exp(logits - logits.max(-1, keepdims=True))
        return exp / exp.sum(-1, keepdims=True)

    weight = WEIGHT if soft else 0.0
    error = softmax(hidden @ head)
    if soft:
        error -= weight * softmax(teacher_hidden @ teacher_head)
    error[np.arange(len(targets)), targets] -= 1 - weight
    return error @ head.T, hidden.T @ error


def errors(fn: Callable, soft: bool, arrays: tuple, tokens: int) -> dict[str, float]:
    """Of both gradients on the first tokens."""
    hidden, head, teacher_hidden, teacher_head, targets = arrays
    few = hidden[:, :tokens], head, teacher_hidden[:, :tokens], teacher_head, targets[:, :tokens]
    found = jax.jit(jax.grad(fn, (0, 1)))(*few)
    pairs = zip(("hidden", "head"), found, reference(soft, few), strict=True)
    return {
        name: float(np.abs(np.asarray(g, np.float64).reshape(true.shape) - true).max() / np.abs(true).max())
        for name, g, true in pairs
    }


def measure(shape: Shape, soft: bool, options: Any) -> dict[str, Any]:
    """All ways on one shape, timed in turn."""
    tokens, width, teacher_width, vocab = shape
    arrays = make(shape, jnp.dtype(options.dtype))
    formula = tokens * vocab * (6 * width + (2 * teacher_width if soft else 0))
    result: dict[str, Any] = {}
    calls: dict[str, Callable] = {}
    for name, fn in ways(shape, soft, options.block_bytes or None).items():
        step = jax.jit(jax.value_and_grad(fn, (0, 1))).lower(*arrays).compile()
        memory = compiled.memory(step)
        result[name] = {
            "temporary_bytes": memory.temporaries,
            "result_bytes": memory.outputs,
            "flops_over_formula": compiled.flops(step) / formula,
        }
        try:
            jax.block_until_ready(step(*arrays))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            result[name]["seconds"] = "out of memory"
            continue
        few = min(tokens, options.checked)
        checked = ways((few, *shape[1:]), soft, 4 * vocab * (1 + soft) * max(1, few // 2))[name]  # in two tiles
        result[name]["error"] = errors(checked, soft, arrays, few)
        calls[name] = functools.partial(step, *arrays)
    if jax.default_backend() != "cpu" and options.peers:
        result |= peers(shape, soft, options)
    clock = time.process_time if options.process_time else time.perf_counter
    times = common.interleave(calls, options.rounds, clock=clock)
    for name, seconds in times.items():
        result[name] |= {"seconds": seconds, "flop_per_second": formula / seconds.median}
    if "dense" in times:
        result["blocked_over_dense"] = common.ratio(times["blocked"], times["dense"])
    if "remat" in times:
        result["blocked_over_remat"] = common.ratio(times["blocked"], times["remat"])
    return result


def missing_peers() -> list[str]:
    """Why Liger cannot be run here; empty if it can."""
    try:
        import liger_kernel  # noqa: F401
        import torch
    except ImportError as error:
        return [f"{error.name} is not installed"]
    return [] if torch.cuda.is_available() else ["torch sees no GPU"]


def peers(shape: Shape, soft: bool, options: Any) -> dict[str, Any]:
    """Liger's fused linear loss: seconds of forward and backward, and the peak beyond inputs and gradients.

    Its soft-label loss is a Jensen-Shannon divergence mixed with cross-entropy: the same matmuls, not the same numbers.
    """
    if missing_peers():
        return {}
    import torch
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSD

    tokens, width, teacher_width, vocab = shape
    kind = {"device": "cuda", "dtype": getattr(torch, options.dtype)}
    hidden, head = torch.randn(tokens, width, **kind), 2 * width**-0.5 * torch.randn(vocab, width, **kind)
    teacher = (
        torch.randn(tokens, teacher_width, **kind),
        2 * teacher_width**-0.5 * torch.randn(vocab, teacher_width, **kind),
    )
    targets = torch.randint(vocab, (tokens,), device="cuda")
    hidden.requires_grad_(), head.requires_grad_()

    def step() -> None:
        hidden.grad = head.grad = None
        if soft:
            loss = LigerFusedLinearJSD(jsd_beta=0.0)(hidden, head, *teacher, targets)
        else:
            loss = LigerFusedLinearCrossEntropyLoss()(head, hidden, targets)
        loss.backward()
        torch.cuda.synchronize()

    gradients = hidden.element_size() * (hidden.numel() + head.numel())
    step()
    hidden.grad = head.grad = None
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    peak = torch.cuda.max_memory_allocated() - held - gradients
    seconds = common.interleave({"liger": step}, options.rounds)["liger"]
    return {"liger": {"temporary_bytes": peak, "seconds": seconds}}


def parse(shape: str) -> Shape:
    try:
        tokens, width, teacher_width, vocab = (int(x) for x in shape.split("x"))
    except ValueError:
        raise UserError(
            f"--shapes {shape}: write TOKENSxWIDTHxTEACHER_WIDTHxVOCABULARY, as 1024x256x128x32768"
        ) from None
    if min(tokens, width, teacher_width, vocab) < 1:
        raise UserError(f"--shapes {shape}: every size must be at least 1")
    return tokens, width, teacher_width, vocab


def main() -> None:
    if "--peers" in sys.argv:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch wants memory too
    cpu = jax.default_backend() == "cpu"
    parser = common.parser(__doc__)
    parser.add_argument("--shapes", nargs="+", default=CPU if cpu else ACCELERATOR)
    parser.add_argument("--dtype", default="float32" if cpu else "bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--block_bytes", type=int, default=0, help="of blocked and remat; 0: the default")
    parser.add_argument(
        "--checked", type=common.positive, default=64, help="tokens whose gradient is compared with float64"
    )
    parser.add_argument("--process_time", action="store_true", help="CPU time of the process, for a busy machine")
    parser.add_argument("--peers", action="store_true", help="Liger's kernels too, where torch sees a GPU")
    options = parser.parse_args()
    shapes = ACCELERATOR if options.shapes == ["accelerator"] else options.shapes
    parsed = {shape: parse(shape) for shape in shapes}
    results = {
        text: {name: measure(shape, soft, options) for name, soft in (("cross_entropy", False), ("distillation", True))}
        for text, shape in parsed.items()
    }
    absent = missing_peers() if options.peers else ["not asked for: --peers"]
    common.finish(options, {"dtype": options.dtype, "peers_absent": absent, "results": results})


if __name__ == "__main__":
    common.run(main)

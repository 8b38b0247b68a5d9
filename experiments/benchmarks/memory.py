"""What soft labels need in memory: XLA's own figures for the compiled steps. Nothing is executed.

    python experiments/benchmarks/memory.py [--out FILE.json]
    python experiments/benchmarks/memory.py --pair gpu-100m/gpu-35m --vocab 32768 262144 --rows 16 --seq_len 1024

Of each setting, temporary bytes on one device as XLA assigns buffers:

    ratio  assisted / (plain + trunk), where trunk is the helper's forward pass to its last hidden states, with what it
           returns; aim: at most 1.10
    dense  the same of a step with the loss of slm_assist/losses/dense.py, from whole arrays of logits

Arguments (train state, batch, the helper's parameters) are no part of it: they are given beside.

Expected bytes, beyond the student's own activations: both steps hold the head's float32 gradient 4 V d_s, and hold one
block of float32 logits, of one model or of two (`loss.block_bytes`, both models together), with a few arrays of its
size beside it; assisted, the helper's hidden states too, tokens x d_t. Nothing grows with tokens x V. Dense keeps
4 tokens V bytes several times: logits, probabilities and gradient of the student, logits and probabilities of the
teacher; at 4096 tokens and V = 262144 that is 4.3 GB each. Expected FLOPs as in assistance.py: they do not matter here.
"""

import argparse
import functools
import itertools
from collections.abc import Mapping
from typing import Any

import common
import jax
import jax.numpy as jnp
import optax
import setting as setting_lib

from slm_assist import compiled as compiled_lib
from slm_assist.assist import labels
from slm_assist.losses import dense
from slm_assist.state import TrainState

VOCABULARIES = (32768, 131072, 262144)
PAIRS = ("4x256/2x192", "4x512/2x256")


def logits(model: Any, params: Any, batch: labels.Batch) -> jax.Array:
    """All of them, [B, T, V] float32."""
    hidden, head = labels.hidden_and_head(model, params, batch)
    return jnp.dot(hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)


def dense_step(
    state: TrainState, batch: labels.Batch, helpers: Mapping[str, Any], *, setting: setting_lib.Setting
) -> tuple[TrainState, dict[str, jax.Array]]:
    """`steps.assisted_step` with the dense loss."""
    student, teacher = setting.student, setting.teacher
    soft = jax.lax.stop_gradient(logits(teacher, helpers["teacher"], batch))

    def mean(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        loss = dense.distillation(
            logits(student.model, params, batch),
            soft,
            batch["targets"],
            batch["mask"],
            weight=setting_lib.WEIGHT,
            temperature=setting_lib.TEMPERATURE,
            z_loss=student.z_loss,
        )
        return loss.mean, loss.parts

    grads, parts = jax.grad(mean, has_aux=True)(state.params)
    updates, opt_state = student.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    parts |= {"grad_norm": optax.tree.norm(grads)}
    return state._replace(step=state.step + 1, params=params, opt_state=opt_state), parts


def compile_dense(setting: setting_lib.Setting) -> jax.stages.Compiled:
    """The dense step, compiled as the others are."""
    step = functools.partial(dense_step, setting=setting)
    return setting_lib.compile_step(setting, step, helpers=setting.helpers())


def measure(pair: str, vocab: int, rows: int, seq_len: int, with_dense: bool = True, **keys: Any) -> dict[str, Any]:
    """The figures of one setting; `keys` are those of the config."""
    student, teacher = setting_lib.split_pair(pair)
    made = setting_lib.build(student, teacher, vocab, rows, seq_len, **keys)
    programs, seconds = setting_lib.compile_all(made, ("plain", "assisted", "trunk"))
    if with_dense:
        programs["dense"] = compile_dense(made)
    memory = {name: compiled_lib.memory(program) for name, program in programs.items()}
    temporaries = {name: found.temporaries for name, found in memory.items()}
    trunk = memory["trunk"].temporaries + memory["trunk"].outputs
    apart = temporaries["plain"] + trunk
    return {
        "pair": pair,
        "ratio": temporaries["assisted"] / apart,
        "dense": temporaries["dense"] / apart if with_dense else None,
        "ratio_to_plain": temporaries["assisted"] / temporaries["plain"],
        "temporary_bytes": temporaries,
        "trunk_bytes": trunk,
        "state_bytes": memory["plain"].aliased,
        "helper_bytes": memory["assisted"].arguments - memory["plain"].arguments,
        "memory": {name: found._asdict() for name, found in memory.items()},
        "compile_seconds": seconds,
        "setting": setting_lib.describe(made),
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    """What is compiled."""
    parser.add_argument("--pair", nargs="+", default=list(PAIRS), help=f"STUDENT/TEACHER, each {setting_lib.SIZES}")
    parser.add_argument("--vocab", nargs="+", type=int, default=list(VOCABULARIES))
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--seq_len", type=int, default=256)
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")
    parser.add_argument("--remat", default="none", help="none, dots or full")
    parser.add_argument("--microbatches", type=int, default=1)
    parser.add_argument("--block_bytes", type=int, default=0, help="loss.block_bytes; 0: the default")
    parser.add_argument("--no_dense", action="store_true", help="without the dense step")


def main() -> None:
    parser = common.parser(__doc__, rounds=None)
    add_options(parser)
    options = parser.parse_args()
    keys = {
        "compute__dtype": options.dtype,
        "compute__remat": options.remat,
        "microbatches": options.microbatches,
        "loss__block_bytes": options.block_bytes,
    }
    results = [
        measure(pair, vocab, options.rows, options.seq_len, not options.no_dense, **keys)
        for pair, vocab in itertools.product(options.pair, options.vocab)
    ]
    common.finish(options, {"settings": results})


if __name__ == "__main__":
    common.run(main)

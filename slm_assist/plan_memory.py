"""Memory of a step on one device: what XLA's compiler says, or what arithmetic says where there is no compiler.

Arithmetic adds up what must be there: train state and helpers as they are laid out, a gradient for each parameter
(two with microbatches), everything that the student's backward pass keeps (its exact shapes, from tracing it), and the
largest working set: a layer redone, or a block of logits with the gradient of the head. What XLA saves by reusing
buffers, or spends on copies and collectives, is not known to it. Beside XLA's own figures for eight CPU devices it was
4 % below to 9 % above (a model of 14M, data-parallel, AdamW; remat none and full, and dots for the assisted step);
beside those for a v5p slice of 128 and the paper's 2.8B with 1.5B, 24 % below for the plain step and 20 % for the
assisted one; for v5e:64 it was above: 20 GiB, where XLA asked for 16.8. The factors in plan.py
were chosen with these in view.
"""

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from slm_assist import compiled as compiled_lib
from slm_assist import programs, sharding, start
from slm_assist import state as state_lib
from slm_assist.assist.helpers import Helper
from slm_assist.assist.stages import Stage
from slm_assist.experiment import Experiment
from slm_assist.models import Transformer
from slm_assist.models.attention import splash


class Memory(NamedTuple):
    """Bytes of one device in the step of a stage, by part; `how` is "compiled" or "estimated"."""

    how: str
    parts: dict[str, float]
    flops: float | None = None  # of one device in one update, counted in what XLA compiled
    problem: str = ""  # XLA's own words where it ran out of memory

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def state_shapes(experiment: Experiment) -> state_lib.TrainState:
    """The train state as shapes with their layout on the experiment's mesh; allocates nothing."""
    return start.shapes(experiment)[1]


def device_bytes(tree: Any) -> int:
    """Bytes of one device in a tree of shapes with a layout."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def compile_step(experiment: Experiment, stage: Stage, helpers: dict[str, Helper]) -> jax.stages.Compiled:
    """The step of a stage for the devices of the experiment's mesh, which need not be there.

    With XLA's least effort, which takes a fifth of the time; on a v5p the paper's plain step then had 9 % more
    temporaries.
    """
    state = state_shapes(experiment)
    params_of = {role: helper.shapes(experiment.mesh) for role, helper in helpers.items()}
    arguments = (state, programs.batch_shapes(experiment, stage), programs.params_in(stage, params_of))
    layout = jax.tree.map(lambda x: x.sharding, state)
    options = {"out_shardings": (layout, sharding.replicated(experiment.mesh)), "donate_argnums": 0}
    with _least_effort(), jax.set_mesh(experiment.mesh):
        step = programs.stage_step(experiment, stage, helpers)
        return jax.jit(step, **options).lower(*arguments).compile()


LEAST_EFFORT = {
    "jax_exec_time_optimization_effort": -1.0,
    "jax_memory_fitting_effort": -1.0,
    "jax_optimization_level": "O0",
}


@contextlib.contextmanager
def _least_effort() -> Iterator[None]:
    before = {name: getattr(jax.config, name) for name in LEAST_EFFORT}
    for name, value in LEAST_EFFORT.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def compiled(experiment: Experiment, stage: Stage, helpers: dict[str, Helper]) -> Memory:
    """What XLA's compiler needs on a device of the experiment's mesh; a step that does not fit is no error."""
    try:
        step = compile_step(experiment, stage, helpers)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Memory("compiled", _exhausted(str(error)), problem=" ".join(str(error).split())[:300])
    found = compiled_lib.memory(step)
    outputs = found.outputs - found.aliased
    parts = {"arguments": found.arguments, "temporaries": found.temporaries, "results": outputs, "code": found.code}
    return Memory("compiled", parts, compiled_lib.flops(step))


def _exhausted(message: str) -> dict[str, float]:
    """The bytes that XLA asked for in vain, as far as its message tells."""
    found = re.search(r"\(([\d.]+)G\) exceeds|Used ([\d.]+)G of", message)
    return {"needed": float(found[1] or found[2]) * 2**30} if found else {}


def estimated(experiment: Experiment, stage: Stage, helpers: dict[str, Helper]) -> Memory:
    """What a step needs by arithmetic; see the module's docstring."""
    config, student, mesh = experiment.config, experiment.student, experiment.mesh
    state = state_shapes(experiment)
    rows = config.batch_rows // config.microbatches // sharding.batch_shards(mesh)
    tokens, tensor = rows * config.data.seq_len, mesh.shape[sharding.VOCAB_AXIS]
    model = _on_one_device(student.model, tensor)
    present = {role: helper for role, helper in helpers.items() if role in programs.params_in(stage, helpers)}
    teacher = present["teacher"].model if stage.soft_labels else None
    gradients = device_bytes(state.params) * (2 if config.microbatches > 1 else 1)
    working = max(
        _layer_bytes(model, rows, experiment) if model.remat != "none" else 0,
        _loss_bytes(model, teacher and _on_one_device(teacher, tensor), tokens, student.block_bytes),
    )
    parts = {
        "parameters": device_bytes(state.params),
        "optimizer": device_bytes(state.opt_state),
        "gradients": gradients,
        "activations": _kept_bytes(model, rows, experiment),
        "working": working,
        "batch": device_bytes(programs.batch_shapes(experiment, stage)),
        "helpers": _helper_bytes(present, mesh),
    }
    if teacher is not None:
        parts["soft labels"] = tokens * teacher.config.d_model * jnp.dtype(teacher.dtype).itemsize
    return Memory("estimated", parts)


def _helper_bytes(helpers: dict[str, Helper], mesh: Any) -> int:
    """Parameters of the helpers, a checkpoint in two roles once."""
    different: list[Helper] = []
    for helper in helpers.values():
        if not any(helper.same(other) for other in different):
            different.append(helper)
    return sum(helper.device_bytes(mesh) for helper in different)


def _on_one_device(model: Transformer, tensor: int) -> Transformer:
    """The part of a model that one device computes where `tensor` share the heads, the MLP and the vocabulary."""
    names = ("num_heads", "num_kv_heads", "d_ff", "vocab_size")
    sizes = {name: getattr(model.config, name) for name in names}
    parts = {name: size // tensor for name, size in sizes.items() if size % tensor == 0}
    if parts.get("num_heads", sizes["num_heads"]) % parts.get("num_kv_heads", sizes["num_kv_heads"]):
        parts["num_kv_heads"] = 1
    return dataclasses.replace(model, config=dataclasses.replace(model.config, **parts))


def _kept_bytes(model: Transformer, rows: int, experiment: Experiment) -> int:
    """What the backward pass keeps of the forward pass beside the parameters themselves."""
    if model.attention == "cudnn":  # traced only where there is a GPU; splash keeps as much
        refused = splash.refusal(model.config.head_dim, experiment.config.data.seq_len, model.dtype)
        model = dataclasses.replace(model, attention="xla" if refused else "splash")
    kept = _kept(model, rows, experiment.config.data.seq_len, experiment.objective.has_prefix)
    given = jax.tree.leaves(model.shapes())
    stacked = {x.shape for x in given}  # a copy of parameters in the compute dtype lies as they do
    return sum(
        x.size * x.dtype.itemsize // (experiment.mesh.shape["fsdp"] if x.shape in stacked else 1)
        for x in kept
        if (x.shape, x.dtype) not in {(y.shape, y.dtype) for y in given}
    )


@functools.lru_cache
def _kept(model: Transformer, rows: int, length: int, has_prefix: bool) -> list[Any]:
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    prefix = jax.ShapeDtypeStruct((rows, length), bool) if has_prefix else None

    def pull(params, tokens, segment_ids, prefix_mask):
        def hidden(params):
            return model.apply(params, tokens, segment_ids=segment_ids, prefix_mask=prefix_mask)

        return jax.vjp(hidden, params)[1]

    return jax.tree.leaves(jax.eval_shape(pull, model.shapes(), tokens, tokens, prefix))


def _layer_bytes(model: Transformer, rows: int, experiment: Experiment) -> int:
    """What redoing one repetition of the pattern of layers keeps."""
    config = dataclasses.replace(model.config, num_layers=len(model.config.pattern), vocab_size=2)
    return _kept_bytes(dataclasses.replace(model, config=config, remat="none"), rows, experiment)


def _loss_bytes(model: Transformer, teacher: Transformer | None, tokens: int, block_bytes: int) -> int:
    """A block's logits in float32 and once more in the compute dtype, heads gathered, the head's gradient."""
    config, size = model.config, jnp.dtype(model.dtype).itemsize
    models = [model] if teacher is None else [model, teacher]
    logits = min(4 * tokens * config.vocab_size * len(models), block_bytes)
    heads = sum(m.config.d_model * config.vocab_size * size for m in models)
    return logits + logits // len(models) * size // 4 + heads + 4 * config.d_model * config.vocab_size

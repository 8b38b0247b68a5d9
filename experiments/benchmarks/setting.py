"""Models, batch and compiled steps of a benchmark: the functions that a run compiles, on random tokens.

A model is given as a named size of slm_assist/models/sizes.py, or as LAYERSxWIDTH or LAYERSxWIDTHxFF: heads of 64,
a gated MLP of FF columns (3 x WIDTH where not given). Each row of the batch is four documents.
"""

import dataclasses
import functools
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slm_assist import config as config_lib
from slm_assist import config_rules, experiment, flops, sharding, steps
from slm_assist import state as state_lib
from slm_assist.assist import labels
from slm_assist.assist.helpers import Helper, Placement
from slm_assist.assist.schedule import assist_schedule
from slm_assist.errors import UserError
from slm_assist.losses import blocked
from slm_assist.models import ModelConfig, Transformer, attention
from slm_assist.models.sizes import NAMED, named
from slm_assist.pretrained import RunModel

SIZES = "a named size, LAYERSxWIDTH or LAYERSxWIDTHxFF"
DOCUMENTS = 4  # of a row
WEIGHT, TEMPERATURE = 0.667, 1.0


def model_config(text: str, vocab_size: int, scan_layers: bool | None = None) -> ModelConfig:
    """The shape that `text` names. None: layers are scanned on accelerators, and where there are more than 8."""
    if text in NAMED:
        return named(text, vocab_size, **({} if scan_layers is None else {"scan_layers": scan_layers}))
    found = re.fullmatch(r"(\d+)x(\d+)(?:x(\d+))?", text)
    if not found:
        raise UserError(f"{text}: use LAYERSxWIDTH, LAYERSxWIDTHxFF or one of {', '.join(NAMED)}")
    layers, width = int(found[1]), int(found[2])
    head_dim = min(64, width)
    heads = width // head_dim
    return ModelConfig(
        vocab_size=vocab_size,
        num_layers=layers,
        d_model=width,
        d_ff=int(found[3] or 3 * width),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        scan_layers=jax.default_backend() != "cpu" or layers > 8 if scan_layers is None else scan_layers,
    )


@dataclasses.dataclass(frozen=True)
class Setting:
    """A student, perhaps a teacher, and the shape of their batch, on a mesh."""

    student: steps.Student
    teacher: Transformer | None
    rows: int
    seq_len: int
    mesh: jax.sharding.Mesh
    placement: Placement

    @property
    def tokens(self) -> int:
        return self.rows * self.seq_len

    @property
    def helper(self) -> Helper:
        return Helper("teacher", RunModel("none"), 0, self.teacher, self.placement)

    def state(self) -> state_lib.TrainState:
        """Shapes and layout of the train state."""
        model, optimizer = self.student.model, self.student.optimizer
        layout = state_lib.state_shardings(model, optimizer, {}, self.mesh)
        shapes = jax.eval_shape(lambda: state_lib.init(model, optimizer, 0, {}))
        return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, layout)

    def batch(self, rows: int = 0) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and layout of a batch, or of a pool of `rows`."""
        at, shape = sharding.batch_sharding(self.mesh), (rows or self.rows, self.seq_len)
        dtypes = {name: np.float32 if name == "mask" else np.int32 for name in labels.ARRAYS}
        return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=at) for name, dtype in dtypes.items()}

    def helpers(self) -> dict[str, Any]:
        """Shapes and layout of the teacher's parameters."""
        return {"teacher": self.helper.shapes(self.mesh)}


def split_pair(text: str) -> tuple[str, str]:
    """The two sizes of STUDENT/TEACHER."""
    student, slash, teacher = text.partition("/")
    if not (student and slash and teacher):
        raise UserError(f"{text}: write STUDENT/TEACHER, each {SIZES}")
    return student, teacher


def build(
    student: str,
    teacher: str | None,
    vocab: int,
    rows: int,
    seq_len: int,
    *,
    scan_layers: bool | None = None,
    **keys: Any,
) -> Setting:
    """A setting on all devices.

    Args:
      student, teacher: see `model_config`; no teacher, no assisted step.
      scan_layers: as in `model_config`.
      keys: those of slm_assist/config.py, with `__` for the dot.
    """
    config = config_lib.get_config()
    keys = {"steps": 1000, "optimizer__warmup_steps": 10, "batch_rows": rows} | keys
    for key, value in keys.items():
        config_lib.set_key(config, key.replace("__", "."), value)
    config_rules.check(config)
    mesh = experiment.make_mesh(config)
    dtype = experiment.compute_dtype(config.compute.dtype, mesh.devices.flat[0])

    def model(text: str, kernel: str, remat: str) -> Transformer:
        shape = model_config(text, vocab, scan_layers)
        backend = attention.choose(kernel, mesh.devices.flat[0], shape, seq_len, dtype)
        return Transformer(shape, dtype=dtype, remat=remat, attention=backend)

    kernel = config.compute.attention
    # A kernel that is named is for the student, as in slm_assist/experiment.py.
    small = model(teacher, "xla" if kernel == "xla" else "auto", "none") if teacher else None
    made = experiment.make_student(config, model(student, kernel, config.compute.remat))
    return Setting(made, small, rows, seq_len, mesh, Placement.of(config))


# The functions that are measured; each takes what `arguments` gives for its name.


def plain(setting: Setting) -> Callable:
    """The step without help."""
    return functools.partial(steps.plain_step, student=setting.student)


def assisted(setting: Setting) -> Callable:
    """The step with soft labels."""
    return functools.partial(
        steps.assisted_step,
        student=setting.student,
        teacher=setting.teacher,
        schedule=assist_schedule("constant", weight=WEIGHT),
        temperature=TEMPERATURE,
    )


def forward(setting: Setting) -> Callable:
    """The teacher's bare forward pass: trunk, head's matmul, each token's largest logit, [B, T]."""

    def largest(helpers: Mapping[str, Any], batch: labels.Batch) -> jax.Array:
        hidden, head = labels.teach(setting.teacher, helpers["teacher"], batch)
        return _largest(hidden, head)

    return largest


def forward_tiled(setting: Setting) -> Callable:
    """`forward`, with the logits of as many tokens at a time as the loss takes."""
    tile = largest_tile(setting)

    def largest(helpers: Mapping[str, Any], batch: labels.Batch) -> jax.Array:
        hidden, head = labels.teach(setting.teacher, helpers["teacher"], batch)
        return jax.lax.map(lambda part: _largest(part, head), hidden.reshape(-1, tile, hidden.shape[-1]))

    return largest


def _largest(hidden: jax.Array, head: jax.Array) -> jax.Array:
    return jnp.dot(hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32).max(axis=-1)


def largest_tile(setting: Setting) -> int:
    """Tokens whose float32 logits fit in a block; a divisor of the batch's."""
    token = 4 * setting.teacher.config.vocab_size
    block = setting.student.block_bytes or blocked.default_block_bytes(token)
    most = max(1, min(setting.tokens, block // token))
    return next(tile for tile in range(most, 0, -1) if setting.tokens % tile == 0)


def trunk(setting: Setting) -> Callable:
    """The teacher's last hidden states: what the assisted step computes of it before the loss."""
    return lambda helpers, batch: labels.teach(setting.teacher, helpers["teacher"], batch).hidden_BxTxD


STEPS = {"plain": plain, "assisted": assisted}
PASSES = {"forward": forward, "forward_tiled": forward_tiled, "trunk": trunk}


def compile_step(
    setting: Setting, step: Callable, batch: dict[str, Any] | None = None, helpers: dict[str, Any] | None = None
) -> jax.stages.Compiled:
    """A training step as slm_assist/programs.py compiles it: laid out, and given its state's memory.

    Args:
      step: (state, batch, helpers) -> (state, metrics).
      batch, helpers: shapes and layouts; None: the setting's batch, no helper.
    """
    state = setting.state()
    layout = jax.tree.map(lambda x: x.sharding, state)
    jitted = jax.jit(step, out_shardings=(layout, sharding.replicated(setting.mesh)), donate_argnums=0)
    with jax.set_mesh(setting.mesh):
        return jitted.lower(state, batch or setting.batch(), helpers or {}).compile()


def compile_pass(
    setting: Setting, function: Callable, batch: dict[str, Any] | None = None, helpers: dict[str, Any] | None = None
) -> jax.stages.Compiled:
    """A pass of a helper, (helpers, batch) -> arrays; None: the teacher, the setting's batch."""
    with jax.set_mesh(setting.mesh):
        return jax.jit(function).lower(helpers or setting.helpers(), batch or setting.batch()).compile()


def compile_all(setting: Setting, names: tuple[str, ...]) -> tuple[dict[str, jax.stages.Compiled], float]:
    """The programs called `names` of STEPS and PASSES, and the seconds it took."""
    began, made = time.perf_counter(), {}
    for name in names:
        if name in STEPS:
            helpers = None if name == "plain" else setting.helpers()
            made[name] = compile_step(setting, STEPS[name](setting), helpers=helpers)
        else:
            made[name] = compile_pass(setting, PASSES[name](setting))
    return made, time.perf_counter() - began


# Values for what is run.


def new_state(setting: Setting) -> state_lib.TrainState:
    """A fresh train state on the devices."""
    model, optimizer = setting.student.model, setting.student.optimizer
    layout = jax.tree.map(lambda x: x.sharding, setting.state())
    with jax.set_mesh(setting.mesh):
        return jax.jit(lambda: state_lib.init(model, optimizer, 0, {}), out_shardings=layout)()


def new_helpers(setting: Setting) -> dict[str, Any]:
    """A fresh teacher's parameters, in its dtype and layout."""
    like = setting.helpers()["teacher"]

    def init() -> Any:
        return jax.tree.map(lambda x, to: x.astype(to.dtype), setting.teacher.init(jax.random.key(1)), like)

    with jax.set_mesh(setting.mesh):
        return {"teacher": jax.jit(init, out_shardings=jax.tree.map(lambda x: x.sharding, like))()}


def new_batch(setting: Setting, rows: int = 0) -> dict[str, jax.Array]:
    """Random tokens in packed rows."""
    shapes = setting.batch(rows)
    shape = shapes["tokens"].shape
    generator = np.random.default_rng(0)
    draw = functools.partial(generator.integers, 0, setting.student.model.config.vocab_size, shape)
    length = -(-setting.seq_len // DOCUMENTS)
    place = np.arange(setting.seq_len)
    values = {
        "tokens": draw(),
        "targets": draw(),
        "segment_ids": np.broadcast_to(1 + place // length, shape),
        "positions": np.broadcast_to(place % length, shape),
        "mask": np.ones(shape),
    }
    return {name: jax.device_put(values[name].astype(like.dtype), like.sharding) for name, like in shapes.items()}


def model_flops(setting: Setting) -> dict[str, int]:
    """FLOPs of a batch by arithmetic (slm_assist/flops.py)."""
    student, tokens = setting.student.model.config, setting.tokens
    found = {"plain": flops.plain(student, setting.seq_len)}
    if setting.teacher:
        found["forward"] = flops.forward(setting.teacher.config, setting.seq_len)
        found["assisted"] = flops.assisted(student, setting.teacher.config, setting.seq_len)
    return {name: int(value * tokens) for name, value in found.items()}


def utilisation(setting: Setting, work: float, seconds: float, matmul: float) -> dict[str, float | None]:
    """FLOP/s as a share of the devices' dense bfloat16 peak, where it is known, and of the measured matmul rate.

    Args:
      work: FLOPs of all devices.
      matmul: FLOP/s of one device, from `common.peak_matmul`.
    """
    peak, rate = flops.peak(setting.mesh.devices.flat[0]), work / seconds / setting.mesh.size
    return {"of_peak": rate / peak if peak else None, "of_matmul": rate / matmul}


def describe(setting: Setting) -> dict[str, Any]:
    """What a result says of its setting."""
    student = setting.student
    found = {
        "student": student.model.config.to_json(),
        "student_parameters": student.model.num_params(),
        "vocab_size": student.model.config.vocab_size,
        "rows": setting.rows,
        "seq_len": setting.seq_len,
        "dtype": str(jnp.dtype(student.model.dtype)),
        "remat": student.model.remat,
        "attention": student.model.attention,
        "microbatches": student.microbatches,
        "mesh": dict(setting.mesh.shape),
    }
    if setting.teacher:
        small = setting.teacher
        found |= {"teacher": small.config.to_json(), "teacher_parameters": small.num_params()}
    return found

"""`slm-assist plan`: what a run needs, costs and takes, on paper, before any machine is rented.

Nothing is allocated and no data is read. The steps are those that would run, with the real optimizer's state and the
real layout; a TPU slice's are compiled where libtpu is installed (`plan_memory.compiled`), others estimated.

The time of an update is its FLOPs at an assumed share of the devices' peak, a recomputed forward pass
(compute.remat) included, plus one reading and writing of the train state. Communication, input, validation and
checkpoints are not in it.
"""

import functools
import math
import runpy
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_collections
from jax.sharding import AbstractMesh, AxisType

from slm_assist import config as config_lib
from slm_assist import corpus, flops, hardware, metrics, plan_memory, plan_table, roles, shapes, sharding, topology
from slm_assist import experiment as experiment_lib
from slm_assist.assist.helpers import Helper, Placement, open_model
from slm_assist.assist.own_teacher import is_own
from slm_assist.assist.stages import Stage
from slm_assist.data import objectives
from slm_assist.data.objectives import Objective
from slm_assist.data.tokenizers import Vocabulary
from slm_assist.errors import UserError, one_of
from slm_assist.experiment import Experiment, Say
from slm_assist.hardware import HARDWARE, Hardware
from slm_assist.losses.common import check_top_k
from slm_assist.losses.tiling import default_block_bytes
from slm_assist.models import ModelConfig, Transformer, attention
from slm_assist.models.attention import cudnn, splash
from slm_assist.models.sizes import NAMED, named
from slm_assist.plan_memory import state_shapes
from slm_assist.pretrained import RunModel, is_there

REDONE = {"none": 0.0, "dots": 0.1, "full": 0.7}  # of a forward pass through the layers, about: not its last matmuls
MARGIN = {"compiled": 1.0, "estimated": 1.3}  # what an estimate must leave free; see `plan_memory`


class Devices(NamedTuple):
    """What is to be rented."""

    kind: str  # of `HARDWARE`
    count: int
    shape: str | None  # a TPU slice's, as "4x4"; None where no such slice is known

    @property
    def hardware(self) -> Hardware:
        return HARDWARE[self.kind]


def parse_devices(text: str) -> Devices:
    """KIND:N or, of TPUs, KIND:AxB or KIND:AxBxC, as v5e:16, v5p:2x2x4, h100:64.

    Raises:
      UserError: an unknown kind, or no number.
    """
    kind, _, number = text.partition(":")
    if kind not in HARDWARE:
        raise UserError(f"--devices={text}: {hardware.unknown(kind)}")
    sides = number.split("x")
    if not all(side.isdecimal() and int(side) for side in sides) or (len(sides) > 1 and not HARDWARE[kind].is_tpu):
        raise UserError(f"--devices={text}: give KIND:N with N devices, as {kind}:8")
    if len(sides) > 1:
        return Devices(kind, topology.chips(number), number)
    shape = topology.shape_of(kind, int(number))
    if HARDWARE[kind].is_tpu and shape is None:
        known = ", ".join(str(topology.chips(shape)) for shape in topology.SHAPES[kind])
        raise UserError(
            f"--devices={text}: no {kind} slice of {number} chips is known, only of {known}; or name a shape, as "
            f"{kind}:{topology.SHAPES[kind][1]}"
        )
    return Devices(kind, int(number), shape)


def plan(
    config: ml_collections.ConfigDict,
    devices: Devices,
    *,
    helper_size: str = "",
    utilisation: float = 0.0,
    compiling: bool = True,
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """What a run of `config` needs, costs and takes, as plain JSON values; `table` shows it.

    Args:
      config: from `config.resolve`.
      devices: on which it is to run.
      helper_size: named size of the small LMs whose run directories are not there.
      utilisation: assumed share of the peak FLOP/s; 0: the kind's in `HARDWARE`.
      compiling: ask XLA for the memory where it can compile for the devices.
      say: told before something takes long.

    Raises:
      UserError: whatever in the config does not fit, or does not fit the devices.
    """
    if not 0 <= utilisation <= 1:
        raise UserError(f"--utilisation={utilisation}: give a share of the peak up to 1, or 0 for the kind's own")
    compiling = compiling and devices.shape is not None and topology.available()
    mesh = mesh_of(config, devices, compiling)
    helpers = find_helpers(config, devices, mesh, helper_size)
    experiment = on_paper(config, devices, mesh, helpers)
    stages = {stage.name: stage for stage in experiment.plan()}
    if compiling:
        say(f"compiling {' and '.join(stages)} for {devices.kind}:{devices.shape}; this takes a minute or two")
    measure = plan_memory.compiled if compiling else plan_memory.estimated
    memory = {name: measure(experiment, stage, helpers) for name, stage in stages.items()}
    utilisation = utilisation or devices.hardware.utilisation
    seconds_of = functools.partial(
        update_seconds, experiment, helpers, devices, utilisation, plan_memory.device_bytes(state_shapes(experiment))
    )
    times = {name: seconds_of(stage) for name, stage in stages.items()}
    plain = seconds_of(Stage(0, 1, soft_labels=False, selecting=False))
    tokens = config.batch_rows * config.data.seq_len
    seconds = sum((stage.stop - stage.start) * times[stage.name] for stage in experiment.plan())
    work = sum((stage.stop - stage.start) * sum(_cost(experiment, helpers, stage)) for stage in experiment.plan())
    student_work = config.steps * tokens * flops.plain(experiment.student.model.config, config.data.seq_len)
    return {
        "devices": {"kind": devices.kind, "count": devices.count, "shape": devices.shape},
        "mesh": dict(experiment.mesh.shape),
        "memory_limit": devices.hardware.memory,
        "parameters": {"student": experiment.student.model.num_params()}
        | {role: helper.model.num_params() for role, helper in helpers.items()},
        "tokens": config.steps * tokens,
        "tokens_per_update": tokens,
        "utilisation": utilisation,
        "stages": {
            name: {
                "updates": sum(s.stop - s.start for s in experiment.plan() if s.name == name),
                "flops": dict(experiment.step_flops(helpers, stage)),
                "seconds": times[name],
                "added": times[name] / plain - 1,
                "memory": _memory_record(memory[name], devices),
            }
            for name, stage in stages.items()
        },
        "seconds": seconds,
        "flops": work,
        "added_time": seconds / (config.steps * plain) - 1,
        "added_flops": work / student_work - 1,
    }


def _memory_record(memory: plan_memory.Memory, devices: Devices) -> dict[str, Any]:
    fits = not memory.problem and MARGIN[memory.how] * memory.total <= devices.hardware.memory
    return {
        "how": memory.how,
        "total": memory.total,
        "fits": fits,
        "margin": MARGIN[memory.how],
        "parts": memory.parts,
        "counted_flops": memory.flops,
        "problem": memory.problem,
    }


def _cost(experiment: Experiment, helpers: dict[str, Helper], stage: Stage) -> list[float]:
    return list(experiment.step_flops(helpers, stage).values())


def update_seconds(
    experiment: Experiment,
    helpers: dict[str, Helper],
    devices: Devices,
    utilisation: float,
    state_bytes: int,
    stage: Stage,
) -> float:
    """Expected seconds of one update in a stage; a device holds `state_bytes` of the train state."""
    config, student = experiment.config, experiment.student.model
    tokens = config.batch_rows * config.data.seq_len
    layers = flops.forward(student.config, config.data.seq_len) - flops.head(student.config)
    work = sum(_cost(experiment, helpers, stage)) + REDONE[student.remat] * tokens * layers
    computing = work / (devices.count * devices.hardware.flops * utilisation)
    return computing + 2 * state_bytes / devices.hardware.bandwidth


# From a config to an experiment without data.


def find_helpers(config: ml_collections.ConfigDict, devices: Devices, mesh: Any, size: str = "") -> dict[str, Helper]:
    """The config's helpers by role: from their run directories, or of a named size where these are not there yet.

    Raises:
      UserError: neither the directory nor a size.
    """
    found = {}
    if size:
        one_of("--teacher_size", size, NAMED)
    for role, (directory, step) in roles.wanted(config).items():
        if is_own(role, directory):
            raise UserError(
                f"assist.teacher={directory}: what a function needs is not known yet; plan with a small LM's run "
                "directory instead, or with --assist.schedule=none"
            )
        run = RunModel(directory)
        if is_there(directory):
            run = open_model(role, directory)
            shape = run.shape()
        elif size:
            shape = named(size, vocabulary_size(config))
        else:
            raise UserError(
                f"{role}: {directory} is not a run directory yet, so its model is not known; name its size, as "
                "--teacher_size=paper-1.5b, or define TEACHER_SIZE in the experiment file"
            )
        kernel = "xla" if config.compute.attention == "xla" else "auto"  # one that is named is for the student
        model = _transformer(config, kernel, shape, devices, mesh)
        found[role] = Helper(role, run, step, model, Placement.of(config))
    return found


def dtype_of(config: ml_collections.ConfigDict) -> jnp.dtype:
    """The compute dtype; all kinds of `HARDWARE` have bfloat16."""
    return jnp.dtype("bfloat16" if config.compute.dtype == "auto" else config.compute.dtype)


def _transformer(
    config: ml_collections.ConfigDict, name: str, shape: ModelConfig, devices: Devices, mesh: Any, remat="none"
) -> Transformer:
    """The model with the attention that `name`, a value of compute.attention, gives on the devices."""
    dtype, length = dtype_of(config), config.data.seq_len
    if not isinstance(mesh, AbstractMesh):
        name = attention.choose(name, mesh.devices.flat[0], shape, length, dtype)
    elif name != "xla":
        kernel, module = ("splash", splash) if devices.hardware.is_tpu else ("cudnn", cudnn)
        refused = module.refusal(shape.head_dim, length, dtype, shape.attention_softcap)
        if devices.kind.startswith("a100") and shape.head_dim > 128:
            refused = f"on an A100 cuDNN takes head_dim up to 128, not {shape.head_dim}"
        if name not in ("auto", kernel):
            refused = f"{devices.kind} has no such kernel"
        if name != "auto" and refused:
            raise UserError(f"compute.attention={name}: {refused}; use compute.attention=auto")
        name = "xla" if refused else kernel
    return Transformer(shape, dtype=dtype, remat=remat, attention=name)


def vocabulary_size(config: ml_collections.ConfigDict) -> int:
    """Ids of data.vocabulary if it is there, else data.vocab_size, with sentinels."""
    given, sentinels = config.data.vocabulary, corpus.sentinels(config)
    if given and ("://" in given or Path(given).exists()):
        vocabulary = Vocabulary.load(given)
        return vocabulary.size + (0 if len(vocabulary.sentinel_ids) else sentinels)
    return config.data.vocab_size + sentinels


def on_paper(config: ml_collections.ConfigDict, devices: Devices, mesh: Any, helpers: dict[str, Helper]) -> Experiment:
    """The experiment that `experiment.build` would make on accelerators, without its data."""
    config = ml_collections.ConfigDict(config)
    sizes = {helper.model.config.vocab_size for helper in helpers.values()}
    size = max(sizes) if sizes else vocabulary_size(config)
    # The default goes by the machine that this runs on; of a stage with one model it may be less.
    logits = 4 * size * (2 if "teacher" in helpers else 1) // mesh.shape["tensor"]
    config.loss.block_bytes = config.loss.block_bytes or default_block_bytes(logits, "accelerator")
    objectives.check(config.data)
    check_top_k(config.assist.top_k, size)
    shape = shapes.model_config(config, size)
    for helper in helpers.values():
        roles.check_fits(config, helper, shape)
    model = _transformer(config, config.compute.attention, shape, devices, mesh, config.compute.remat)
    objective = Objective(config.data.objective, config.data.objective in ("prefix", "ul2"), "", dict)
    return Experiment(
        config=config,
        mesh=mesh,
        prepared=SimpleNamespace(train=SimpleNamespace(domains=["all"])),
        student=experiment_lib.make_student(config, model),
        schedule=experiment_lib.make_schedule(config),
        guide_width=helpers["guide"].model.config.d_model if "guide" in helpers else 0,
        score=roles.score_of(config, size),
        objective=objective,
        data=None,
        validation=None,
    )


def mesh_of(config: ml_collections.ConfigDict, devices: Devices, compiling: bool) -> Any:
    """The config's mesh over devices that need not be there; abstract where nothing is compiled for them.

    Raises:
      UserError: the mesh, or the batch, does not fit so many devices.
    """
    sizes = sharding.mesh_sizes(*(config.mesh[name] for name in sharding.MESH_AXES), devices.count)
    if math.prod(sizes.values()) != devices.count:
        asked = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise UserError(f"mesh {asked} does not fit {devices.count} devices: change mesh.* or --devices")
    abstract = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * 3)
    experiment_lib.check_batch(config, abstract)
    if not compiling:
        return abstract
    return sharding.make_mesh(**sizes, devices=topology.devices(devices.kind, devices.shape))


def teacher_size(path: str) -> str:
    """TEACHER_SIZE of an experiment file: the named size of its small LM; empty where it has none."""
    return str(runpy.run_path(path).get("TEACHER_SIZE", "")) if path else ""


def run(
    path: str,
    overrides: Mapping[str, str],
    devices: str,
    *,
    helper_size: str = "",
    utilisation: float = 0.0,
    compiling: bool = True,
    json_file: str = "",
    say: Say = print,
) -> None:
    """`slm-assist plan`: says what the experiment in `path` takes, and writes it to `json_file` where one is named.

    Raises:
      UserError: as `plan`, and a file that cannot be written.
    """
    found = parse_devices(devices)
    if json_file and not Path(json_file).absolute().parent.is_dir():
        raise UserError(f"--json={json_file}: there is no such directory; name a file that can be written")
    config, _ = config_lib.resolve(path, overrides)
    result = plan(
        config,
        found,
        helper_size=helper_size or teacher_size(path),
        utilisation=utilisation,
        compiling=compiling,
        say=say,
    )
    say(plan_table.table(result))
    if json_file:
        try:
            metrics.write_json(Path(json_file), {"experiment": path, **result})
        except OSError as error:
            raise UserError(f"--json={json_file}: {error.strerror}; name a file that can be written") from None

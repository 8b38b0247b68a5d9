"""What a config names, found, checked and built, before anything is allocated on a device."""

import dataclasses
import importlib.metadata
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from slm_assist import config as config_lib
from slm_assist import optim, sharding
from slm_assist.assist import helpers as helpers_lib
from slm_assist.assist.schedule import AssistSchedule, Stage, assist_schedule, stages
from slm_assist.data import rows as rows_lib
from slm_assist.data.sources import open_source
from slm_assist.data.tokenizers import Vocabulary
from slm_assist.errors import UserError
from slm_assist.evals.perplexity import Perplexity
from slm_assist.models import ModelConfig, Transformer
from slm_assist.models.sizes import named
from slm_assist.run_dir import RunDir
from slm_assist.steps import Student

Say = Callable[[str], None]


@dataclasses.dataclass
class Experiment:
    """Everything a run needs but its state."""

    config: ml_collections.ConfigDict
    mesh: jax.sharding.Mesh
    prepared: rows_lib.Prepared
    student: Student
    schedule: AssistSchedule
    stages: tuple[Stage, ...]
    validation: Perplexity

    @property
    def dtype(self) -> jnp.dtype:
        return self.student.model.dtype


def build(config: ml_collections.ConfigDict, run: RunDir, say: Say) -> Experiment:
    """Opens or prepares the data and builds model, optimizer and schedules.

    Raises:
      UserError: whatever in the config, its sources or its devices does not fit.
    """
    mesh = make_mesh(config)
    dtype = compute_dtype(config.compute.dtype, mesh.devices.flat[0])
    _check_before_data(config, run)
    prepared = prepare(config, run, say=say)
    model = Transformer(model_config(config, prepared.vocabulary.size), dtype=dtype, remat=config.compute.remat)
    schedule = assist_schedule(
        config.assist.schedule,
        weight=config.assist.weight,
        steps=config_lib.assisted_steps(config),
        decay_steps=config.assist.decay_steps,
    )
    validation = Perplexity(
        prepared.validation,
        limit=config.validation.rows,
        batch_rows=config.batch_rows,
        token_bytes=prepared.vocabulary.token_bytes,
    )
    return Experiment(
        config=config,
        mesh=mesh,
        prepared=prepared,
        student=make_student(config, model),
        schedule=schedule,
        stages=stages(schedule, config.steps),
        validation=validation,
    )


def _check_before_data(config: ml_collections.ConfigDict, run: RunDir) -> None:
    """Finds mistakes in model, optimizer and helpers before a corpus is prepared for hours."""
    make_student(config, Transformer(model_config(config, config.data.vocab_size)))
    if not run.config.is_file():
        if config.assist.teacher:
            helpers_lib.open_run("teacher", config.assist.teacher, config.assist.teacher_step)
        if config.validation.buckets:
            helpers_lib.open_run("buckets", config.validation.buckets)


def make_mesh(config: ml_collections.ConfigDict) -> jax.sharding.Mesh:
    """The config's mesh, with the batch checked against it."""
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    shards = sharding.batch_shards(mesh)
    if (config.batch_rows // config.microbatches) % shards:
        raise UserError(
            f"batch_rows={config.batch_rows} in {config.microbatches} microbatches is not divisible by the {shards} "
            f"parts of the mesh's data and fsdp axes; use a multiple of {shards * config.microbatches}"
        )
    return mesh


def prepare(config: ml_collections.ConfigDict, run: RunDir | None = None, *, say: Say) -> rows_lib.Prepared:
    """The rows, from the cache or made now, with the run's, the config's, the teacher's or a new vocabulary."""
    data = config.data
    fields = {"text_field": data.text_field, "domain_field": data.domain_field, "cache_dir": data.cache_dir}
    source = open_source(data.source, validation_fraction=data.validation_fraction, **fields)
    validation = open_source(data.validation, **fields) if data.validation else None
    say(source.describe())
    prepared = rows_lib.prepare(
        source,
        vocabulary=find_vocabulary(config, run),
        vocab_size=data.vocab_size,
        seq_len=data.seq_len,
        validation_source=validation,
        validation_fraction=data.validation_fraction,
        cache_dir=Path(data.cache_dir).expanduser(),
        cores=data.cores,
        progress=config.log.progress,
    )
    train, held = prepared.train, prepared.validation
    say(
        f"rows of {data.seq_len} tokens: {len(train):,} to train on ({train.tokens:,} tokens), {len(held):,} to "
        f"validate on; {prepared.vocabulary.size} pieces; in {prepared.path}"
    )
    return prepared


def find_vocabulary(config: ml_collections.ConfigDict, run: RunDir | None) -> Vocabulary | None:
    """A run that goes on keeps its own; then the config's, the teacher's; None: one is to be trained."""
    if run and run.config.is_file():
        return Vocabulary.load(run.tokenizer)
    given = config.data.vocabulary
    if not given and config.assist.teacher:
        given = helpers_lib.open_run("teacher", config.assist.teacher).path
    if given:
        path = Path(given).expanduser()
        return Vocabulary.load(path / "tokenizer" if (path / "tokenizer").is_dir() else path)
    return None


def model_config(config: ml_collections.ConfigDict, vocab_size: int) -> ModelConfig:
    """The named size with the config's changes, for a vocabulary of `vocab_size`."""
    given = {name: value for name, value in config.model.items() if isinstance(value, int) and value}
    if config.model.scan_layers != "auto":
        given["scan_layers"] = config.model.scan_layers == "true"
    return named(config.model.size, vocab_size, **given)


def compute_dtype(name: str, device: jax.Device) -> jnp.dtype:
    """`auto` is bfloat16 where the device multiplies it natively: TPUs, and GPUs from compute capability 8."""
    if name == "auto":
        native = device.platform == "tpu" or (
            device.platform == "gpu" and float(getattr(device, "compute_capability", 0) or 0) >= 8
        )
        name = "bfloat16" if native else "float32"
    return jnp.dtype(name)


def make_student(config: ml_collections.ConfigDict, model: Transformer) -> Student:
    """The model with its optimizer and the options of its loss."""
    c = config.optimizer
    learning_rate = optim.learning_rate(
        c.schedule,
        peak=c.peak_learning_rate,
        steps=config.steps,
        warmup_steps=c.warmup_steps,
        final_fraction=c.final_fraction,
        decay_fraction=c.decay_fraction,
    )
    optimizer = optim.make_optimizer(
        c.name,
        learning_rate,
        weight_decay=c.weight_decay,
        b1=c.b1,
        b2=c.b2,
        eps=c.eps,
        clip_norm=c.clip_norm,
        axes=model.logical_axes(),
    )
    return Student(
        model=model,
        optimizer=optimizer,
        learning_rate=learning_rate,
        z_loss=config.loss.z_loss,
        block_bytes=config.loss.block_bytes or None,
        microbatches=config.microbatches,
    )


def find_teacher(experiment: Experiment, step: int) -> helpers_lib.Helper:
    """The config's teacher at `step` (-1: the newest), checked but not loaded."""
    return helpers_lib.find(
        "teacher",
        experiment.config.assist.teacher,
        step=step,
        vocabulary=experiment.prepared.vocabulary,
        dtype=experiment.dtype,
    )


def facts(experiment: Experiment, helpers: dict[str, helpers_lib.Helper]) -> dict[str, Any]:
    """What config.json keeps beside the config: enough to tell whether two runs can be compared."""
    train, config = experiment.prepared.train, experiment.config
    device = experiment.mesh.devices.flat[0]
    return {
        "vocabulary": experiment.prepared.vocabulary.fingerprint,
        "vocabulary_size": experiment.prepared.vocabulary.size,
        "train_rows": train.fingerprint,
        "validation_rows": experiment.validation.fingerprint,
        "objective": "causal",
        "parameters": experiment.student.model.num_params(),
        "train_tokens": int(train.tokens),
        "train_rows_count": len(train),
        "validation_rows_count": len(experiment.validation.row_ids),
        "seq_len": config.data.seq_len,
        "batch_rows": config.batch_rows,
        "helpers": {role: helper.facts() for role, helper in helpers.items()},
        "hardware": device.device_kind if device.platform != "cpu" else f"CPU ({platform.machine()})",
        "devices": experiment.mesh.size,
        "dtype": str(experiment.dtype),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")}
        | {"python": platform.python_version()},
    }


# Facts that a run must find unchanged when it goes on.
SAME_ON_RESUME = ("vocabulary", "train_rows", "validation_rows", "parameters", "dtype")


def check_resume(run: RunDir, experiment: Experiment) -> dict[str, Any] | None:
    """The facts a run was started with, None for a new run.

    Raises:
      UserError: the config or the data is not the one the run was started with; says which keys.
    """
    if not run.config.is_file():
        return None
    stored = run.read(run.config)
    found = facts(experiment, {})
    changed = [
        f"{name}: {stored['facts'].get(name)} -> {found[name]}"
        for name in SAME_ON_RESUME
        if stored["facts"].get(name) != found[name]
    ]
    if changed:
        raise UserError(f"{run}: cannot go on, the data or device is not what it was ({'; '.join(changed)}); {CURE}")
    return stored["facts"]


def check_config(run: RunDir, config: ml_collections.ConfigDict) -> None:
    """Raises `UserError` where a run would go on with another config; cheap, so it comes first."""
    if run.config.is_file():
        changed = config_lib.changed_keys(run.read(run.config)["config"], config_lib.to_dict(config))
        if changed:
            raise UserError(f"{run}: cannot go on with another config ({'; '.join(changed)}); {CURE}")


CURE = "use the old values, or start over beside it with --fresh"

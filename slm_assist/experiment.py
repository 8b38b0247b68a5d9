"""What a config names, found, checked and built, before anything is allocated on a device."""

import dataclasses
import importlib.metadata
import platform
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from slm_assist import aligning, config_rules, corpus, optim, roles, shapes, sharding
from slm_assist import config as config_lib
from slm_assist import feed as feed_lib
from slm_assist.assist import helpers as helpers_lib
from slm_assist.assist import online, own_teacher, row_list, token_weight
from slm_assist.assist.schedule import AssistSchedule, assist_schedule
from slm_assist.assist.scores import Score
from slm_assist.assist.stages import Stage
from slm_assist.data import mixture, objectives
from slm_assist.data import rows as rows_lib
from slm_assist.data.objectives import Objective
from slm_assist.distributed import Group
from slm_assist.errors import UserError
from slm_assist.evals import token_metrics
from slm_assist.evals.perplexity import Perplexity
from slm_assist.losses import blocked
from slm_assist.losses.common import check_top_k
from slm_assist.models import Transformer, attention
from slm_assist.run_dir import RunDir
from slm_assist.state import TrainState
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
    score: Score | None
    objective: Objective
    data: feed_lib.Data
    validation: Perplexity
    guide_width: int = 0  # of the small LM whose representations are followed

    @property
    def dtype(self) -> jnp.dtype:
        return self.student.model.dtype

    @property
    def domains(self) -> list[str]:
        return self.prepared.train.domains

    def plan(self, assisted: int = -1) -> tuple[Stage, ...]:
        """The stages, where `assisted` updates have the teacher; -1: as many as the config allows."""
        return config_rules.plan(self.config, assisted)

    def first_assist(self) -> dict[str, Any]:
        """What the gifts have come to before the first update: `TrainState.assist`."""
        decided = self.schedule.stage1_steps is not None
        assisted = config_rules.assisted_steps(self.config) if decided else -1
        memory = online.initial_state(self.config.select.rule) if self.config.select.rows == "online" else {}
        if aligning.projects(self.config):
            memory["map"] = aligning.first_map(self.config, self.student, self.guide_width)
        return {"stage1_steps": jnp.int32(assisted), **memory}

    def switched(self, state: TrainState, step: int) -> TrainState:
        """The state once `auto` has ended stage 1 at `step`."""
        old = state.assist["stage1_steps"]
        decided = feed_lib.put_whole(np.int32(step), old.sharding)
        return state._replace(assist=state.assist | {"stage1_steps": decided})

    def shares_teacher(self, helpers: dict[str, helpers_lib.Helper], stage: Stage) -> bool:
        """Whether scorer and teacher are one checkpoint fed the same inputs, and one forward pass serves both.

        It keeps the hidden states of all candidates, and of all kept rows on every device; that must be no more than
        the logits of a block may take.
        """
        roles_here = {"teacher", "scorer"} <= helpers.keys() and stage.soft_labels and stage.selecting
        if not roles_here or self.objective.name != "causal" or not helpers["teacher"].same(helpers["scorer"]):
            return False
        model, select = helpers["teacher"].model, self.config.select
        row = self.config.data.seq_len * model.config.d_model * jnp.dtype(model.dtype).itemsize
        rows = self.config.batch_rows * (1 + select.pool_factor / sharding.batch_shards(self.mesh))
        return rows * row <= (
            self.student.block_bytes or blocked.default_block_bytes(4 * self.prepared.vocabulary.size)
        )

    def step_flops(self, helpers: dict[str, helpers_lib.Helper], stage: Stage) -> dict[str, float]:
        """`roles.step_flops` of this experiment."""
        shared = self.shares_teacher(helpers, stage)
        return roles.step_flops(self.config, self.student.model.config, helpers, stage, shared)

    def kinds(self, first: int, assisted: int) -> tuple[Stage, ...]:
        """One stage of every kind that may come from update `first` on; `assisted` is -1 while undecided."""
        plans = [self.plan(assisted)]
        if assisted < 0:  # it may end anywhere
            cap = config_rules.assisted_steps(self.config)
            ends = {first + 1, cap, config_rules.selecting_steps(self.config, cap)}
            plans += [self.plan(end) for end in sorted(ends) if first < end <= cap]
        return tuple({stage.name: stage for plan in plans for stage in plan if stage.stop > first}.values())


def build(config: ml_collections.ConfigDict, run: RunDir, say: Say, group: Group | None = None) -> Experiment:
    """Opens or prepares the data and builds model, optimizer and schedules.

    Args:
      group: the run's processes, where they are several.

    Raises:
      UserError: whatever in the config, its sources or its devices does not fit.
    """
    mesh = make_mesh(config)
    dtype = compute_dtype(config.compute.dtype, mesh.devices.flat[0])
    _check_before_data(config, run)
    shape, device = shapes.model_config(config, config.data.vocab_size, run), mesh.devices.flat[0]
    backend = attention.choose(config.compute.attention, device, shape, config.data.seq_len, dtype)
    prepared = corpus.prepare(config, run, say=say, group=group, reader=feed_lib.reader(mesh, config.batch_rows))
    vocabulary = prepared.vocabulary
    shape = shapes.model_config(config, vocabulary.size, run)
    new = not (run.config.is_file() or config.branch.run)
    if config.init.model and new:
        shapes.check_vocabulary(config, vocabulary)
    model = Transformer(shape, dtype=dtype, remat=config.compute.remat, attention=backend)
    check_top_k(config.assist.top_k, vocabulary.size)
    validation = Perplexity(
        prepared.validation,
        limit=config.validation.rows,
        batch_rows=config.batch_rows,
        token_bytes=vocabulary.token_bytes,
    )
    objective = corpus.make_objective(config, prepared)
    return Experiment(
        config=config,
        mesh=mesh,
        prepared=prepared,
        student=make_student(config, model),
        schedule=make_schedule(config),
        guide_width=aligning.guide_width(config, run),
        score=roles.score_of(config, vocabulary.size),
        objective=objective,
        data=feed_lib.Data(config, prepared.train, objective, mesh),
        validation=validation,
    )


def make_schedule(config: ml_collections.ConfigDict) -> AssistSchedule:
    """The config's weight of the small LM, update by update."""
    return assist_schedule(
        config.assist.schedule,
        weight=config.assist.weight,
        steps=config_rules.assisted_steps(config),
        decay_steps=config.assist.decay_steps,
    )


def _check_before_data(config: ml_collections.ConfigDict, run: RunDir) -> None:
    """Finds mistakes in model, optimizer and helpers before a corpus is prepared for hours."""
    make_student(config, Transformer(shapes.model_config(config, config.data.vocab_size, run)))
    make_schedule(config)
    aligning.schedule(config)
    token_weight.find(config.assist.token_weight)
    token_metrics.find(config.validation.metric)
    objectives.check(config.data)
    wanted = roles.wanted(config)
    for name in ("list", "then"):
        if config.select.rows == "list" and config.select[name] not in config_rules.THEN:
            row_list.read(config.select[name])
    mixture.check(config.data.domain_weights)
    vocabulary = corpus.find_vocabulary(config, run)
    if vocabulary:
        roles.score_of(config, vocabulary.size)
        check_top_k(config.assist.top_k, vocabulary.size)
        if not config.data.stream:
            objectives.make(
                config.data, vocabulary.with_sentinels(len(vocabulary.sentinel_ids) or corpus.sentinels(config))
            )
    if not (run.config.is_file() or config.branch.run):
        if config.init.model:
            wanted_sentinels = len(vocabulary.sentinel_ids) or corpus.sentinels(config)
            shapes.check_vocabulary(config, vocabulary.with_sentinels(wanted_sentinels))
        for role, (directory, step) in wanted.items():
            if own_teacher.is_own(role, directory):
                own_teacher.check(directory, step)
                continue
            helper = helpers_lib.find(role, directory, step=step, vocabulary=vocabulary, dtype=jnp.float32)
            roles.check_fits(config, helper, shapes.model_config(config, vocabulary.size, run))
        if config.validation.buckets:
            helpers_lib.open_model("buckets", config.validation.buckets)


def make_mesh(config: ml_collections.ConfigDict) -> jax.sharding.Mesh:
    """The config's mesh, with the batch checked against it."""
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    if jax.process_count() > 1 and mesh.size != jax.device_count():
        raise UserError(
            f"the mesh has {mesh.size} devices and the {jax.process_count()} processes have {jax.device_count()}: use "
            "them all, with mesh.data=-1"
        )
    check_batch(config, mesh)
    return mesh


def check_batch(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> None:
    """Raises `UserError` where the mesh does not divide the batch."""
    shards = sharding.batch_shards(mesh)
    if (config.batch_rows // config.microbatches) % shards:
        raise UserError(
            f"batch_rows={config.batch_rows} in {config.microbatches} microbatches is not divisible by the {shards} "
            f"parts of the mesh's data and fsdp axes; use a multiple of {shards * config.microbatches}"
        )


def compute_dtype(name: str, device: jax.Device) -> jnp.dtype:
    """`auto` is bfloat16 where the device multiplies it natively: TPUs, and GPUs from compute capability 8."""
    if name == "auto":
        native = device.platform == "tpu" or (
            device.platform == "gpu" and float(getattr(device, "compute_capability", 0) or 0) >= 8
        )
        name = "bfloat16" if native else "float32"
    return jnp.dtype(name)


def make_learning_rate(config: ml_collections.ConfigDict) -> optax.Schedule:
    """The learning rate of every update."""
    c = config.optimizer
    return optim.learning_rate(
        c.schedule,
        peak=c.peak_learning_rate,
        steps=config.steps,
        warmup_steps=config_rules.warmup_steps(config),
        final_fraction=c.final_fraction,
        decay_fraction=c.decay_fraction,
    )


def make_student(config: ml_collections.ConfigDict, model: Transformer) -> Student:
    """The model with its optimizer and the options of its loss."""
    c, learning_rate = config.optimizer, make_learning_rate(config)
    optimizer = optim.make_optimizer(
        c.name,
        learning_rate,
        weight_decay=c.weight_decay,
        b1=c.b1,
        b2=c.b2,
        eps=c.eps,
        clip_norm=c.clip_norm,
        muon_momentum=c.muon_momentum,
        muon_steps=c.muon_steps,
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


def find_helpers(
    experiment: Experiment, chosen: dict[str, int] | None = None, needed: Collection[str] | None = None
) -> dict[str, helpers_lib.Helper]:
    """The config's helpers by role, checked but not loaded.

    Args:
      chosen: the steps that the run began with.
      needed: the roles that it still needs, by default all.
    """
    wanted = {role: run for role, run in roles.wanted(experiment.config).items() if needed is None or role in needed}
    own = {
        role: own_teacher.find(run.directory, experiment.prepared.train, experiment.prepared.vocabulary, run.step)
        for role, run in wanted.items()
        if own_teacher.is_own(role, run.directory)
    }
    found = {
        role: helpers_lib.find(
            role,
            directory,
            step=step if chosen is None else chosen[role],
            vocabulary=experiment.prepared.vocabulary,
            dtype=experiment.dtype,
            placement=helpers_lib.Placement.of(experiment.config),
        )
        for role, (directory, step) in wanted.items()
        if role not in own
    }
    return own | {role: with_attention(experiment.config, helper, experiment.mesh) for role, helper in found.items()}


def with_attention(
    config: ml_collections.ConfigDict, helper: helpers_lib.Helper, mesh: jax.sharding.Mesh
) -> helpers_lib.Helper:
    """The helper with the fastest attention that takes its shape: a kernel that is named is for the student."""
    device = mesh.devices.flat[0]
    name = "xla" if config.compute.attention == "xla" else "auto"
    backend = attention.choose(name, device, helper.model.config, config.data.seq_len, helper.model.dtype)
    return dataclasses.replace(helper, model=dataclasses.replace(helper.model, attention=backend))


def facts(
    experiment: Experiment, helpers: dict[str, helpers_lib.Helper], helped: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """What config.json keeps beside the config: enough to tell whether two runs can be compared.

    Args:
      helpers: the small LMs that are to help; helped: facts of those that have helped already.
    """
    train, config = experiment.prepared.train, experiment.config
    device = experiment.mesh.devices.flat[0]
    return {
        "vocabulary": experiment.prepared.vocabulary.fingerprint,
        "vocabulary_size": experiment.prepared.vocabulary.size,
        "train_rows": train.fingerprint,
        "validation_rows": experiment.validation.fingerprint,
        "objective": experiment.objective.fingerprint,
        "data": experiment.data.facts(),
        "parameters": experiment.student.model.num_params(),
        "train_tokens": train.tokens,
        "train_rows_count": None if config.data.stream else len(train),
        "validation_rows_count": len(experiment.validation.row_ids),
        "seq_len": config.data.seq_len,
        "batch_rows": config.batch_rows,
        "helpers": {**helped, **{role: helper.facts() for role, helper in helpers.items()}},
        "hardware": device.device_kind if device.platform != "cpu" else f"CPU ({platform.machine()})",
        "devices": experiment.mesh.size,
        "dtype": str(experiment.dtype),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")}
        | {"python": platform.python_version()},
    }


# Facts that a run must find unchanged when it goes on.
SAME_ON_RESUME = ("vocabulary", "train_rows", "validation_rows", "objective", "data", "parameters", "dtype")


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


def check_helpers(run: RunDir, known: dict[str, Any], helpers: dict[str, helpers_lib.Helper]) -> None:
    """Raises `UserError` where a helper that a run goes on with is another than the one it, or its trunk, began with.

    Args:
      known: facts of those that it began with, by role.
    """
    for role, helper in helpers.items():
        if role in known and helper.facts()["identity"] != known[role].get("identity"):
            raise UserError(
                f"{helpers_lib.KEYS[role]}={helper.run}: not what {run} began with; put that one back, or "
                "start over beside it with --fresh"
            )


def check_config(run: RunDir, config: ml_collections.ConfigDict) -> None:
    """Raises `UserError` where a run would go on with another config; cheap, so it comes first."""
    if run.config.is_file():
        changed = config_lib.changed_keys(run.read(run.config)["config"], config_lib.to_dict(config))
        if changed:
            raise UserError(f"{run}: cannot go on with another config ({'; '.join(changed)}); {CURE}")


CURE = "use the old values, or start over beside it with --fresh"

"""Which configs make sense: ranges, and keys that contradict each other."""

from collections.abc import Mapping
from typing import Any

import ml_collections

from slm_assist import plugins
from slm_assist.assist import representations, schedule, scores, selection, weights
from slm_assist.assist.stages import Stage, stages
from slm_assist.data import templates
from slm_assist.errors import UserError, nearest, one_of


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested config to `{dotted key: value}`."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping | ml_collections.ConfigDict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def check(config: ml_collections.ConfigDict) -> None:
    """Raises `UserError` where keys are out of range or contradict each other."""
    _check_ranges(flatten(config))
    if config.batch_rows % config.microbatches:
        raise UserError(
            f"batch_rows={config.batch_rows} is not divisible by microbatches={config.microbatches}; change one"
        )
    one_of("optimizer.name", config.optimizer.name, ("adamw", "adafactor", "muon"))
    one_of("optimizer.schedule", config.optimizer.schedule, ("cosine", "wsd", "constant"))
    if not plugins.is_plugin(config.assist.schedule):
        one_of("assist.schedule", config.assist.schedule, schedule.KINDS)
    one_of("model.scan_layers", config.model.scan_layers, ("auto", "true", "false"))
    one_of("compute.dtype", config.compute.dtype, ("auto", "float32", "bfloat16"))
    one_of("compute.remat", config.compute.remat, ("none", "dots", "full"))
    one_of("compute.attention", config.compute.attention, ("auto", "xla", "cudnn", "splash"))
    one_of("mesh.helpers", config.mesh.helpers, ("auto", "replicated", "fsdp"))
    if warmup_steps(config) >= config.steps:
        key = "grow" if warmup_steps(config) == config.grow.warmup_steps else "optimizer"
        raise UserError(f"{key}.warmup_steps={warmup_steps(config)} leaves nothing of steps={config.steps}; lower it")
    _check_fractions(config)
    span = config.log.profile
    if span and not (len(span) == 2 and 1 <= span[0] <= span[1] <= config.steps):
        raise UserError(
            f"log.profile={','.join(map(str, span))}: give the first and the last update to trace, from 1 to "
            f"steps={config.steps}, as 100,103"
        )
    if any(step > config.steps for step in config.checkpoint.keep):
        raise UserError(f"checkpoint.keep={config.checkpoint.keep} has a step beyond steps={config.steps}")
    _check_stream(config)
    templates.check(config.data)
    _check_assist(config)
    _check_select(config)
    _check_represent(config)
    _check_grow(config)
    _check_init(config)
    if config.branch.step != -1 and not config.branch.run:
        raise UserError(f"branch.step={config.branch.step} needs branch.run, the directory of the run to go on from")
    if config.branch.run and config.data.stream:
        raise UserError("branch.run with data.stream=true: a stream's place is its own run's; prepare the rows instead")


POSITIVE = ("steps", "batch_rows", "microbatches", "data.seq_len", "checkpoint.keep_last", "select.k",
            "select.pool_factor", "assist.window", "optimizer.muon_steps")  # fmt: skip
LEAST = dict.fromkeys(POSITIVE, 1) | dict.fromkeys(
    ("data.order_seed", "data.sentinels", "assist.teacher_step", "mesh.data", "mesh.fsdp", "mesh.tensor",
     "represent.helper_step", "represent.student_layer", "represent.helper_layer", "grow.helper_step",
     "grow.warmup_steps", "branch.step", "init.step"), -1
) | {"select.scorer_step": -2, "select.reference_step": -2}  # fmt: skip


def _check_ranges(flat: Mapping[str, Any]) -> None:
    for key, value in flat.items():
        numbers = value if isinstance(value, tuple) else (value,)
        if isinstance(numbers[0] if numbers else "", str | bool):
            continue
        least = LEAST.get(key, 0)
        for number in numbers:
            if not least <= number < 2**40:  # NaN is not either
                raise UserError(f"{key}={number}: must be a finite number of at least {least}")
    for key in ("seed", "data.order_seed"):
        if flat[key] >= 2**31:
            raise UserError(f"{key}={flat[key]}: must be below 2^31")
    for key in ("optimizer.b1", "optimizer.b2", "optimizer.muon_momentum"):
        if flat[key] >= 1:
            raise UserError(f"{key}={flat[key]}: must be below 1")
    if not flat["optimizer.peak_learning_rate"] > 0:
        raise UserError(f"optimizer.peak_learning_rate={flat['optimizer.peak_learning_rate']}: must be above 0")


def _check_fractions(config: ml_collections.ConfigDict) -> None:
    flat = flatten(config)
    for key in ("data.validation_fraction", "optimizer.final_fraction", "optimizer.decay_fraction",
                "assist.fraction", "assist.weight", "assist.margin", "checkpoint.keep_fraction", "data.ul2_causal",
                "data.ul2_prefix", "data.ul2_span", "data.corrupted", "select.band", "select.fraction",
                "select.threshold_decay", "select.token_share", "represent.fraction"):  # fmt: skip
        if not 0.0 <= flat[key] <= 1.0:
            raise UserError(f"{key}={flat[key]}: must lie between 0 and 1")
    if not config.assist.temperature > 0:
        raise UserError(f"assist.temperature={config.assist.temperature}: must be above 0")


def _check_init(config: ml_collections.ConfigDict) -> None:
    if config.init.step != -1 and not config.init.model:
        raise UserError(f"init.step={config.init.step} needs init.model, what the student begins as")
    if not config.init.model:
        return
    if config.grow.helper:
        raise UserError("init.model and grow.helper: a student begins as one model or grown from one; leave one out")
    for name, value in config.model.items():
        if isinstance(value, int) and value:
            raise UserError(f"model.{name}={value}: the student has the shape of init.model; leave it out")


def _check_stream(config: ml_collections.ConfigDict) -> None:
    data = config.data
    if not data.stream:
        return
    if not data.source.startswith("seqio:"):
        raise UserError(f"data.stream=true with data.source={data.source!r}: only seqio:NAME streams; set it to false")
    for key, plain in (("data.objective", "causal"), ("data.domain_weights", ""), ("select.rows", "all")):
        value = flatten(config)[key]
        if value not in (plain, "online"):
            raise UserError(
                f"{key}={value} needs prepared rows, and a stream has the Task's own order, packing and objective: set "
                f"data.stream=false, or leave {key} out"
            )


def _check_assist(config: ml_collections.ConfigDict) -> None:
    assist = config.assist
    if assist.schedule == "none":
        if assist.teacher:
            raise UserError(
                f"assist.teacher={assist.teacher!r} but assist.schedule=none: set assist.schedule=step (SALT) or "
                "constant (RKD), or leave the teacher out"
            )
        if assist.token_weight:
            raise UserError(
                f"assist.token_weight={assist.token_weight!r} but assist.schedule=none: no soft labels; leave it out"
            )
        return
    if not assist.teacher:
        raise UserError(
            f"assist.schedule={assist.schedule} needs assist.teacher, the run directory of a trained small LM"
        )
    if assist.steps > config.steps:
        raise UserError(
            f"assist.steps={assist.steps} (n_KD) is beyond the run's steps={config.steps}; lower it or use "
            "assist.schedule=constant"
        )
    if assist.decay_steps and assist.schedule not in ("linear", "ratio"):
        raise UserError(
            f"assist.decay_steps={assist.decay_steps} has no meaning with assist.schedule={assist.schedule}; set "
            "assist.schedule=linear or ratio"
        )
    if assist.decay_steps > assisted_steps(config):
        raise UserError(
            f"assist.decay_steps={assist.decay_steps} is longer than stage 1 ({assisted_steps(config)} steps)"
        )


def _check_select(config: ml_collections.ConfigDict) -> None:
    select = config.select
    one_of("select.rows", select.rows, ("all", "online", "list"))
    one_of("select.masked", select.masked, scores.MASKED)
    selection.check_rule(select.rule)
    if not select.token_share > 0:
        raise UserError("select.token_share=0 leaves no token to learn from; use a share above 0, 1 for all")
    if (select.rows == "list") != bool(select.list):
        raise UserError(
            f"select.rows={select.rows} and select.list={select.list!r}: a list needs both select.rows=list and "
            "select.list, the file that `slm-assist select` wrote"
        )
    if select.list in THEN:
        raise UserError(f"select.list={select.list}: name the file that `slm-assist select` wrote")
    if select.then not in THEN and not select.then.endswith(".npz"):
        raise UserError(f"select.then={select.then!r}: write all, unseen or a file .npz{nearest(select.then, THEN)}")
    if select.rows == "online" and select.pool_factor < 2:
        raise UserError("select.pool_factor=1 leaves nothing to choose from; use at least 2")
    if select.steps > config.steps:
        raise UserError(f"select.steps={select.steps} is beyond the run's steps={config.steps}; lower it")
    given = [name for name in ("scorer", "reference") if select[name]]
    if given and not selects(config):
        raise UserError(
            f"select.{given[0]}={select[given[0]]!r} but nothing is selected: set select.rows=online or "
            "select.token_share below 1, or leave it out"
        )


def _check_represent(config: ml_collections.ConfigDict) -> None:
    represent = config.represent
    one_of("represent.map", represent.map, representations.MAPS)
    if not plugins.is_plugin(represent.schedule):
        one_of("represent.schedule", represent.schedule, REPRESENT_SCHEDULES)
    if (represent.schedule == "none") == bool(represent.helper):
        raise UserError(
            f"represent.schedule={represent.schedule} and represent.helper={represent.helper!r}: representations need "
            "both a schedule (linear is LET's) and the run directory of a trained small LM"
        )
    if represent.schedule != "none" and not aligned_steps(config):
        raise UserError(
            f"represent.fraction={represent.fraction:g} leaves no update to represent.schedule={represent.schedule}; "
            "raise it, set represent.steps, or leave both out"
        )
    if represent.steps > config.steps:
        raise UserError(f"represent.steps={represent.steps} is beyond the run's steps={config.steps}; lower it")


def _check_grow(config: ml_collections.ConfigDict) -> None:
    grow = config.grow
    one_of("grow.depth", grow.depth, weights.DEPTHS)
    if grow.warmup_steps != -1 and not grow.helper:
        raise UserError(
            f"grow.warmup_steps={grow.warmup_steps} needs grow.helper; for other runs set optimizer.warmup_steps"
        )


REPRESENT_SCHEDULES = ("none", "constant", "step", "linear")


def warmup_steps(config: ml_collections.ConfigDict) -> int:
    """Updates over which the learning rate rises."""
    return config.optimizer.warmup_steps if config.grow.warmup_steps < 0 else config.grow.warmup_steps


def aligned_steps(config: ml_collections.ConfigDict) -> int:
    """How many updates, from the first, follow a small LM's representations."""
    represent = config.represent
    if represent.schedule == "none":
        return 0
    if represent.schedule == "constant":
        return config.steps
    return represent.steps or round(represent.fraction * config.steps)


def selects(config: ml_collections.ConfigDict) -> bool:
    """Whether some part of the run learns from a choice of rows or tokens."""
    return config.select.rows != "all" or config.select.token_share < 1


def selecting_steps(config: ml_collections.ConfigDict, assisted: int) -> int:
    """How many updates, from the first, learn from a choice; `assisted` of them or others have the teacher."""
    select = config.select
    if not selects(config):
        return 0
    if select.steps or select.fraction:
        return select.steps or round(select.fraction * config.steps)
    return assisted or round(WITHOUT_TEACHER * config.steps)


def plan(config: ml_collections.ConfigDict, assisted: int = -1) -> tuple[Stage, ...]:
    """The run's stages, where `assisted` updates have the teacher; -1: as many as the config allows."""
    assisted = assisted_steps(config) if assisted < 0 else assisted
    return stages(
        config.steps, assisted=assisted, selecting=selecting_steps(config, assisted), aligned=aligned_steps(config)
    )


THEN = ("all", "unseen")  # other values of select.then are files
WITHOUT_TEACHER = 0.173  # the paper's 36K of 208K


def assisted_steps(config: ml_collections.ConfigDict) -> int:
    """n_KD, the number of updates the small LM takes part in."""
    if config.assist.schedule == "none":
        return 0
    if config.assist.schedule == "constant":
        return config.steps
    return config.assist.steps or round(config.assist.fraction * config.steps)


def auto_options(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """What `assist.schedule=auto` decides by."""
    assist = config.assist
    return {
        "cap": assisted_steps(config),
        "margin": assist.margin,
        "window": assist.window,
        "patience": assist.patience,
    }


def kept_steps(config: ml_collections.ConfigDict) -> tuple[int, ...]:
    """Steps whose checkpoints are kept for good."""
    part = round(config.checkpoint.keep_fraction * config.steps)
    return tuple(sorted({*config.checkpoint.keep, *([part] if part else [])}))

"""Every key of an experiment: its default, what it means, and whether it may change on resume.

An experiment file (see `experiments/`) holds `OVERRIDES`, a dict of dotted keys; the command line overrides
that with `--key=value`. `--print_config` shows each key, its value and who set it. Keys marked [resume] may
differ when a run goes on; any other difference is refused, by name.
"""

import difflib
import json
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections

from slm_assist.errors import UserError, nearest, one_of


def get_config() -> ml_collections.ConfigDict:
    """The defaults. Types are those of the defaults: an int may stand for a float, nothing else mixes."""
    c = ml_collections.ConfigDict()
    c.name = ""  # how reports call the run; empty: the run directory's name  [resume]
    c.seed = 0  # initialisation, and the order of the data unless data.order_seed says otherwise
    c.steps = 1000  # optimizer updates in the run
    c.batch_rows = 16  # rows in one update, over all devices and hosts
    c.microbatches = 1  # parts a batch is split into, one after the other; gradients add up, by token

    c.model = ml_collections.ConfigDict()
    c.model.size = "laptop-large"  # a named size of slm_assist/models/sizes.py
    c.model.num_layers = 0  # 0: as the size says; so with the next five
    c.model.d_model = 0  # width of the residual stream
    c.model.d_ff = 0  # width of the MLP
    c.model.num_heads = 0  # query heads
    c.model.num_kv_heads = 0  # key and value heads
    c.model.head_dim = 0  # width of a head
    c.model.scan_layers = "auto"  # true: one compiled layer, repeated | false: unrolled | auto: as the size says

    c.data = ml_collections.ConfigDict()
    c.data.source = "python:"  # python: | text:GLOB[,GLOB] | jsonl:GLOB[,GLOB] (also .gz .xz .zst)
    c.data.validation = ""  # a source of its own for validation; empty: a part of data.source
    c.data.validation_fraction = 0.01  # of the documents (python: of the bytes), by a stable hash
    c.data.text_field = "text"  # jsonl: the field with the text
    c.data.domain_field = ""  # jsonl: dotted field with the domain, as meta.pile_set_name; empty: one domain
    c.data.seq_len = 256  # T: tokens the model sees in a row (a row stores T+1)
    c.data.vocabulary = ""  # SentencePiece model or run directory; empty: the teacher's, else train one
    c.data.vocab_size = 2048  # pieces, when a vocabulary is trained
    c.data.cache_dir = "~/.cache/slm_assist"  # prepared rows and vocabularies, keyed by content  [resume]
    c.data.cores = 0  # threads that prepare; 0: as many as cores  [resume]
    c.data.order_seed = -1  # the order of the rows; -1: seed

    c.optimizer = ml_collections.ConfigDict()
    c.optimizer.name = "adamw"  # adamw | adafactor
    c.optimizer.peak_learning_rate = 2e-3  # at the end of the warm-up
    c.optimizer.schedule = "cosine"  # cosine | wsd (warmup, stable, decay) | constant
    c.optimizer.warmup_steps = 50  # updates of linear rise
    c.optimizer.final_fraction = 0.1  # learning rate at the last step, as a part of the peak
    c.optimizer.decay_fraction = 0.2  # wsd: the last part of the run, over which the learning rate decays
    c.optimizer.weight_decay = 0.1  # on matrices, not on norms
    c.optimizer.b1 = 0.9  # adamw
    c.optimizer.b2 = 0.95  # adamw
    c.optimizer.eps = 1e-8  # adamw
    c.optimizer.clip_norm = 1.0  # of the global gradient norm; 0: no clipping

    c.loss = ml_collections.ConfigDict()
    c.loss.z_loss = 0.0  # weight of logsumexp(logits)^2
    c.loss.block_bytes = 0  # largest float32 block of logits; 0: 16 MiB on CPUs, 512 MiB elsewhere  [resume]

    c.assist = ml_collections.ConfigDict()
    c.assist.schedule = "none"  # none (BASELINE) | constant (RKD) | step (SALT) | linear
    c.assist.teacher = ""  # run directory of the small LM whose soft labels are learnt
    c.assist.teacher_step = -1  # its saved step; -1: the newest whole one
    c.assist.weight = 0.667  # w: the loss is (1-w) cross-entropy + w CE(teacher, student)
    c.assist.temperature = 1.0  # divides the teacher's logits: below 1 sharpens, above 1 softens
    c.assist.steps = 0  # n_KD: updates with the small LM; 0: assist.fraction of the run
    c.assist.fraction = 0.173  # the paper's 36K of 208K
    c.assist.decay_steps = 0  # linear: updates over which w goes to 0, at the end of stage 1; 0: half of it

    c.mesh = ml_collections.ConfigDict()
    c.mesh.data = -1  # splits rows; -1: the devices that are left  [resume: mesh.*]
    c.mesh.fsdp = 1  # splits rows and parameters
    c.mesh.tensor = 1  # splits heads, MLP and vocabulary

    c.compute = ml_collections.ConfigDict()
    c.compute.dtype = "auto"  # auto (bfloat16 where the device has it natively) | float32 | bfloat16
    c.compute.remat = "none"  # none | dots (keep matmul results) | full  [resume]
    c.compute.deterministic = False  # GPUs: only kernels that give the same bits each time  [resume]

    c.validation = ml_collections.ConfigDict()
    c.validation.every = 100  # steps; 0: only at the end
    c.validation.rows = 512  # rows to evaluate on, always the same; 0: all
    c.validation.buckets = ""  # run directory whose loss cuts the rows into easy, medium and hard thirds

    c.checkpoint = ml_collections.ConfigDict()
    c.checkpoint.every = 200  # steps; 0: only at the end  [resume: checkpoint.*]
    c.checkpoint.keep_last = 2  # how many of the newest stay
    c.checkpoint.keep = ()  # steps to save and keep for good, as 100,200
    c.checkpoint.keep_fraction = 0.0  # and the step at this part of the run; 0: none. Small LMs: 0.12, to score with

    c.log = ml_collections.ConfigDict()
    c.log.tensorboard = True  # [resume: log.*]
    c.log.progress = True  # a bar with loss, speed, stage and time left
    return c


MAY_CHANGE_ON_RESUME = (
    "name",
    "data.cache_dir",
    "data.cores",
    "loss.block_bytes",
    "compute.remat",
    "compute.deterministic",
    "mesh.",
    "checkpoint.",
    "log.",
)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested config to `{dotted key: value}`."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping | ml_collections.ConfigDict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def to_dict(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Plain nested dict, as it is written to config.json."""
    return json.loads(json.dumps(config.to_dict()))


def resolve(
    experiment: str = "", overrides: Mapping[str, Any] | None = None
) -> tuple[ml_collections.ConfigDict, dict[str, str]]:
    """Defaults, then the experiment file, then `overrides`; returns the config and who set each key.

    Args:
      experiment: path of a Python file with a dict `OVERRIDES`; empty for the defaults.
      overrides: dotted keys; values may be strings, as from a command line.

    Raises:
      UserError: an unknown key, a value of the wrong type, keys that contradict each other.
    """
    config = get_config()
    origins = dict.fromkeys(flatten(config), "default")
    for layer, values in ((experiment, read_experiment(experiment)), ("command line", overrides or {})):
        for key, value in values.items():
            set_key(config, key, value)
            origins[key] = layer
    check(config)
    return config, origins


def read_experiment(path: str) -> dict[str, Any]:
    """The `OVERRIDES` of an experiment file."""
    if not path:
        return {}
    if not Path(path).is_file():
        raise UserError(f"{path}: no such experiment file; see experiments/ for those that come with the code")
    try:
        overrides = runpy.run_path(path).get("OVERRIDES")
    except Exception as error:
        raise UserError(f"{path}: cannot be run as an experiment file: {error!r}") from error
    if not isinstance(overrides, dict):
        raise UserError(f"{path}: an experiment file defines a dict OVERRIDES of dotted keys; it has none")
    return overrides


def set_key(config: ml_collections.ConfigDict, key: str, value: Any) -> None:
    """Sets one dotted key, parsing strings by the default's type."""
    keys = flatten(get_config())
    if key not in keys:
        raise UserError(f"unknown config key {key!r}{_nearest_key(key, keys)}; --print_config lists all keys")
    parsed = parse(key, value, keys[key])
    *sections, last = key.split(".")
    for section in sections:
        config = config[section]
    config[last] = parsed


def parse(key: str, value: Any, default: Any) -> Any:
    """`value`, perhaps a string from a command line, as the type of `default`, or `UserError`."""
    try:
        return _parse(value, default)
    except (KeyError, TypeError, ValueError):
        kind = "a list of ints, as 100,200" if isinstance(default, tuple) else type(default).__name__
        raise UserError(f"{key}={value!r}: the value must be {kind}, as the default {default!r}") from None


def _nearest_key(key: str, keys: Mapping[str, Any]) -> str:
    same_leaf = [name for name in keys if name.split(".")[-1] == key.split(".")[-1]]
    if same_leaf:
        best = difflib.get_close_matches(key, same_leaf, n=1, cutoff=0.0)[0]
        return f" (did you mean {best}?)"
    return nearest(key, keys)


BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


def _parse(value: Any, default: Any) -> Any:
    if isinstance(default, bool):
        return value if isinstance(value, bool) else BOOLEANS[str(value).lower()]
    if isinstance(default, tuple):
        items = value.split(",") if isinstance(value, str) else value
        return tuple(_parse(item, 0) for item in items if item != "")
    if isinstance(default, int):
        if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
            _refuse()
        return int(value)
    if isinstance(default, float):
        return float(value) if not isinstance(value, bool) else _refuse()
    return value if isinstance(value, str) else _refuse()


def _refuse():
    raise TypeError


def check(config: ml_collections.ConfigDict) -> None:
    """Raises `UserError` where keys are out of range or contradict each other."""
    _check_ranges(flatten(config))
    if config.batch_rows % config.microbatches:
        raise UserError(
            f"batch_rows={config.batch_rows} is not divisible by microbatches={config.microbatches}; change one"
        )
    one_of("optimizer.name", config.optimizer.name, ("adamw", "adafactor"))
    one_of("optimizer.schedule", config.optimizer.schedule, ("cosine", "wsd", "constant"))
    one_of("assist.schedule", config.assist.schedule, ("none", "constant", "step", "linear"))
    one_of("model.scan_layers", config.model.scan_layers, ("auto", "true", "false"))
    one_of("compute.dtype", config.compute.dtype, ("auto", "float32", "bfloat16"))
    one_of("compute.remat", config.compute.remat, ("none", "dots", "full"))
    if config.optimizer.warmup_steps >= config.steps:
        raise UserError(
            f"optimizer.warmup_steps={config.optimizer.warmup_steps} leaves nothing of steps={config.steps}; lower it"
        )
    _check_fractions(config)
    if any(step > config.steps for step in config.checkpoint.keep):
        raise UserError(f"checkpoint.keep={config.checkpoint.keep} has a step beyond steps={config.steps}")
    _check_assist(config)


POSITIVE = ("steps", "batch_rows", "microbatches", "data.seq_len", "checkpoint.keep_last")
MAY_BE_MINUS_ONE = ("data.order_seed", "assist.teacher_step", "mesh.data", "mesh.fsdp", "mesh.tensor")


def _check_ranges(flat: Mapping[str, Any]) -> None:
    for key, value in flat.items():
        numbers = value if isinstance(value, tuple) else (value,)
        if isinstance(numbers[0] if numbers else "", str | bool):
            continue
        least = 1 if key in POSITIVE else -1 if key in MAY_BE_MINUS_ONE else 0
        for number in numbers:
            if not least <= number < 2**40:  # NaN is not either
                raise UserError(f"{key}={number}: must be a finite number of at least {least}")
    for key in ("seed", "data.order_seed"):
        if flat[key] >= 2**31:
            raise UserError(f"{key}={flat[key]}: must be below 2^31")
    for key in ("optimizer.b1", "optimizer.b2"):
        if flat[key] >= 1:
            raise UserError(f"{key}={flat[key]}: must be below 1")
    if not flat["optimizer.peak_learning_rate"] > 0:
        raise UserError(f"optimizer.peak_learning_rate={flat['optimizer.peak_learning_rate']}: must be above 0")


def _check_fractions(config: ml_collections.ConfigDict) -> None:
    flat = flatten(config)
    for key in ("data.validation_fraction", "optimizer.final_fraction", "optimizer.decay_fraction",
                "assist.fraction", "assist.weight", "checkpoint.keep_fraction"):  # fmt: skip
        if not 0.0 <= flat[key] <= 1.0:
            raise UserError(f"{key}={flat[key]}: must lie between 0 and 1")
    if not config.assist.temperature > 0:
        raise UserError(f"assist.temperature={config.assist.temperature}: must be above 0")


def _check_assist(config: ml_collections.ConfigDict) -> None:
    assist = config.assist
    if assist.schedule == "none":
        if assist.teacher:
            raise UserError(
                f"assist.teacher={assist.teacher!r} but assist.schedule=none: set assist.schedule=step (SALT) or "
                "constant (RKD), or leave the teacher out"
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
    if assist.decay_steps and assist.schedule != "linear":
        raise UserError(
            f"assist.decay_steps={assist.decay_steps} has no meaning with assist.schedule={assist.schedule}; set "
            "assist.schedule=linear"
        )
    if assist.decay_steps > assisted_steps(config):
        raise UserError(
            f"assist.decay_steps={assist.decay_steps} is longer than stage 1 ({assisted_steps(config)} steps)"
        )


def assisted_steps(config: ml_collections.ConfigDict) -> int:
    """n_KD, the number of updates the small LM takes part in."""
    if config.assist.schedule == "none":
        return 0
    if config.assist.schedule == "constant":
        return config.steps
    return config.assist.steps or round(config.assist.fraction * config.steps)


def kept_steps(config: ml_collections.ConfigDict) -> tuple[int, ...]:
    """Steps whose checkpoints are kept for good."""
    part = round(config.checkpoint.keep_fraction * config.steps)
    return tuple(sorted({*config.checkpoint.keep, *([part] if part else [])}))


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`key: old -> new` for each key that differs and must not when a run goes on."""
    old, new = flatten(old), flatten(new)
    return [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(MAY_CHANGE_ON_RESUME)
    ]


def describe(config: ml_collections.ConfigDict, origins: Mapping[str, str]) -> str:
    """One line a key: `key = value    # who set it`."""
    flat = flatten(config)
    width = max(len(f"{key} = {value!r}") for key, value in flat.items())
    return "\n".join(f"{f'{key} = {value!r}':<{width}}  # {origins[key]}" for key, value in flat.items())

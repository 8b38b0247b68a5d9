"""Every key of an experiment: its default, what it means, and whether it may change on resume.

An experiment file (see `experiments/`) holds `OVERRIDES`, a dict of dotted keys; the command line overrides
that with `--key=value`. `--print_config` shows each key, its value and who set it. Keys marked [resume] may
differ when a run goes on; any other difference is refused, by name.
"""

import difflib
import functools
import json
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections

from slm_assist.config_rules import check, flatten
from slm_assist.errors import UserError, nearest


def get_config() -> ml_collections.ConfigDict:
    """The defaults. Types are those of the defaults: an int may stand for a float, nothing else mixes."""
    c = ml_collections.ConfigDict()
    c.name = ""  # how reports call the run; empty: the run directory's name  [resume]
    c.seed = 0  # initialisation, and the order of the data unless data.order_seed says otherwise
    c.steps = 1000  # optimizer updates in the run
    c.batch_rows = 16  # rows in one update, over all devices and hosts
    c.microbatches = 1  # parts a batch is split into, one after the other; gradients add up, by token

    c.init = ml_collections.ConfigDict()
    c.init.model = ""  # run directory or hf:PATH_OR_NAME that the student begins as: weights and shape; empty: random
    c.init.step = -1  # its saved step; -1: the newest whole one

    c.model = ml_collections.ConfigDict()
    c.model.size = "laptop-large"  # a named size of slm_assist/models/sizes.py | hf:PATH_OR_NAME, that model's shape
    c.model.num_layers = 0  # 0: as the size says; so with the next five
    c.model.d_model = 0  # width of the residual stream
    c.model.d_ff = 0  # width of the MLP
    c.model.num_heads = 0  # query heads
    c.model.num_kv_heads = 0  # key and value heads
    c.model.head_dim = 0  # width of a head
    c.model.scan_layers = "auto"  # true: one compiled layer, repeated | false: unrolled | auto: as the size says

    c.data = ml_collections.ConfigDict()
    c.data.source = "python:"  # python: | text: jsonl: pile: parquet: array_record: nanogpt: megatron: + GLOB[,GLOB] |
    # tfds:NAME:SPLIT | seqio:NAME. data/sources.py says more of each; files may be .gz .xz .zst and on gs://
    c.data.stream = False  # seqio: read rows as they come, without preparing them (the task's own order and packing)
    c.data.validation = ""  # a source of its own for validation; empty: a part of data.source
    c.data.validation_fraction = 0.01  # of the documents (python: of the bytes), by a stable hash
    c.data.text_field = "text"  # jsonl, parquet, array_record, tfds, seqio: the field with the text
    c.data.domain_field = ""  # dotted field with the domain, as meta.pile_set_name; empty: one domain
    c.data.domain_weights = ""  # DOMAIN=WEIGHT,... | natural | pile (its published ones, the default of pile:)
    c.data.prompt = ""  # to fine-tune: a template with a record's fields, as "Q: {question}\nA:"; empty: text without
    c.data.answer = ""  # what follows, as " {answer}". jsonl, parquet, array_record, tfds; see data/templates.py
    c.data.learn = "answer"  # answer | all (prompt and answer) | regular expression: what it matches in the answer
    c.data.choices = ""  # words for labels: FIELD:word|word|word (of 0, 1, 2), or FIELD:code=word|code=word; ...
    c.data.shorten = ""  # field of the prompt to cut where an example is longer than a row; empty: leave it out
    c.data.seq_len = 256  # T: tokens the model sees in a row (a row stores T+1)
    c.data.vocabulary = ""  # SentencePiece model, tokenizer.json, run directory, hf:; empty: the small LM's, or learnt
    c.data.vocab_size = 2048  # pieces, when a vocabulary is trained
    c.data.sentinels = -1  # ids behind the pieces that stand for corrupted spans; -1: as many as the objective needs
    c.data.objective = "causal"  # causal | prefix | span | ul2 (a mixture by segment) | package.module:function
    c.data.ul2_causal = 0.6  # ul2: share of segments for next-token prediction (the paper's proportions)
    c.data.ul2_prefix = 0.2  # with a bidirectional prefix
    c.data.ul2_span = 0.2  # with corrupted spans
    c.data.corrupted = 0.15  # span: share of a segment's tokens that are corrupted
    c.data.span_length = 3.0  # span: mean tokens of a corrupted span
    c.data.cache_dir = "~/.cache/slm_assist"  # prepared rows and vocabularies, keyed by content  [resume]
    c.data.cores = 0  # threads that prepare; 0: as many as cores  [resume]
    c.data.order_seed = -1  # the order of the rows; -1: seed

    c.optimizer = ml_collections.ConfigDict()
    c.optimizer.name = "adamw"  # adamw | adafactor | muon (matrices by Muon, the rest by AdamW)
    c.optimizer.peak_learning_rate = 2e-3  # at the end of the warm-up
    c.optimizer.schedule = "cosine"  # cosine | wsd (warmup, stable, decay) | constant
    c.optimizer.warmup_steps = 50  # updates of linear rise
    c.optimizer.final_fraction = 0.1  # learning rate at the last step, as a part of the peak
    c.optimizer.decay_fraction = 0.2  # wsd: the last part of the run, over which the learning rate decays
    c.optimizer.weight_decay = 0.1  # on matrices, not on norms
    c.optimizer.b1 = 0.9  # adamw
    c.optimizer.b2 = 0.95  # adamw
    c.optimizer.eps = 1e-8  # adamw
    c.optimizer.muon_momentum = 0.95  # muon: of the matrices, with Nesterov's look ahead
    c.optimizer.muon_steps = 5  # muon: Newton-Schulz iterations
    c.optimizer.clip_norm = 1.0  # of the global gradient norm; 0: no clipping

    c.loss = ml_collections.ConfigDict()
    c.loss.z_loss = 0.0  # weight of logsumexp(logits)^2
    c.loss.block_bytes = 0  # largest block of logits; 0: 32 MiB or 64 tokens on CPUs, else 512 MiB or 512  [resume]

    c.assist = ml_collections.ConfigDict()
    c.assist.schedule = "none"  # none (BASELINE) | constant (RKD) | step (SALT) | linear | ratio | auto
    c.assist.teacher = ""  # the small LM: run directory | hf:PATH_OR_NAME, as for all helpers | package.module:function
    c.assist.teacher_step = -1  # its saved step; -1: the newest whole one
    c.assist.weight = 0.667  # w: the loss is (1-w) cross-entropy + w CE(teacher, student)
    c.assist.token_weight = ""  # package.module:function(TokenInfo, w) -> w of each token; empty: w for all
    c.assist.temperature = 1.0  # divides the teacher's logits: below 1 sharpens, above 1 softens
    c.assist.top_k = 0  # only the teacher's k likeliest tokens, renormalised; 0: all
    c.assist.steps = 0  # n_KD: updates with the small LM (auto: at most); 0: assist.fraction of the run
    c.assist.fraction = 0.173  # the paper's 36K of 208K; with auto 0.4 is a better cap
    c.assist.decay_steps = 0  # linear, ratio: updates at the end of stage 1 over which w goes to 0; 0: half of it
    c.assist.margin = 0.005  # auto: stage 1 ends when the student's accuracy is within this of the teacher's,
    c.assist.window = 50  # auto: both smoothed over about this many updates,
    c.assist.patience = 3  # auto: or when so many validations brought no better cross-entropy; 0: not by that

    c.select = ml_collections.ConfigDict()
    c.select.rows = "all"  # all | online (candidates scored on the device) | list (rows chosen before, select.list)
    c.select.score = "salt"  # salt | perplexity | difference | excess | learnability | package.module:function
    c.select.k = 10  # salt: a token counts where it is among the scorer's k likeliest
    c.select.masked = "zero"  # salt: other tokens count as 0 (zero) or not at all (drop)
    c.select.statistic = "median"  # salt: over a row's tokens: median | mean | upper_quartile | lower_quartile
    c.select.rule = "top"  # online: top | band | gumbel | random | threshold | package.module:function
    c.select.pool_factor = 5  # online: candidates for each row that is kept
    c.select.band = 0.5  # band: which part of the ranked candidates; 0 lowest, 0.5 middle, 1 highest scores
    c.select.noise = 0.1  # gumbel: scale of the noise that is added to the scores (tau)
    c.select.threshold_decay = 0.95  # threshold: how much of the running bar stays at each update
    c.select.scorer = ""  # the small LM that scores: run directory | hf:PATH_OR_NAME; empty: assist.teacher
    c.select.scorer_step = -2  # its saved step; -1: the newest; -2: the one its checkpoint.keep_fraction kept
    c.select.reference = ""  # run or hf: of the second model that some scores and token_share need; empty: the scorer's
    c.select.reference_step = -1  # its saved step; -1: the newest; -2: as above
    c.select.list = ""  # list: file of row ids that `slm-assist select` wrote
    c.select.then = "all"  # list: rows afterwards: all | unseen (what stage 1 has not read) | a file of its own
    c.select.steps = 0  # updates with selection; 0: those with the teacher, else select.fraction of the run
    c.select.fraction = 0.0  # of the run; 0: as long as the teacher stays, 0.173 without one
    c.select.token_share = 1.0  # RHO-1: share of a microbatch's tokens the loss counts, by learner - reference loss
    c.select.sample = 192  # rows scored once when a selecting run begins, for a person to look at; 0: none  [resume]

    c.represent = ml_collections.ConfigDict()
    c.represent.schedule = "none"  # of lambda: none | constant | step | linear (LET) | package.module:function
    c.represent.helper = ""  # run directory or hf: of the small LM (the guide) whose representations are followed
    c.represent.helper_step = -1  # its saved step; -1: the newest whole one
    c.represent.weight = 0.1  # lambda: the loss is that of the labels + lambda (1 - cosine), token by token
    c.represent.steps = 0  # updates with the guide; 0: represent.fraction of the run
    c.represent.fraction = 0.173  # as of soft labels, so that the two compare
    c.represent.student_layer = -1  # whose output is aligned, counted from 0; -1: a third of the way up
    c.represent.helper_layer = -1  # with which of the guide's; -1: its last hidden states, after the final norm
    c.represent.map = "projection"  # between widths: projection (learnt, to the guide's) | truncate (first dimensions)

    c.grow = ml_collections.ConfigDict()
    c.grow.helper = ""  # run directory or hf: of the small LM (the parent) that the student grows from; empty: random
    c.grow.helper_step = -1  # its saved step; -1: the newest whole one
    c.grow.depth = "zero"  # added layers: zero (add nothing at first, so logits stay) | stack | interleave
    c.grow.noise = 1.0  # tells clones apart, and keeps the logits: part of the RMS of the weights that read them
    c.grow.warmup_steps = -1  # the learning rate's rise in a grown run; -1: optimizer.warmup_steps

    c.branch = ml_collections.ConfigDict()
    c.branch.run = ""  # go on from a checkpoint of that run, in a run of one's own: to decay from a trunk's plateau
    c.branch.step = -1  # its saved step; -1: the newest whole one

    c.mesh = ml_collections.ConfigDict()
    c.mesh.data = -1  # splits rows; -1: the devices that are left  [resume: mesh.*]
    c.mesh.fsdp = 1  # splits rows and parameters
    c.mesh.tensor = 1  # splits heads, MLP and vocabulary
    c.mesh.helpers = "auto"  # small LMs' parameters: replicated | fsdp (split over every device) | auto
    c.mesh.helper_replicate_bytes = 4 * 2**30  # auto: replicated up to this size of each, split above

    c.compute = ml_collections.ConfigDict()
    c.compute.dtype = "auto"  # auto (bfloat16 where the device has it natively) | float32 | bfloat16
    c.compute.attention = "auto"  # auto | xla | cudnn (GPUs) | splash (TPUs); auto: the fastest that is exact  [resume]
    c.compute.cache_dir = "~/.cache/slm_assist/compiled"  # compiled steps, for the next start; empty: none  [resume]
    c.compute.remat = "none"  # none | dots (keep matmul results) | full  [resume]
    c.compute.deterministic = False  # GPUs: only kernels that give the same bits each time  [resume]

    c.validation = ml_collections.ConfigDict()
    c.validation.every = 100  # steps; 0: only at the end
    c.validation.rows = 512  # rows to evaluate on, always the same; 0: all
    c.validation.metric = ""  # package.module:function(TokenStats, batch) -> a number for each token; several: commas
    c.validation.buckets = ""  # run directory or hf: of what cuts the rows by its loss: easy, medium and hard thirds

    c.checkpoint = ml_collections.ConfigDict()
    c.checkpoint.every = 200  # steps; 0: only at the end  [resume: checkpoint.*]
    c.checkpoint.keep_last = 2  # how many of the newest stay
    c.checkpoint.keep = ()  # steps to save and keep for good, as 100,200
    c.checkpoint.keep_fraction = 0.0  # and the step at this part of the run; 0: none. Small LMs: 0.12, to score with

    c.log = ml_collections.ConfigDict()
    c.log.tensorboard = True  # [resume: log.*]
    c.log.profile = ()  # first and last update to trace for a profiler, as 100,103: written to RUN/profile
    c.log.progress = True  # a bar with loss, speed, stage and time left
    c.log.samples = 2  # texts that the finished model writes, for the report; 0: none
    return c


MAY_CHANGE_ON_RESUME = (
    "name",
    "data.cache_dir",
    "data.cores",
    "loss.block_bytes",
    "compute.remat",
    "compute.deterministic",
    "compute.attention",
    "compute.cache_dir",
    "mesh.",
    "checkpoint.",
    "log.",
    "select.sample",
)


# What a branch may change beside that: what comes after its first update, and what only looks on.
MAY_CHANGE_ON_BRANCH = (*MAY_CHANGE_ON_RESUME, "steps", "optimizer.", "branch.", "validation.")


def to_dict(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Plain nested dict, as it is written to config.json."""
    return json.loads(json.dumps(config.to_dict()))


def from_dict(values: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """The config of a config.json; keys that it does not have yet are at their defaults."""
    config = get_config()
    for key, value in flatten(values).items():
        if key in _defaults():
            set_key(config, key, value)
    return config


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
    if config.data.source.startswith("pile:") and not config.data.domain_weights:
        config.data.domain_weights, origins["data.domain_weights"] = "pile", "data.source"
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


@functools.cache
def _defaults() -> Mapping[str, Any]:
    """Every key's default, not to be written to."""
    return flatten(get_config())


def set_key(config: ml_collections.ConfigDict, key: str, value: Any) -> None:
    """Sets one dotted key, parsing strings by the default's type."""
    keys = _defaults()
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


def changed_keys(
    old: Mapping[str, Any], new: Mapping[str, Any], may_change: tuple[str, ...] = MAY_CHANGE_ON_RESUME
) -> list[str]:
    """`key: old -> new` for each that differs and must not when a run goes on; one that is new had its default."""
    defaults = flatten(to_dict(get_config()))
    old, new = defaults | flatten(old), flatten(new)
    return [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(may_change)
    ]


def describe(config: ml_collections.ConfigDict, origins: Mapping[str, str]) -> str:
    """One line a key: `key = value    # who set it`."""
    flat = flatten(config)
    width = max(len(f"{key} = {value!r}") for key, value in flat.items())
    return "\n".join(f"{f'{key} = {value!r}':<{width}}  # {origins[key]}" for key, value in flat.items())

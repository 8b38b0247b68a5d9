"""The text that a config names: its vocabulary, its rows or stream, and what is asked of them."""

import dataclasses
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_collections

from slm_assist import pretrained, roles
from slm_assist.assist import helpers as helpers_lib
from slm_assist.assist.own_teacher import is_own
from slm_assist.data import examples, objectives, templates
from slm_assist.data import rows as rows_lib
from slm_assist.data.objectives import Objective
from slm_assist.data.paths import cache_path
from slm_assist.data.rows import Prepared
from slm_assist.data.sources import Source, open_source
from slm_assist.data.tokenizers import Vocabulary
from slm_assist.distributed import Group
from slm_assist.errors import UserError
from slm_assist.models.hf import load as hub
from slm_assist.run_dir import RunDir

if TYPE_CHECKING:  # TensorFlow loads only where a config names a stream
    from slm_assist.data.stream import Stream

Say = Callable[[str], None]


def prepare(
    config: ml_collections.ConfigDict,
    run: RunDir | None = None,
    *,
    say: Say,
    part: tuple[int, int] | None = None,
    group: Group | None = None,
    reader: tuple[int, int] = (0, 1),
) -> Prepared | None:
    """The rows, from the cache or made now, with the run's, the config's, a helper's or a new vocabulary.

    With `part` (i, n), makes that part only, and returns None where others are missing. With data.stream, `train` is
    the stream, and only the rows to validate on are prepared.

    Args:
      group: the processes that prepare the same; of those that see the same data.cache_dir one prepares, and the
        others wait for it.
      reader: which of how many shares of a stream this process reads.

    Raises:
      UserError: whatever in the sources, the vocabulary or the cache does not fit.
    """
    data = config.data
    vocabulary = find_vocabulary(config, run)
    if data.stream:
        if part:
            raise UserError("--part with data.stream=true: a stream is not prepared; set data.stream=false")
        stream = _open_stream(config, vocabulary, reader, say)
        return _in_turn(config, group, say, lambda: _streamed(config, stream, say))
    source = _open(config, data.source, vocabulary)
    if vocabulary is None:
        vocabulary = getattr(source, "vocabulary", None)  # a seqio Task brings its own
    prepared = _in_turn(config, group, say, lambda: _rows(config, source, vocabulary, part, say))
    if prepared is None:
        return None
    if vocabulary is None or not len(vocabulary.sentinel_ids):
        vocabulary = prepared.vocabulary.with_sentinels(sentinels(config))
    train, held = prepared.train, prepared.validation
    say(
        f"rows of {data.seq_len} tokens: {len(train):,} to train on ({train.tokens:,} tokens), {len(held):,} to "
        f"validate on; {vocabulary.size} pieces; in {prepared.path}"
    )
    if train.examples:
        say(f"examples: {examples.describe(prepared.meta['splits'], data.seq_len)}")
    return dataclasses.replace(prepared, vocabulary=vocabulary)


def _in_turn(
    config: ml_collections.ConfigDict, group: Group | None, say: Say, make: Callable[[], Prepared | None]
) -> Prepared | None:
    """`make()` on every process; on each disk the lowest of the processes that see it goes first."""
    if group is None or group.count == 1:
        return make()
    place = cache_path(config.data.cache_dir)
    place.mkdir(parents=True, exist_ok=True)
    token = group.first("disk", lambda: secrets.token_hex(8))
    mark = place / f".process-{token}-{group.index}"
    mark.touch()
    try:
        group.wait("marked")
        seen = [int(file.name.rsplit("-", 1)[1]) for file in place.glob(f".process-{token}-*")]
        leader = min(seen)  # a mark that comes late, over a network, costs doubled work and no more
        leaders = group.agreed("leaders", leader, lambda everyone: sorted(set(everyone)))
    finally:
        mark.unlink(missing_ok=True)
    names = ", ".join(map(str, leaders))
    verb = "looks for the rows first, or makes them" if len(leaders) == 1 else "look first, each for its disk"
    say(f"process {names} of {group.count} {verb}; the others wait")
    return group.by(leader, "prepared", make)


def _open(config: ml_collections.ConfigDict, spec: str, vocabulary: Vocabulary | None) -> Source:
    data = config.data
    return open_source(
        spec,
        text_field=data.text_field,
        domain_field=data.domain_field,
        validation_fraction=data.validation_fraction,
        cache_dir=data.cache_dir,
        vocabulary=vocabulary and vocabulary.with_sentinels(0),
        templates=templates.from_config(data),
    )


def _rows(
    config: ml_collections.ConfigDict,
    source: Source,
    vocabulary: Vocabulary | None,
    part: tuple[int, int] | None,
    say: Say,
) -> Prepared | None:
    data = config.data
    say(source.describe())
    return rows_lib.prepare(
        source,
        vocabulary=vocabulary and vocabulary.with_sentinels(0),  # sentinels stand in no row
        vocab_size=data.vocab_size,
        seq_len=data.seq_len,
        validation_source=_open(config, data.validation, vocabulary) if data.validation else None,
        validation_fraction=data.validation_fraction,
        cache_dir=data.cache_dir,
        cores=data.cores,
        progress=config.log.progress,
        part=part,
        learn=data.learn,
    )


def prepare_as_told(config: dict[str, Any], part: tuple[int, int] | None = None) -> None:
    """`prepare` by a plain dict of keys, for workers that are sent one."""
    quiet = ml_collections.ConfigDict(config)
    quiet.log.progress = False
    prepare(quiet, say=lambda line: None, part=part)


def _open_stream(
    config: ml_collections.ConfigDict, vocabulary: Vocabulary | None, reader: tuple[int, int], say: Say
) -> "Stream":
    from slm_assist.data.stream import Stream

    data, pool = config.data, config.select.pool_factor if config.select.rows == "online" else 1
    return Stream(
        data.source,
        data.seq_len,
        config.batch_rows,
        seed=config.seed if data.order_seed < 0 else data.order_seed,
        process_index=reader[0],
        process_count=reader[1],
        behind=4 * pool,
        vocabulary=vocabulary,
        say=say,
    )


def _streamed(config: ml_collections.ConfigDict, stream: "Stream", say: Say) -> Prepared:
    """A stream to train on, and prepared rows to validate on."""
    config = config.copy_and_resolve_references()
    config.data.validation = config.data.validation or stream.validation_spec
    held = _open(config, config.data.validation, stream.vocabulary)
    # As if it were both splits; only the one to validate on is used.
    prepared = _rows(config, held, stream.vocabulary, None, say)
    say(
        f"rows of {config.data.seq_len} tokens: a stream of {stream.spec} to train on, {len(prepared.validation):,} to "
        f"validate on; {stream.vocabulary.size} pieces"
    )
    return dataclasses.replace(prepared, train=stream, vocabulary=stream.vocabulary)


def make_objective(config: ml_collections.ConfigDict, prepared: Prepared) -> Objective:
    """What is asked of the rows; of a stream, the Task has decided it."""
    if not config.data.stream:
        if prepared.train.examples and config.data.objective != "causal":
            raise UserError(f"data.objective={config.data.objective}: examples are learnt with data.objective=causal")
        return objectives.make(config.data, prepared.vocabulary)
    prefix = prepared.train.has_prefix
    return Objective("prefix" if prefix else "causal", prefix, "as the Task packs", objectives.causal)


def sentinels(config: ml_collections.ConfigDict) -> int:
    """How many ids behind the pieces of a new vocabulary stand for corrupted spans."""
    return config.data.sentinels if config.data.sentinels >= 0 else objectives.sentinels_needed(config.data)


def find_vocabulary(config: ml_collections.ConfigDict, run: RunDir | None) -> Vocabulary | None:
    """A run keeps its own; else the config's, a trunk's, init.model's or a helper's; None: one is to be trained."""
    if run and run.config.is_file():
        return Vocabulary.load(run.tokenizer)
    given = config.data.vocabulary
    if not given and config.branch.run:
        given = helpers_lib.open_trunk(config.branch.run, config.branch.step).path
    if not given and config.init.model:
        return pretrained.open_model(config.init.model, "init.model").vocabulary
    for role, (directory, _) in roles.wanted(config).items() if not given else ():
        if not given and not is_own(role, directory):
            return helpers_lib.open_model(role, directory).vocabulary
    if hub.is_name(str(given)):
        return pretrained.HubModel(given).vocabulary
    if "://" in str(given):
        return Vocabulary.load(given)
    if given:
        path = Path(given).expanduser()
        return Vocabulary.load(path / "tokenizer" if (path / "tokenizer").is_dir() else path)
    return None

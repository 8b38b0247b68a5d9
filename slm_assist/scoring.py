"""Offline scoring: every row of a prepared corpus, judged by a small LM (or two) once, in row order.

Scores land in a directory (`assist/score_store.py`) span by span. The command may be killed at any moment and
given again, by any number of processes that share the work. A row always stands in the same place of a batch of
the same shape, so on the same devices its score has the same bits however the work was cut.
"""

import dataclasses
import functools
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from tqdm import tqdm

from slm_assist import corpus, experiment, flops, programs, roles, sharding
from slm_assist.assist import helpers as helpers_lib
from slm_assist.assist import labels, sample, score_store, scores
from slm_assist.assist.helpers import Helper
from slm_assist.assist.score_store import Writer
from slm_assist.assist.scores import Score
from slm_assist.data.loader import Prefetcher
from slm_assist.data.rows import Rows
from slm_assist.errors import UserError
from slm_assist.experiment import Say
from slm_assist.models import Transformer
from slm_assist.pretrained import Pretrained

SPANS, SPAN_ROWS = 64, 1024  # a corpus has at least so many spans, if they are not to be shorter than a batch


class Stopped(Exception):
    """SIGTERM or Ctrl-C: the scores so far are kept; the same command goes on. `signal` is its number."""

    def __init__(self, done: int, rows: int, signal_number: int):
        super().__init__(f"stopped: {done:,} of {rows:,} rows are scored; the same command goes on from there")
        self.signal = signal_number


def score(
    config: ml_collections.ConfigDict,
    out: str | Path,
    *,
    part: tuple[int, int] | None = None,
    say: Say = tqdm.write,
) -> Path:
    """Scores the training rows of `config.data` by `config.select.score` and returns the directory.

    Args:
      config: data.*, select.*, mesh.*, compute.*, batch_rows (rows in one forward pass), loss.block_bytes.
      out: a new directory, or one where the same was begun before.
      part: (I, N): this is process I of N; None: as JAX counts processes. Each uses its own devices.
      say: where messages for people go.

    Raises:
      UserError: something in the config, the data, the helpers or on the disk does not fit; scores so far are kept.
      Stopped: a signal asked to stop.
    """
    index, count = part or (jax.process_index(), jax.process_count())
    if not 0 <= index < count:
        raise UserError(f"--part={index}/{count}: write I/N with I from 0 to N - 1")
    job = _prepare(config, Path(out).expanduser(), say if index == 0 else lambda line: None)
    with Writer(out, job.meta, (index, count)) as writer:
        try:
            with programs.compilation_cache(config.compute.cache_dir), jax.set_mesh(job.mesh):
                _run(job, writer, say)
        except KeyboardInterrupt as interrupt:
            number = interrupt.args[0] if interrupt.args else signal.SIGINT
            raise Stopped(writer.done, len(job.rows), number) from None
        except OSError as error:
            raise UserError(f"{out}: {error.strerror or error}; mend that, and the same command goes on") from error
    return writer.path


def score_step(
    params: Mapping[str, Any],
    batch: labels.Batch,
    *,
    models: Mapping[str, Transformer],
    score: Score,
    k: int,
    block_bytes: int | None = None,
) -> jax.Array:
    """[B, 4] float32: score, mean loss (nats), share of tokens with rank below k, tokens.

    Args:
      params: of each role in `models`.
      batch: arrays [B, T], causal.
      models: a model for each of the score's roles; loss and rank are of `score.main`.
    """
    stats = {r: labels.token_stats(model, params[r], batch, block_bytes=block_bytes) for r, model in models.items()}
    main, counted = stats[score.main], batch["mask"] != 0
    tokens = counted.sum(axis=1, dtype=jnp.float32)
    share = (counted & (main.rank < k)).sum(axis=1, dtype=jnp.float32) / jnp.maximum(tokens, 1)
    return jnp.stack([score(stats, batch["mask"]), scores.perplexity(main.loss, batch["mask"]), share, tokens], axis=1)


@dataclasses.dataclass(frozen=True)
class Job:
    """What is scored, with what."""

    config: ml_collections.ConfigDict
    rows: Rows
    mesh: jax.sharding.Mesh
    score: Score
    helpers: dict[str, Helper]
    meta: dict[str, Any]
    say: Say

    @property
    def models(self) -> dict[str, Transformer]:
        return {role: helper.model for role, helper in self.helpers.items()}


def _prepare(config: ml_collections.ConfigDict, out: Path, say: Say) -> Job:
    """Cheap checks first, then the rows, then the helpers checked against them."""
    score_store.check_out(out)
    select = config.select
    options = {"k": select.k, "masked": select.masked, "statistic": select.statistic}
    chosen = scores.make(select.score, **options)
    if "learner" in chosen.roles:
        raise UserError(
            f"select.score={select.score}: it compares with the model that is being trained, so it cannot be computed "
            "beforehand; train with select.rows=online, or score with select.score=difference"
        )
    if config.data.stream:
        raise UserError("data.stream=true: a stream has no row ids to keep scores of; set data.stream=false")
    wanted = roles.scoring(config, set(chosen.roles))
    steps = {role: _step(out, role, helpers_lib.open_model(role, *run), run.step) for role, run in wanted.items()}
    mesh = _make_mesh(config)
    if not config.data.vocabulary:
        config = config.copy_and_resolve_references()
        config.data.vocabulary = next(iter(wanted.values())).directory
    prepared = corpus.prepare(config, say=say)
    rows, vocabulary = prepared.train, prepared.vocabulary
    chosen = scores.make(select.score, **options, vocab_size=vocabulary.size)
    dtype = experiment.compute_dtype(config.compute.dtype, mesh.devices.flat[0])
    placement = helpers_lib.Placement.of(config)
    found = {
        role: helpers_lib.find(
            role, run.directory, step=steps[role], vocabulary=vocabulary, dtype=dtype, placement=placement
        )
        for role, run in wanted.items()
    }
    helpers = {role: experiment.with_attention(config, helper, mesh) for role, helper in found.items()}
    meta = {
        "vocabulary": rows.vocabulary.fingerprint,
        "corpus": rows.fingerprint,
        "rows": len(rows),
        "seq_len": rows.seq_len,
        "domains": rows.domains,
        "score": {"name": select.score} | options,
        "helpers": {role: helper.facts() for role, helper in helpers.items()},
        "dtype": str(dtype),
        "batch_rows": config.batch_rows,
        "span_rows": span_rows(len(rows), config.batch_rows),
        "flops": len(rows) * rows.seq_len * sum(flops.forward(h.model.config, rows.seq_len) for h in helpers.values()),
        "source": config.data.source,
        "rows_path": str(prepared.path),
    }
    return Job(config, rows, mesh, chosen, helpers, meta, say)


def _make_mesh(config: ml_collections.ConfigDict) -> jax.sharding.Mesh:
    """Of this process's devices: processes share nothing but the directory."""
    sizes = config.mesh
    mesh = sharding.make_mesh(sizes.data, sizes.fsdp, sizes.tensor, devices=jax.local_devices())
    shards = sharding.batch_shards(mesh)
    if config.batch_rows % shards:
        raise UserError(
            f"batch_rows={config.batch_rows} is not divisible by the {shards} parts of the mesh's data and fsdp axes; "
            f"use a multiple of {shards}"
        )
    return mesh


def _step(out: Path, role: str, run: Pretrained, step: int) -> int:
    """The saved step to score with; "the newest" is the one that was the newest when scoring into `out` began."""
    step = helpers_lib.find_step(role, run, step)
    if step != helpers_lib.NEWEST:
        return step
    stored = score_store.read_meta(out)["helpers"].get(role, {}) if (out / "meta.json").is_file() else {}
    return stored["step"] if stored.get("run") == run.location else run.steps()[-1]


def span_rows(rows: int, batch_rows: int) -> int:
    """Rows in a span: whole batches, about `SPAN_ROWS`, fewer where the corpus is small."""
    return batch_rows * max(1, min(SPAN_ROWS, rows // SPANS) // batch_rows)


class _Piece(NamedTuple):
    """The rows `first` to `first + count` of the span that starts at row `span`: one batch."""

    span: int
    first: int
    count: int
    ends_span: bool


class Batches:
    """What a `Prefetcher` asks: the n-th batch of the work to do, always of `batch_rows` rows.

    Rows after a span's last one are copies with a mask of zeros.
    """

    def __init__(self, rows: Rows, spans: list[int], span_rows: int, batch_rows: int):
        self._rows, self._batch_rows = rows, batch_rows
        self.pieces = []
        for span in spans:
            end = min(span + span_rows, len(rows))
            for first in range(span, end, batch_rows):
                count = min(batch_rows, end - first)
                self.pieces.append(_Piece(span, first, count, first + count == end))

    def batch_at(self, n: int) -> dict[str, np.ndarray]:
        if n >= len(self.pieces):  # asked for ahead, never used
            return {}
        _, first, count, _ = self.pieces[n]
        batch = self._rows.get(np.resize(np.arange(first, first + count, dtype=np.int64), self._batch_rows))
        batch["mask"][count:] = 0
        return batch


def _run(job: Job, writer: Writer, say: Say) -> None:
    """Scores this process's spans that are left; whoever finds all done writes the sample."""
    index, count = writer.part
    sample_file = writer.path / score_store.SAMPLE
    wants_sample = job.config.select.sample > 0 and not sample_file.is_file()
    load = functools.cache(lambda: helpers_lib.load_all(job.helpers, job.mesh, job.say)[1])
    if writer.todo and writer.done:
        say(f"{writer.path}: going on, {writer.done:,} of {len(job.rows):,} rows are scored")
    if writer.todo:
        score_spans(job, writer, scoring_step(job, load()), load())
    if not score_store.is_complete(writer.path, job.meta):
        say(f"{writer.path}: part {index}/{count} is done; the other parts are not")
        return
    found = score_store.open_scores(writer.path, job.rows)
    if wants_sample:
        sample.write(sample_file, _look(job, found, load()))
    say(f"{writer.path}: {describe(found)}")


def describe(found: score_store.Scores) -> str:
    """One line about the scores of a corpus."""
    values = found.score
    bad = np.flatnonzero(np.isnan(values))
    nan = f"; {len(bad):,} rows have no number (NaN), the first is row {bad[0]}" if len(bad) else ""
    good = values[~np.isnan(values)]
    middle = f"mean {good.mean(dtype=np.float64):.4f}, median {np.median(good):.4f}" if len(good) else "no scores"
    return f"all {len(values):,} rows have a score ({found.meta['score']['name']}: {middle}{nan})"


def scoring_step(job: Job, params: dict[str, Any]) -> Callable:
    """`score_step` of a job, compiled."""
    config = job.config
    options = {"k": config.select.k, "block_bytes": config.loss.block_bytes or None}
    built = _built(job, params, functools.partial(score_step, models=job.models, score=job.score, **options))
    job.say(
        f"compiled: {built.costs()}; computing in {job.meta['dtype']} on {job.mesh.size} x "
        f"{job.mesh.devices.flat[0].device_kind}"
    )
    for role, helper in job.helpers.items():
        job.say(f"{role}: {helper.run} at step {helper.step}, {helper.where(job.mesh)}")
    return built.call


def score_spans(job: Job, writer: Writer, step: Callable, params: dict[str, Any]) -> None:
    """Scores the spans that are this process's to score, and writes each as it is done."""
    config = job.config
    reader = Batches(job.rows, writer.todo, job.meta["span_rows"], config.batch_rows)
    collected: list[np.ndarray] = []

    def take(piece: _Piece, domain: np.ndarray, result: jax.Array) -> None:
        values = np.asarray(result)  # waits for the device
        collected.append(np.column_stack([values, domain.astype(np.float32)])[: piece.count])
        if piece.ends_span:
            writer.append(piece.span, np.concatenate(collected))
            collected.clear()
        bar.update(piece.count)

    total = sum(piece.count for piece in reader.pieces)
    quiet = writer.part[0] != 0 or not config.log.progress
    where = sharding.batch_sharding(job.mesh)
    with Prefetcher(reader) as batches, tqdm(total=total, desc="score", unit="rows", disable=quiet) as bar:
        waiting = None  # the batch before: its result is read while the next one runs
        for n, piece in enumerate(reader.pieces):
            batch = batches.batch_at(n)
            result = step(params, put(batch, where))
            if waiting:
                take(*waiting)
            waiting = (piece, batch["domain"], result)
        take(*waiting)


ARRAYS = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), np.int32) | {"mask": np.float32}


def put(batch: Mapping[str, np.ndarray], where: jax.sharding.Sharding) -> dict[str, jax.Array]:
    """A batch on this process's devices."""
    return {name: jax.device_put(batch[name], where) for name in ARRAYS}


def compiled(job: Job, params: dict[str, Any], function: Callable) -> Callable:
    """(params, batch) -> results, whole on every device, compiled for the one shape of a batch."""
    return _built(job, params, function).call


def _built(job: Job, params: dict[str, Any], function: Callable) -> programs.Built:
    shape, where = (job.config.batch_rows, job.rows.seq_len), sharding.batch_sharding(job.mesh)
    batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=where) for name, dtype in ARRAYS.items()}
    whole = sharding.replicated(job.mesh)
    return programs.build(job.config, job.mesh, function, params, batch, out_shardings=whole)


def _look(job: Job, found: score_store.Scores, params: dict[str, Any]) -> sample.Sample:
    """Rows of high, middle and low score, token by token."""
    role, select = job.score.main, job.config.select
    model, blocks = job.models[role], job.config.loss.block_bytes or None
    step = compiled(job, params, lambda p, batch: labels.token_stats(model, p[role], batch, block_bytes=blocks))
    where = sharding.batch_sharding(job.mesh)
    row_ids = sample.spread(found.score, select.sample)
    return sample.make(
        job.rows,
        row_ids,
        found.score[row_ids],
        lambda batch: step(params, put(batch, where)),
        batch_rows=job.config.batch_rows,
        header={
            "score": select.score,
            "k": select.k,
            "roles": {r: {"run": str(h.run), "step": h.step} for r, h in job.helpers.items()},
            "kept_share": None,
        },
    )

"""How fast rows are scored, against the bare forward pass of the same model.

    python experiments/benchmarks/scoring.py [--size laptop-small] [--vocab_size 2048] [--out result.json]

Prints one JSON object. Four things are timed in turn, `--repeats` times, on the same batches in one process:

    matmul      trunk and head's matmul, each token's largest logit
    forward     trunk, head's matmul, logsumexp and the target's logit: the loss of each token, in the plainest way
    score       the scoring step: loss and rank of each token without a [batch, time, vocabulary] array, SALT's score
    end_to_end  the same as `slm-assist score` runs it: rows read, checked and moved, results read and written

Expected FLOPs: one forward pass, head included, for each of the four (slm_assist/flops.py). Expected bytes: `score`
holds a block of float32 logits (`loss.block_bytes`) where `forward` holds batch x time x vocabulary of them.

Throughput is relative to `forward`, and to `forward` in the tiles that the scoring step uses (`forward_tiled`),
which on CPUs is faster than one large array; each figure is the median over the repeats of the ratio within a repeat.
On CPUs the same ratios of process time are given too: they hold on a machine that has other work.
"""

import dataclasses
import functools
import tempfile
import time
from pathlib import Path

import common
import jax
import jax.numpy as jnp
import numpy as np

from slm_assist import config as config_lib
from slm_assist import corpus, experiment, flops, scoring, sharding
from slm_assist.assist import labels, scores
from slm_assist.assist.helpers import Helper
from slm_assist.assist.score_store import Writer
from slm_assist.data.rows import Rows
from slm_assist.losses import blocked
from slm_assist.models import Transformer
from slm_assist.models.sizes import named
from slm_assist.pretrained import RunModel


def matmul(params, batch, *, model):
    """The least that any score needs; [B, T]."""
    hidden, head = labels.hidden_and_head(model, params["scorer"], batch)
    return jnp.dot(hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32).max(axis=-1)


def token_loss(hidden, head, targets):
    """-log p of each target, all logits at once."""
    logits = jnp.dot(hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
    target_logit = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - target_logit


def forward(params, batch, *, model):
    """Bare forward pass to the loss of each token, [B, T]."""
    return token_loss(*labels.hidden_and_head(model, params["scorer"], batch), batch["targets"])


def forward_tiled(params, batch, *, model, tile):
    """`forward` with the logits of `tile` tokens at a time."""
    hidden, head = labels.hidden_and_head(model, params["scorer"], batch)
    tiles = batch["targets"].size // tile
    parts = (hidden.reshape(tiles, tile, -1), batch["targets"].reshape(tiles, tile))
    return jax.lax.map(lambda part: token_loss(part[0], head, part[1]), parts)


def make_job(args, cache: str) -> tuple[scoring.Job, dict]:
    """Rows of a corpus and a model with random parameters, as a job of `slm-assist score`."""
    config = config_lib.get_config()
    keys = {
        "data.source": args.source, "data.seq_len": args.seq_len, "data.vocab_size": args.vocab_size,
        "data.cache_dir": cache, "data.vocabulary": args.vocabulary, "batch_rows": args.batch_rows,
        "compute.dtype": args.dtype, "log.progress": False,
    }  # fmt: skip
    for key, value in keys.items():
        config_lib.set_key(config, key, value)
    mesh = sharding.make_mesh()
    prepared = corpus.prepare(config, say=lambda line: None)
    rows: Rows = prepared.train
    dtype = experiment.compute_dtype(args.dtype, mesh.devices.flat[0])
    given = {name: getattr(args, name) for name in ("num_layers", "d_model", "d_ff") if getattr(args, name)}
    model = Transformer(named(args.size, prepared.vocabulary.size, **given), dtype=dtype)
    with jax.set_mesh(mesh):
        params = jax.jit(model.init, out_shardings=sharding.replicated(mesh))(jax.random.key(0))
        params = {"scorer": jax.tree.map(lambda x: x.astype(dtype), params)}
    meta = {
        "vocabulary": "", "corpus": "", "rows": len(rows), "seq_len": args.seq_len, "domains": rows.domains,
        "score": {}, "helpers": {}, "dtype": str(dtype), "batch_rows": args.batch_rows,
        "span_rows": args.batch_rows * min(args.batches, len(rows) // args.batch_rows),
    }  # fmt: skip
    score = scores.make("salt", k=10, masked="zero", statistic="median")
    helpers = {"scorer": Helper("scorer", RunModel(cache), 0, model)}
    return scoring.Job(config, rows, mesh, score, helpers, meta, lambda line: None), params


def timed(function) -> tuple[float, float]:
    """Seconds on the wall, and of the process on all cores."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(job: scoring.Job, params: dict, repeats: int) -> dict[str, list[tuple[float, float]]]:
    """What `timed` says of each of the four for the same batches, `repeats` times, interleaved."""
    model, batch_rows = job.models["scorer"], job.config.batch_rows
    count = job.meta["span_rows"] // batch_rows
    where = sharding.batch_sharding(job.mesh)
    batches = [scoring.put(job.rows.get(np.arange(n * batch_rows, (n + 1) * batch_rows)), where) for n in range(count)]
    block_bytes = blocked.default_block_bytes(4 * model.config.vocab_size)
    tokens = batch_rows * job.rows.seq_len
    tile = next(t for t in range(max(1, min(tokens, block_bytes // (4 * model.config.vocab_size))), 0, -1)
                if tokens % t == 0)  # fmt: skip
    steps = {
        "matmul": functools.partial(matmul, model=model),
        "forward": functools.partial(forward, model=model),
        "forward_tiled": functools.partial(forward_tiled, model=model, tile=tile),
    }
    steps = {name: scoring.compiled(job, params, step) for name, step in steps.items()}
    steps["score"] = scoring.scoring_step(job, params)

    def all_batches(step) -> None:
        jax.block_until_ready([step(params, batch) for batch in batches])

    def end_to_end() -> None:
        with tempfile.TemporaryDirectory() as out, Writer(Path(out) / "scores", job.meta) as writer:
            writer.todo = [0]
            scoring.score_spans(job, writer, steps["score"], params)

    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in (*steps, "end_to_end")}
    for repeat in range(repeats + 1):  # the first warms up
        for name in seconds:
            spent = timed(end_to_end if name == "end_to_end" else functools.partial(all_batches, steps[name]))
            if repeat:
                seconds[name].append(spent)
    return seconds


def ratios(seconds: dict[str, list[float]]) -> dict[str, list[float]]:
    """Throughput of scoring by that of the bare passes, in each repeat."""
    return {
        f"{name} to {base}": [b / s for s, b in zip(seconds[name], seconds[base], strict=True)]
        for name in ("score", "end_to_end")
        for base in ("forward", "forward_tiled", "matmul")
    }


def medians(values: dict[str, list[float]]) -> dict[str, float]:
    return {name: round(float(np.median(x)), 4) for name, x in values.items()}


def main() -> None:
    parser = common.parser(__doc__, rounds=None)
    parser.add_argument("--source", default="python:")
    parser.add_argument("--vocabulary", default="", help="a vocabulary; default: one is learnt")
    parser.add_argument("--vocab_size", type=int, default=2048)
    parser.add_argument("--seq_len", type=int, default=256)
    parser.add_argument("--size", default="laptop-small", help="a named size of slm_assist/models/sizes.py")
    parser.add_argument("--num_layers", type=int, default=0)
    parser.add_argument("--d_model", type=int, default=0)
    parser.add_argument("--d_ff", type=int, default=0)
    parser.add_argument("--batch_rows", type=int, default=16)
    parser.add_argument("--batches", type=int, default=8, help="in one measurement")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--cache_dir", default="", help="keeps the prepared rows; default: a temporary directory")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        job, params = make_job(args, args.cache_dir or temporary)
        with jax.set_mesh(job.mesh):
            measured = measure(job, params, args.repeats)
    seconds, cpu_seconds = ({name: [x[i] for x in pairs] for name, pairs in measured.items()} for i in range(2))
    model = job.models["scorer"]
    tokens, device = job.meta["span_rows"] * job.rows.seq_len, job.mesh.devices.flat[0]
    ratio = ratios(seconds)
    result = {
        "throughput_ratio": medians(ratio),
        "throughput_ratio_range": {name: [round(min(x), 4), round(max(x), 4)] for name, x in ratio.items()},
        "process_time_ratio": medians(ratios(cpu_seconds)) if device.platform == "cpu" else None,
        "tokens_per_second": {name: tokens / float(np.median(values)) for name, values in seconds.items()},
        "rows_per_second": job.meta["span_rows"] / float(np.median(seconds["end_to_end"])),
        "model": dataclasses.asdict(model.config),
        "parameters": model.num_params(),
        "forward_flops_per_token": flops.forward(model.config, job.rows.seq_len),
        "batch_rows": args.batch_rows,
        "seq_len": args.seq_len,
        "batches": job.meta["span_rows"] // args.batch_rows,
        "repeats": args.repeats,
        "dtype": job.meta["dtype"],
        "devices": job.mesh.size,
    }
    common.finish(args, result)


if __name__ == "__main__":
    common.run(main)

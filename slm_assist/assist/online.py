"""Selection on the device, inside the train step: candidates in, the rows worth learning from out.

The small LM's forward pass over the candidates, the scores and the choice are part of the compiled step, sharded
like the batch; nothing goes by way of the host. Candidates are scored in parts of a microbatch's size, so that
scoring needs no more memory than the step's own forward pass; but with `share_teacher` the hidden states of all
candidates are kept, and those of the kept rows stand on every device while they are dealt out again.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from slm_assist.assist import labels, selection
from slm_assist.assist.labels import Batch
from slm_assist.assist.scores import Score
from slm_assist.losses import TokenStats
from slm_assist.metrics import Pairs
from slm_assist.models import Transformer
from slm_assist.sharding import constrain

ROWS = "rows"  # the metric that is no mean: which rows were kept
CAUSAL = "causal_"  # names of the arrays to score with, where the objective is another
ROW_ARRAYS = (*labels.ARRAYS, "prefix_mask")


@dataclasses.dataclass(frozen=True)
class Filter:
    """How rows are chosen from candidates; everything is known before tracing.

    Attributes:
      score: what a row is worth; None where the rule does not ask (`random`).
      models: the models of the score's roles; `learner` is the student.
      keep: rows that stay, a batch.
      rule, band, noise, decay: as in `selection.keep_rows` and `selection.running_threshold`.
      parts: how many parts the candidates are scored in; divides the candidates of every device.
      share_teacher: the scorer is the teacher, so its hidden states of the kept rows go on as soft labels.
      domains: number of domains, whose candidates and kept rows are counted.
      seed: of the noise.
    """

    score: Score | None
    models: Mapping[str, Transformer]
    keep: int
    parts: int
    rule: str = "top"
    band: float = 0.5
    noise: float = 0.1
    decay: float = 0.95
    share_teacher: bool = False
    domains: int = 1
    seed: int = 0
    block_bytes: int | None = None


class Chosen(NamedTuple):
    """The result of `choose`: a batch, the state of the running threshold, and what can be said of the choice."""

    batch: Batch
    assist: dict[str, jax.Array]
    metrics: Pairs
    rows: dict[str, jax.Array]  # index [keep], valid [keep]; candidates, kept [domains]


def initial_state(rule: str) -> dict[str, jax.Array]:
    """What the rule must remember from step to step; part of the train state."""
    return selection.initial_threshold() if rule == "threshold" else {}


def choose(
    chooser: Filter, candidates: Batch, params: Mapping[str, Any], assist: dict[str, jax.Array], step: jax.Array
) -> Chosen:
    """Scores candidates and keeps the best, in their order.

    Args:
      candidates: arrays [N, T] as in a batch, `domain` [N], and, where the objective is not causal, the causal
        form of the same rows under `causal_*`: scores are always causal.
      params: of the score's roles.
      assist: from `initial_state` or the last choice.
      step: int32; makes the noise of each update another one.
    """
    scores_N, hidden_NxTxD = _scores(chooser, candidates, params)
    threshold = None
    if chooser.rule == "threshold":
        memory = {name: assist[name] for name in initial_state("threshold")}
        assist = assist | selection.running_threshold(memory, scores_N, chooser.keep, decay=chooser.decay)
        threshold = assist["threshold"]
    kept = selection.keep_rows(
        scores_N,
        chooser.keep,
        rule=chooser.rule,
        key=jax.random.fold_in(jax.random.key(chooser.seed), step),
        band=chooser.band,
        noise=chooser.noise,
        threshold=threshold,
    )
    batch = {name: candidates[name] for name in ROW_ARRAYS if name in candidates}
    if hidden_NxTxD is not None:
        batch[labels.TEACHER_HIDDEN] = hidden_NxTxD
    batch = {name: _rows(x, kept.index) for name, x in batch.items()}
    batch["mask"] = batch["mask"] * kept.valid[:, None]
    domain_N = candidates["domain"]
    count = jnp.zeros(chooser.domains, jnp.int32)
    rows = {
        "index": kept.index,
        "valid": kept.valid,
        "candidates": count.at[domain_N].add(1),
        "kept": count.at[domain_N[kept.index]].add(kept.valid.astype(jnp.int32)),
    }
    return Chosen(batch, assist, _statistics(chooser, scores_N, kept, threshold), rows)


def _rows(x: jax.Array, index: jax.Array) -> jax.Array:
    return constrain(jnp.take(x, index, axis=0), "batch", *["length", "act_embed"][: x.ndim - 1])


def _scores(chooser: Filter, candidates: Batch, params: Mapping[str, Any]) -> tuple[jax.Array, jax.Array | None]:
    """Scores [N] and, for `share_teacher`, the scorer's hidden states [N, T, d]."""
    causal = CAUSAL if CAUSAL + "tokens" in candidates else ""
    rows = {name: candidates[causal + name] for name in ROW_ARRAYS if causal + name in candidates}
    if chooser.score is None:
        return jnp.zeros(rows["tokens"].shape[0], jnp.float32), None

    def one(part: Batch) -> tuple[jax.Array, jax.Array | None]:
        stats: dict[str, TokenStats] = {}
        hidden = None
        for role in chooser.score.roles:
            options = {"helper": role != "learner", "block_bytes": chooser.block_bytes}
            stats[role], seen = labels.judge(chooser.models[role], params[role], part, **options)
            if chooser.share_teacher and role == "scorer":
                hidden = seen
        return chooser.score(stats, part["mask"]), hidden

    # Every part takes every n-th row, so that each device keeps the rows it has.
    split = jax.tree.map(lambda x: x.reshape(-1, chooser.parts, *x.shape[1:]).swapaxes(0, 1), rows)
    scored = jax.lax.map(one, split)
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), scored)


def _statistics(chooser: Filter, scores_N: jax.Array, kept: selection.Kept, threshold: jax.Array | None) -> Pairs:
    one, count, valid = jnp.float32(1), jnp.float32(scores_N.shape[0]), kept.valid.sum()
    pairs = {"candidates": (count, one), "kept_rows": (valid, one)}
    if chooser.score is None:
        return pairs
    counts_N = scores_N != -jnp.inf  # a score's way to leave a row out; NaN counts, and shows
    rows, scores_N = counts_N.sum().astype(jnp.float32), jnp.where(counts_N, scores_N, 0.0)
    mean = scores_N.sum() / jnp.maximum(rows, 1)
    used = kept.valid * counts_N[kept.index]
    pairs |= {
        "score_mean": (scores_N.sum(), rows),
        "score_kept_mean": ((scores_N[kept.index] * used).sum(), used.sum()),
        "score_std": (jnp.sqrt((counts_N * (scores_N - mean) ** 2).sum() / jnp.maximum(rows, 1)), one),
        "score_min": (scores_N.min(where=counts_N, initial=jnp.inf), one),
        "score_max": (scores_N.max(where=counts_N, initial=-jnp.inf), one),
        "score_zero": ((counts_N & (scores_N == 0)).sum().astype(jnp.float32), rows),
    }
    return pairs if threshold is None else pairs | {"score_threshold": (threshold, one)}

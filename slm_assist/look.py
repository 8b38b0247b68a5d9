"""A sample of candidates, scored once when a run that selects begins: for a person to see what the score prefers."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from slm_assist import sharding
from slm_assist.assist import labels, sample
from slm_assist.assist.helpers import Helper
from slm_assist.assist.stages import Stage
from slm_assist.experiment import Experiment
from slm_assist.feed import put
from slm_assist.run_dir import RunDir


def is_wanted(experiment: Experiment) -> bool:
    """Whether a new run begins with a sample: it scores candidates, and they are not of a stream."""
    return experiment.score is not None and not experiment.data.stream and experiment.config.select.sample > 0


def params_in(experiment: Experiment, params_of: dict[str, Any], student: Any) -> dict[str, Any]:
    """The parameters that `scored` takes, of helpers and, as "learner", the student's."""
    params = params_of | {"learner": student}
    return {role: params[role] for role in experiment.score.roles}


def scored(experiment: Experiment, helpers: dict[str, Helper]) -> Callable:
    """(parameters by role, batch) -> the score of each row, and loss and rank of its tokens."""
    score = experiment.score
    models = {role: helper.model for role, helper in helpers.items()} | {"learner": experiment.student.model}
    token_stats = functools.partial(labels.token_stats, block_bytes=experiment.student.block_bytes)

    def scored(params: dict[str, Any], batch: labels.Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        stats = {role: token_stats(models[role], params[role], batch, helper=role != "learner") for role in score.roles}
        return score(stats, batch["mask"]), *stats[score.main]

    return scored


def write_sample(
    experiment: Experiment,
    run: RunDir,
    helpers: dict[str, Helper],
    params_of: dict[str, Any],
    student: Any,
    plan: tuple[Stage, ...],
    step: Callable | None,
) -> None:
    """Scores the run's first `select.sample` candidates and keeps what each token cost.

    Args:
      params_of: of the helpers by role; `student`: the learner's parameters.
      plan: the run's stages, the first of which chooses among candidates.
      step: `scored`, compiled; None where no sample `is_wanted`.
    """
    if step is None or run.selection_sample.is_file():
        return
    config = experiment.config
    params = params_in(experiment, params_of, student)
    where, scores = sharding.batch_sharding(experiment.mesh), []

    def stats_of(batch: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        values, loss, rank = jax.device_get(step(params, put(batch, labels.ARRAYS, where)))
        scores.append(values)
        return loss, rank

    feed, rows = experiment.data.feed(plan), experiment.prepared.train
    pools = -(-config.select.sample // (config.batch_rows * config.select.pool_factor))
    row_ids = np.concatenate([feed.row_ids_at(n) for n in range(pools)])[: config.select.sample]
    header = {
        "score": config.select.score,
        "k": config.select.k,
        "roles": {role: {"run": str(helper.run), "step": helper.step} for role, helper in helpers.items()},
        "kept_share": 1 / config.select.pool_factor,
    }
    made = sample.make(rows, row_ids, np.zeros(len(row_ids)), stats_of, batch_rows=config.batch_rows, header=header)
    found = np.concatenate(scores)[: len(row_ids)]
    if jax.process_index() == 0:
        sample.write(run.selection_sample, made._replace(score=np.nan_to_num(found)))

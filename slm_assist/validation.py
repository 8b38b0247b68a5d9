"""Validation during a run: an experiment's rows, buckets and compiled step put together."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from slm_assist import distributed, metrics, sharding, steps
from slm_assist.assist import helpers as helpers_lib
from slm_assist.assist.labels import ARRAYS
from slm_assist.distributed import Group
from slm_assist.evals import perplexity, token_metrics
from slm_assist.experiment import Experiment, Say
from slm_assist.feed import put
from slm_assist.run_dir import RunDir


def validator(experiment: Experiment, run: RunDir, eval_step: Callable, say: Say, group: Group) -> Callable:
    """(step, parameters) -> the figures of a validation line; what each row cost is kept beside, for the report.

    Cuts the rows into buckets first, if that is to be done.
    """
    where = sharding.batch_sharding(experiment.mesh)

    def sums(params: Any, step: Callable = eval_step) -> dict[str, np.ndarray]:
        return experiment.validation.row_sums(lambda batch: jax.device_get(step(params, put(batch, ARRAYS, where))))

    if experiment.config.validation.buckets:
        experiment.validation.buckets = _buckets(experiment, sums, say, group)

    def validate(step: int, params: Any) -> dict[str, Any]:
        rows = sums(params)
        token_metrics.refuse_not_finite(rows, step)
        kept = {name: rows[name].tolist() for name in ("cross_entropy", "tokens")}
        if distributed.index() == 0:
            metrics.write_json(run.validation_rows, {"step": step} | kept)
        return experiment.validation.record(rows)

    return validate


def _buckets(experiment: Experiment, sums: Callable, say: Say, group: Group) -> np.ndarray:
    """Thirds of the validation rows by the loss of the run that the config names: cut once, kept beside the rows."""
    name = experiment.config.validation.buckets
    cutter = helpers_lib.open_model("buckets", name)
    identity = {"run": cutter.name, "rows": experiment.validation.fingerprint, "model": cutter.identity}
    file = perplexity.bucket_file(experiment.prepared.path, cutter.name, identity)
    found = perplexity.read_buckets(file)
    # Process 0's answer, for all go the same way: cutting takes every device.
    cut = group.first("buckets", lambda: None if found is None else found.tolist())
    buckets = None if cut is None else np.array(cut, np.int64)
    if buckets is None:
        helper = helpers_lib.find(
            "buckets",
            name,
            step=-1,
            vocabulary=experiment.prepared.vocabulary,
            dtype=experiment.dtype,
            placement=helpers_lib.Placement.of(experiment.config),
        )
        helper, params = helper.load(experiment.mesh, say)
        step = jax.jit(
            functools.partial(steps.eval_step, model=helper.model, block_bytes=experiment.student.block_bytes),
            out_shardings=sharding.replicated(experiment.mesh),
        )
        buckets = perplexity.thirds(sums(params, step))
        perplexity.write_buckets(file, buckets, experiment.validation.row_ids, identity)
        say(f"cut {len(buckets)} validation rows into easy, medium and hard by {name} at step {helper.step}")
    return buckets

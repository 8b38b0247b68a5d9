"""Metrics of somebody's own for validation: functions of what the model makes of each token.

`validation.metric="package.module:function,..."` names functions `(TokenStats, batch) -> a number for each token`,
all [B, T]. A validation line has the mean over its tokens, overall, by domain and by bucket, under the function's name.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from slm_assist import plugins
from slm_assist.errors import UserError
from slm_assist.losses import TokenStats

KEY = "validation.metric"
TokenMetric = Callable[[TokenStats, Mapping[str, jax.Array]], jax.Array]
TAKEN = {  # names in a validation line, and of the sums that it is made of
    "kind", "step", "log_perplexity", "bits_per_byte", "accuracy", "tokens", "standard_error", "domains", "buckets",
    "train_flops", "train_seconds", "validation_seconds", "cross_entropy", "correct", "bytes",
}  # fmt: skip


def find(names: str) -> dict[str, TokenMetric]:
    """The functions that a config names, by their own names, tried on the shapes of a small batch.

    Raises:
      UserError: one cannot be found or called so, fails, does not give one number a token, or has a name that is
        taken.
    """
    found: dict[str, TokenMetric] = {}
    for name in filter(None, (name.strip() for name in names.split(","))):
        function, short = plugins.load(KEY, name), name.rpartition(":")[2].rpartition(".")[2]
        if short in TAKEN | found.keys():
            raise UserError(f"{KEY}={name!r}: validation has a {short!r} already; call the function something else")
        plugins.check_parameters(KEY, name, function, "stats", "batch")
        found[short] = _checked(name, function)
        number, ids = jax.ShapeDtypeStruct((2, 3), jnp.float32), jax.ShapeDtypeStruct((2, 3), jnp.int32)
        batch = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), ids) | {"mask": number}
        jax.eval_shape(found[short], TokenStats(number, ids), batch)
    return found


def _checked(name: str, function: TokenMetric) -> TokenMetric:
    def metric(stats: TokenStats, batch: Mapping[str, jax.Array]) -> jax.Array:
        given = plugins.call(KEY, name, function, stats, batch)
        plugins.check_shape(KEY, name, given, stats.loss.shape, "a number for each token, [B, T]")
        return given.astype(jnp.float32)

    return metric


def refuse_not_finite(sums: Mapping[str, np.ndarray], step: int) -> None:
    """Raises `UserError` where one of the functions gave a row something that cannot be averaged."""
    for name in sums.keys() - TAKEN:
        rows = int((~np.isfinite(sums[name])).sum())
        if rows:
            raise UserError(
                f"step {step}: {KEY}: {name} is not finite in {rows} of {len(sums[name])} validation rows; the last "
                "checkpoint is kept: mend the function, or leave it out and start over with --fresh"
            )

"""Scores -> rows, on the host for offline lists and on the device inside a step; and tokens, for RHO-1.

The host functions take numpy arrays of any length and cost O(N). The device functions are traceable, take the whole
(possibly sharded) array, and give the same answer on any mesh. Everywhere, of equal scores the lower index is
taken first.
"""

import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slm_assist import plugins
from slm_assist.errors import UserError, nearest

# On the host.


def top(scores: np.ndarray, m: int) -> np.ndarray:
    """The `m` rows with the highest scores: ascending int64 indices [m]; ties go to the lower index.

    Raises:
      UserError: a NaN score, m < 1, or m larger than the number of scores.
    """
    scores = checked(scores)
    if not 1 <= m <= len(scores):
        raise UserError(f"m={m}: choose between 1 and the number of rows, {len(scores)}")
    return np.flatnonzero(_lowest(-scores, m))


def band(scores: np.ndarray, low: float, high: float) -> np.ndarray:
    """Rows whose place among the ascending scores lies in [low N, high N): ascending int64 indices.

    (0, 0.2) is the lowest fifth, (0.4, 0.6) the middle, (0.8, 1) the highest; neighbouring bands share no row and
    miss none. Of equal scores the lower index has the lower place.

    Raises:
      UserError: a NaN score, or not 0 <= low < high <= 1.
    """
    scores = checked(scores)
    if not 0 <= low < high <= 1:
        raise UserError(f"low={low}, high={high}: a band needs 0 <= low < high <= 1")
    first, end = (math.ceil(exact(edge) * len(scores)) for edge in (low, high))
    return np.flatnonzero(_lowest(scores, end) & ~_lowest(scores, first))


def gumbel_top(scores: np.ndarray, m: int, tau: float, seed: int) -> np.ndarray:
    """A sample of `m` rows without replacement, weighted by exp(score / tau): ascending int64 indices [m].

    tau -> 0 is `top`; a large tau is like `random`, with noise of its own. Arguments and errors else as for `top`.
    """
    return top(perturbed(scores, tau, seed), m)


def random(n: int, m: int, seed: int) -> np.ndarray:
    """`m` of `n` rows, each set of them equally likely: ascending int64 indices [m]. Errors as for `top`."""
    return top(uniform(n, seed), m)


def per_domain(
    scores: np.ndarray, domains: np.ndarray, quotas: Mapping[int, int], allowed: np.ndarray | None = None
) -> np.ndarray:
    """The `quotas[d]` highest-scored rows of each domain d: ascending int64 indices.

    Args:
      scores: [N]. For other rules give `perturbed` or `uniform` scores.
      domains: int [N]; a domain that `quotas` does not have gives no row.
      allowed: bool [N]; the others are left out.

    Raises:
      UserError: a NaN score, or a domain with fewer rows than its quota.
    """
    scores, members, picks = checked(scores), by_domain(domains), [np.empty(0, np.int64)]
    for domain, quota in quotas.items():
        rows = members.get(domain, picks[0])
        rows = rows if allowed is None else rows[allowed[rows]]
        if quota > len(rows):
            raise UserError(f"domain {domain}: its quota is {quota} rows and it has {len(rows)}; lower it")
        picks.append(rows[_lowest(-scores[rows], quota)])
    return np.sort(np.concatenate(picks))


def by_domain(domains: np.ndarray) -> dict[int, np.ndarray]:
    """The rows of each domain that has any: ascending int64 indices."""
    order = np.argsort(domains, kind="stable")
    present, counts = np.unique(domains, return_counts=True)
    return dict(zip(present.tolist(), np.split(order, np.cumsum(counts)[:-1]), strict=True))


def uniform(n: int, seed: int, stream: int = 0) -> np.ndarray:
    """float64 [n] in (0, 1), a function of (seed, stream, index): the same bits on every machine."""
    raw = np.random.Philox(key=(int(seed) % 2**64) + (stream << 64)).random_raw(n)
    return ((raw >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def perturbed(scores: np.ndarray, tau: float, seed: int) -> np.ndarray:
    """float64 [N]: scores + tau * Gumbel noise, which is in the order of score / tau + noise.

    Its two logarithms are the machine's own: elsewhere two rows can change places only if they agree to 15 digits.
    """
    if not 0 <= tau < math.inf:
        raise UserError(f"tau={tau}: the noise needs a scale of at least 0")
    return checked(scores).astype(np.float64) - tau * np.log(-np.log(uniform(len(scores), seed, stream=1)))


def checked(scores: np.ndarray) -> np.ndarray:
    """`scores` as a float array [N]; UserError on NaN."""
    scores = np.asarray(scores)
    scores = scores if np.issubdtype(scores.dtype, np.floating) else scores.astype(np.float64)
    broken = np.isnan(scores)
    if broken.any():
        raise UserError(
            f"{broken.sum()} of {len(scores)} scores are NaN, the first that of row {broken.argmax()}: the model that "
            "scored is broken or the rows are damaged; score again with another checkpoint"
        )
    return scores


def exact(x: float) -> Fraction:
    """The decimal number a person wrote: 0.07 is 7/100, so that 0.07 of 100 rows are 7."""
    return Fraction(str(x))


def _lowest(scores: np.ndarray, m: int) -> np.ndarray:
    """bool [N]: the `m` lowest scores, ties to the lower index; without sorting."""
    if m in (0, len(scores)):
        return np.full(len(scores), m > 0)
    bar = np.partition(scores, m - 1)[m - 1]
    chosen = scores < bar
    chosen[np.flatnonzero(scores == bar)[: m - np.count_nonzero(chosen)]] = True
    return chosen


# On the device.

RULES = ("top", "band", "gumbel", "random", "threshold")


class Kept(NamedTuple):
    """The rows of a pool that go into the update.

    Attributes:
      index: int32 [keep], ascending and distinct.
      valid: float32 [keep], 1 for a row that was chosen and 0 for one that only fills its slot (`threshold` where
        too few rows reach the bar): multiply its mask by this.
    """

    index: jax.Array
    valid: jax.Array


def check_rule(rule: str) -> None:
    """Raises `UserError` unless `rule` is one of `RULES`, or names a function that can be loaded."""
    if plugins.is_plugin(rule):
        plugins.check_parameters("select.rule", rule, plugins.load("select.rule", rule), "scores", "keep", "key")
    elif rule not in RULES:
        choices = f"{', '.join(RULES)} or package.module:function"
        raise UserError(f"select.rule={rule!r}: choose one of {choices}{nearest(rule, RULES)}")


def keep_rows(
    scores_N: jax.Array,
    keep: int,
    *,
    rule: str = "top",
    key: jax.Array | None = None,
    band: float = 0.5,
    noise: float = 0.1,
    threshold: jax.Array | float | None = None,
) -> Kept:
    """Which `keep` of N candidates to train on. NaN counts as -inf.

    Args:
      scores_N: float [N], whole or sharded.
      rule: "top": the highest scores (`jax.lax.top_k`).
        "band": `keep` neighbours among the ascending scores, from place round((N - keep) * band) on.
        "gumbel": a sample without replacement, weighted by exp(score / noise); noise -> 0 is "top".
        "random": any, whatever their scores.
        "threshold": of those with a score of at least `threshold`, the `keep` highest.
        "package.module:function": fn(scores_N, keep, key) -> distinct indices, int [keep].
      key: a `jax.random.key`, for "gumbel", "random" and functions.
      threshold: from `running_threshold`.

    Raises:
      UserError: an unknown rule, keep < 1 or above N, an argument that the rule needs and lacks, or a function that
        gives no [keep] indices.
    """
    check_rule(rule)
    n = scores_N.shape[0]
    if not 1 <= keep <= n:
        raise UserError(f"keep={keep}: choose between 1 and the number of candidates, {n}")
    needs = {"band": (), "top": (), "threshold": (threshold,)}.get(rule, (key,))
    if any(x is None for x in needs):
        raise UserError(f"select.rule={rule!r}: needs {'a threshold' if rule == 'threshold' else 'a random key'}")
    scores = _comparable(scores_N)
    valid_N = jnp.ones(n, bool)
    if rule == "band":
        first = round((n - keep) * band)
        index = jnp.argsort(scores)[first : first + keep]
    elif rule == "random":
        index = jax.random.permutation(key, n)[:keep]
    elif rule == "threshold":
        valid_N = scores >= threshold
        index = jax.lax.top_k(jnp.where(valid_N, scores, -jnp.inf), keep)[1]
    elif plugins.is_plugin(rule):
        index = _plugin_index(rule, scores, keep, key)
    else:
        noisy = scores + noise * jax.random.gumbel(key, (n,)) if rule == "gumbel" else scores
        index = jax.lax.top_k(noisy, keep)[1]
    index = jnp.sort(index.astype(jnp.int32))
    return Kept(index, valid_N[index].astype(jnp.float32))


def _plugin_index(rule: str, scores_N: jax.Array, keep: int, key: jax.Array) -> jax.Array:
    index = jnp.asarray(plugins.call("select.rule", rule, plugins.load("select.rule", rule), scores_N, keep, key))
    if index.shape != (keep,) or not jnp.issubdtype(index.dtype, jnp.integer):
        raise UserError(
            f"select.rule={rule!r}: gave {index.dtype} {index.shape}; return {keep} distinct indices of the candidates"
        )
    return index


def _comparable(x: jax.Array) -> jax.Array:
    """float32, NaN as -inf, and one zero: sorting may tell -0 from 0, which would break ties by sign."""
    x = x.astype(jnp.float32)
    return jnp.where(jnp.isnan(x), -jnp.inf, jnp.where(x == 0, 0.0, x))


Threshold = dict[str, jax.Array]


def initial_threshold() -> Threshold:
    """The state of a running threshold before any pool; it is part of what a checkpoint saves."""
    return {"threshold": jnp.zeros((), jnp.float32), "pools": jnp.zeros((), jnp.int32)}


def running_threshold(state: Threshold, scores_N: jax.Array, keep: int, decay: float) -> Threshold:
    """The bar after one more pool: an exponential mean of the pools' `keep`-th largest scores.

    It starts at the first pool's. Update first, then select with `state["threshold"]`: the first pool then keeps its
    own top rows, and later ones about `keep` on average. A pool with fewer than `keep` finite scores changes nothing.

    Args:
      state: {"threshold": float32 [], "pools": int32 [], how many pools it has seen}.
      decay: how much of the old bar stays; 0 is each pool's own bar.
    """
    bar = jax.lax.top_k(_comparable(scores_N), keep)[0][-1]
    mixed = jnp.where(state["pools"] > 0, decay * state["threshold"] + (1 - decay) * bar, bar)
    usable = jnp.isfinite(bar)
    return {
        "threshold": jnp.where(usable, mixed, state["threshold"]),
        "pools": state["pools"] + usable.astype(jnp.int32),
    }


def top_share(values_BxT: jax.Array, mask_BxT: jax.Array, share: float) -> jax.Array:
    """RHO-1: the top ceil(share * count) of the tokens that the mask counts, over the whole array: bool [B, T].

    Ties go to the lower flat index; NaN counts as -inf. Nothing is sorted or gathered: the bar is found by counting,
    four bits of the ordered float at a time, and so is the last index among the tokens that tie with it. Devices
    exchange counts only.

    Args:
      values_BxT: float, fewer than 2^32 of them.
      mask_BxT: bool or float; 0 leaves a token out.
      share: above 0, at most 1; taken as the nearest fraction with a denominator below 46341, so that decimals of up
        to four places are exact.

    Raises:
      UserError: a share out of range.
    """
    if not 0 < share <= 1:
        raise UserError(f"select.token_share={share}: must be above 0 and at most 1")
    counted = mask_BxT != 0
    wanted = _share_of(jnp.sum(counted, dtype=jnp.int32), share)
    order = _ordered_bits(_comparable(values_BxT))
    bar = _largest_with(lambda at_least: counted & (order >= at_least), wanted)
    above, ties = counted & (order > bar), counted & (order == bar)
    batch, length = order.shape
    rows, columns = (jax.lax.broadcasted_iota(jnp.uint32, order.shape, axis) for axis in (0, 1))
    backwards = jnp.uint32(batch * length - 1) - (rows * jnp.uint32(length) + columns)
    missing = wanted - jnp.sum(above, dtype=jnp.int32)
    last = _largest_with(lambda at_least: ties & (backwards >= at_least), missing)
    return above | (ties & (backwards >= last))


def _share_of(count: jax.Array, share: float) -> jax.Array:
    """ceil(share * count) in int32, no product of which overflows."""
    fraction = exact(share).limit_denominator(46340)
    p, q = fraction.numerator, fraction.denominator
    return count // q * p + (count % q * p + q - 1) // q


def _ordered_bits(x: jax.Array) -> jax.Array:
    """uint32 in the order of the float32 `x`, for which neither NaN nor -0 is there."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _largest_with(select: Callable[[jax.Array], jax.Array], wanted: jax.Array) -> jax.Array:
    """The largest uint32 bound for which `select(bound)`, which falls with it, has at least `wanted` entries."""

    def digit(i, bound):
        step = jnp.uint32(1) << (28 - 4 * i).astype(jnp.uint32)
        counts = [jnp.sum(select(bound + jnp.uint32(d) * step), dtype=jnp.int32) for d in range(1, 16)]
        return bound + jnp.sum(jnp.stack(counts) >= wanted).astype(jnp.uint32) * step

    return jax.lax.fori_loop(0, 8, digit, jnp.uint32(0))

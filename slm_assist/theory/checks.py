"""A prediction beside a measurement, its interval, and whether they agree: computed, by one of four rules."""

import dataclasses
import math
import statistics
from collections.abc import Sequence

import numpy as np

from slm_assist.errors import UserError
from slm_assist.report import stats

LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of a comparison.

    Attributes:
      what: the figure.
      predicted, measured: numbers; `measured` may be exact, and then `interval` is None.
      interval: of `measured`, 95 % unless `rule` says otherwise.
      rule: in words, how `agrees` was decided.
      note: what else is to know.
    """

    what: str
    predicted: float
    measured: float
    interval: tuple[float, float] | None
    agrees: bool
    rule: str
    note: str = ""

    def to_json(self) -> dict:
        return dataclasses.asdict(self)


def contains(what: str, predicted: float, measured: float, interval: tuple[float, float], note: str = "") -> Check:
    """Agrees where the interval of the measurement contains the prediction."""
    agrees = interval[0] <= predicted <= interval[1]
    return _check(what, predicted, measured, interval, agrees, "the interval contains it", note)


def near(
    what: str,
    predicted: float,
    measured: float,
    interval: tuple[float, float] | None = None,
    *,
    tolerance: float,
    note: str = "",
) -> Check:
    """Agrees where they differ by no more than `tolerance` of the prediction (for formulas that are approximate)."""
    agrees = abs(measured - predicted) <= tolerance * abs(predicted)
    return _check(what, predicted, measured, interval, agrees, f"within {tolerance:.0%}", note)


def at_most(what: str, limit: float, measured: float, interval=None, note: str = "") -> Check:
    """Agrees where the measurement, and its whole interval if it has one, is no more than the limit."""
    value = measured if interval is None else interval[1]
    return _check(what, limit, measured, interval, value <= limit, "at most that", note)


def at_least(what: str, limit: float, measured: float, interval=None, note: str = "") -> Check:
    """Agrees where the measurement, and its whole interval if it has one, is no less than the limit."""
    value = measured if interval is None else interval[0]
    return _check(what, limit, measured, interval, value >= limit, "at least that", note)


def _check(what, predicted, measured, interval, agrees, rule, note) -> Check:
    interval = None if interval is None else (float(interval[0]), float(interval[1]))
    return Check(what, float(predicted), float(measured), interval, bool(agrees), rule, note)


def mean_interval(values: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Mean and 95 % t-interval of independent values.

    Raises:
      UserError: fewer than two.
    """
    values = [float(value) for value in np.ravel(values)]
    if len(values) < 2:
        raise UserError("an interval needs at least two repetitions")
    found = stats.estimate(values)
    return found.mean, (found.mean - found.half_width, found.mean + found.half_width)


def share_interval(hits: int, trials: int) -> tuple[float, tuple[float, float]]:
    """Share and its exact 95 % binomial interval (Clopper and Pearson 1934).

    Raises:
      UserError: no trial, or more hits than trials.
    """
    if not 0 <= hits <= trials or trials < 1:
        raise UserError(f"share_interval: {hits} of {trials} is no share")
    tail = (1 - LEVEL) / 2
    low = 0.0 if hits == 0 else _solve(lambda p: _at_most(trials - hits, trials, 1 - p) - tail)
    high = 1.0 if hits == trials else _solve(lambda p: tail - _at_most(hits, trials, p))
    return hits / trials, (low, high)


def _at_most(hits: int, trials: int, p: float) -> float:
    """P(Binomial(trials, p) <= hits)."""
    if p in (0.0, 1.0):
        return float(p == 0.0 or hits == trials)
    whole = math.lgamma(trials + 1)
    terms = (whole - math.lgamma(k + 1) - math.lgamma(trials - k + 1) + k * math.log(p)
             + (trials - k) * math.log1p(-p) for k in range(hits + 1))  # fmt: skip
    return math.fsum(map(math.exp, terms))


def _solve(rising, low: float = 0.0, high: float = 1.0) -> float:
    """Where a rising function is 0."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if rising(middle) > 0 else (middle, high)
    return (low + high) / 2


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of log y on log x, by least squares."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def largest_z(trials: int) -> float:
    """What the largest of so many |z| stays below with 95 % (Bonferroni)."""
    return statistics.NormalDist().inv_cdf(1 - (1 - LEVEL) / 2 / trials)

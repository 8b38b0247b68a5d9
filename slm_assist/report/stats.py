"""The arithmetic of a comparison: crossings, t-intervals over seeds, and the size of noise."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

# 97.5 % quantiles of Student's t with 1, 2, ... 30 degrees of freedom
T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def t_975(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, to 0.001 (beyond 30 by its expansion in 1/freedom)."""
    return T_975[freedom - 1] if freedom <= 30 else 1.95996 + 2.3722 / freedom + 2.8225 / freedom**2


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One figure over seeds.

    Attributes:
      mean: None if some seed has no value (a target that it does not reach).
      half_width: of the 95 % t-interval around the mean, None with one seed.
      values: one a seed, None where there is none.
    """

    mean: float | None
    half_width: float | None
    values: tuple[float | None, ...]

    def to_json(self) -> dict:
        interval = None
        if self.half_width is not None:
            interval = [self.mean - self.half_width, self.mean + self.half_width]
        return {"mean": self.mean, "interval_95": interval, "seeds": list(self.values)}


def estimate(values: Sequence[float | None]) -> Estimate:
    """Mean and half-width t * s / sqrt(n), s the sample standard deviation over seeds."""
    values = tuple(values)
    if not values or None in values:
        return Estimate(None, None, values)
    n = len(values)
    half_width = t_975(n - 1) * statistics.stdev(values) / math.sqrt(n) if n > 1 else None
    return Estimate(math.fsum(values) / n, half_width, values)


def difference(a: Mapping[int, float], b: Mapping[int, float]) -> Estimate:
    """a - b, each `{seed: value}`: paired by seed where seeds agree, else between the means.

    Two or more pairs give the t-interval of the paired differences. Without pairs, two or more seeds on
    each side give t * sqrt(s_a^2 / n_a + s_b^2 / n_b) with the degrees of freedom of the smaller side, which
    is wider than Welch's. One pair, or one seed on a side, gives no interval.
    """
    pairs = [a[seed] - b[seed] for seed in a if seed in b]
    if pairs:
        return estimate(pairs)
    apart = statistics.fmean(a.values()) - statistics.fmean(b.values())
    if min(len(a), len(b)) < 2:
        return Estimate(apart, None, (apart,))
    error = math.sqrt(sum(statistics.variance(side.values()) / len(side) for side in (a, b)))
    return Estimate(apart, t_975(min(len(a), len(b)) - 1) * error, (apart,))


def first_crossing(x: Sequence[float], y: Sequence[float], target: float) -> float | None:
    """Where y first is at or below `target`, linear between the two points around it; None: nowhere."""
    for i, value in enumerate(y):
        if value <= target:
            if i == 0:
                return x[0]
            return x[i - 1] + (y[i - 1] - target) / (y[i - 1] - value) * (x[i] - x[i - 1])
    return None


def interpolate(at: float, x: Sequence[float], y: Sequence[float]) -> float | None:
    """y at `at`, linear between the points of ascending x; None outside them."""
    for i, right in enumerate(x):
        if at <= right:
            if at == right:
                return y[i]
            return None if i == 0 else y[i - 1] + (at - x[i - 1]) / (right - x[i - 1]) * (y[i] - y[i - 1])
    return None


def least_significant_difference(baseline: Sequence[float], n_other: int) -> float:
    """Below this, a difference of two means is noise at the 95 % level: t * s * sqrt(1/n + 1/n_other).

    s is the sample standard deviation of BASELINE's n >= 2 seeds, t has n - 1 degrees of freedom, and
    the other method is taken to spread as BASELINE does.
    """
    n = len(baseline)
    return t_975(n - 1) * statistics.stdev(baseline) * math.sqrt(1 / n + 1 / n_other)


def clustered_standard_error(differences: Sequence[float], weights: Sequence[float]) -> float:
    """Standard error of a weighted mean of differences over k >= 2 clusters (here: rows, or domains).

    sqrt(k / (k - 1) * sum w_i^2 (d_i - mean)^2) / sum w_i, the usual linearised form for a ratio of sums.
    """
    k, total = len(differences), math.fsum(weights)
    mean = math.fsum(w * d for w, d in zip(weights, differences, strict=True)) / total
    squares = math.fsum((w * (d - mean)) ** 2 for w, d in zip(weights, differences, strict=True))
    return math.sqrt(k / (k - 1) * squares) / total

"""Comparisons of points, the same for every method: at equal steps, at equal FLOPs, and the cost to a quality.

Pairs share a seed. BASELINE at a method's FLOPs is interpolated between BASELINE's own fully decayed models of that
seed, linearly in the logarithm of the FLOPs, and never extrapolated; a cost to a quality is interpolated in the same
way between the method's own. A difference is called better or worse only where the 95 % interval leaves out 0 and the
difference is at least the minimum detectable one by BASELINE's own spread over seeds.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import measures
import numpy as np
from measures import PRIMARY
from points import Point

from slm_assist.report import stats

SHARES = {"full": 1.0, "shared": 0.1, "free": 0.0}  # of the small LM's training that is charged, and in words:
CHARGED = {"full": "in full", "shared": "shared by 10", "free": "left out"}
BETTER, WORSE, OPEN, ONE, OUTSIDE = "better", "worse", "not resolved", "one seed", "outside the measured range"
# 80 % quantiles of Student's t with 1, 2, ... 9 degrees of freedom
T_80 = (1.376, 1.061, 0.978, 0.941, 0.920, 0.906, 0.896, 0.889, 0.883)
EDGE = 1e-9  # relative: FLOPs added up in another order are the same FLOPs

Seeds = Mapping[int, Sequence[Point]]  # the points of a row by seed, in the order of steps


def at_steps(own: Sequence[Point], steps: int) -> Point | None:
    """The model that was trained for exactly so many steps."""
    return next((point for point in own if point.steps == steps), None)


def at_flops(own: Sequence[Point], flops: float, name: str) -> np.ndarray | None:
    """[1 + replicates] a measure at so many FLOPs; None outside what was measured."""
    x = [point.flops for point in own]
    for i, right in enumerate(x):
        if abs(flops / right - 1) < EDGE:
            return own[i].measures[name]
        if flops < right:
            if i == 0:
                return None
            part = math.log(flops / x[i - 1]) / math.log(right / x[i - 1])
            return (1 - part) * own[i - 1].measures[name] + part * own[i].measures[name]
    return None


def apart(seeds: Seeds, steps: int, of_base: Callable[[int, Point], np.ndarray | None], name: str,
          detectable: float | None) -> dict[str, Any]:  # fmt: skip
    """A row's models of so many steps minus what `of_base` gives for each, paired by seed, and the verdict.

    Args:
      detectable: the minimum detectable difference; None: not known.
    """
    pairs = []
    for seed, own in seeds.items():
        point = at_steps(own, steps)
        base = of_base(seed, point) if point else None
        if base is None:
            return {"mean": None, "interval": None, "seeds": [], "detectable": detectable, "verdict": OUTSIDE}
        pairs.append(point.measures[name] - base)
    values = np.stack(pairs, axis=1)
    mean, interval = float(values[0].mean()), measures.interval(values)
    return {
        "mean": mean, "interval": interval, "seeds": [float(x) for x in values[0]], "detectable": detectable,
        "verdict": verdict(mean, interval, detectable),
    }  # fmt: skip


def verdict(mean: float, interval: Sequence[float] | None, detectable: float | None) -> str:
    """`better` or `worse` (bits a byte: less is better), `not resolved`, or `one seed`, of which nothing is said."""
    if interval is None or detectable is None:
        return ONE
    if abs(mean) < detectable or interval[0] <= 0 <= interval[1]:
        return OPEN
    return BETTER if mean < 0 else WORSE


def detectable(base: Seeds, steps: int, name: str, others: int) -> float | None:
    """The difference of two means over seeds that would be found with 80 % power at the 95 % level, unpaired.

    (t_0.975 + t_0.80) s sqrt(2 / others), s BASELINE's standard deviation over all of its seeds, at its models of so
    many steps, and the other row, of `others` seeds that BASELINE has too, taken to spread as it does. None where
    BASELINE has one seed.
    """
    return of_spread([float(p.measures[name][0]) for own in base.values() if (p := at_steps(own, steps))], others)


def of_spread(values: Sequence[float], others: int) -> float | None:
    """`detectable` of BASELINE's values by seed."""
    n = len(values)
    if n < 2:
        return None
    factor = stats.t_975(n - 1) + T_80[min(n - 1, len(T_80)) - 1]
    return factor * float(np.std(values, ddof=1)) * math.sqrt(2 / others)


def to_quality(seeds: Seeds, base: Seeds, steps: int, cost: Callable[[Point], float]) -> dict[str, Any]:
    """Cost until BASELINE's quality at so many steps, as a part of BASELINE's cost there.

    Curves are means over the seeds that both have. `within`: the cost lies between two of the row's models; `before`:
    its first is as good already (then `mean` is that one's cost, and the truth is less); `never`: none is.
    """
    shared = [seed for seed in seeds if seed in base]
    paid = [math.log(np.mean([cost(seeds[seed][i]) for seed in shared])) for i in range(len(seeds[shared[0]]))]
    target_cost = np.mean([cost(at_steps(base[seed], steps)) for seed in shared])
    curve = np.stack(
        [[point.measures[PRIMARY] for point in seeds[seed]] for seed in shared]
    )  # [seeds, ends, replicates]
    target = np.stack([at_steps(base[seed], steps).measures[PRIMARY] for seed in shared])  # [seeds, replicates]
    log_target = math.log(target_cost)
    rng, n = np.random.default_rng(1), len(shared)
    value, where = _reach(paid, curve[:, :, 0].mean(axis=0), target[:, 0].mean())
    ratios = []
    for b in range(1, curve.shape[2]):
        drawn = rng.integers(n, size=n)
        of_all = _reach(paid, curve[:, :, b].mean(axis=0), target[:, b].mean())[0]
        of_drawn = _reach(paid, curve[drawn, :, b].mean(axis=0), target[drawn, b].mean())[0]
        ratios.append(_widened(of_all, of_drawn, n) - log_target)
    edges = np.exp(np.quantile(ratios, (0.025, 0.975), method="nearest")) if n > 1 else None
    return {
        "where": where,
        "mean": None if value is None else math.exp(value - log_target),
        "interval": None if edges is None else [float(x) if math.isfinite(x) else None for x in edges],
    }


def _widened(of_all: float | None, of_drawn: float | None, seeds: int) -> float:
    """The logarithm of a cost, what the draw of seeds adds to it widened as `measures.interval` does; inf: never."""
    if of_all is None or of_drawn is None:
        return math.inf
    return of_all + (measures.widening(seeds) * (of_drawn - of_all) if seeds > 1 else 0.0)


def _reach(x: Sequence[float], y: Sequence[float], target: float) -> tuple[float | None, str]:
    if y[0] <= target:
        return x[0], "before"
    value = stats.first_crossing(x, y, target)
    return value, "never" if value is None else "within"

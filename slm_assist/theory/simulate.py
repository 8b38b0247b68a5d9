"""The bounds against repetitions of the sample: coverage, tightness, increments, and the rate in N and T.

Laws, classes and bounds are exact; only the rows are random.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from slm_assist.errors import UserError
from slm_assist.theory import bounds, risk
from slm_assist.theory.martingale import increments
from slm_assist.theory.sources import Source

FORMS = {"excess": ("covering", "finite"), "class": ("martingale", "rows")}


class Setting(NamedTuple):
    """What a bound speaks of: `class_KxCxV` are the members of Theta, `teacher_CxV` is q."""

    source: Source
    teacher_CxV: np.ndarray
    class_KxCxV: np.ndarray
    delta: float = 0.05

    @property
    def largest_loss(self) -> float:
        return risk.largest_loss(self.class_KxCxV)

    @property
    def total_variation(self) -> float:
        return float(risk.mean_over(self.source, risk.total_variation(self.teacher_CxV, self.source.law_CxV)))

    def common(self, weight: float) -> dict[str, float]:
        """What every bound is given."""
        return {"members": len(self.class_KxCxV), "largest_loss": self.largest_loss, "weight": weight,
                "total_variation": self.total_variation, "delta": self.delta}  # fmt: skip


def bias_ratios(setting: Setting, weight: float) -> np.ndarray:
    """|R - R^w| / (2 M w TV) of each member, exact, [K]; M is that of the class."""
    source, tables = setting.source, setting.class_KxCxV
    gap = risk.risk(source, tables) - risk.mixed_risk(source, tables, setting.teacher_CxV, weight)
    limit = bounds.bias(setting.largest_loss, weight, setting.total_variation)["theorem"]
    return np.abs(gap) / limit


class Repetitions(NamedTuple):
    """The two bounds over repetitions of a sample of N rows at one weight; all arrays [R] over repetitions.

    Attributes:
      excess: R(hat) - R(best).
      excess_bound: terms by name, of each form.
      gap: the largest R - R^w_N of any member.
      class_excess: the largest of (R - R^w_N - bound) over members: the bound held where it is not above 0; by form.
      class_ratio: the largest (R - R^w_N) / bound of any member, by form.
      class_unbiased: the same with the bias term left out, by form.
      class_bound: terms, mean over members, by form; not random.
    """

    weight: float
    rows: int
    excess: np.ndarray
    excess_bound: dict[str, bounds.Terms]
    gap: np.ndarray
    class_excess: dict[str, np.ndarray]
    class_ratio: dict[str, np.ndarray]
    class_unbiased: dict[str, np.ndarray]
    class_bound: dict[str, bounds.Terms]


def repeat(
    setting: Setting, weights: Sequence[float], rows: Sequence[int], repetitions: int, seed: int
) -> list[Repetitions]:
    """Both bounds for every weight and number of rows, on the same `repetitions` samples; the first N rows of each.

    Raises:
      UserError: no repetition, or fewer rows than the theorem asks for.
    """
    if repetitions < 1 or min(rows) < 16:
        raise UserError(f"repetitions={repetitions}, rows={list(rows)}: at least 1, and at least 16 rows")
    source, tables = setting.source, setting.class_KxCxV
    losses = {w: risk.token_loss(tables, setting.teacher_CxV, w) for w in weights}
    true = risk.risk(source, tables)
    best, rng = int(true.argmin()), np.random.default_rng(seed)
    widths = {w: _widths(setting, losses[w], w, rows) for w in weights}
    found = {(w, n): [] for w in weights for n in rows}
    for _ in range(repetitions):
        counts = source.counts(source.sample(max(rows), rng)).reshape(max(rows), -1)
        for w, loss in losses.items():
            row_loss = counts @ loss.reshape(len(tables), -1).T / source.length
            for n in rows:
                found[w, n].append(_one(setting, w, row_loss[:n], true, best, widths[w][n]))
    return [Repetitions(w, n, **_stacked(results), class_bound=_means(widths[w][n]))
            for (w, n), results in found.items()]  # fmt: skip


def _widths(setting: Setting, loss_KxCxV: np.ndarray, weight: float, rows: Sequence[int]) -> dict:
    steps = increments(setting.source, loss_KxCxV)
    return {n: {form: bounds.finite_class(steps, rows=n, form=form, **setting.common(weight))
                for form in FORMS["class"]} for n in rows}  # fmt: skip


def _one(setting: Setting, weight: float, loss_NxK, true_K, best: int, widths) -> dict[str, Any]:
    """What one sample gives."""
    mean_K = loss_NxK.mean(axis=0)
    hat, gap_K = int(mean_K.argmin()), true_K - mean_K
    terms = {form: bounds.excess_risk(loss_NxK[:, hat], loss_NxK[:, best], form=form, **setting.common(weight))
             for form in FORMS["excess"]}  # fmt: skip
    return {
        "excess": true_K[hat] - true_K[best],
        "excess_bound": terms,
        "gap": gap_K.max(),
        "class_excess": {form: (gap_K - width["total"]).max() for form, width in widths.items()},
        "class_ratio": {form: (gap_K / width["total"]).max() for form, width in widths.items()},
        "class_unbiased": {form: (gap_K - width["total"] + width["bias"]).max() for form, width in widths.items()},
    }


def _stacked(results: list[dict]) -> dict:
    """Of dictionaries of numbers, the dictionary of arrays."""
    first = results[0]
    return {key: _stacked([r[key] for r in results]) if isinstance(first[key], dict)
            else np.array([r[key] for r in results]) for key in first}  # fmt: skip


def _means(by_form: dict) -> dict:
    return {form: {name: float(np.mean(value)) for name, value in terms.items()} for form, terms in by_form.items()}


def increment_samples(setting: Setting, member: int, weight: float, rows: int, seed: int) -> dict[str, Any]:
    """The increments of one member's loss on fresh rows beside what `martingale` says of them.

    Returns:
      `values` [N, T + 1], `exact` (the `Increments`), `row_gap` [N]: R^w minus each row's loss, -sum of its values.
    """
    source = setting.source
    loss = risk.token_loss(setting.class_KxCxV[member], setting.teacher_CxV, weight)
    exact, drawn = increments(source, loss), source.sample(rows, seed)
    row_loss = loss[drawn.context_NxT, drawn.token_NxT].mean(axis=1)
    return {"values": exact.of(drawn), "exact": exact, "row_gap": risk.expected(source, loss) - row_loss}


def single(
    setting: Setting, member: int, weight: float, rows: int, deltas: Sequence[float], repetitions: int, seed: int
) -> dict[str, dict[float, int]]:
    """How often the bound on R^w - R^w_N of ONE member fails, by form and delta: what a class or a bias would hide.

    Forms: `martingale` and `rows` of `bounds.finite_class` for a class of one, and `empirical`, Theorem 4 of Maurer
    and Pontil, which bounds the best member in `bounds.excess_risk`.
    """
    source = setting.source
    loss = risk.token_loss(setting.class_KxCxV[member], setting.teacher_CxV, weight)
    drawn, steps = source.sample(rows * repetitions, seed), increments(source, loss)
    row_loss = loss[drawn.context_NxT, drawn.token_NxT].mean(axis=1).reshape(repetitions, rows)
    gap = risk.expected(source, loss) - row_loss.mean(axis=1)
    spread = np.sqrt(2 * row_loss.var(axis=1, ddof=1) / rows)
    fails: dict[str, dict[float, int]] = {"martingale": {}, "rows": {}, "empirical": {}}
    for delta in deltas:
        common = {"members": 1, "largest_loss": setting.largest_loss, "weight": 0.0, "total_variation": 0.0}
        for form in FORMS["class"]:
            limit = bounds.finite_class(steps, rows=rows, delta=delta, form=form, **common)["total"]
            fails[form][delta] = int((gap > limit).sum())
        log = np.log(2 / delta)
        limit = spread * np.sqrt(log) + 7 * setting.largest_loss * log / (3 * (rows - 1))
        fails["empirical"][delta] = int((gap > limit).sum())
    return fails


def deviations(setting: Setting, weight: float, rows: int, repetitions: int, seed: int) -> dict[str, Any]:
    """sup over the class of |R^w_N - R^w|, and what it is measured against, for one N and T.

    Returns:
      `sup` [R]; `deviation` [R], R^w_N - R^w of the first member; `exact_sd` of the latter, sqrt(Var(L) / N);
      `width`: of the paper's bound without bias, the largest of the class.
    """
    source = setting.source
    loss = risk.token_loss(setting.class_KxCxV, setting.teacher_CxV, weight)
    drawn = source.sample(rows * repetitions, seed)
    pair = drawn.context_NxT.astype(np.int64) * source.vocab + drawn.token_NxT
    pair = pair.reshape(repetitions, -1) + np.arange(repetitions)[:, None] * source.law_CxV.size
    counts = np.bincount(pair.ravel(), minlength=repetitions * source.law_CxV.size).reshape(repetitions, -1)
    mean_RxK = counts @ loss.reshape(len(loss), -1).T / (rows * source.length)
    apart = mean_RxK - risk.expected(source, loss)
    steps = increments(source, loss)
    terms = bounds.finite_class(steps, rows=rows, **setting.common(weight))
    return {
        "sup": np.abs(apart).max(axis=1),
        "deviation": apart[:, 0],
        "exact_sd": float(np.sqrt(steps.mean_variance_T[0].sum() / rows)),
        "width": float((terms["total"] - terms["bias"]).max()),
    }

"""How good a tabular student gets with n tokens of each context, what weight is best, where soft labels stop helping.

The student is P = (1 - w) e + w q (`students.tabular`), e the empirical law of n tokens from d. To second order
KL(d || P) is chi2(P || d) / 2, and the expectation of that is, for every n,

    E chi2(P || d) / 2 = (1 - w)^2 (V - 1) / (2 n) + (w^2 / 2) chi2(q || d)                                     (*)

since E (e_v - d_v)^2 = d_v (1 - d_v) / n and E e = d. So (*) is exact for the chi-square risk, and for the KL risk
holds where n min d >> 1 (elsewhere e has zeros; at w = 0 the expected KL is infinite) and (q - d) / d is small. Setting
its derivative in w to zero gives w*; the last term is what remains as n grows, the floor.

For KL itself the expansion is better made about the mean of P, m = (1 - w) d + w q, than about d:

    E KL(d || P) ~ KL(d || m) + (1 - w)^2 / (2 n) sum_v d_v^2 (1 - d_v) / m_v^2                                (**)

The two differ by a term of order w / n that (*) leaves out, so as n grows the best weight of KL is not w* ~
(V - 1) / (n chi2) but (sum_v q_v / d_v - 1) / (n chi2): the same rate, another constant unless sum_v q_v / d_v = V.

Means over contexts are by `share_C` (contexts of share 0 are left out), the same n in each; chi2 may be a mean.
"""

import math
from collections.abc import Sequence

import numpy as np

from slm_assist.errors import UserError, one_of
from slm_assist.theory import checks, risk

MEASURES = ("kl", "chi_square")


def predicted_risk(n: float, vocab: int, chi_square: float, weight: float) -> float:
    """(*): nats a token above the data's entropy."""
    risk.check_weight(weight)
    return float((1 - weight) ** 2 * (vocab - 1) / (2 * n) + weight**2 / 2 * chi_square)


def best_weight(n: float, vocab: int, chi_square: float) -> float:
    """w* = [(V - 1) / n] / [(V - 1) / n + chi2(q || d)]: near 1 early, then as 1 / n.

    Raises:
      UserError: no token, or a chi2 below 0.
    """
    if n <= 0 or chi_square < 0:
        raise UserError(f"n={n}, chi_square={chi_square}: a context has tokens, and chi2 is not negative")
    return float((vocab - 1) / n / ((vocab - 1) / n + chi_square))


def crossover(vocab: int, chi_square: float, weight: float) -> float:
    """n at which (*) is the same for w = 0 and for `weight`: (V - 1) (2 - w) / (w chi2); beyond it BASELINE leads.

    Raises:
      UserError: the weight is 0 or not in [0, 1].
    """
    risk.check_weight(weight)
    if weight == 0:
        raise UserError("weight=0 is BASELINE itself: it crosses nothing")
    return float((vocab - 1) * (2 - weight) / (weight * chi_square)) if chi_square else math.inf


def floor(d_CxV: np.ndarray, q_CxV: np.ndarray, weight: float) -> np.ndarray:
    """KL(d || (1 - w) d + w q) at each context, [..., C]: what soft labels with a fixed w leave for ever; exact."""
    risk.check_weight(weight)
    return risk.kl(d_CxV, (1 - weight) * d_CxV + weight * q_CxV)


def refined_risk(d_CxV: np.ndarray, q_CxV: np.ndarray, n: float, weight: float) -> np.ndarray:
    """(**): expected KL risk at each context, [..., C], nats."""
    middle = (1 - weight) * d_CxV + weight * q_CxV
    spread = (d_CxV**2 * (1 - d_CxV) / middle**2).sum(axis=-1)
    return floor(d_CxV, q_CxV, weight) + (1 - weight) ** 2 / (2 * n) * spread


def refined_best_weight(d_CxV: np.ndarray, q_CxV: np.ndarray, n: float, share_C: np.ndarray) -> float:
    """The w in [0, 1] that minimises the mean of (**), on finer and finer grids, to 1e-6."""
    low, high = 0.0, 1.0
    for _ in range(4):
        grid = np.linspace(low, high, 101)
        best = int(np.argmin([refined_risk(d_CxV, q_CxV, n, w) @ share_C for w in grid]))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, 100)]
    return float((low + high) / 2)


def draws(d_CxV: np.ndarray, n: int, repetitions: int, rng: np.random.Generator) -> np.ndarray:
    """Empirical laws of n tokens of each context, [R, C, V]."""
    return rng.multinomial(n, d_CxV, size=(repetitions, len(d_CxV))) / n


def measured_risk(
    d_CxV: np.ndarray, q_CxV: np.ndarray, empirical_RxCxV: np.ndarray, weight: float, share_C: np.ndarray,
    measure: str = "kl",
) -> np.ndarray:  # fmt: skip
    """Excess risk of the student in each repetition, mean over contexts, [R].

    Args:
      measure: `kl`, infinite where a symbol has no probability, or `chi_square` (half of it, as in (*)).
    """
    one_of("measure", measure, MEASURES)
    p = (1 - weight) * empirical_RxCxV + weight * q_CxV
    by_context = risk.kl(d_CxV, p) if measure == "kl" else risk.chi_square(p, d_CxV) / 2
    inside = share_C > 0
    return by_context[:, inside] @ share_C[inside]


def measured_best_weight(
    d_CxV: np.ndarray, q_CxV: np.ndarray, empirical_RxCxV: np.ndarray, share_C: np.ndarray, measure: str = "kl"
) -> float:
    """The w that minimises the mean risk of these repetitions.

    Both risks are convex in w: chi-square is a parabola, for KL the derivative's zero is found by bisection.
    """
    one_of("measure", measure, MEASURES)
    inside = share_C > 0
    weigh, d_CxV, q_CxV = share_C[inside, None], d_CxV[inside], q_CxV[inside]
    empirical_RxCxV = empirical_RxCxV[:, inside]
    towards = q_CxV - empirical_RxCxV
    if measure == "chi_square":
        off = empirical_RxCxV - d_CxV
        w = -(weigh * off * towards / d_CxV).sum() / (weigh * towards**2 / d_CxV).sum()
        return float(np.clip(w, 0, 1))

    def derivative(w: float) -> float:
        return -(weigh * d_CxV * towards / (empirical_RxCxV + w * towards)).sum()

    low, high = 0.0, 1.0
    if derivative(1.0) < 0:
        return 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if derivative(middle) > 0 else (middle, high)
    return (low + high) / 2


def in_batches(empirical_RxCxV: np.ndarray, function, batches: int = 10) -> tuple[float, tuple[float, float]]:
    """`function` of batches of the repetitions: mean and 95 % t-interval."""
    return checks.mean_interval([function(part) for part in np.array_split(empirical_RxCxV, batches)])


def best_weights(
    d_CxV: np.ndarray, q_CxV: np.ndarray, share_C: np.ndarray, sizes: Sequence[int], repetitions: int, seed: int
) -> list[dict]:
    """For each n: w* and the minimiser of (**), the best w measured by both risks, and the KL at w* and at that."""
    rng, vocab = np.random.default_rng(seed), d_CxV.shape[-1]
    chi2, found = float(risk.chi_square(q_CxV, d_CxV) @ share_C), []
    for n in sizes:
        e, predicted = draws(d_CxV, n, repetitions, rng), best_weight(n, vocab, chi2)
        line = {"n": n, "n_min_d": n * float(d_CxV.min()), "predicted": predicted,
                "refined": refined_best_weight(d_CxV, q_CxV, n, share_C)}  # fmt: skip
        for measure in MEASURES:
            best = in_batches(e, lambda part, m=measure: measured_best_weight(d_CxV, q_CxV, part, share_C, m))
            line[measure] = {"best": best[0], "interval": best[1]}
        at = [float(measured_risk(d_CxV, q_CxV, e, w, share_C).mean()) for w in (predicted, line["kl"]["best"])]
        found.append(line | {"kl_at_predicted": at[0], "kl_at_best": at[1]})
    return found


def risk_curves(
    d_CxV: np.ndarray, q_CxV: np.ndarray, share_C: np.ndarray, sizes: Sequence[int], weights: Sequence[float],
    repetitions: int, seed: int,
) -> dict[float, list[tuple[float, tuple[float, float]]]]:  # fmt: skip
    """Measured KL risk of each fixed weight at each n: mean and interval; `inf` where a repetition's is infinite."""
    rng = np.random.default_rng(seed)
    curves: dict[float, list] = {w: [] for w in weights}
    for n in sizes:
        e = draws(d_CxV, n, repetitions, rng)
        for w in weights:
            values = measured_risk(d_CxV, q_CxV, e, w, share_C)
            whole = np.isfinite(values).all()
            curves[w].append(checks.mean_interval(values) if whole else (math.inf, (math.inf, math.inf)))
    return curves


def measured_crossover(
    d_CxV: np.ndarray, q_CxV: np.ndarray, share_C: np.ndarray, weight: float, around: float, repetitions: int,
    seed: int, measure: str = "kl", batches: int = 10,
) -> tuple[float, tuple[float, float]]:  # fmt: skip
    """The n at which w = 0 and `weight` have the same mean risk, with its interval over batches of repetitions.

    The difference of the risks is measured at nine n from around / 2 to 2 around and fitted by a + b / n + c / n^2.

    Raises:
      UserError: some risk is infinite, or they do not cross there.
    """
    rng = np.random.default_rng(seed)
    sizes = np.unique(np.round(around * np.geomspace(0.5, 2, 9)).astype(int))
    differences = np.empty((repetitions, len(sizes)))
    for i, n in enumerate(sizes):
        e = draws(d_CxV, int(n), repetitions, rng)
        base, fixed = (measured_risk(d_CxV, q_CxV, e, w, share_C, measure) for w in (0.0, weight))
        differences[:, i] = base - fixed
    if not np.isfinite(differences).all():
        raise UserError(f"crossover near n={around:.0f}: a symbol was never drawn, and at w = 0 its KL is infinite")

    def zero(part: np.ndarray) -> float:
        c, b, a = np.polyfit(1 / sizes, part.mean(axis=0), 2)
        roots = [1 / x.real for x in np.roots([c, b, a]) if abs(x.imag) < 1e-12]
        inside = [n for n in roots if sizes[0] <= n <= sizes[-1]]
        if not inside:
            raise UserError(f"crossover: none between n={sizes[0]} and n={sizes[-1]}")
        return inside[0]

    return checks.mean_interval([zero(part) for part in np.array_split(differences, batches)])

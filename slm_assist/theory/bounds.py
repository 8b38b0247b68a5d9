"""The risk bounds of learning from soft labels (SALT, arXiv 2410.18779), with every term and every constant computed.

Rows are independent; the loss of a row is the mean over its T tokens, R and R^w are its expectations, R^w_N its mean
over N rows; -log P is in [0, M]. TV is the mean over positions of E[total variation of teacher and data].

1. Bias. R - R^w = w E[sum_v (d - q)(-log P)], so |R - R^w| <= 2 M w TV by Hoelder's inequality, for any |log P| <= M.
   As -log P is in [0, M] and sum_v (d - q) = 0, half of it holds as well: M w TV (`bias` returns both).

2. Excess risk. Of a class Theta let hat minimise R^w_N and best minimise R. Then
       R(hat) - R(best) = [R - R^w](hat) + [R^w - R^w_N](hat) + [R^w_N(hat) - R^w_N(best)] + [R^w_N - R^w](best)
                          + [R^w - R](best)
   The third bracket is at most 0; the first and the last are biases. Maurer and Pontil (2009, arXiv 0907.3740) bound
   the others for losses in [0, 1], here multiplied by M, each with probability 1 - delta/2, V_N the sample variance:
     hat, Theorem 6:  sqrt(18 V_N ln(C / (delta/2)) / N) + 15 M ln(C / (delta/2)) / (N - 1), with N >= 16 and
                      C = 10 N_inf(1/N, loss^w of Theta, 2N), for a finite class at most 10 |Theta|, which is taken
     best, Theorem 4: sqrt(2 V_N ln(2 / (delta/2)) / N) + 7 M ln(2 / (delta/2)) / (3 (N - 1))
   So the O(M ln(C / delta) / (N - 1)) of the paper is M (15 ln(2 C / delta) + (7/3) ln(4 / delta)) / (N - 1).
   For a finite class Theorem 4 and a union bound (their Corollary 5) give the first line with constants 2 and 7/3 and
   ln(4 |Theta| / delta): `form="finite"`.

3. Finite class. For one member the increments of `martingale`, over all rows one after the other and each divided by
   N, are a martingale with increments at most C/N and predictable quadratic variation at most sum_t V_t / N. Freedman
   (1975) gives R^w - R^w_N <= sqrt(2 v ln(1/d)) + (2 b / 3) ln(1/d) with v = sum_t V_t / N, b = C / N and
   d = delta / |Theta|; a union bound and 1. give, for all members at once with probability 1 - delta,
       R <= R^w_N + 2 M w TV + sqrt(2 sum_t V_t ln(|Theta|/delta) / N) + (2 C / 3 N) ln(|Theta|/delta)
   This is the paper's form if V_t and C belong to the increments of the MEAN over tokens (V_t of order 1/T^2, so the
   root is of order 1/sqrt(N T)); for a row's summed loss V_t is T^2 times, C and the bound are T times as large. The
   sum begins at t = 0: the first context is random too. V_t has to be the largest conditional variance of any past.
   As rows are independent, Bernstein's inequality also holds with Var(L) = sum_t E[xi_t^2], which is less, if C
   is the most that a whole row can be off, at most M: `form="rows"`.
"""

import math

import numpy as np

from slm_assist.errors import UserError, one_of
from slm_assist.theory import risk
from slm_assist.theory.martingale import Increments

Terms = dict[str, np.ndarray]


def bias(largest_loss: float, weight: float, total_variation: float) -> Terms:
    """|R - R^w| is at most `theorem` (2 M w TV), and at most `half` (M w TV).

    Args:
      largest_loss: M, nats (`risk.largest_loss`).
      total_variation: mean over the tokens of the corpus, in [0, 1].
    """
    risk.check_weight(weight)
    theorem = np.float64(2 * largest_loss * weight * total_variation)
    return {"theorem": theorem, "half": theorem / 2}


def excess_risk(
    hat_loss_N: np.ndarray,
    best_loss_N: np.ndarray,
    *,
    members: int,
    largest_loss: float,
    weight: float,
    total_variation: float,
    delta: float,
    form: str = "covering",
) -> Terms:
    """R(hat) - R(best) is at most `total`, with probability 1 - delta; nats a token.

    Args:
      hat_loss_N: loss^w of each row (mean over its tokens) under the minimiser on these rows, [..., N].
      best_loss_N: the same under the member of least R, [..., N].
      members: |Theta|.
      form: `covering`, the paper's (Theorem 6), or `finite` (Corollary 5).

    Returns:
      `bias` 4 M w TV, `variance_hat`, `variance_best`, `remainder`, and their sum `total`, each [...].

    Raises:
      UserError: fewer rows than the theorem asks for, an unknown form, or a delta that is no probability.
    """
    one_of("form", form, ("covering", "finite"))
    _check(members, delta)
    n = hat_loss_N.shape[-1]
    if n < 16:
        raise UserError(f"excess_risk: {n} rows; Theorem 6 of Maurer and Pontil holds from 16 rows on")
    root, rest, log_hat = (
        (18, 15, math.log(2 * 10 * members / delta))
        if form == "covering"
        else (2, 7 / 3, math.log(4 * members / delta))
    )
    log_best = math.log(4 / delta)
    return _summed({
        "bias": 2 * bias(largest_loss, weight, total_variation)["theorem"],
        "variance_hat": np.sqrt(root * hat_loss_N.var(axis=-1, ddof=1) * log_hat / n),
        "variance_best": np.sqrt(2 * best_loss_N.var(axis=-1, ddof=1) * log_best / n),
        "remainder": np.float64(largest_loss * (rest * log_hat + 7 / 3 * log_best) / (n - 1)),
    })  # fmt: skip


def finite_class(
    steps: Increments,
    *,
    rows: int,
    members: int,
    largest_loss: float,
    weight: float,
    total_variation: float,
    delta: float,
    form: str = "martingale",
) -> Terms:
    """R - R^w_N of every member is at most its `total`, all at once with probability 1 - delta; nats a token.

    Args:
      steps: increments of loss^w of the members, leading axes [...].
      rows: N.
      members: |Theta|.
      form: `martingale`, the paper's, or `rows` (exact variance of a row, its largest loss in place of C).

    Returns:
      `bias` 2 M w TV, `variance`, `remainder`, and their sum `total`, each [...].

    Raises:
      UserError: no row, an unknown form, or a delta that is no probability.
    """
    one_of("form", form, ("martingale", "rows"))
    _check(members, delta)
    if rows < 1:
        raise UserError(f"finite_class: rows={rows}; at least one is needed")
    log = math.log(members / delta)
    if form == "martingale":
        variance, largest = steps.largest_variance_T.sum(axis=-1), steps.largest_T.max(axis=-1)
    else:
        variance, largest = steps.mean_variance_T.sum(axis=-1), np.float64(largest_loss)
    return _summed({
        "bias": bias(largest_loss, weight, total_variation)["theorem"],
        "variance": np.sqrt(2 * variance * log / rows),
        "remainder": 2 * largest * log / (3 * rows),
    })  # fmt: skip


def _summed(terms: Terms) -> Terms:
    return terms | {"total": sum(terms.values())}


def _check(members: int, delta: float) -> None:
    if members < 1 or not 0 < delta < 1:
        raise UserError(f"members={members}, delta={delta}: a class has members, and delta is between 0 and 1")

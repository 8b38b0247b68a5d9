"""Exact risks of a tabular model, and distances between conditional laws; nats a token.

A model or teacher is a table [..., C, V] of probabilities, leading axes are several of them. Risks are means over the T
positions of a row, not sums:

    loss^w(c, y) = (1 - w) (-log P(y | c)) + w CE(q(. | c), P(. | c))       (SALT, arXiv 2410.18779)
    R^w = mean over t of E[loss^w(c_t, x_t)] = sum_c occupation(c) sum_y d(y | c) loss^w(c, y),     R = R^0
"""

import numpy as np

from slm_assist.errors import UserError
from slm_assist.theory.sources import Source


def token_loss(model_CxV: np.ndarray, teacher_CxV: np.ndarray, weight: float) -> np.ndarray:
    """loss^w of each token in each context, [..., C, V]; what `losses.dense.distillation` gives token by token.

    Raises:
      UserError: the weight is not in [0, 1].
    """
    check_weight(weight)
    log_p = np.log(model_CxV)
    return -(1 - weight) * log_p - weight * (teacher_CxV * log_p).sum(axis=-1, keepdims=True)


def expected(source: Source, loss_CxV: np.ndarray) -> np.ndarray:
    """E of a function of (context, token), mean over positions, [...]."""
    return np.einsum("c,cv,...cv->...", source.occupation_C, source.law_CxV, loss_CxV)


def risk(source: Source, model_CxV: np.ndarray) -> np.ndarray:
    """R, the expected cross-entropy with the data, [...]."""
    return expected(source, -np.log(model_CxV))


def mixed_risk(source: Source, model_CxV: np.ndarray, teacher_CxV: np.ndarray, weight: float) -> np.ndarray:
    """R^w, [...]."""
    return expected(source, token_loss(model_CxV, teacher_CxV, weight))


def largest_loss(model_CxV: np.ndarray) -> float:
    """M, the largest -log P of a table or of a class of tables."""
    return float(-np.log(model_CxV.min()))


def context_variance(source: Source, loss_CxV: np.ndarray) -> np.ndarray:
    """Var of the loss over the next token at each fixed context, [..., C]."""
    mean = (source.law_CxV * loss_CxV).sum(axis=-1, keepdims=True)
    return (source.law_CxV * (loss_CxV - mean) ** 2).sum(axis=-1)


def total_variation(p_CxV: np.ndarray, q_CxV: np.ndarray) -> np.ndarray:
    """sum |p - q| / 2 at each context, [..., C]."""
    return np.abs(p_CxV - q_CxV).sum(axis=-1) / 2


def chi_square(q_CxV: np.ndarray, d_CxV: np.ndarray) -> np.ndarray:
    """chi2(q || d) = sum (q - d)^2 / d at each context, [..., C]."""
    return ((q_CxV - d_CxV) ** 2 / d_CxV).sum(axis=-1)


def kl(d_CxV: np.ndarray, p_CxV: np.ndarray) -> np.ndarray:
    """KL(d || p) at each context, [..., C]; infinite where p is 0. d is positive."""
    with np.errstate(divide="ignore"):
        return (d_CxV * (np.log(d_CxV) - np.log(p_CxV))).sum(axis=-1)


def mean_over(source: Source, value_C: np.ndarray, bucket: str | None = None) -> np.ndarray:
    """Mean of [..., C] over the contexts of the corpus's tokens: all, or those of one bucket, [...].

    Raises:
      UserError: no such bucket.
    """
    if bucket is not None and bucket not in source.buckets:
        raise UserError(f"bucket={bucket!r}: the source has {', '.join(source.buckets)}")
    inside = 1.0 if bucket is None else source.bucket_C == source.buckets.index(bucket)
    share = source.occupation_C * inside
    return (value_C * (share / share.sum())).sum(axis=-1)


def check_weight(weight: float) -> None:
    """Raises `UserError` unless the weight is in [0, 1]."""
    if not 0 <= weight <= 1:
        raise UserError(f"weight={weight}: the weight of the soft labels is between 0 and 1")

"""Tabular students: the exact minimiser of the mixed loss, and finite classes to choose from."""

from collections.abc import Sequence

import numpy as np

from slm_assist.errors import UserError
from slm_assist.theory import risk, teachers
from slm_assist.theory.sources import Source


def tabular(count_CxV: np.ndarray, teacher_CxV: np.ndarray, weight: float, smoothing: float = 0.0) -> np.ndarray:
    """The table that minimises the mixed loss on a sample, [..., C, V].

    In a context with n tokens that loss is n CE((1 - w) e + w q, P), e the empirical law: (1 - w) of it is linear in e
    and w of it in q, both against -log P. A cross-entropy is least where P is its first argument: P = (1 - w) e + w q.
    A context that was never seen has no loss; there the student is left at the uniform law.

    Args:
      count_CxV: how often each token followed each context, [..., C, V].
      smoothing: added to each count first, which keeps log P bounded at w = 0.

    Raises:
      UserError: the weight is not in [0, 1], or the smoothing negative.
    """
    risk.check_weight(weight)
    if smoothing < 0:
        raise UserError(f"smoothing={smoothing}: it is added to counts and cannot be negative")
    seen = count_CxV.sum(axis=-1, keepdims=True) > 0
    smooth = count_CxV + smoothing
    empirical = smooth / np.where(seen, smooth.sum(axis=-1, keepdims=True), 1.0)
    return np.where(seen, (1 - weight) * empirical + weight * teacher_CxV, 1.0 / count_CxV.shape[-1])


def floored(law_CxV: np.ndarray, floor: float) -> np.ndarray:
    """(1 - V floor) law + floor: no probability is below `floor`, so |log P| <= -log(floor)."""
    vocab = law_CxV.shape[-1]
    if not 0 < floor * vocab < 1:
        raise UserError(f"floor={floor}: with {vocab} symbols it must be above 0 and below {1 / vocab:g}")
    return floor + (1 - vocab * floor) * law_CxV


def finite_class(
    source: Source,
    teacher_CxV: np.ndarray,
    *,
    steps: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    temperatures: Sequence[float] = (0.5, 0.8, 1.0, 1.25, 2.0),
    perturbed: int = 39,
    scales: tuple[float, float] = (0.01, 0.3),
    floor: float = 1e-3,
    seed: int = 0,
) -> np.ndarray:
    """|Theta| tables [K, C, V]: tempered laws on the way from the data's to the teacher's, and perturbed data laws.

    K = len(steps) * len(temperatures) + perturbed; the first with step 0 and temperature 1 is the data's law, floored.

    Args:
      perturbed: members softmax(log d + scale * normal), among which a sample has to decide; `scales`: the smallest
        and the largest of them.
      floor: of every probability, so that M = -log(floor) at most.
    """
    members = [
        teachers.tempered((1 - a) * source.law_CxV + a * teacher_CxV, temperature)
        for a in steps
        for temperature in temperatures
    ]
    rng = np.random.default_rng(seed)
    for scale in np.geomspace(*scales, perturbed):
        noise = np.exp(scale * rng.normal(size=source.law_CxV.shape))
        members.append(source.law_CxV * noise / (source.law_CxV * noise).sum(axis=1, keepdims=True))
    return floored(np.stack(members), floor)

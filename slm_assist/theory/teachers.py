"""Teachers whose bias is chosen: tables q(. | context), [C, V]."""

from collections.abc import Mapping

import numpy as np

from slm_assist.errors import UserError
from slm_assist.theory import risk
from slm_assist.theory.sources import Source, check_law

MEASURES = {"total_variation": (risk.total_variation, 1.0), "chi_square": (risk.chi_square, 0.5)}


def towards(
    source: Source,
    other_CxV: np.ndarray,
    distance: float | Mapping[str, float],
    measure: str = "total_variation",
) -> np.ndarray:
    """(1 - s) d + s other, with the s in each bucket that makes the mean distance from the data's law `distance`.

    Along this path total variation is s times, chi2(q || d) is s^2 times that of `other`, so s is exact.

    Args:
      other_CxV: the law that the teacher is wrong towards.
      distance: mean over the contexts, one number for every bucket or one by name.
      measure: `total_variation` or `chi_square`.

    Raises:
      UserError: an unknown measure or bucket, or a distance beyond that of `other`.
    """
    check_law("other_CxV", other_CxV)
    if measure not in MEASURES:
        raise UserError(f"measure={measure!r}: choose one of {', '.join(MEASURES)}")
    between, power = MEASURES[measure]
    by_bucket = dict.fromkeys(source.buckets, distance) if not isinstance(distance, Mapping) else dict(distance)
    if set(by_bucket) != set(source.buckets):
        raise UserError(f"distance of {', '.join(by_bucket)}: the source's buckets are {', '.join(source.buckets)}")
    share_C = np.empty(len(source.law_CxV))
    for i, name in enumerate(source.buckets):
        farthest = float(risk.mean_over(source, between(other_CxV, source.law_CxV), name))
        if not 0 <= by_bucket[name] <= farthest:
            raise UserError(f"{measure}={by_bucket[name]:g} in {name}: this path has 0 to {farthest:.4g}")
        share_C[source.bucket_C == i] = (by_bucket[name] / farthest) ** power if farthest else 0.0
    return (1 - share_C[:, None]) * source.law_CxV + share_C[:, None] * other_CxV


def tempered(law_CxV: np.ndarray, temperature: float) -> np.ndarray:
    """softmax(log law / temperature): below 1 sharpens, above 1 softens, as in `losses.dense`.

    Raises:
      UserError: the temperature is not positive.
    """
    if temperature <= 0:
        raise UserError(f"temperature={temperature}: it divides the logits and must be positive")
    z = np.log(law_CxV) / temperature
    p = np.exp(z - z.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def forgetful(source: Source, kept_C: np.ndarray) -> np.ndarray:
    """The best a smaller model can do that sees only `kept(c)` of the context: E[d(. | c) given kept(c)].

    With `np.arange(V**2) % V` an order-2 source has the best order-1 teacher; it is exact where the older token does
    not matter and wrong where it does.

    Args:
      kept_C: int, what is left of each context.
    """
    kept_C = np.asarray(kept_C)
    if kept_C.shape != (len(source.law_CxV),):
        raise UserError(f"kept_C {kept_C.shape}: the source has {len(source.law_CxV)} contexts")
    joint, kinds = source.occupation_C[:, None] * source.law_CxV, int(kept_C.max()) + 1
    together = np.stack([joint[kept_C == kind].sum(axis=0) for kind in range(kinds)])
    return (together / together.sum(axis=1, keepdims=True))[kept_C]

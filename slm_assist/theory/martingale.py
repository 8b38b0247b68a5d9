"""The martingale of a row's loss, exactly: its increments, their conditional variances and their bounds.

The loss of a row is L = (1/T) sum_t loss^w(c_t, x_t), the mean over its tokens, and E[L] = R^w. Its increments are

    xi_t = E[L | first context and t tokens] - E[L | first context and t - 1 tokens],     xi_0 = E[L | c_1] - E[L]

so L - E[L] = sum_{t=0}^{T} xi_t. With h(c) = E[loss | c] and g_t(c) = E[sum_{s >= t} loss_s | c_t = c], by recursion
from the end (g_{T+1} = 0, g_t = h + E g_{t+1}),

    T xi_t = loss(c_t, x_t) + g_{t+1}(c_{t+1}) - g_t(c_t)

loss - h is the surprise of the token, which w shrinks by 1 - w; the rest is what the token changes of the losses to
come, its influence, which w does not shrink. Where influence decays xi_t is of order 1/T, sum_t V_t of order 1/T.
"""

import dataclasses

import numpy as np

from slm_assist.theory.sources import Rows, Source


@dataclasses.dataclass(frozen=True, eq=False)
class Increments:
    """Of one loss table, or of several with leading axes; position 0 is the first context, 1 .. T the tokens.

    Attributes:
      first_C: xi_0, [..., C].
      step_TxCxV: xi_t of token v in context c at position t, [..., T, C, V].
      variance_TxC: E[xi_t^2 | c_t = c], [..., T, C].
      mean_variance_T: E[xi_t^2], [..., T + 1]; they add up to Var(L), since increments are uncorrelated.
      largest_variance_T: V_t, the largest E[xi_t^2 | past] of any past that can happen, [..., T + 1].
      largest_T: C_t, the largest |xi_t| that can happen, [..., T + 1].
    """

    first_C: np.ndarray
    step_TxCxV: np.ndarray
    variance_TxC: np.ndarray
    mean_variance_T: np.ndarray
    largest_variance_T: np.ndarray
    largest_T: np.ndarray

    def law(self, source: Source, position: int) -> tuple[np.ndarray, np.ndarray]:
        """The exact law of xi_t at one position, 0 .. T: its values and their probabilities; of one loss table only."""
        if position == 0:
            return self.first_C, source.start_C
        mass = source.position_TxC[position - 1][:, None] * source.law_CxV
        return self.step_TxCxV[position - 1].ravel(), mass.ravel()

    def of(self, rows: Rows) -> np.ndarray:
        """The increments of rows, float64 [N, T + 1]; of one loss table only. Rows that are too short do not fit."""
        first = self.first_C[rows.context_NxT[:, 0]]
        steps = self.step_TxCxV[np.arange(rows.token_NxT.shape[1]), rows.context_NxT, rows.token_NxT]
        return np.concatenate([first[:, None], steps], axis=1)


def increments(source: Source, loss_CxV: np.ndarray) -> Increments:
    """The exact increments of the mean loss of a row, for a loss table [..., C, V] (`risk.token_loss`)."""
    length, law = source.length, source.law_CxV
    expected = (law * loss_CxV).sum(axis=-1)
    to_come, steps = np.zeros_like(expected), []
    for _ in range(length):
        value = loss_CxV + to_come[..., source.follow_CxV]
        to_come = expected + (law * to_come[..., source.follow_CxV]).sum(axis=-1)
        steps.append((value - to_come[..., None]) / length)
    step = np.stack(steps[::-1], axis=-3)
    first = (to_come - (source.start_C * to_come).sum(axis=-1, keepdims=True)) / length
    variance = (law * step**2).sum(axis=-1)
    possible_TxC, possible_C = source.position_TxC > 0, source.start_C > 0
    first_variance = (source.start_C * first**2).sum(axis=-1, keepdims=True)

    def join(of_first, of_steps):
        return np.concatenate([of_first, of_steps], axis=-1)

    return Increments(
        first,
        step,
        variance,
        join(first_variance, (source.position_TxC * variance).sum(axis=-1)),
        join(first_variance, np.where(possible_TxC, variance, 0.0).max(axis=-1)),
        join(
            np.where(possible_C, np.abs(first), 0.0).max(axis=-1, keepdims=True),
            np.where(possible_TxC, np.abs(step).max(axis=-1), 0.0).max(axis=-1),
        ),
    )

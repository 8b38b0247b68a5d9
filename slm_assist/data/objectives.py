"""What a row asks of the model: from stored ids to tokens, targets and mask."""

import numpy as np


def causal(ids_NxR: np.ndarray, starts_NxR: np.ndarray, length_N: np.ndarray) -> dict[str, np.ndarray]:
    """Next-token prediction inside each document of a row.

    Args:
      ids_NxR: R = T + 1 ids a row.
      starts_NxR: bool, True where a document starts. A row's first id begins a segment in any case.
      length_N: how many of the R ids are text; the rest is padding.

    Returns:
      tokens, targets, segment_ids, positions: int32 [N, T]. Segments count from 1, padding is 0; positions
        restart at 0 in each segment.
      mask: float32 [N, T], 1 where the target is in its token's segment, else 0.
    """
    ids = np.ascontiguousarray(ids_NxR, dtype=np.int32)
    at = np.arange(ids.shape[1], dtype=np.int32)
    starts = starts_NxR.copy()
    starts[:, 0] = True
    segment = np.cumsum(starts, axis=1, dtype=np.int32)
    segment *= at < length_N[:, None]
    positions = at - np.maximum.accumulate(np.where(starts, at, 0), axis=1)
    positions[segment == 0] = 0
    same = (segment[:, 1:] == segment[:, :-1]) & (segment[:, 1:] > 0)
    return {
        "tokens": ids[:, :-1],
        "targets": ids[:, 1:],
        "segment_ids": segment[:, :-1],
        "positions": positions[:, :-1],
        "mask": same.astype(np.float32),
    }

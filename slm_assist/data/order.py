"""Shuffling without an array: a keyed permutation of `range(n)`, evaluated only where it is asked for."""

from collections.abc import Sequence

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_ROUNDS = 6


def mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: each output bit depends on every input bit. uint64 in, uint64 out."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _round_keys(*seeds: int) -> np.ndarray:
    """uint64 [_ROUNDS] keys that depend on every one of `seeds` and on their order."""
    key = np.zeros(1, np.uint64)
    for seed in seeds:
        key = mix(key + np.uint64((seed * _GOLDEN + _GOLDEN) & _MASK))
    return mix(key + np.arange(1, _ROUNDS + 1, dtype=np.uint64) * np.uint64(_GOLDEN))


def permute(index: np.ndarray, n: int, seed: int, epoch: int = 0) -> np.ndarray:
    """Where `index` goes under the permutation of `range(n)` keyed by (seed, epoch).

    A Feistel network on pairs (left, right) in Z_a x Z_b with a * b >= n: each round adds a keyed hash of one
    half to the other, which is undone by subtracting it, so the whole is a bijection of `range(a * b)`. What
    lands outside `range(n)` walks on along its cycle until it is inside (a * b < n + sqrt(n) + 1, so few do).

    Args:
      index: integers in [0, n), any shape.
      n: size of the permuted range, at least 1.
      seed, epoch: the key; any integers, taken modulo 2**64.

    Returns:
      int64 array of the shape of `index`.
    """
    a = max(1, int(np.ceil(np.sqrt(n))))
    b = -(-n // a)
    out = np.asarray(index).astype(np.uint64).reshape(-1)
    keys = _round_keys(seed, epoch)
    outside = np.arange(out.size)
    while outside.size:
        left, right = out[outside] // np.uint64(b), out[outside] % np.uint64(b)
        for round_, key in enumerate(keys):
            if round_ % 2 == 0:
                left = (left + mix(right + key) % np.uint64(a)) % np.uint64(a)
            else:
                right = (right + mix(left + key) % np.uint64(b)) % np.uint64(b)
        out[outside] = left * np.uint64(b) + right
        outside = outside[out[outside] >= n]
    return out.astype(np.int64).reshape(np.shape(index))


def row_keys(seed: int, epochs: np.ndarray, row_ids: np.ndarray) -> np.ndarray:
    """A hash of (seed, epoch, row id) for each row, uint64 [N]: what a row's objective draws from.

    Args:
      seed: any integer, taken modulo 2**64.
      epochs, row_ids: int64 [N].
    """
    key = mix(np.full(1, (int(seed) * _GOLDEN + _GOLDEN) & _MASK, np.uint64))
    for value in (epochs, row_ids):
        key = mix(key + np.asarray(value, np.int64).astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(_GOLDEN))
    return key


class Order:
    """An endless shuffled sequence of row ids: every epoch visits each row once, in an order of its own.

    Args:
      rows: the number of rows (all ids below it), or a list of row ids.
      seed: of the shuffle.
    """

    def __init__(self, rows: int | Sequence[int] | np.ndarray, seed: int):
        whole = isinstance(rows, int | np.integer)
        self._rows = None if whole else np.asarray(rows, np.int64)
        self._n = int(rows) if whole else len(self._rows)
        self._seed = int(seed)
        if self._n < 1:
            raise ValueError("an order needs at least one row")

    def __len__(self) -> int:
        return self._n

    def rows_at(self, positions: np.ndarray) -> np.ndarray:
        """Row ids, int64 [n], at `positions`, int64 [n] >= 0, of the endless sequence; O(1) each."""
        positions = np.asarray(positions, np.int64)
        epochs, index = np.divmod(positions, self._n)
        out = np.empty_like(index)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            out[here] = permute(index[here], self._n, self._seed, int(epoch))
        return out if self._rows is None else self._rows[out]

    def epochs_at(self, positions: np.ndarray) -> np.ndarray:
        """How often the row at each of `positions`, int64 [n], has been there before, int64 [n]."""
        return np.asarray(positions, np.int64) // self._n

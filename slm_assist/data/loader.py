"""Batches as a pure function of the step number, and a thread that makes them ahead of time."""

import bisect
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from slm_assist.data.objectives import causal
from slm_assist.data.order import row_keys
from slm_assist.data.rows import Rows


class RowOrder(Protocol):
    """What a Loader asks of an order: `Order` and `Mixture` have it."""

    def rows_at(self, positions: np.ndarray) -> np.ndarray: ...

    def epochs_at(self, positions: np.ndarray) -> np.ndarray: ...


class Loader:
    """`batch_at(n)` for rows in a given order; each process of a multi-host run gets its rows.

    Args:
      rows: the prepared rows.
      order: which row stands at which position.
      batch_rows: rows in the global batch.
      first_step, first_position: the batch of step `first_step` begins at this position of the order.
      objective: what the rows ask of the model (see objectives.py); a row's draws come from a hash of `seed`,
        the epoch and the row id.
      seed: of the objective.
      causal_too: adds what `objectives.causal` gives, each name with `causal_` in front: rows are scored by
        it whatever the objective is.
      local: which of a batch's `batch_rows` rows this host reads, int64, ascending; by default all.
    """

    def __init__(
        self,
        rows: Rows,
        order: RowOrder,
        batch_rows: int,
        *,
        first_step: int = 0,
        first_position: int = 0,
        objective: Callable[..., dict[str, np.ndarray]] = causal,
        seed: int = 0,
        causal_too: bool = False,
        local: np.ndarray | None = None,
    ):
        self._rows, self._order, self._batch_rows = rows, order, batch_rows
        self._first_step, self._first_position = first_step, first_position
        self._objective, self._seed, self._causal_too = objective, seed, causal_too
        self._local = slice(None) if local is None else local

    def _positions(self, n: int) -> np.ndarray:
        """Positions of the whole batch of step n."""
        if n < self._first_step:
            raise ValueError(f"batch {n} asked for, the first is {self._first_step}")
        first = self._first_position + (n - self._first_step) * self._batch_rows
        return np.arange(first, first + self._batch_rows, dtype=np.int64)

    def row_ids_at(self, n: int) -> np.ndarray:
        """Row ids of the whole batch of step n, int64 [B]; reads no row."""
        return self._order.rows_at(self._positions(n))

    def batch_at(self, n: int) -> dict[str, np.ndarray]:
        """The batch of step n, whatever was asked before.

        Returns:
          What `Rows.get` returns, for this host's rows, and row_ids, int64.
        """
        positions = self._positions(n)[self._local]
        row_ids = self._order.rows_at(positions)
        keys = row_keys(self._seed, self._order.epochs_at(positions), row_ids)
        objective = self._with_causal if self._causal_too else self._objective
        return self._rows.get(row_ids, objective, keys) | {"row_ids": row_ids}

    def _with_causal(self, ids: np.ndarray, starts: np.ndarray, length: np.ndarray, keys: np.ndarray) -> dict:
        """Both forms of the same rows."""
        plain = causal(ids, starts, length)
        return self._objective(ids, starts, length, keys) | {f"causal_{name}": x for name, x in plain.items()}


class Feed:
    """Loaders that follow each other: each serves the steps from its own start to that of the next.

    Args:
      spans: (start step, Loader) in ascending order of the steps.

    Raises:
      ValueError: the steps do not ascend.
    """

    def __init__(self, spans: Sequence[tuple[int, Loader]]):
        self._starts, self._loaders = [start for start, _ in spans], [loader for _, loader in spans]
        if not spans or any(a >= b for a, b in zip(self._starts, self._starts[1:], strict=False)):
            raise ValueError(f"spans must ascend, not start at {self._starts}")

    def _at(self, n: int) -> Loader:
        span = bisect.bisect_right(self._starts, n) - 1
        if span < 0:
            raise ValueError(f"batch {n} asked for, the first is {self._starts[0]}")
        return self._loaders[span]

    def batch_at(self, n: int) -> dict[str, np.ndarray]:
        """The batch of step n, see `Loader.batch_at`."""
        return self._at(n).batch_at(n)

    def row_ids_at(self, n: int) -> np.ndarray:
        """Row ids of the whole batch of step n, see `Loader.row_ids_at`."""
        return self._at(n).row_ids_at(n)


class Prefetcher:
    """Serves `loader.batch_at(start)`, `start + 1`, ... made ahead by a background thread.

    `loader` is a Loader, a Feed, or whatever has a `batch_at`. Use it as a context manager, or call `close`.
    An error in the thread is raised by the `batch_at` that asked for its batch.
    """

    def __init__(self, loader: Loader | Feed, start: int = 0, depth: int = 2):
        self._loader, self._next, self._ahead = loader, start, start
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._batches = deque()
        for _ in range(depth):
            self._submit()

    def _submit(self) -> None:
        self._batches.append(self._pool.submit(self._loader.batch_at, self._ahead))
        self._ahead += 1

    def batch_at(self, n: int) -> dict[str, np.ndarray]:
        """The n-th batch. `n` is one more at each call, from `start`; otherwise ValueError."""
        if n != self._next:
            raise ValueError(f"batch {n} asked for where {self._next} is next: start another Prefetcher there")
        self._submit()
        batch = self._batches.popleft().result()
        self._next += 1
        return batch

    def close(self) -> None:
        """Stops the thread; waits for the batch it is making, if any."""
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *exc) -> None:
        self.close()

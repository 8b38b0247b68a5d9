"""Batches as a pure function of the step number, and a thread that makes them ahead of time."""

from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from slm_assist.data.order import Order
from slm_assist.data.rows import Rows
from slm_assist.errors import UserError


class Loader:
    """`batch_at(n)` for rows in a given order; each process of a multi-host run gets its slice.

    Args:
      rows: the prepared rows.
      order: which row stands at which position.
      batch_rows: rows in the global batch.
      process_index, process_count: this host and how many there are; each gets a contiguous part.

    Raises:
      UserError: the hosts do not divide the batch.
    """

    def __init__(self, rows: Rows, order: Order, batch_rows: int, *, process_index: int = 0, process_count: int = 1):
        if batch_rows < 1 or batch_rows % process_count:
            raise UserError(f"a batch of {batch_rows} rows cannot be split over {process_count} hosts")
        self._rows, self._order, self._batch_rows = rows, order, batch_rows
        self._local = batch_rows // process_count
        self._offset = process_index * self._local

    def batch_at(self, n: int) -> dict[str, np.ndarray]:
        """The n-th batch: positions n * B to n * B + B of the order, whatever was asked before.

        Returns:
          What `Rows.get` returns, for this host's B / process_count rows, and row_ids, int64.
        """
        first = n * self._batch_rows + self._offset
        row_ids = self._order.rows_at(np.arange(first, first + self._local, dtype=np.int64))
        return self._rows.get(row_ids) | {"row_ids": row_ids}


class Prefetcher:
    """Serves `loader.batch_at(start)`, `start + 1`, ... made ahead by a background thread.

    Use it as a context manager, or call `close`. An error in the thread is raised by the `batch_at` that
    asked for its batch.
    """

    def __init__(self, loader: Loader, start: int = 0, depth: int = 2):
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

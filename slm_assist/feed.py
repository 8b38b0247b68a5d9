"""Which rows a run reads at which update: all of them, candidates to choose from, or lists made beforehand."""

import functools
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from slm_assist import sharding
from slm_assist.assist import row_list
from slm_assist.assist.online import CAUSAL
from slm_assist.assist.row_list import RowList
from slm_assist.assist.stages import Stage
from slm_assist.checkpoint import whole_steps
from slm_assist.config_rules import THEN
from slm_assist.data import mixture
from slm_assist.data.loader import Feed, Loader, Prefetcher
from slm_assist.data.objectives import Objective
from slm_assist.data.order import Order
from slm_assist.data.row_store import Rows
from slm_assist.errors import UserError
from slm_assist.metrics import write_json
from slm_assist.run_dir import RunDir

if TYPE_CHECKING:  # TensorFlow loads only where a config names a stream
    from slm_assist.data.stream import Stream


class Data:
    """The training rows of a config, and their order.

    An unchanged choice of rows runs on through a switch of stages: where rows are chosen on the device, what
    follows begins behind the last candidates. Another list has an order and a position of its own. Candidates that
    span two epochs (or weights that repeat a small domain) may hold a row twice.

    Raises:
      UserError: a list that was made for other rows, or weights for other domains.
    """

    def __init__(
        self, config: ml_collections.ConfigDict, rows: "Rows | Stream", objective: Objective, mesh: jax.sharding.Mesh
    ):
        self._config, self._rows, self._objective = config, rows, objective
        self._where = sharding.batch_sharding(mesh)
        self._seed = config.seed if config.data.order_seed < 0 else config.data.order_seed
        self.weights = mixture.weights(config.data.domain_weights, rows.domains, config.data.source)
        pool = config.batch_rows * config.select.pool_factor
        if config.select.rows == "online" and not config.data.stream and pool > len(rows):
            raise UserError(
                f"select.pool_factor={config.select.pool_factor}: an update would have {pool:,} candidates, and the "
                f"corpus has {len(rows):,} rows; lower it, or batch_rows"
            )
        self._lists: dict[str, RowList] = {}
        for name in ("list", "then") if config.select.rows == "list" else ():
            file = config.select[name]
            if file not in THEN:
                self._lists[name] = row_list.read(file)
                self._lists[name].check(rows)

    def facts(self) -> dict[str, Any]:
        """What config.json says of the choice of rows."""
        return {"domain_weights": self.weights, "lists": {name: x.header for name, x in self._lists.items()}}

    @property
    def stream(self) -> "Stream | None":
        """The source itself, where rows are not prepared."""
        return self._rows if self._config.data.stream else None

    def feed(self, plan: tuple[Stage, ...]) -> "Feed | StreamFeed":
        """Batches by the number of the update, for a run with these stages."""
        select, batch = self._config.select, self._config.batch_rows
        until = max((stage.stop for stage in plan if stage.selecting), default=0)
        if self.stream:
            pool = select.pool_factor if select.rows == "online" else 1
            return StreamFeed(self.stream, until, pool, lambda rows: readers(self._where, rows))
        if select.rows == "all" or not until:
            return Feed([(0, self._loader(self._everything, batch))])
        if select.rows == "online":
            pool = batch * select.pool_factor
            chosen = self._loader(self._everything, pool, causal_too=self._objective.name != "causal")
            after = self._loader(self._everything, batch, first_step=until, first_position=until * pool)
            return Feed([(0, chosen), (until, after)])
        return Feed([(first, self._loader(order, batch, first_step=first)) for first, order in self._listed(until)])

    def say_lists(self, plan: tuple[Stage, ...], say: Any) -> None:
        """How far the lists reach."""
        until = max((stage.stop for stage in plan if stage.selecting), default=0)
        stops = (until, self._config.steps)
        for (first, order), stop in zip(self._listed(until) if self._lists else (), stops, strict=False):
            if order is not self._everything:
                needed, there = (stop - first) * self._config.batch_rows, len(order)
                each = "each is read" if self.weights is None else "on average, each is read"
                again = "" if needed <= there else f"; {each} {needed / there:.1f} times, every time in a new order"
                say(f"updates {first} to {stop}: {needed:,} rows are read from a list of {there:,}{again}")

    @functools.cached_property
    def _everything(self) -> Any:
        return self._order(None)

    def _order(self, row_ids: np.ndarray | None) -> Any:
        if self.weights is None:
            return Order(len(self._rows) if row_ids is None else row_ids, self._seed)
        return mixture.Mixture(self._rows.all_domains(), self._rows.domains, self.weights, self._seed, row_ids=row_ids)

    def _listed(self, until: int) -> list[tuple[int, Any]]:
        """(first update, order) of the selected rows and, where the run goes on, of those afterwards."""
        select, listed = self._config.select, self._order(self._lists["list"].row_ids)
        if until == self._config.steps:
            return [(0, listed)]
        after = self._everything
        if select.then == "unseen":
            seen = np.zeros(len(self._rows), bool)
            seen[listed.rows_at(np.arange(until * self._config.batch_rows))] = True
            if seen.all():
                raise UserError(
                    "select.then=unseen, but stage 1 reads every row: use select.then=all, or a shorter stage 1"
                )
            after = self._order(np.flatnonzero(~seen))
        elif select.then != "all":
            after = self._order(self._lists["then"].row_ids)
        return [(0, listed), (until, after)]

    def _loader(self, order: Any, batch_rows: int, **more) -> Loader:
        return Loader(
            self._rows,
            order,
            batch_rows,
            objective=self._objective,
            seed=self._config.seed,
            local=None if jax.process_count() == 1 else rows_here(self._where, batch_rows),
            **more,
        )


class StreamFeed:
    """`Feed` over a stream: the first `until` updates read `pool` of its batches each, the others one."""

    def __init__(self, stream: "Stream", until: int, pool: int, readers_of: Callable[[int], list[np.ndarray]]):
        self._stream, self._until, self._pool, self._readers_of = stream, until, pool, readers_of

    def first_at(self, n: int) -> int:
        """The stream's batch that update `n` begins with."""
        return min(n, self._until) * self._pool + max(n - self._until, 0)

    def batch_at(self, n: int) -> dict[str, np.ndarray]:
        """This host's rows of update `n`, which is one more at each call; also as `causal_*`, without a prefix."""
        parts = [self._stream.batch_at(i) for i in range(self.first_at(n), self.first_at(n + 1))]
        batch = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return batch | {CAUSAL + name: x for name, x in batch.items() if self._stream.has_prefix}

    def row_ids_at(self, n: int) -> np.ndarray:
        """The ids, int64, of all hosts' rows of update `n`, in the order of the batch on the devices."""
        parts = [self._stream.row_ids_at(i) for i in range(self.first_at(n), self.first_at(n + 1))]
        row_ids = np.empty(sum(len(part) for part in parts), np.int64)
        held = self._readers_of(len(row_ids))
        for reader, rows in enumerate(held):
            row_ids[rows] = np.concatenate([part.reshape(len(held), -1)[reader] for part in parts])
        return row_ids


class Batch(NamedTuple):
    """Arrays on the devices, and what the log says of them."""

    arrays: dict[str, jax.Array]
    row_ids: np.ndarray | None  # of all hosts' candidates, where rows are chosen from them
    dropped: int | jax.Array | None  # tokens that the objective had no room for, on all hosts
    waited: float  # seconds until the batch was there


class Batches:
    """Batches on the devices, made ahead by a thread; use as a context manager."""

    def __init__(self, data: Data, plan: tuple[Stage, ...], first: int, run: RunDir, mesh: jax.sharding.Mesh):
        self._data, self._run, self._where = data, run, sharding.batch_sharding(mesh)
        self._sum = jax.jit(jnp.sum, out_shardings=sharding.replicated(mesh))
        self._feed = data.feed(plan)
        if data.stream and first:
            self._go_to(first, self._read_place(first))
        self._ahead = Prefetcher(self._feed, first)

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_) -> None:
        self._ahead.close()

    def follow(self, plan: tuple[Stage, ...], n: int) -> None:
        """Goes on from update `n` with other stages; what was made ahead for the old ones is dropped."""
        self._ahead.close()
        place = self._data.stream and self._data.stream.state_at(self._feed.first_at(n))
        self._feed = self._data.feed(plan)
        if place:
            self._go_to(n, place)
        self._ahead = Prefetcher(self._feed, n)

    def save_place(self, n: int) -> None:
        """Keeps where a stream is before update `n`, for this process; prepared rows need nothing kept."""
        if not self._data.stream:
            return
        self._run.stream.mkdir(exist_ok=True)
        write_json(self._place(n), self._data.stream.state_at(self._feed.first_at(n)))
        whole = whole_steps(self._run.checkpoints)
        for file in self._run.stream.glob(f"*-{jax.process_index()}.json"):
            step = int(file.name.split("-")[0])
            if step not in whole and step < max(whole, default=0):  # later ones may be under way
                file.unlink()

    def _place(self, n: int) -> Path:
        return self._run.stream / f"{n}-{jax.process_index()}.json"

    def _read_place(self, n: int) -> dict[str, Any]:
        """What `save_place` kept; the stream's own beginning if the file is gone."""
        file = self._place(n)
        return self._run.read(file) if file.is_file() else self._data.stream.state_at(0)

    def _go_to(self, n: int, place: dict[str, Any]) -> None:
        """Update `n` is next; from a `place` before it the stream reads on."""
        wanted = self._feed.first_at(n)
        self._data.stream.restore(place | {"skip": wanted - place["batch"]})

    def batch_at(self, n: int, names: Collection[str]) -> "Batch":
        """The batch of update n, of it the arrays `names`."""
        began = time.perf_counter()
        batch = self._ahead.batch_at(n)
        waited = time.perf_counter() - began
        row_ids = self._feed.row_ids_at(n) if "domain" in names else None
        return Batch(put_local(batch, names, self._where), row_ids, self._dropped(batch), waited)

    def _dropped(self, batch: Mapping[str, np.ndarray]) -> int | jax.Array | None:
        """The sum over all hosts' rows; read later, so that nobody waits for it here."""
        if "dropped" not in batch:
            return None
        if jax.process_count() == 1:
            return int(batch["dropped"].sum())
        return self._sum(jax.make_array_from_process_local_data(self._where, batch["dropped"]))


def rows_here(where: jax.sharding.Sharding, rows: int) -> np.ndarray:
    """Which of the `rows` rows of a batch the devices of this process hold, int64, ascending."""
    return _rows_of(where, rows)[jax.process_index()]


def reader(mesh: jax.sharding.Mesh, rows: int) -> tuple[int, int]:
    """Which of `readers` this process is, and how many there are."""
    if jax.process_count() == 1:
        return 0, 1
    where = sharding.batch_sharding(mesh)
    held = readers(where, rows)
    return next(i for i, part in enumerate(held) if np.array_equal(part, rows_here(where, rows))), len(held)


def readers(where: jax.sharding.Sharding, rows: int) -> list[np.ndarray]:
    """The parts of a batch that some process holds, each once, by their first row: `rows_here` of the readers.

    Processes that hold the same rows (where a row is split between them, by `tensor`) read the same.
    """
    parts = {part.tobytes(): part for part in _rows_of(where, rows).values()}
    return sorted(parts.values(), key=lambda part: int(part[0]))


def _rows_of(where: jax.sharding.Sharding, rows: int) -> dict[int, np.ndarray]:
    """By process. On TPUs the rows of a process need not be neighbours: the mesh follows the wires."""
    spans: dict[int, set[tuple[int, int]]] = {}
    for device, (span,) in where.devices_indices_map((rows,)).items():
        spans.setdefault(device.process_index, set()).add(span.indices(rows)[:2])
    return {
        process: np.concatenate([np.arange(*span, dtype=np.int64) for span in sorted(held)])
        for process, held in spans.items()
    }


def put_local(
    batch: Mapping[str, np.ndarray], names: Collection[str], where: jax.sharding.Sharding
) -> dict[str, jax.Array]:
    """Arrays of a batch on the devices, of which each process gives the rows that its devices hold."""
    return {name: jax.make_array_from_process_local_data(where, batch[name]) for name in names}


def put(batch: Mapping[str, np.ndarray], names: Collection[str], where: jax.sharding.Sharding) -> dict[str, jax.Array]:
    """Arrays of a batch on the devices, of which each process has all rows."""
    return {name: put_whole(batch[name], where) for name in names}


def put_whole(x: np.ndarray, where: jax.sharding.Sharding) -> jax.Array:
    """An array that every process has whole, on the devices; each process sends its devices their parts."""
    if where.is_fully_addressable:
        return jax.device_put(x, where)
    return jax.make_array_from_callback(x.shape, where, lambda part: x[part])

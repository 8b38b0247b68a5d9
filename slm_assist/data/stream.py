"""Rows as a seqio Task or Mixture gives them, without preparing any: an endless stream that can be resumed.

Each host reads its shard of the data (seqio's `shard_info`) and packs it by itself, so a stream goes on exactly
only with as many hosts as it began with. What it has read is the state of a tf.data iterator.
"""

import base64
import logging
import tempfile
import threading
import weakref
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from slm_assist.data import seqio_source, seqio_tasks
from slm_assist.data.tokenizers import Vocabulary
from slm_assist.errors import UserError

SNAPSHOT_EVERY = 50  # batches
_FORMAT = 1
BEHIND = 16  # batches
_log = logging.getLogger(__name__)


class Stream:
    """`batch_at(n)` for n = 0, 1, ...: this host's rows of the n-th batch, in the Task's own order and packing.

    seqio packs documents whole: what does not fit a row starts the next one, and a document longer than a row
    is trimmed unless the Task cuts it (this package's do). A Task with "inputs" is a prefix LM, half of the row
    for the inputs. Each segment begins with the vocabulary's BOS as input, with id 0 where it has none.

    Args:
      name: [seqio:][package.module/]NAME[:SPLIT].
      seq_len: T.
      batch_rows: rows in the global batch.
      seed: of the shuffle, of the mixing and of preprocessors that take one.
      split: where `name` says none.
      process_index, process_count: this host and how many there are.
      shuffle: whether the Task shuffles its files and its buffer (1000 examples unless it says otherwise).
      snapshot_every: batches between two snapshots of the iterator; a resumed run redraws up to so many.
      behind: how many batches behind the newest `state_at` may be asked for: as many as are made ahead.
      vocabulary: of the run, where it is known; needed for Tasks whose features have none.
      say: where messages for people go.

    Attributes:
      vocabulary: of the ids.
      fingerprint: hex, over the Task, its files, seed and seq_len.
      domains: [""], as rows of a stream are not told apart.
      has_prefix: whether batches have prefix_mask.
      close: a function of nothing that ends the stream's threads; called by itself at the end of the process.

    Raises:
      UserError: unknown name or split, a vocabulary that does not fit, hosts that do not divide the batch.
    """

    domains = ("",)
    tokens = None  # nobody has counted them

    def __init__(
        self,
        name: str,
        seq_len: int,
        batch_rows: int,
        *,
        seed: int,
        split: str = "train",
        process_index: int = 0,
        process_count: int = 1,
        shuffle: bool = True,
        snapshot_every: int = SNAPSHOT_EVERY,
        behind: int = BEHIND,
        vocabulary: Vocabulary | None = None,
        say: Callable[[str], None] = _log.warning,
    ):
        if batch_rows < 1 or batch_rows % process_count:
            raise UserError(f"a batch of {batch_rows} rows cannot be split over {process_count} hosts")
        self.spec = f"seqio:{name.removeprefix('seqio:')}"
        provider, self._named_split = seqio_tasks.find(self.spec, vocabulary)
        self.provider, self.split = provider, self._named_split or split
        if self.split not in provider.splits:
            raise UserError(
                f"source {self.spec}: it has no split {self.split!r}; write seqio:{provider.name}:SPLIT with one of "
                f"{', '.join(sorted(provider.splits))}"
            )
        self.vocabulary = _vocabulary(self.spec, provider, vocabulary)
        self.seq_len, self.has_prefix = seq_len, "inputs" in provider.output_features
        self._local, self._process, self._processes = batch_rows // process_count, process_index, process_count
        self._seed, self._shuffle, self._say = seed, shuffle, say
        self._every, self._behind = snapshot_every, behind
        self.fingerprint = self._fingerprint()
        self._iterators = [self._start()]  # one; a list, for what empties it must not hold this object
        # An iterator that lives when Python ends takes the process down: TensorFlow's threads still run.
        self.close = weakref.finalize(self, self._iterators.clear)
        self._next, self._can_save = 0, True
        self._snapshots: dict[int, dict[str, bytes] | None] = {0: None}  # None: the beginning
        self._lock = threading.Lock()

    @property
    def validation_spec(self) -> str:
        """The source of rows to validate on: the Task's validation split.

        Raises:
          UserError: it has none.
        """
        if "validation" not in self.provider.splits:
            raise UserError(f"source {self.spec}: it has no split 'validation'; set data.validation to another source")
        name = self.spec.removesuffix(f":{self._named_split}") if self._named_split else self.spec
        return f"{name}:validation"

    def _fingerprint(self) -> str:
        seqio, _, _ = seqio_tasks.modules(self.spec)
        tasks = [task for task in seqio.get_subtasks(self.provider) if self.split in task.splits]
        rates = (
            [float(self.provider.get_rate(task)) for task in tasks] if isinstance(self.provider, seqio.Mixture) else []
        )
        identity = [seqio_source.identify(task, self.split) for task in tasks]
        said = [identity, rates, self.vocabulary.fingerprint, self.seq_len, self._seed, self._shuffle]
        return seqio_source.digest(said)

    def _start(self) -> Any:
        """A tf.data iterator over this host's batches; of a dataset of its own, for a second pass over one is
        shuffled in another way."""
        seqio, _, tf = seqio_tasks.modules(self.spec)
        lengths = {"targets": self.seq_len}
        converter = seqio.LMFeatureConverter
        if self.has_prefix:
            lengths = {"inputs": self.seq_len // 2, "targets": self.seq_len - self.seq_len // 2}
            converter = seqio.PrefixLMFeatureConverter
        try:
            dataset = seqio.get_dataset(
                self.provider,
                lengths,
                converter(pack=True, bos_id=self.vocabulary.bos_id or 0),
                dataset_split=self.split,
                shuffle=self._shuffle,
                num_epochs=None,
                shard_info=seqio.ShardInfo(self._process, self._processes),
                verbose=False,
                seed=self._seed,
                batch_size=self._local,
            )
        except (ValueError, TypeError, RuntimeError, tf.errors.OpError) as error:
            raise UserError(f"source {self.spec}: cannot be streamed ({seqio_tasks.reason(error)})") from error
        return iter(dataset)

    def batch_at(self, n: int) -> dict[str, np.ndarray]:
        """The n-th batch; `n` is one more at each call, from 0 or from where `restore` led.

        Returns:
          What `seqio_tasks.ours` returns, for this host's rows; domain, int32 [N] of zeros; and row_ids, int64
          [N], (position in this host's stream) * process_count + process_index.

        Raises:
          UserError: the data cannot be read, gives no row, or has ids beyond the vocabulary.
          ValueError: `n` is another number.
        """
        with self._lock:
            if n != self._next:
                raise ValueError(f"batch {n} asked for where {self._next} is next: restore a stream there")
            if n and n % self._every == 0:
                self._snapshot(n)
            batch = self._draw()
            self._next += 1
        made = seqio_tasks.ours(batch)
        largest = max(int(made["tokens"].max()), int(made["targets"].max()))
        if largest >= self.vocabulary.size:
            raise UserError(
                f"source {self.spec}: id {largest} in batch {n}, but the vocabulary has {self.vocabulary.size} pieces; "
                "set data.vocabulary to the one the ids were made with"
            )
        row_ids = self._row_ids(n, self._process)
        return made | {"domain": np.zeros(len(row_ids), np.int32), "row_ids": row_ids}

    def row_ids_at(self, n: int) -> np.ndarray:
        """The ids, int64 [B], of the n-th batch on all hosts, host by host."""
        return np.concatenate([self._row_ids(n, process) for process in range(self._processes)])

    def _row_ids(self, n: int, process: int) -> np.ndarray:
        positions = np.arange(n * self._local, (n + 1) * self._local, dtype=np.int64)
        return positions * self._processes + process

    def _draw(self) -> dict[str, np.ndarray]:
        _, _, tf = seqio_tasks.modules(self.spec)
        try:
            return {name: value.numpy() for name, value in next(self._iterators[0]).items()}
        except StopIteration:
            raise UserError(
                f"source {self.spec}: the split {self.split!r} does not fill {self._local} rows on host "
                f"{self._process} of {self._processes}; give more data or fewer hosts"
            ) from None
        except tf.errors.OpError as error:
            raise UserError(f"source {self.spec}: cannot be read ({seqio_tasks.reason(error)})") from error

    def _snapshot(self, n: int) -> None:
        """Keeps the iterator's state before batch `n`, and drops those that nobody can ask for any more."""
        _, _, tf = seqio_tasks.modules(self.spec)
        if not self._can_save:
            return
        try:
            with tempfile.TemporaryDirectory(prefix="slm_assist-") as directory:
                tf.train.Checkpoint(iterator=self._iterators[0]).write(f"{directory}/iterator")
                self._snapshots[n] = {file.name: file.read_bytes() for file in sorted(Path(directory).iterdir())}
        except tf.errors.OpError as error:
            self._can_save = False
            self._say(
                f"source {self.spec}: its place cannot be saved ({seqio_tasks.reason(error)}), so a resumed run reads "
                "everything before it again"
            )
            return
        enough = max(at for at in self._snapshots if at <= max(n - self._behind, min(self._snapshots)))
        self._snapshots = {at: files for at, files in self._snapshots.items() if at >= enough}

    def state_at(self, n: int) -> dict[str, Any]:
        """What `restore` needs to go on with batch `n`, for JSON; each host keeps its own.

        Args:
          n: a batch that has been drawn or is next; of those before, only the newest `behind` are sure to be at hand.
        """
        with self._lock:
            known = [at for at in self._snapshots if at <= n]
            if n > self._next or not known:
                raise ValueError(f"batch {n}: the stream knows {min(self._snapshots)} to {self._next}")
            at = max(known)
            files = self._snapshots[at]
        return {
            "format": _FORMAT,
            "fingerprint": self.fingerprint,
            "process_count": self._processes,
            "process_index": self._process,
            "batch_rows": self._local * self._processes,
            "batch": at,
            "skip": n - at,
            "iterator": files
            and {name: base64.b64encode(zlib.compress(data)).decode() for name, data in files.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where `state_at` was asked: the next batch is the one named there.

        Raises:
          UserError: the state is of other data, another batch, seed or number of hosts, or damaged.
        """
        self._check(state)
        with self._lock:
            at, skip, files = state["batch"], state["skip"], state["iterator"]
            self._iterators[:] = [self._start()]
            if files and state["process_index"] == self._process and self._read(files):
                self._snapshots = {at: {name: zlib.decompress(base64.b64decode(x)) for name, x in files.items()}}
            else:
                self._snapshots, at, skip = {0: None}, 0, at + skip
                if skip > self._every:
                    self._say(f"source {self.spec}: reading {skip} batches again, to where the run was stopped")
            for _ in range(skip):
                self._draw()
            self._next = at + skip

    def _check(self, state: dict[str, Any]) -> None:
        if state.get("format") != _FORMAT:
            raise UserError(f"source {self.spec}: its saved place is of another version; start over with --fresh")
        here = {
            "process_count": ("hosts", self._processes),
            "batch_rows": ("rows in a batch", self._local * self._processes),
            "fingerprint": ("the data (files, Task, seed, seq_len)", self.fingerprint),
        }
        for key, (words, value) in here.items():
            if state[key] != value:
                raise UserError(
                    f"source {self.spec}: a stream goes on only as it began: {words} {state[key]} -> {value}; use what "
                    "it was, or start over with --fresh"
                )

    def _read(self, files: dict[str, str]) -> bool:
        """Puts the iterator where a snapshot was taken; False if TensorFlow cannot (another version of it)."""
        _, _, tf = seqio_tasks.modules(self.spec)
        try:
            with tempfile.TemporaryDirectory(prefix="slm_assist-") as directory:
                for name, data in files.items():
                    Path(directory, Path(name).name).write_bytes(zlib.decompress(base64.b64decode(data)))
                tf.train.Checkpoint(iterator=self._iterators[0]).read(f"{directory}/iterator").assert_consumed()
        except (tf.errors.OpError, AssertionError, ValueError, zlib.error) as error:
            self._say(f"source {self.spec}: its saved place cannot be used ({seqio_tasks.reason(error)})")
            self._iterators[:] = [self._start()]
            return False
        return True


def _vocabulary(spec: str, provider: Any, given: Vocabulary | None) -> Vocabulary:
    """The vocabulary of the stream's ids, which must leave id 0 to padding."""
    vocabulary = seqio_tasks.vocabulary_of(spec, provider, given)
    if vocabulary is None:
        raise UserError(
            f"source {spec}: its features have no vocabulary; set data.vocabulary to the one its ids are of"
        )
    if vocabulary.token_bytes[0]:
        raise UserError(
            f"source {spec}: id 0 is the piece {vocabulary.pieces()[0]!r}, and seqio takes it for padding when it "
            "packs; set data.stream=false to prepare rows of it"
        )
    return vocabulary

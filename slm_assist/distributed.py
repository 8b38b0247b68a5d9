"""Several processes as one run: how they join, and what they tell each other beside the devices.

What is told goes through the key-value store of `jax.distributed`'s coordinator, on the hosts: no device waits for it.
A process that fails says why, and the others end with that line instead of waiting for it in a collective. One that is
killed says nothing: the others find its connection closed, or JAX ends them, process 0's death at once.

A signal to any process stops all at one step. `Group.stopping(n)` costs a lock; a thread looks for a notice a few
times a second. Where there is one, each process's thread tells the last step that its loop went on from, and the
step after the highest is where all stop: nobody is past it, and nobody waits for a device to find it. This is the
protocol of `multihost_utils.reached_preemption_sync_point`, which hears SIGTERM only, and only while no handler of
Python's stands in its place; here Ctrl-C counts too. Latency: a look (0.2 s; n/500 s for n processes), a message each
way, and one update.
"""

import contextlib
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax

from slm_assist.errors import UserError

CONNECT_SECONDS = 300  # for all processes to be there
_LEAVE_SECONDS = 5.0  # for a loop to come out by itself before its process is ended
_LAST_SECONDS = 20.0  # for the others to be gone before process 0, which they talk through
_WAIT_MILLISECONDS = 1000  # of one request: Python's signal handlers run between two
_LOST = ("Connection closed", "Connection reset", "heartbeat", "UNAVAILABLE", "Gloo")  # in errors of collectives
_groups = itertools.count()
_failed = False


def start(coordinator: str = "", processes: int = 0, process: int = -1, *, seconds: int = CONNECT_SECONDS) -> None:
    """Joins this process to the others of its job; to be called before anything uses a device.

    Without arguments JAX looks for a cluster that it knows (Slurm with more than one task, TPU pods, GKE, MPI); where
    there is none, this process is alone.

    Args:
      coordinator: HOST:PORT of process 0, reachable from all.
      processes: how many there are.
      process: which one this is, from 0.
      seconds: until all must be there.

    Raises:
      UserError: arguments that are incomplete or out of range, or the others could not be reached in time.
    """
    if jax.distributed.is_initialized():
        return
    explicit = _checked(coordinator, processes, process)
    if not explicit and os.environ.get("SLURM_NTASKS") == "1":
        return  # one task has nobody to find, and two such steps of a job would fight for a port
    who = f"process {process}" if explicit else "this process"
    where = f"--coordinator={coordinator}" if explicit else "the coordinator of the cluster"
    # JAX aborts the process, with a stack trace, where it cannot connect; this is before it.
    late = threading.Timer(seconds, _give_up, (who, where, seconds))
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            **explicit, initialization_timeout=seconds + 60, shutdown_timeout_seconds=int(_LAST_SECONDS)
        )
    except (ValueError, RuntimeError) as error:
        # Alone where JAX knows no cluster, or where this is somebody's own program that uses its devices already.
        if explicit or not any(words in str(error) for words in ("should be defined", "must be called before")):
            raise UserError(f"{who} cannot join the others at {where}: {_first_line(error)}") from error
    finally:
        late.cancel()


def _give_up(who: str, where: str, seconds: int) -> None:
    _end_now(
        f"{who} and the others did not meet at {where} within {seconds} s: start all processes with the same address, "
        "and see that its port is free on process 0's host and open to the others",
        2,
    )


def _end_now(line: str, status: int) -> NoReturn:
    """Says why, and ends this process, whatever its main thread waits for."""
    sys.stdout.flush()
    print(f"slm-assist: error: {line}", file=sys.stderr, flush=True)
    os._exit(status)


def _checked(coordinator: str, processes: int, process: int) -> dict[str, Any]:
    """The arguments of `jax.distributed.initialize`; none where nothing is given."""
    if not coordinator and not processes and process == -1:
        return {}
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isdecimal() and processes and process != -1):
        raise UserError(
            f"--coordinator={coordinator or '?'} --processes={processes or '?'} --process="
            f"{'?' if process == -1 else process}: give all three, as --coordinator=HOST:PORT --processes=2 --process=0"
        )
    if not 0 <= process < processes:
        raise UserError(f"--process={process} with --processes={processes}: count the processes from 0")
    return {"coordinator_address": coordinator, "num_processes": processes, "process_id": process}


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def index() -> int:
    """This process's number; 0 where it is alone. Touches no device there."""
    return jax.process_index() if jax.distributed.is_initialized() else 0


def count() -> int:
    """How many processes there are. Touches no device where this one is alone."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def has_failed() -> bool:
    """Whether a run of several processes has, in this one or another."""
    return _failed


def leave(status: int) -> int:
    """Returns the exit status; after a failure of several processes ends this one, as JAX would wait for the others."""
    if _failed:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


class Agreed(Exception):
    """Raised by all processes at the same place; no failure of any."""


class Group:
    """The processes of one run. With one process nothing is sent and everything is agreed.

    Every method but `fail` must be called by all processes, in the same order.
    """

    def __init__(self):
        self.index, self.count = index(), count()
        self.caught: list[int] = []  # signals to this process, for `stopping`
        self._prefix = f"slm_assist/{next(_groups)}"
        self._uses: dict[str, int] = {}
        self._lock = threading.Lock()
        self._went_on, self._stop_at, self._stop_signal = -1, None, 0
        self._noticed = self.failed = False
        self._ending: dict[str, Any] | None = None
        self._left = threading.Event()
        self._watcher = None
        if self.count > 1:
            self._client = _client()
            self._watcher = threading.Thread(target=self._watch, name="distributed", daemon=True)
            self._watcher.start()

    def agreed(self, name: str, value: Any, decide: Callable[[list[Any]], Any]) -> Any:
        """What process 0 makes of the values (JSON) of all processes, in their order; waits for all of them."""
        if self.count == 1:
            return decide([value])
        key = self._key(name)
        if self.index:
            self._tell(f"{key}/{self.index}", value)
            return self._hear(f"{key}/decided")
        values = [value] + [self._hear(f"{key}/{process}") for process in range(1, self.count)]
        decided = decide(values)
        self._tell(f"{key}/decided", decided)
        return decided

    def wait(self, name: str) -> None:
        """Returns once all processes are here."""
        self.agreed(name, None, lambda _: None)

    def first(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` gives on process 0, for all; the others wait for it."""
        if self.count == 1:
            return make()
        key = self._key(name)
        if self.index:
            return self._hear(key)
        value = make()
        self._tell(key, value)
        return value

    def by(self, leader: int, name: str, make: Callable[[], Any]) -> Any:
        """`make()` on every process, on `leader` before those that wait for it."""
        if self.count == 1:
            return make()
        key = f"{self._key(name)}/{leader}"
        if self.index != leader:
            self._hear(key)
            return make()
        value = make()
        self._tell(key, True)
        return value

    def same(self, name: str, values: Mapping[str, Any]) -> None:
        """Compares a flat mapping (JSON) over all processes.

        Raises:
          UserError: on all processes, where one differs: which process, and in what.
        """

        def differences(everyone: list[dict[str, Any]]) -> str:
            for process, theirs in enumerate(everyone):
                keys = sorted(everyone[0].keys() | theirs.keys())
                pairs = ((key, theirs.get(key), everyone[0].get(key)) for key in keys)
                found = [f"{key} {here} not {there}" for key, here, there in pairs if here != there]
                if found:
                    return f"process {process} has another {name} than process 0: {'; '.join(found[:4])}"
            return ""

        if told := self.agreed(f"same {name}", json.loads(json.dumps(values)), differences):
            raise UserError(f"{told}; start all processes with one command, on one version of files and packages")

    def stopping(self, n: int) -> int:
        """The signal that all processes stop for at step `n`, or 0; to be asked at every step.

        Raises:
          UserError, KeyboardInterrupt: another process has failed, or was stopped before it trained.
        """
        if self.count == 1:
            return self.caught[0] if self.caught else 0
        self._raise_ending()
        if self.caught and not self._noticed:
            self._noticed = True
            self._tell_once("stop", self.caught[0])
        with self._lock:
            if self._stop_at is not None and n >= self._stop_at:
                return self._stop_signal
            self._went_on = n
        return 0

    def fail(self, error: BaseException) -> None:
        """Tells the others that this process ends, and why; process 0 stays until they have gone."""
        global _failed
        if self.count == 1 or self.failed or isinstance(error, Agreed):
            return
        _failed = self.failed = True
        status, line = 1, f"{type(error).__name__}: {_first_line(error)}"
        if isinstance(error, UserError):
            status, line = 2, str(error)
        elif isinstance(error, KeyboardInterrupt) or hasattr(error, "signal"):
            number = int(getattr(error, "signal", None) or next(iter(error.args), signal.SIGINT))
            status, line = 128 + number, f"stopped by signal {number}"
        self._tell_once("end", {"process": self.index, "status": status, "line": line})
        self._go()

    @contextlib.contextmanager
    def failing_together(self) -> Iterator[None]:
        """Calls `fail` for what is raised inside, before anything around it is closed that waits for the others."""
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            self.fail(error)
            if self.count > 1 and any(words in str(error) for words in _LOST):
                raise UserError(
                    f"another of the {self.count} processes is gone ({_first_line(error)}); the same command goes on "
                    "from the last checkpoint"
                ) from error
            raise
        except BaseException as error:
            self.fail(error)
            raise

    def close(self) -> None:
        """Ends the thread that listens."""
        self._left.set()
        if self._watcher and threading.current_thread() is not self._watcher:
            self._watcher.join()

    def _key(self, name: str) -> str:
        self._uses[name] = self._uses.get(name, 0) + 1
        return f"{self._prefix}/{name}/{self._uses[name]}"

    def _tell(self, key: str, value: Any) -> None:
        self._client.key_value_set(key, json.dumps(value))

    def _tell_once(self, word: str, value: Any) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was first, or the coordinator is gone
            self._tell(f"{self._prefix}/notice/{word}", value)

    def _hear(self, key: str) -> Any:
        """The value of a key, once it is there."""
        while True:
            self._raise_ending()
            try:
                return json.loads(self._client.blocking_key_value_get(key, _WAIT_MILLISECONDS))
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise UserError(f"process 0 cannot be reached any more ({_first_line(error)})") from error
            if threading.current_thread() is self._watcher and "end" in self._notices():
                raise UserError("another process has ended")  # `_watch`, which waits here itself, finds it next

    def _raise_ending(self) -> None:
        if self._ending:
            if self._ending["status"] > 128:
                raise KeyboardInterrupt(self._ending["status"] - 128)
            raise UserError(self._because())

    def _because(self) -> str:
        return f"process {self._ending['process']} of {self.count} ended: {self._ending['line']}"

    def _watch(self) -> None:
        """The thread: finds the step to stop at, and ends a process that waits for one that is gone."""
        every = max(0.2, self.count / 500)
        while not self._left.wait(every):
            try:
                found = self._notices()
            except jax.errors.JaxRuntimeError:
                continue  # JAX ends a process whose coordinator is gone for long
            if "end" in found:
                self._end(found["end"])
                return
            if "stop" in found and self._stop_at is None:
                with contextlib.suppress(UserError, KeyboardInterrupt, jax.errors.JaxRuntimeError), self._lock:
                    self._stop_at = 1 + self.agreed("stop", self._went_on, max)
                    self._stop_signal = found["stop"]

    def _notices(self) -> dict[str, Any]:
        notices = self._client.key_value_dir_get(f"{self._prefix}/notice/")
        return {key.rsplit("/", 1)[1]: json.loads(value) for key, value in notices}

    def _end(self, ending: dict[str, Any]) -> None:
        """Gives the main thread a moment to raise; if it is stuck with the devices, ends the process here."""
        global _failed
        self._ending, _failed = ending, True
        if ending["process"] == self.index or self._left.wait(_LEAVE_SECONDS):
            return
        self._go()
        _end_now(self._because(), ending["status"])

    def _go(self) -> None:
        """Says that this process leaves; process 0, through which all talk, is the last."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._tell(f"{self._prefix}/gone/{self.index}", True)
        until = time.monotonic() + _LAST_SECONDS
        while self.index == 0 and time.monotonic() < until:
            gone = self._client.key_value_dir_get(f"{self._prefix}/gone/")
            if len(gone) == self.count:
                time.sleep(0.1)
                return
            time.sleep(0.05)


@contextlib.contextmanager
def together() -> Iterator[Group]:
    """The group of this run's processes; if one of them fails inside, all do."""
    group = Group()
    try:
        with group.failing_together():
            yield group
    finally:
        group.close()


def _client() -> Any:
    """JAX's own key-value client, which it has no public name for; Orbax uses it in the same way."""
    from jax._src import distributed

    return distributed.global_state.client

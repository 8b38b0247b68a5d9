"""Checkpoints through Orbax: asynchronous, whole or not there, without pickle.

A run's checkpoint N holds the items `params`, `optimizer`, `assist` and `meta` (JSON: the length of
metrics.jsonl and the clock). A helper reads `params` alone.
"""

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from slm_assist.distributed import Group
from slm_assist.errors import UserError
from slm_assist.state import TrainState

# Orbax logs a failed save or restore once for every array; one line says it here.
for _name in ("absl", "asyncio"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)


class Checkpoints:
    """The checkpoints of one run, in `directory`; use as a context manager."""

    def __init__(self, directory: Path, *, keep_last: int = 2, keep: tuple[int, ...] = (), group: Group | None = None):
        policies = checkpoint_managers
        self.directory, self._group = directory, group
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(
                    [policies.LatestN(keep_last), policies.CustomSteps(list(keep))]
                ),
                cleanup_tmp_directories=True,
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, value, traceback) -> None:
        if kind is None:
            self.wait()
        if self._group is None or not self._group.failed:  # closing waits for the other processes
            self._manager.close()

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Starts saving; the arrays are copied before this returns, so the state may be donated."""
        self._guard(
            lambda: self._manager.save(
                int(jax.device_get(state.step)),
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params),
                    optimizer=ocp.args.StandardSave(state.opt_state),
                    assist=ocp.args.StandardSave(state.assist),
                    meta=ocp.args.JsonSave(meta),
                ),
                force=True,
            )
        )

    def check(self) -> None:
        """Raises what went wrong with the save under way, if anything has."""
        self._guard(self._manager.check_for_errors)

    def wait(self) -> None:
        """Returns once the last save is whole on disk."""
        self._guard(self._manager.wait_until_finished)

    def _guard(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:
            text = str(error)
            full = "No space left" in text or "RESOURCE_EXHAUSTED" in text or "File too large" in text
            last = max(whole_steps(self.directory), default=None)
            kept = f"checkpoint {last} is whole" if last is not None else "no checkpoint was written yet"
            cure = "the disk is full: make room" if full else f"{type(error).__name__}: {text.splitlines()[0][:200]}"
            raise UserError(
                f"{self.directory}: a checkpoint could not be saved ({cure}); {kept}, and the same command goes on "
                "from there"
            ) from error

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """State and meta of checkpoint `step`; `like` gives shapes, dtypes and shardings."""
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(like.params),
                optimizer=ocp.args.StandardRestore(like.opt_state),
                assist=ocp.args.StandardRestore(like.assist),
                meta=ocp.args.JsonRestore(),
            ),
        )
        state = TrainState(
            step=jax.make_array_from_callback((), like.step.sharding, lambda _: np.int32(step)),
            params=restored.params,
            opt_state=restored.optimizer,
            assist=restored.assist,
        )
        return state, restored.meta

    def restore_newest(self, like: TrainState, say: Callable[[str], None]) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest checkpoint that can be restored; those that cannot are named and removed."""
        steps = self.steps()
        broken: dict[int, str] = {}
        while steps:
            step = steps.pop()
            try:
                result, reason = self.restore(step, like), ""
            except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file
                result, reason = None, str(error).splitlines()[0][:200] or type(error).__name__
            if reason := self._anywhere(reason):
                broken[step] = reason
                continue
            for bad in broken:
                say(f"checkpoint {bad} cannot be restored and is removed; going on from checkpoint {step}")
                self._manager.delete(bad)
            return result
        if broken:
            raise UserError(
                f"{self.directory}: none of the checkpoints {sorted(broken)} can be restored "
                f"({next(iter(broken.values()))}); start over beside it with --fresh"
            )
        return None

    def _anywhere(self, reason: str) -> str:
        """The first reason that a process has, for all: each reads other files, and all go on from one checkpoint."""
        if self._group is None:
            return reason
        return self._group.agreed("restored", reason, lambda reasons: next(filter(None, reasons), ""))


def restore_state(directory: Path, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """State and meta of another run's checkpoint `step`, which that run may be training on beside this.

    Raises:
      UserError: it cannot be read, or is not like `like`.
    """
    place = (directory / str(step)).absolute()
    try:
        with ocp.StandardCheckpointer() as reader, ocp.Checkpointer(ocp.JsonCheckpointHandler()) as json_reader:
            items = {"params": like.params, "optimizer": like.opt_state, "assist": like.assist}
            found = {name: reader.restore(place / name, tree) for name, tree in items.items()}
            meta = json_reader.restore(place / "meta")
    except Exception as error:  # a damaged or another file raises many kinds
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"{directory}: checkpoint {step} cannot be read as this run's state ({reason})") from error
    first = jax.make_array_from_callback((), like.step.sharding, lambda _: np.int32(step))
    return TrainState(first, found["params"], found["optimizer"], found["assist"]), meta


def save_params(directory: Path, params: Any) -> None:
    """Saves parameters alone, as checkpoint 0, for `restore_params`.

    Raises:
      UserError: they cannot be written.
    """
    try:
        with ocp.CheckpointManager(directory.absolute()) as manager:
            manager.save(0, args=ocp.args.Composite(params=ocp.args.StandardSave(params)))
    except (OSError, ValueError) as error:
        raise UserError(f"{directory}: cannot be written ({str(error).splitlines()[0][:200]}); make room") from error


def whole_steps(directory: Path) -> list[int]:
    """Steps whose checkpoint was completed. A save that was cut short leaves only a name of another form."""
    if not directory.is_dir():
        return []
    return sorted(
        int(path.name)
        for path in directory.iterdir()
        if path.name.isdecimal() and (path / "_CHECKPOINT_METADATA").is_file()
    )


def check_step(directory: Path, step: int) -> list[int]:
    """The whole checkpoints in `directory`, `step` (-1: any) among them.

    Raises:
      UserError: there is none, or not this one (those kept are listed).
    """
    steps = whole_steps(directory)
    if not steps:
        raise UserError(f"{directory}: no whole checkpoint there; train that run first, or name another directory")
    if step != -1 and step not in steps:
        raise UserError(
            f"{directory}: step {step} was not kept; there are {', '.join(map(str, steps))} (checkpoint.keep={step} in "
            "its own run keeps it)"
        )
    return steps


def restore_params(
    directory: Path, like: Any, *, step: int = -1, say: Callable[[str], None] = print
) -> tuple[Any, int]:
    """The parameters of another run at `step`, or at its newest whole checkpoint; returns (params, step).

    Args:
      directory: `checkpoints/` of that run.
      like: tree of `jax.ShapeDtypeStruct` with shardings; parameters are cast to its dtypes.

    Raises:
      UserError: there is no checkpoint, not this one (those kept are listed), or none can be read.
    """
    steps = check_step(directory, step)
    candidates = [step] if step != -1 else steps[::-1]
    started = {int(found[0]) for path in directory.iterdir() if (found := re.match(r"\d+", path.name))}
    for candidate in candidates:
        try:
            with ocp.StandardCheckpointer() as reader:
                params = reader.restore((directory / str(candidate) / "params").absolute(), like)
        except Exception as error:  # a damaged file raises many kinds
            reason = str(error).splitlines()[0][:200]
            say(f"{directory}: checkpoint {candidate} cannot be read ({reason})")
            continue
        if step == -1 and candidate < max(started):
            say(f"{directory}: checkpoint {max(started)} is not whole; using {candidate}, the newest that is")
        return params, candidate
    raise UserError(f"{directory}: no checkpoint of {candidates} can be read; train that run again")

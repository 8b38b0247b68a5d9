"""The names of the files in a run's directory, its lock, and reading it as somebody else's helper.

config.json    {"config": every key, "facts": what was found out: fingerprints, counts, hardware, helpers}
model.json     the model's shape
tokenizer/     the vocabulary
checkpoints/N/ parameters, optimizer, assist state and meta after N updates
stream/        where a streamed source is read on, by checkpoint and process
metrics.jsonl  one line an update or a validation
validation_rows.json  sums of each validation row at the last validation
profile/       traces of the updates that log.profile names
selection_sample.npz  some candidates as the scorer sees them, where rows are selected
samples.json   a few texts by the model at the end
summary.json   what the run cost; there once it is finished
tensorboard/   events
"""

import contextlib
import fcntl
import itertools
import json
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slm_assist.errors import UserError


class RunDir:
    """Paths of one run."""

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        self.config = self.path / "config.json"
        self.model = self.path / "model.json"
        self.tokenizer = self.path / "tokenizer"
        self.checkpoints = self.path / "checkpoints"
        self.stream = self.path / "stream"
        self.metrics = self.path / "metrics.jsonl"
        self.validation_rows = self.path / "validation_rows.json"
        self.selection_sample = self.path / "selection_sample.npz"
        self.profile = self.path / "profile"
        self.samples = self.path / "samples.json"
        self.summary = self.path / "summary.json"
        self.tensorboard = self.path / "tensorboard"

    def __str__(self) -> str:
        return str(self.path)

    def read(self, file: Path) -> dict[str, Any]:
        """A JSON file of the run.

        Raises:
          UserError: it is not there or is not JSON.
        """
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{self.path}: not a run directory, it has no {file.name}") from None
        except ValueError as error:
            raise UserError(f"{file}: not JSON ({error}); the file is damaged") from None

    def flops_at(self, step: int) -> float | None:
        """Training FLOPs spent up to `step`, by the run's own metrics; None where they do not say."""
        if not self.metrics.is_file():
            return None
        with open(self.metrics, encoding="utf-8") as lines:
            for line in lines:
                with contextlib.suppress(ValueError):
                    record = json.loads(line)
                    if record.get("kind") == "train" and record["step"] == step:
                        return record["flops"]
        return None

    def beside(self) -> "RunDir":
        """This directory if it is free, else the first free one of `PATH-2`, `PATH-3`, ..."""
        if not self.path.exists():
            return self
        for number in itertools.count(2):
            other = self.path.with_name(f"{self.path.name}-{number}")
            if not other.exists():
                return RunDir(other)
        raise AssertionError

    def sign(self) -> str:
        """Writes a word into the lock that this process holds; `check_signed` finds it from another host."""
        word = secrets.token_hex(8)
        (self.path / "LOCK").write_text(word, encoding="utf-8")
        return word

    def check_signed(self, word: str, seconds: float = 60.0) -> None:
        """Waits until this directory's lock has the word, as a network's disk may show it late.

        Raises:
          UserError: it has not: this directory is another than that of the process that signed.
        """
        until = time.monotonic() + seconds
        while True:
            with contextlib.suppress(OSError):
                if (self.path / "LOCK").read_text(encoding="utf-8") == word:
                    return
            if time.monotonic() > until:
                raise UserError(
                    f"{self.path}: not the directory that process 0 calls so; all processes of a run need one run_dir "
                    "on a disk that they share, given as an absolute path"
                )
            time.sleep(0.05)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps a second process out for as long as this one lives; nothing stays locked after a kill.

        A directory in which nothing came to be is removed again.

        Raises:
          UserError: another process trains in this directory, or it cannot be written.
        """
        file = self.path / "LOCK"
        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); choose another run_dir") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before us may have removed the file between our open and our lock.
            held = file.exists() and os.path.samestat(os.fstat(descriptor), file.stat())
        except BlockingIOError:
            held = False
        if not held:
            os.close(descriptor)
            raise UserError(
                f"{self.path}: another process is training in this directory; wait for it, stop it, or use another "
                "run_dir"
            )
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                self.checkpoints.rmdir()  # if nothing is in it
            if os.listdir(self.path) == ["LOCK"]:
                file.unlink()
                self.path.rmdir()
                with contextlib.suppress(OSError):
                    for folder in made[1:]:
                        folder.rmdir()
            os.close(descriptor)

"""Directories that appear whole or not at all, whoever writes at the same time or is killed meanwhile."""

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def scratch(cache_dir: Path) -> Iterator[Path]:
    """A directory to write in, locked while its owner lives and removed at the end unless it was renamed.

    Removes those that a killed process left behind: their lock is free.
    """
    for left in cache_dir.glob(".tmp-*"):
        if (lock := _try_lock(left)) is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)
    while True:
        path = cache_dir / f".tmp-{secrets.token_hex(8)}"
        path.mkdir()
        lock = _try_lock(path)
        if lock is not None and path.exists():  # else another process saw it without its lock and removed it
            break
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _try_lock(directory: Path) -> int | None:
    """A file descriptor that holds the directory's lock, or None if another process has it."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Waits for the directory's lock and holds it; there is nothing to hold where it has been removed."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except FileNotFoundError:
        yield
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def sync(directory: Path) -> None:
    """Asks the disk to hold all of `directory` before it gets its final name."""
    for path in [*directory.rglob("*"), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def install(scratch: Path, path: Path) -> None:
    """Gives `scratch` its final name, unless another process was first with the same contents."""
    if path.is_symlink() and not path.exists():
        path.unlink()  # what it led to was deleted
    try:
        scratch.rename(path)
    except OSError:
        if not path.exists():
            raise

"""Files on this machine and in buckets: finding, fingerprinting and opening them.

A name with `://` (gs://, s3://) goes through etils.epath, everything else through the standard library.
"""

import contextlib
import glob
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from slm_assist.errors import UserError

_BLOCK = 1 << 22


def is_remote(path: Any) -> bool:
    """Whether a path or its name leads off this machine."""
    return "://" in str(path)


def find(spec: str, globs: str) -> list[Path]:
    """The files that comma-separated `globs` name, each once; in sorted order within a glob.

    Raises:
      UserError: a glob matches no file, or a file is empty.
    """
    found: dict[Path, None] = {}
    for pattern in filter(None, map(str.strip, globs.split(","))):
        files, cure = (_find_remote if is_remote(pattern) else _find_here)(pattern)
        if not files:
            raise UserError(f"source {spec}: no file matches {pattern}; {cure}")
        found.update(dict.fromkeys(files))
    if not found:
        raise UserError(f"source {spec!r} names no files: write the paths after the colon")
    for path in found:
        if not size_of(path):
            raise UserError(f"{path}: the file is empty; remove it or leave it out of {spec}")
    return list(found)


def _find_here(pattern: str) -> tuple[list[Path], str]:
    """Files, and what to say if there are none."""
    pattern = os.path.expanduser(pattern)
    names = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
    cure = f"use {pattern.rstrip('/')}/*" if os.path.isdir(pattern) else "check the path"
    return [Path(name) for name in names if os.path.isfile(name)], cure


def _find_remote(pattern: str) -> tuple[list[Path], str]:
    path = remote(pattern)
    if "**" in pattern:
        raise UserError(f"{pattern}: ** does not work in a bucket; name the folders, or use *")
    parts = pattern.split("/")
    fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    try:
        if fixed == len(parts):
            is_folder = path.is_dir()
            return ([path] if path.exists() and not is_folder else []), (
                f"use {pattern.rstrip('/')}/*" if is_folder else "check the path"
            )
        found = remote("/".join(parts[:fixed])).glob("/".join(parts[fixed:]))
        return sorted((file for file in found if not file.is_dir()), key=str), "check the path"
    except Exception as error:  # each file system and its way of logging in has exceptions of its own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{pattern}: cannot be looked up ({reason}); check the path and your credentials") from error


def remote(name: str) -> Path:
    """A path of etils.epath. It reads through TensorFlow where that is installed, which must leave the GPU alone."""
    try:
        from etils import epath
    except ImportError as error:
        raise UserError(f"{name}: reading it needs etils: pip install 'etils[epath]'") from error
    if importlib.util.find_spec("tensorflow") is not None:
        import tensorflow as tf

        with contextlib.suppress(RuntimeError):  # already in use: whoever did that has decided
            tf.config.set_visible_devices([], "GPU")
    return epath.Path(name)


def cache_path(cache_dir: str | Path) -> Path:
    """`data.cache_dir` as a path; UserError if it is not on a disk, since rows are mapped into memory."""
    if is_remote(cache_dir):
        raise UserError(f"data.cache_dir={cache_dir}: rows are mapped into memory; give a folder on a disk")
    return Path(cache_dir).expanduser()


def size_of(path: Path) -> int:
    """Bytes in a file here or elsewhere."""
    stat = path.stat()
    return stat.length if is_remote(path) else stat.st_size


@contextlib.contextmanager
def on_this_machine(path: Path) -> Iterator[Path]:
    """The file itself, or a copy of a remote one that is removed at the end."""
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="slm_assist-") as directory:
        copy = Path(directory, path.name)
        with path.open("rb") as source, copy.open("wb") as target:
            shutil.copyfileobj(source, target, _BLOCK)
        yield copy


def digests(paths: list[Path], cache_dir: str | Path | None) -> dict[Path, tuple[int, str]]:
    """Size and content hash of each file; hashes are kept in digests.json of `cache_dir`.

    A remote file is known by path, size and time of change instead.

    Raises:
      UserError: a file cannot be read.
    """
    memo_file = cache_path(cache_dir) / "digests.json" if cache_dir else None
    try:
        memo = json.loads(memo_file.read_text()) if memo_file else {}
    except (OSError, ValueError):  # missing or damaged: it only saves time
        memo = {}
    result, fresh = {}, {}
    for path in paths:
        if is_remote(path):
            stat = path.stat()
            known = f"{path}|{stat.length}|{stat.mtime}".encode()
            result[path] = (stat.length, hashlib.blake2b(known, digest_size=16).hexdigest())
            continue
        try:
            stat = path.stat()
            key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
            if key not in memo:
                with path.open("rb") as file:
                    fresh[key] = hashlib.file_digest(file, partial(hashlib.blake2b, digest_size=16)).hexdigest()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error
        result[path] = (stat.st_size, memo.get(key) or fresh[key])
    if memo_file and fresh:
        with contextlib.suppress(OSError):
            memo_file.parent.mkdir(parents=True, exist_ok=True)
            scratch = memo_file.with_name(f"{memo_file.name}.{os.getpid()}")
            scratch.write_text(json.dumps(memo | fresh, indent=0))
            scratch.replace(memo_file)
    return result

"""The text that every installation of this has: the Python sources of its libraries."""

import hashlib
import importlib.util
import os
import sysconfig
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

PACKAGES = ("jax", "flax", "numpy", "scipy", "optax")
STDLIB = "stdlib"

# Not the language as people write it: tests, generated tables, stored programs, other people's packages.
_SKIPPED = {
    STDLIB: {
        "__pycache__", "config", "dist-packages", "encodings", "ensurepip", "idle_test", "idlelib", "lib2to3",
        "pydoc_data", "site-packages", "test", "tests",
    },
}  # fmt: skip
_SKIPPED_EVERYWHERE = {"__pycache__", "export_back_compat_test_data"}
_BIGGEST_GROUP = 0.2  # of its domain, to be drawn for validation


class PythonFile(NamedTuple):
    """A source file; `name` is its path below its domain's directory, `split` is train or validation."""

    path: Path
    domain: str
    name: str
    size: int
    digest: bytes
    split: str = "train"

    @property
    def group(self) -> str:
        """The first directory or module below the domain: all of a group is on one side of the split."""
        return self.name.split("/")[0].removesuffix(".py")


def python_files(validation_fraction: float) -> tuple[list[PythonFile], int]:
    """The files in a fixed order, and how many were left out because they are not UTF-8.

    Packages are found, not imported; one that is not installed is left out. Reads every file once.
    """
    files, skipped = [], 0
    for domain, root in _roots():
        here = []
        for path in _walk(root, _SKIPPED.get(domain, set()) | _SKIPPED_EVERYWHERE):
            content = path.read_bytes()
            try:
                if not content.decode("utf-8").strip():
                    continue
            except UnicodeDecodeError:
                skipped += 1
                continue
            digest = hashlib.blake2b(content, digest_size=16).digest()
            name = path.relative_to(root).as_posix()
            here.append(PythonFile(path, domain, name, len(content), digest))
        validation = _validation_groups(here, validation_fraction)
        files += [f._replace(split="validation") if f.group in validation else f for f in here]
    return files, skipped


def _roots() -> list[tuple[str, Path]]:
    roots = [(STDLIB, Path(sysconfig.get_paths()["stdlib"]))]
    for package in PACKAGES:
        found = importlib.util.find_spec(package)
        if found is not None and found.submodule_search_locations:
            roots.append((package, Path(found.submodule_search_locations[0])))
    return roots


def _walk(root: Path, skipped: set[str]) -> list[Path]:
    """The .py files below `root`, sorted by path, without what is generated at build time."""
    found = []
    for directory, names, files in os.walk(root):
        names[:] = [name for name in names if name.split("-")[0] not in skipped and name not in skipped]
        found += [
            Path(directory, file) for file in files if file.endswith(".py") and not file.startswith("_sysconfigdata")
        ]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _validation_groups(files: list[PythonFile], fraction: float) -> set[str]:
    """Groups that together hold about `fraction` of the bytes of one domain's `files`, at least one group.

    Groups come in the order of a hash of their name, so that another version of a package draws nearly the
    same ones. One is taken if it is not a big part of the domain and does not overshoot twofold.
    """
    sizes: dict[str, int] = defaultdict(int)
    for file in files:
        sizes[file.group] += file.size
    if fraction <= 0 or len(sizes) < 2:
        return set()
    whole = sum(sizes.values())
    chosen, total = set(), 0
    for group in sorted(sizes, key=lambda group: hashlib.blake2b(f"{files[0].domain}/{group}".encode()).digest()):
        fits = sizes[group] <= _BIGGEST_GROUP * whole and total + sizes[group] <= 2 * fraction * whole
        if fits and total < fraction * whole:
            chosen.add(group)
            total += sizes[group]
    return chosen or {min(sizes, key=lambda group: (sizes[group], group))}

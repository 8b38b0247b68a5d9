"""The safetensors format, a tensor at a time.

A file is the length of its header (8 bytes), the header (JSON: of each tensor its dtype, shape and place), and the
tensors' bytes. The package safetensors maps whole files into memory and writes from a dict that holds all tensors;
here one tensor is in memory, so that a model of any size passes through a small host.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from slm_assist.errors import UserError

DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_MAX_HEADER = 100_000_000  # the format's own limit


class Stored(NamedTuple):
    """Where a tensor lies."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Tensors:
    """All tensors of a folder by name, whatever files they are in.

    Raises:
      UserError: a file is missing, cut short or no safetensors file; names it.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._found: dict[str, Stored] = {}
        for file in _files(directory):
            self._found |= _header(file)

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._found[name].shape

    def dtype(self, name: str) -> str:
        """As the format calls it: "F32", "BF16", ..."""
        return self._found[name].dtype

    def read(self, name: str) -> np.ndarray:
        """One tensor, in memory of its own.

        Raises:
          UserError: it is not of floating-point numbers, or the file cannot be read.
        """
        found = self._found[name]
        if found.dtype not in DTYPES:
            raise UserError(
                f"{found.file}: {name} is {found.dtype}, and {', '.join(DTYPES)} are read; a quantised model must be "
                "saved as floats first"
            )
        dtype, count = DTYPES[found.dtype], math.prod(found.shape)
        try:
            values = np.fromfile(found.file, dtype, count=count, offset=found.start)
        except OSError as error:
            raise UserError(f"{found.file}: {error.strerror or error}; make it readable, or copy it again") from error
        return values.reshape(found.shape)


def _files(directory: Path) -> list[Path]:
    """The files with the weights: the only one, or those that the index names."""
    index = directory / INDEX
    if (directory / SINGLE).is_file():  # first, as transformers has it
        return [directory / SINGLE]
    if not index.is_file():
        raise UserError(f"{directory}: it has no {SINGLE} and no {INDEX}{_instead(directory)}")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: damaged ({error!r}); download the model again") from error
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise UserError(
            f"{directory}: {', '.join(missing[:3])} missing, {len(missing)} of the {len(names)} files of {INDEX}; "
            "download the rest"
        )
    return [directory / name for name in names]


def _instead(directory: Path) -> str:
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt*")):
        return (
            ", only pickled weights, which are not read because loading them runs code; save them as safetensors "
            "with transformers: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    return "; give the folder of a model that transformers has saved"


def _header(file: Path) -> dict[str, Stored]:
    try:
        size = file.stat().st_size
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header: dict[str, Any] = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        found = {
            name: Stored(
                file, entry["dtype"], tuple(entry["shape"]), *(8 + length + at for at in entry["data_offsets"])
            )
            for name, entry in header.items()
        }
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}; make it readable, or copy it again") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not a safetensors file, or cut short ({error}); download it again") from error
    for name, tensor in found.items():
        if tensor.stop > size:
            raise UserError(f"{file}: cut short, {name} ends at byte {tensor.stop} of {size}; download it again")
        wanted = math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize if tensor.dtype in DTYPES else None
        if wanted is not None and tensor.stop - tensor.start != wanted:
            raise UserError(
                f"{file}: {name} {list(tensor.shape)} of {tensor.dtype} has {tensor.stop - tensor.start} bytes where "
                f"{wanted} are needed; download it again"
            )
    return found


def write(
    directory: Path,
    shapes: Mapping[str, tuple[int, ...]],
    value_of: Callable[[str], np.ndarray],
    *,
    dtype: str = "F32",
    shard_bytes: int = 5 * 10**9,
) -> list[Path]:
    """Writes tensors into `directory`, in files of up to `shard_bytes` with an index where there are several.

    Args:
      shapes: of each tensor, in the order in which they are written.
      value_of: its values, asked for one tensor at a time; rounded to `dtype`.
      dtype: one of `DTYPES`.
    """
    item = DTYPES[dtype].itemsize
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * item
        if filled and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    count = len(shards)
    files = [
        directory / (SINGLE if count == 1 else f"model-{number:05}-of-{count:05}.safetensors")
        for number in range(1, count + 1)
    ]
    for file, names in zip(files, shards, strict=True):
        _write_file(file, {name: shapes[name] for name in names}, map(value_of, names), dtype)
    if count > 1:
        total = sum(math.prod(shape) for shape in shapes.values()) * item
        where = {name: file.name for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return files


def _write_file(file: Path, shapes: Mapping[str, tuple[int, ...]], values: Iterable[np.ndarray], dtype: str) -> None:
    kind, at, header = DTYPES[dtype], 0, {"__metadata__": {"format": "pt"}}
    for name, shape in shapes.items():
        size = math.prod(shape) * kind.itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)  # so that numbers are aligned
    with open(file, "wb") as out:
        out.write(len(head).to_bytes(8, "little") + head)
        for shape, value in zip(shapes.values(), values, strict=True):
            if value.shape != shape:
                raise ValueError(f"{file}: a tensor {value.shape} where {shape} was announced")
            np.ascontiguousarray(value, kind).tofile(out)

"""A model of Hugging Face's: found, checked, and read tensor by tensor onto the devices."""

import dataclasses
import functools
import hashlib
import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from slm_assist.data.tokenizers import Vocabulary
from slm_assist.errors import UserError
from slm_assist.models.config import ModelConfig
from slm_assist.models.hf import tokenizer_files
from slm_assist.models.hf.families import read_config
from slm_assist.models.hf.safetensors import Tensors
from slm_assist.models.hf.tensors import BUFFERS, LAYER, Tensor, found
from slm_assist.models.transformer import Params

PREFIX = "hf:"
SMALL_FILES = ["*.json", "tokenizer.model"]


def is_name(name: str) -> bool:
    """Whether `name` is one of Hugging Face's, `hf:PATH_OR_NAME`."""
    return name.startswith(PREFIX)


def folder(name: str, *, weights: bool = True) -> Path:
    """The folder of `hf:PATH_OR_NAME` or `hf:NAME@REVISION`; downloads what is not here yet.

    Args:
      weights: whether the weights are needed too, or only the small files.

    Raises:
      UserError: there is none, and it cannot be downloaded.
    """
    given = name.removeprefix(PREFIX)
    path = Path(given).expanduser()
    if path.is_dir():
        return path
    if not given or given.startswith(("/", ".", "~")) or given.count("/") > 1:
        raise UserError(f"{name}: there is no such folder; give a folder with config.json, or OWNER/NAME of a model")
    return _downloaded(name, weights)


@functools.cache  # a run asks for a model many times, and the hub would be asked as often
def _downloaded(name: str, weights: bool) -> Path:
    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UserError(f"{name}: downloading needs huggingface_hub: pip install 'slm_assist[hf]'") from error
    patterns = [*SMALL_FILES, *(["*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns))
    except Exception as error:  # many kinds, of the hub and of the network below it
        reason = textwrap.shorten((str(error).strip().splitlines() or [""])[0], 160, placeholder="...")
        raise UserError(
            f"{name}: there is no such folder here, and it cannot be downloaded ({type(error).__name__}: {reason}); "
            f"where there is a network run `hf download {repository} --local-dir DIR`, and give {PREFIX}DIR"
        ) from error


class Folder:
    """A model's folder, of which nothing but config.json has been read.

    Args:
      name: `hf:PATH_OR_NAME`. What is not here yet is downloaded, the weights when they are read.

    Attributes:
      name, path: as given, and the folder; `downloaded`: it is the hub's own copy here.
      family: one of `families.FAMILIES`.

    Raises:
      UserError: it is not there, or of a kind that is not supported.
    """

    def __init__(self, name: str):
        self.name, self.path = name, folder(name, weights=False)
        self.downloaded = not Path(name.removeprefix(PREFIX)).expanduser().is_dir()
        file = self.path / "config.json"
        try:
            self._config: dict[str, Any] = dict(json.loads(file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise UserError(f"{name}: {self.path} has no config.json; give the folder of a model") from None
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{file}: cannot be read ({error}); download it again") from error
        self.family, self._padded = read_config(self._config, str(file))

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """UserError where there is no tokenizer, or one with more tokens than the model has embeddings."""
        return tokenizer_files.read(self.path, self._padded.vocab_size)

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a generated text beside the vocabulary's EOS, as the folder says."""
        return tokenizer_files.stop_ids(self.path)

    def shape(self, vocab_size: int) -> ModelConfig:
        """The model's shape with `vocab_size` tokens; rows of its embedding beyond them are left out."""
        return dataclasses.replace(self._padded, vocab_size=vocab_size)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of its embedding."""
        return self._padded.vocab_size

    @property
    def max_positions(self) -> int | None:
        """The longest rows that it was made for, as its config says."""
        return self._config.get("max_position_embeddings") or self._config.get("n_positions")

    @functools.cached_property
    def tensors(self) -> Tensors:
        """UserError where a file is missing or damaged."""
        return Tensors(folder(self.name))

    @functools.cached_property
    def identity(self) -> str:
        """Hex, over config.json and where each tensor lies: changes when the model is another."""
        digest = hashlib.blake2b(json.dumps(self._config, sort_keys=True).encode(), digest_size=16)
        tensors = self.tensors
        for name in sorted(tensors):
            digest.update(f"{name} {tensors.dtype(name)} {tensors.shape(name)}\n".encode())
        for file in sorted(self.path.glob("*.safetensors")):
            with open(file, "rb") as opened:  # a part of each, as reading all of it takes as long as loading
                for at in np.linspace(0, max(file.stat().st_size - 4096, 0), 16).astype(int):
                    opened.seek(int(at))
                    digest.update(opened.read(4096))
        return digest.hexdigest()

    def params(self, like: Params, config: ModelConfig) -> Params:
        """The parameters as `like` says: shapes, dtypes and where they lie.

        Args:
          like: tree of `jax.ShapeDtypeStruct` with shardings, as of `Transformer(config)`.
          config: `shape(vocab_size)`, scanned or not.

        Raises:
          UserError: a tensor is missing, has another shape, or is not known.
        """
        tensors = self.tensors
        table = {tensor.path: tensor for tensor in self.family.tensors(config)}
        self._check_names(tensors, table, config)
        read = functools.partial(_read, tensors, config)
        return jax.tree_util.tree_map_with_path(lambda path, x: _placed(read, table, path, x, config), like)

    def _check_names(self, tensors: Tensors, table: dict[tuple[str, ...], Tensor], config: ModelConfig) -> None:
        wanted = {
            tensor.name.replace(LAYER, str(layer))
            for tensor in table.values()
            for layer in range(config.num_layers if tensor.in_layer else 1)
        }
        names = {name: found(name, tensors) for name in sorted(wanted)}
        missing = [name for name, there in names.items() if there is None]
        if missing:
            raise UserError(
                f"{self.path}: {missing[0]} is missing, and {len(missing) - 1} more of {len(wanted)} tensors; the "
                "model is not whole, download it again"
            )
        head = {"lm_head.weight", "embed_out.weight"} & set(tensors) if config.tie_embeddings else set()
        embedding = names[next(tensor.name for tensor in table.values() if tensor.path == ("embedding",))]
        for name in head:  # which may be saved with the embedding it is tied to
            if not np.array_equal(tensors.read(name), tensors.read(embedding)):
                raise UserError(
                    f"{self.path}: {name} is not {embedding}, and tie_word_embeddings says that it is; set that to "
                    "false in config.json if the head is one of its own"
                )
        more = [n for n in tensors if n not in {*names.values(), *head} and not BUFFERS.fullmatch(n)]
        if more:
            raise UserError(
                f"{self.path}: the tensor {more[0]} is not one that {self.family.model_type} has by its config.json, "
                f"and {len(more) - 1} more are not; this is another kind of model"
            )


def _read(tensors: Tensors, config: ModelConfig, tensor: Tensor, layer: int, shape: tuple[int, ...]) -> np.ndarray:
    """One of our parameters of one layer, as numpy has it."""
    name = found(tensor.name.replace(LAYER, str(layer)), tensors)
    try:
        there, wanted = tensors.shape(name), tensor.shape(shape)
        padded = tensor.form in ("vocab", "head") and len(there) == 2 and there[0] >= wanted[0]
        if there != wanted and not (padded and there[1] == wanted[1]):
            raise ValueError(f"{list(wanted)} is wanted")
        return tensor.read(tensors.read(name), shape)
    except (ValueError, IndexError) as error:
        raise UserError(
            f"{tensors.directory}: {name} has the shape {list(tensors.shape(name))}, which does not fit config.json "
            f"({error}); one of the two is another model's"
        ) from error


def _placed(
    read: Callable[[Tensor, int, tuple[int, ...]], np.ndarray],
    table: dict[tuple[str, ...], Tensor],
    path: Any,
    like: jax.ShapeDtypeStruct,
    config: ModelConfig,
) -> jax.Array:
    """One parameter on its devices: each layer's tensor is read once, and every device's part of it kept."""
    keys = tuple(key.key for key in path)
    stacked = keys[0] == "groups"
    inner = keys[2:] if stacked else keys[1:] if keys[0].startswith("layer_") else keys
    tensor = table[inner]
    if stacked:
        position, size = int(keys[1].removeprefix("layer_")), len(config.pattern)
        layers = [group * size + position for group in range(config.num_groups)]
    else:
        layers = [int(keys[0].removeprefix("layer_")) if tensor.in_layer else 0]
    places = like.sharding.addressable_devices_indices_map(like.shape)
    bounds_there = {_bounds(index, like.shape) for index in places.values()}
    parts = {bounds: np.empty([stop - start for start, stop in bounds], like.dtype) for bounds in bounds_there}
    for at, layer in enumerate(layers):
        values = read(tensor, layer, like.shape[1:] if stacked else like.shape)
        for bounds, part in parts.items():
            within = tuple(slice(*bound) for bound in (bounds[1:] if stacked else bounds))
            if not stacked:
                part[...] = values[within]
            elif bounds[0][0] <= at < bounds[0][1]:
                part[at - bounds[0][0]] = values[within]
    arrays = [jax.device_put(parts[_bounds(index, like.shape)], device) for device, index in places.items()]
    jax.block_until_ready(arrays)  # so that the host's part is free before the next is read
    return jax.make_array_from_single_device_arrays(like.shape, like.sharding, arrays)


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))

"""A model written in Hugging Face's form: config.json, safetensors, tokenizer."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from slm_assist.data.tokenizers import Vocabulary
from slm_assist.errors import UserError, one_of
from slm_assist.models.config import ModelConfig
from slm_assist.models.hf import safetensors, tokenizer_files
from slm_assist.models.hf.families import family_of
from slm_assist.models.hf.tensors import LAYER, Tensor, joined
from slm_assist.models.transformer import Params

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def export(
    params: Params,
    config: ModelConfig,
    vocabulary: Vocabulary,
    out: Path,
    *,
    dtype: str = "float32",
    max_positions: int = 0,
    shard_bytes: int = 5 * 10**9,
) -> str:
    """Writes the folder `out`, whole or not at all; returns its family's model_type.

    Args:
      params: of `Transformer(config)`, on the devices; one tensor at a time comes to the host.
      dtype: of the numbers; float32 keeps them as they are.
      max_positions: the longest rows that config.json announces; 0: 2048, or the learnt positions.
      shard_bytes: the largest file of weights.

    Raises:
      UserError: no family can hold the model, `out` has something in it, or it cannot be written.
    """
    one_of("--dtype", dtype, DTYPES)
    family, values = family_of(config)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out={out}: there is something; name a new folder")
    ends = {"bos_token_id": vocabulary.bos_id, "eos_token_id": vocabulary.eos_id, "pad_token_id": vocabulary.pad_id}
    longest = {} if config.max_positions else {"max_position_embeddings": max_positions or 2048}
    values = {**values, **longest, **ends, "torch_dtype": dtype, "use_cache": True}
    table = _by_name(family.tensors(config), config)
    temporary = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _write_json(temporary / "config.json", values)
        _write_json(temporary / "generation_config.json", {name: i for name, i in ends.items() if i is not None})
        tokenizer_files.write(
            vocabulary,
            temporary,
            model_max_length=config.max_positions or longest["max_position_embeddings"],
            model_type=family.model_type,
        )
        shapes = {name: _shape(parts, config, params) for name, parts in table.items()}
        safetensors.write(
            temporary, shapes, lambda name: _value(table[name], config, params), dtype=DTYPES[dtype],
            shard_bytes=shard_bytes,
        )  # fmt: skip
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    except OSError as error:
        raise UserError(
            f"--out={out}: cannot be written ({error.strerror or error}); make room, or name another"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return family.model_type


Parts = list[tuple[Tensor, int]]  # and the layer of each


def _by_name(tensors: Any, config: ModelConfig) -> dict[str, Parts]:
    """What each of their tensors is made of, layer after layer."""
    table: dict[str, Parts] = {}
    tensors = list(tensors)
    for layer in range(config.num_layers):
        for tensor in tensors:
            if tensor.in_layer or layer == 0:
                table.setdefault(tensor.name.replace(LAYER, str(layer)), []).append((tensor, layer))
    return table


def _ours(params: Params, tensor: Tensor, layer: int, config: ModelConfig) -> tuple[Any, int | None]:
    """Our parameter, and which of its stack is meant."""
    size, at = len(config.pattern), None
    if tensor.in_layer and config.scan_layers:
        params, at = params["groups"][f"layer_{layer % size}"], layer // size
    elif tensor.in_layer:
        params = params[f"layer_{layer}"]
    for key in tensor.path:
        params = params[key]
    return params, at


def _value(parts: Parts, config: ModelConfig, params: Params) -> np.ndarray:
    values = []
    for tensor, layer in parts:
        value, at = _ours(params, tensor, layer, config)
        values.append((tensor, np.asarray(jax.device_get(value if at is None else value[at]))))
    return joined(values, config.head_dim)


def _shape(parts: Parts, config: ModelConfig, params: Params) -> tuple[int, ...]:
    tensor, layer = parts[0]
    value, at = _ours(params, tensor, layer, config)
    return tensor.shape(value.shape if at is None else value.shape[1:])


def _write_json(file: Path, values: dict[str, Any]) -> None:
    """Nulls too: where a field is missing transformers takes a default, which may be another."""
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

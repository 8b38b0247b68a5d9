"""Host memory and seconds of reading a model in Hugging Face's form onto the devices.

    python experiments/benchmarks/import_memory.py [--gigabytes 1] [--dtype float32] [--out FILE.json]

Writes a Llama-shaped model of about that size with random numbers, in one file, and reads it in a process of its own,
whole on the first device and split over eight (`mesh.fsdp=8`, on CPUs virtual ones). `peak` is the process's largest
resident memory less what it has before reading, over the bytes of the parameters as they lie on the devices. On CPUs
the devices' memory is the host's, so 1 is the least; elsewhere the parameters are not counted and 0 is.

Expected bytes: a stacked parameter is filled layer by layer and handed over whole, so 1 and at most the largest stack
(`largest`, its part of all) beside it, and one layer's tensor.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import jax
import numpy as np

from slm_assist import sharding
from slm_assist.models import ModelConfig, Transformer
from slm_assist.models.hf import load, safetensors
from slm_assist.models.hf.families import family_of
from slm_assist.pretrained import like_student

LAYERS = 24


def shape_of(gigabytes: float) -> ModelConfig:
    """A model of `LAYERS` layers with about so many bytes in float32."""
    width = max(round((gigabytes * 1e9 / 4 / LAYERS / 12) ** 0.5 / 64), 1) * 64
    return ModelConfig(
        vocab_size=2048, num_layers=LAYERS, d_model=width, d_ff=8 * width // 3, num_heads=width // 64,
        num_kv_heads=width // 64, head_dim=64, activation="silu", embed_scale=False,
    )  # fmt: skip


def make(directory: Path, config: ModelConfig, dtype: str) -> None:
    """The model's folder, without a tokenizer."""
    family, values = family_of(config)
    model = Transformer(config)
    by_path = {tensor.path: tensor for tensor in family.tensors(config)}
    shapes = {}
    for path, x in jax.tree_util.tree_leaves_with_path(model.shapes()):
        keys = tuple(key.key for key in path)
        tensor, stacked = by_path[keys[2:] if keys[0] == "groups" else keys], keys[0] == "groups"
        for layer in range(config.num_layers if stacked else 1):
            shapes[tensor.name.replace("{}", str(layer))] = tensor.shape(x.shape[1:] if stacked else x.shape)
    rng = np.random.default_rng(0)
    safetensors.write(
        directory,
        shapes,
        lambda name: rng.random(shapes[name], np.float32),
        dtype={"float32": "F32", "bfloat16": "BF16"}[dtype],
        shard_bytes=10**15,
    )
    (directory / "config.json").write_text(json.dumps(values))


def child(directory: str, fsdp: int) -> None:
    """Reads the model and prints what that took, as a line of JSON."""
    folder = load.Folder(f"hf:{directory}")
    config = folder.shape(folder.padded_vocab_size)
    like = like_student(Transformer(config), sharding.make_mesh(data=1, fsdp=fsdp), np.float32)
    before, began = _resident(), time.perf_counter()
    params = jax.block_until_ready(folder.params(like, config))
    sizes = [x.nbytes for x in jax.tree.leaves(params)]
    print(json.dumps({
        "seconds": time.perf_counter() - began, "peak": (_resident() - before) / sum(sizes), "bytes": sum(sizes),
        "largest": max(sizes) / sum(sizes),
    }))  # fmt: skip


def _resident() -> int:
    """Bytes: the largest so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def read(directory: Path, fsdp: int) -> dict[str, Any]:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={fsdp}"
    command = [sys.executable, __file__, "--child", str(directory), str(fsdp)]
    out = subprocess.run(command, env=os.environ | {"XLA_FLAGS": flags}, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(out.stdout.splitlines()[-1])


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], int(sys.argv[3]))
        return
    parser = common.parser(__doc__, rounds=3)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of the model in float32")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of its file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        make(Path(temporary), shape_of(options.gigabytes), options.dtype)
        found = {f"fsdp_{fsdp}": [read(Path(temporary), fsdp) for _ in range(options.rounds)] for fsdp in (1, 8)}
    result = {
        name: {key: common.Times.of(each[key] for each in rounds) for key in rounds[0]}
        for name, rounds in found.items()
    }
    common.finish(options, {"read": result, "dtype": options.dtype})


if __name__ == "__main__":
    common.run(main)

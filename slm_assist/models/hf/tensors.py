"""Which tensor of a Hugging Face model is which parameter of ours, and the two layouts."""

import math
import re
from collections.abc import Container, Iterator
from typing import NamedTuple

import numpy as np

from slm_assist.models.config import ModelConfig

LAYER = "{}"  # stands for a layer's number in names


class Tensor(NamedTuple):
    """One parameter's place in a Hugging Face model.

    Attributes:
      path: ours, below the layer where there is one.
      name: theirs, with `LAYER` for the layer's number.
      form: how theirs lies. "plain": as ours but for its shape. "linear": [outputs, inputs], transposed.
        "vocab": [V, d], with rows for padding perhaps; "head": the same, transposed.
      part: (i, n, where) if theirs holds n of ours, this being the i-th: side by side in the last dimension ("blocks",
        GPT-2), or head by head in the first ("heads", GPT-NeoX).
    """

    path: tuple[str, ...]
    name: str
    form: str = "plain"
    part: tuple[int, int, str] | None = None

    @property
    def in_layer(self) -> bool:
        return LAYER in self.name

    def read(self, theirs: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Our parameter of `shape` from their tensor, mostly a view of it.

        Raises:
          ValueError: the sizes differ.
        """
        if self.part:
            index, count, where = self.part
            if where == "blocks":
                width = theirs.shape[-1] // count
                theirs = theirs[..., index * width : (index + 1) * width]
            else:
                head_dim = shape[-1]
                parted = theirs.reshape(-1, count, head_dim, *theirs.shape[1:])
                theirs = parted[:, index].reshape(-1, *theirs.shape[1:])
        if self.form in ("vocab", "head"):
            theirs = theirs[: shape[0 if self.form == "vocab" else -1]]
        if self.form in ("linear", "head"):
            theirs = theirs.T
        return theirs.reshape(shape)

    def matrix(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """Our shape with all inputs as one dimension and all outputs as another."""
        if self.form in ("vocab", "head") or self.path[-1] == "scale":
            return ours
        if self.path[-1].endswith("bias"):
            return (math.prod(ours),)
        inputs = len(ours) - 1 if self.path[-1] == "out" else 1
        return math.prod(ours[:inputs]), math.prod(ours[inputs:])

    def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """Of their tensor, with all its parts."""
        theirs = self.matrix(ours)[:: -1 if self.form in ("linear", "head") else 1]
        _, count, where = self.part or (0, 1, "blocks")
        return (*theirs[:-1], theirs[-1] * count) if where == "blocks" else (theirs[0] * count, *theirs[1:])

    def written(self, ours: np.ndarray) -> np.ndarray:
        """Their layout of our parameter, without the other parts."""
        theirs = ours.reshape(self.matrix(ours.shape))
        return theirs.T if self.form in ("linear", "head") else theirs


def joined(parts: list[tuple[Tensor, np.ndarray]], head_dim: int) -> np.ndarray:
    """Their tensor from all our parameters in it, each as `written`."""
    parts = sorted(parts, key=lambda part: part[0].part or (0,))
    first = parts[0][0].part
    values = [tensor.written(ours) for tensor, ours in parts]
    if first is None:
        return values[0]
    if first[2] == "blocks":
        return np.concatenate(values, axis=-1)
    by_head = [value.reshape(-1, 1, head_dim, *value.shape[1:]) for value in values]
    return np.concatenate(by_head, axis=1).reshape(-1, *values[0].shape[1:])


def norm(ours: tuple[str, ...], theirs: str, config: ModelConfig) -> Iterator[Tensor]:
    yield Tensor((*ours, "scale"), f"{theirs}.weight")
    if config.norm == "layer":
        yield Tensor((*ours, "bias"), f"{theirs}.bias")


def llama(config: ModelConfig) -> Iterator[Tensor]:
    """Of Llama, Mistral, Qwen, Gemma and Granite."""
    layer = f"model.layers.{LAYER}"
    yield Tensor(("embedding",), "model.embed_tokens.weight", "vocab")
    for ours, theirs in {"query": "q", "key": "k", "value": "v"}.items():
        yield Tensor(("attention", ours), f"{layer}.self_attn.{theirs}_proj.weight", "linear")
        if config.attention_bias:
            yield Tensor(("attention", f"{ours}_bias"), f"{layer}.self_attn.{theirs}_proj.bias")
        if config.qk_norm and ours != "value":
            yield Tensor(("attention", f"{ours}_norm", "scale"), f"{layer}.self_attn.{theirs}_norm.weight")
    yield Tensor(("attention", "out"), f"{layer}.self_attn.o_proj.weight", "linear")
    if config.attention_out_bias:
        yield Tensor(("attention", "out_bias"), f"{layer}.self_attn.o_proj.bias")
    for ours in ("gate", "up", "down"):
        yield Tensor(("mlp", ours), f"{layer}.mlp.{ours}_proj.weight", "linear")
        if config.mlp_bias:
            yield Tensor(("mlp", f"{ours}_bias"), f"{layer}.mlp.{ours}_proj.bias")
    norms = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if config.post_norms:
        norms |= {
            "attention_post_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "mlp_post_norm": "post_feedforward_layernorm",
        }
    for ours, theirs in norms.items():
        yield from norm((ours,), f"{layer}.{theirs}", config)
    yield from norm(("final_norm",), "model.norm", config)
    if not config.tie_embeddings:
        yield Tensor(("head",), "lm_head.weight", "head")


def neox(config: ModelConfig) -> Iterator[Tensor]:
    layer = f"gpt_neox.layers.{LAYER}"
    yield Tensor(("embedding",), "gpt_neox.embed_in.weight", "vocab")
    for index, ours in enumerate(("query", "key", "value")):
        part = (index, 3, "heads")
        yield Tensor(("attention", ours), f"{layer}.attention.query_key_value.weight", "linear", part)
        if config.attention_bias:
            yield Tensor(("attention", f"{ours}_bias"), f"{layer}.attention.query_key_value.bias", "plain", part)
    yield Tensor(("attention", "out"), f"{layer}.attention.dense.weight", "linear")
    if config.attention_out_bias:
        yield Tensor(("attention", "out_bias"), f"{layer}.attention.dense.bias")
    for ours, theirs in {"up": "dense_h_to_4h", "down": "dense_4h_to_h"}.items():
        yield Tensor(("mlp", ours), f"{layer}.mlp.{theirs}.weight", "linear")
        yield Tensor(("mlp", f"{ours}_bias"), f"{layer}.mlp.{theirs}.bias")
    for ours, theirs in {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}.items():
        yield from norm((ours,), f"{layer}.{theirs}", config)
    yield from norm(("final_norm",), "gpt_neox.final_layer_norm", config)
    if not config.tie_embeddings:
        yield Tensor(("head",), "embed_out.weight", "head")


def gpt2(config: ModelConfig) -> Iterator[Tensor]:
    layer = f"transformer.h.{LAYER}"
    yield Tensor(("embedding",), "transformer.wte.weight", "vocab")
    yield Tensor(("positions",), "transformer.wpe.weight")
    for index, ours in enumerate(("query", "key", "value")):
        part = (index, 3, "blocks")
        yield Tensor(("attention", ours), f"{layer}.attn.c_attn.weight", "plain", part)
        yield Tensor(("attention", f"{ours}_bias"), f"{layer}.attn.c_attn.bias", "plain", part)
    yield Tensor(("attention", "out"), f"{layer}.attn.c_proj.weight")
    yield Tensor(("attention", "out_bias"), f"{layer}.attn.c_proj.bias")
    for ours, theirs in {"up": "c_fc", "down": "c_proj"}.items():
        yield Tensor(("mlp", ours), f"{layer}.mlp.{theirs}.weight")
        yield Tensor(("mlp", f"{ours}_bias"), f"{layer}.mlp.{theirs}.bias")
    for ours, theirs in {"attention_norm": "ln_1", "mlp_norm": "ln_2"}.items():
        yield from norm((ours,), f"{layer}.{theirs}", config)
    yield from norm(("final_norm",), "transformer.ln_f", config)
    if not config.tie_embeddings:
        yield Tensor(("head",), "lm_head.weight", "head")


# Buffers that some versions of transformers saved, which are no parameters.
BUFFERS = re.compile(r"(.*\.)?(rotary_emb\.(inv_freq|cos_cached|sin_cached)|(attention|attn)\.(bias|masked_bias))")
# Other names of a tensor; and the base model, saved by itself, has no prefix.
OTHER_NAMES = {"embed_out.weight": "lm_head.weight"}
PREFIXES = ("model.", "gpt_neox.", "transformer.")


def found(name: str, there: Container[str]) -> str | None:
    """The name under which a tensor is there; None if it is not."""
    names = [name, OTHER_NAMES.get(name, name)]
    names += [name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix)]
    return next((name for name in names if name in there), None)

"""The shape of a decoder: everything needed to build it again, and nothing about how it is trained."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from slm_assist.errors import UserError, nearest, one_of
from slm_assist.models.rope import RopeScaling

ACTIVATIONS = ("gelu", "gelu_exact", "relu", "silu")
LAYER_KINDS = ("global", "local")
NORMS = ("rms", "rms_offset", "layer")
POSITIONS = ("rotary", "learned")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A pre-norm decoder.

    Attributes:
      vocab_size: tokens in the vocabulary.
      num_layers: layers; a multiple of `len(pattern)`.
      d_model: width of the residual stream.
      d_ff: width of the MLP's hidden layer: `[d_model, d_ff]` up (twice where gated), `[d_ff, d_model]` down.
      num_heads: query heads.
      num_kv_heads: key and value heads, a divisor of `num_heads` (1: multi-query attention).
      head_dim: width of a head, even; `num_heads * head_dim` need not be `d_model`.
      gated_mlp: `down(act(gate(x)) * up(x))` instead of `down(act(up(x)))`.
      activation: "gelu" (tanh approximation), "gelu_exact", "silu" or "relu".
      tie_embeddings: the output head is the transposed embedding.
      rope_theta: base of the rotary position embedding.
      norm_eps: added to the mean square in norms.
      logit_softcap: c in `c * tanh(logits / c)`, applied by the losses; 0 for none.
      logit_scale: factor on the logits before the cap, applied by the losses.
      embed_scale: multiply the embeddings by sqrt(d_model), so that beside what the layers add they count.
      pattern: layer kinds, repeated over the depth: "global" sees the whole segment, "local" a window.
      window: a "local" layer sees the tokens at a distance below `window`; 0 where there is no such layer.
      scan_layers: stack the parameters of equal layers and scan over them (compile time does not grow with
        the depth); False keeps them apart, which runs faster on CPUs.
      norm: "rms" | "rms_offset" (what is stored is the scale less 1) | "layer" (with means and biases).
      attention_bias: biases on queries, keys and values; `attention_out_bias`, `mlp_bias`: on the other matrices.
      qk_norm: queries and keys are normalised head by head, before their rotation.
      post_norms: what attention and MLP add to the stream is normalised.
      parallel_residual: attention and MLP read the same stream, and not one after the other.
      positions: "rotary" | "learned" (a table of `max_positions` vectors, added to the embeddings).
      max_positions: the longest document with learned positions; 0 where they are rotary.
      rotary_dim: dimensions of a head that rotate, the first ones; 0 for all.
      rope_scaling: how rotary angles are stretched, None for not.
      local_rope_theta: base for "local" layers, whose angles are not stretched; 0: as the others.
      attention_scale: factor on the logits of attention; 0: 1 / sqrt(head_dim).
      attention_softcap: c in c * tanh(logits / c) of attention; 0 for none.
    """

    vocab_size: int
    num_layers: int
    d_model: int
    d_ff: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    gated_mlp: bool = True
    activation: str = "gelu"
    tie_embeddings: bool = True
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    logit_softcap: float = 0.0
    logit_scale: float = 1.0
    embed_scale: bool = True
    pattern: tuple[str, ...] = ("global",)
    window: int = 0
    scan_layers: bool = True
    norm: str = "rms"
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    parallel_residual: bool = False
    positions: str = "rotary"
    max_positions: int = 0
    rotary_dim: int = 0
    rope_scaling: RopeScaling | None = None
    local_rope_theta: float = 0.0
    attention_scale: float = 0.0
    attention_softcap: float = 0.0

    def __post_init__(self):
        object.__setattr__(self, "pattern", _tuple(self.pattern))
        object.__setattr__(self, "rope_scaling", RopeScaling.from_json(self.rope_scaling))
        for field in dataclasses.fields(self):
            _check_type(field.name, getattr(self, field.name), field.type)
        for name in ("vocab_size", "num_layers", "d_model", "d_ff", "num_heads", "num_kv_heads", "head_dim"):
            _require(getattr(self, name) > 0, f"{name}={getattr(self, name)}: use a positive number")
        for name in ("rope_theta", "norm_eps", "logit_scale"):
            _require(getattr(self, name) > 0, f"{name}={getattr(self, name)}: use a positive number")
        for name in ("logit_softcap", "attention_softcap", "attention_scale", "local_rope_theta", "rotary_dim"):
            _require(getattr(self, name) >= 0, f"{name}={getattr(self, name)}: use 0 (none) or more")
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}: use a divisor",
        )
        _require(self.head_dim % 2 == 0, f"head_dim={self.head_dim}: rotary positions need an even number")
        _require(
            self.rotary_dim % 2 == 0 and self.rotary_dim <= self.head_dim,
            f"rotary_dim={self.rotary_dim}: use an even number up to head_dim={self.head_dim}, or 0 for all of it",
        )
        one_of("model.activation", self.activation, ACTIVATIONS)
        one_of("model.norm", self.norm, NORMS)
        one_of("model.positions", self.positions, POSITIONS)
        _require(
            (self.positions == "learned") == (self.max_positions > 0),
            f"max_positions={self.max_positions} with positions={self.positions}: learned positions need their number, "
            "rotary ones 0",
        )
        _require(len(self.pattern) > 0, 'pattern is empty: name at least one layer kind, such as ("global",)')
        for kind in self.pattern:
            one_of("model.pattern", kind, LAYER_KINDS)
        _require(
            self.num_layers % len(self.pattern) == 0,
            f"num_layers={self.num_layers} is not a multiple of the {len(self.pattern)} kinds in pattern: "
            "change one of them",
        )
        _require(
            ("local" in self.pattern) == (self.window > 0),
            f"window={self.window} with pattern {self.pattern}: a positive window and a 'local' layer need each other",
        )

    @property
    def num_groups(self) -> int:
        """How often the pattern repeats over the depth."""
        return self.num_layers // len(self.pattern)

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values; `from_json` gives the config back."""
        return {**dataclasses.asdict(self), "pattern": list(self.pattern)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """The config of a dict made by `to_json`.

        Raises:
          UserError: a field is unknown, missing or has an impossible value.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for name in values:
            _require(name in fields, f"{name}: there is no such field{nearest(name, fields)}")
        for name, field in fields.items():
            needed = field.default is dataclasses.MISSING
            _require(not needed or name in values, f"{name} is missing: give it a value")
        return cls(**values)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(f"model.{message}")


def _check_type(name: str, value: Any, wanted: Any) -> None:
    accepted = (int, float) if wanted is float else wanted
    if wanted in (int, float, bool, str):
        fits = isinstance(value, accepted) and (wanted is bool) == isinstance(value, bool)
        _require(fits, f"{name}={value!r}: use a value of type {wanted.__name__}")


def _tuple(value: Any) -> tuple:
    return tuple(value) if isinstance(value, list | tuple) else (value,)

"""Rotary positions (RoFormer, 2104.09864): angles, and how they are stretched for rows longer than those trained on.

| kind | frequencies | source |
|---|---|---|
| linear | divided by `factor` | 2306.15595 |
| llama3 | divided where a wave is longer than the original rows, kept where it is short, blended between | 2407.21783 |
| yarn | the same by rotations within the original rows; and sin and cos are scaled | 2309.00071 |
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slm_assist.errors import UserError, one_of

KINDS = ("linear", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Attributes:
    kind: one of `KINDS`.
    factor: how many times longer rows may be.
    original_positions: tokens in the rows that the model was trained on at first (llama3, yarn).
    low, high: llama3: waves longer than original_positions / low are divided, shorter than ... / high are kept.
      yarn: beta_slow and beta_fast, the same in rotations within the original rows.
    attention_factor: yarn: multiplies sin and cos; 0: 0.1 ln(factor) + 1.
    truncate: yarn: between whole dimensions.
    """

    kind: str
    factor: float
    original_positions: int = 0
    low: float = 1.0
    high: float = 4.0
    attention_factor: float = 0.0
    truncate: bool = True

    def __post_init__(self):
        one_of("model.rope_scaling.kind", self.kind, KINDS)
        wrong = self.factor <= 0 or self.low <= 0 or self.high <= self.low or self.attention_factor < 0
        if wrong or (self.kind != "linear" and self.original_positions < 1):
            raise UserError(
                f"model.rope_scaling={dataclasses.asdict(self)}: needs factor, low > 0, high > low, "
                "attention_factor >= 0 and, unless linear, original_positions"
            )

    @property
    def amplitude(self) -> float:
        """Multiplies sin and cos."""
        if self.kind != "yarn":
            return 1.0
        return self.attention_factor or (0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0)

    def stretched(self, frequency: np.ndarray, theta: float) -> np.ndarray:
        """The frequencies [dim / 2] (radians a token), in float32 like those given."""
        divided = frequency / np.float32(self.factor)
        if self.kind == "linear":
            return divided
        if self.kind == "llama3":
            waves = np.float32(self.original_positions) / (np.float32(2 * math.pi) / frequency)  # in the original rows
            kept = np.clip((waves - np.float32(self.low)) / np.float32(self.high - self.low), 0, 1)
        else:
            kept = 1 - self._ramp(2 * len(frequency), theta).astype(np.float32)
        return (1 - kept) * divided + kept * frequency

    def _ramp(self, dim: int, theta: float) -> np.ndarray:
        """YaRN: 0 for the dimensions that are kept, 1 for those that are divided."""

        def turning(rotations: float) -> float:
            return dim * math.log(self.original_positions / (rotations * 2 * math.pi)) / (2 * math.log(theta))

        first, last = turning(self.high), turning(self.low)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dim - 1)
        last += 1e-3 * (first == last)
        return np.clip((np.arange(dim // 2) - first) / (last - first), 0, 1)

    @classmethod
    def from_json(cls, values: Any) -> "RopeScaling | None":
        """The scaling of a dict made by `dataclasses.asdict`; None stays None.

        Raises:
          UserError: a field is unknown or missing.
        """
        if values is None or isinstance(values, cls):
            return values
        try:
            return cls(**values)
        except TypeError as error:
            raise UserError(f"model.rope_scaling={values}: {error}") from error


def frequencies(dim: int, theta: float) -> np.ndarray:
    """theta^(-2i / dim) [dim / 2], float32, rounded where transformers rounds: a last bit is seen at far positions."""
    exponent = (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)).astype(np.float64)
    return np.float32(1) / (theta**exponent).astype(np.float32)


def tables(
    positions_BxT: jax.Array, dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[jax.Array, jax.Array]:
    """sin and cos [B, T, dim / 2] of the rotary angles, float32."""
    frequency = frequencies(dim, theta)
    if scaling is not None:
        frequency = scaling.stretched(frequency, theta)
    angle_BxTxH = positions_BxT[..., None].astype(jnp.float32) * frequency
    amplitude = 1.0 if scaling is None else scaling.amplitude
    sin, cos = jnp.sin(angle_BxTxH), jnp.cos(angle_BxTxH)
    return (sin, cos) if amplitude == 1.0 else (amplitude * sin, amplitude * cos)


def rotate(x_BxTxNxH: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the pairs (i, i + dim/2) of every head by the angles of its position; behind `dim` it stays as it is."""
    sin, cos = (angle[:, :, None] for angle in table)
    half = sin.shape[-1]
    first, second, rest = jnp.split(x_BxTxNxH.astype(jnp.float32), (half, 2 * half), axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
    return rotated.astype(x_BxTxNxH.dtype)

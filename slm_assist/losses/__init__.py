"""Losses on soft and hard labels: `dense` is the definition, `blocked` the same numbers without [B, T, V]."""

from slm_assist.losses import blocked, dense
from slm_assist.losses.common import Loss, TokenInfo, TokenStats

__all__ = ["Loss", "TokenInfo", "TokenStats", "blocked", "dense"]

"""Decoders: `ModelConfig` says the shape, `Transformer` binds pure functions over it."""

from slm_assist.models.config import ModelConfig
from slm_assist.models.sizes import NAMED, named
from slm_assist.models.transformer import Transformer, stack, unstack

__all__ = ["NAMED", "ModelConfig", "Transformer", "named", "stack", "unstack"]

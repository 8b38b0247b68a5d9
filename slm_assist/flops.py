"""FLOPs by arithmetic, a token.

The convention is that of PaLM (arXiv 2204.02311, appendix B): 2 FLOPs for each weight of a matrix that a token
meets, the output head counted and the embedding lookup not, plus attention over the full row length (no
discount for causality); training takes three forward passes' worth. Rematerialisation is not counted.
"""

import jax

from slm_assist import hardware
from slm_assist.models import ModelConfig


def forward(config: ModelConfig, seq_len: int) -> float:
    """FLOPs of one forward pass, a token, in rows of `seq_len` tokens."""
    return layers(config, seq_len, config.num_layers) + head(config)


def layers(config: ModelConfig, seq_len: int, count: int) -> float:
    """FLOPs of the first `count` layers, a token."""
    width, head_dim = config.d_model, config.head_dim
    projections = width * head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    mlp = (3 if config.gated_mlp else 2) * width * config.d_ff
    attention = 2 * 2 * seq_len * config.num_heads * head_dim
    return count * (2 * (projections + mlp) + attention)


def head(config: ModelConfig) -> float:
    """FLOPs of the output head alone, a token."""
    return 2 * config.d_model * config.vocab_size


def plain(student: ModelConfig, seq_len: int) -> float:
    """Training FLOPs, a token, without help: forward and backward."""
    return 3 * forward(student, seq_len)


def assisted(student: ModelConfig, teacher: ModelConfig, seq_len: int) -> float:
    """Training FLOPs, a token, with the teacher's forward pass."""
    return plain(student, seq_len) + forward(teacher, seq_len)


def projection(student: ModelConfig, guide: ModelConfig) -> float:
    """Training FLOPs, a token, of the learnt map between two models' hidden states."""
    return 3 * 2 * student.d_model * guide.d_model


def peak(device: jax.Device) -> float | None:
    """The device's dense bfloat16 FLOP/s, None where it is not known (CPUs)."""
    found = hardware.of_device(device.device_kind)
    return found and found.flops

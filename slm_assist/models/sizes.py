"""Named model shapes: pairs of a small LM and the larger one that it helps.

The paper's shapes give its parameter counts (1.49B, 2.82B, 8.46B with 262144 tokens) when the MLP's width is
read as `d_ff` columns in each of three matrices, gate, up and down; with gate and up sharing that width they
would be 0.94B, 1.67B and 4.84B. Of each other pair the small one needs 0.3 to 0.4 of the large one's FLOPs a
token, head included.
"""

from typing import Any

from slm_assist.errors import one_of
from slm_assist.models.config import ModelConfig

_PYTHIA = {
    "gated_mlp": False, "activation": "gelu_exact", "tie_embeddings": False, "embed_scale": False, "norm": "layer",
    "norm_eps": 1e-5, "attention_bias": True, "attention_out_bias": True, "mlp_bias": True, "parallel_residual": True,
}  # fmt: skip


def _pythia(num_layers: int, d_model: int, heads: int) -> dict[str, Any]:
    """A size of the Pythia suite (2304.01373): a quarter of each head rotates."""
    head_dim = d_model // heads
    sizes = {"num_layers": num_layers, "d_model": d_model, "d_ff": 4 * d_model, "head_dim": head_dim}
    return {**_PYTHIA, **sizes, "num_heads": heads, "num_kv_heads": heads, "rotary_dim": head_dim // 4}


_PAPER_NARROW = {"d_model": 1024, "d_ff": 8192, "num_heads": 4, "num_kv_heads": 1, "head_dim": 256}
_PAPER_WIDE = {"d_model": 2048, "d_ff": 16384, "num_heads": 8, "num_kv_heads": 1, "head_dim": 256}

NAMED: dict[str, dict[str, Any]] = {
    # The paper's: 1.5B helps 2.8B, 2.8B helps 8.6B.
    "paper-1.5b": {**_PAPER_NARROW, "num_layers": 44},
    "paper-2.8b": {**_PAPER_NARROW, "num_layers": 92},
    "paper-8.6b": {**_PAPER_WIDE, "num_layers": 72},
    # Pythia's shapes (with a vocabulary of one's own; with theirs, model.size=hf:EleutherAI/pythia-70m).
    "pythia-14m": _pythia(6, 128, 4),
    "pythia-70m": _pythia(6, 512, 8),
    "pythia-160m": _pythia(12, 768, 12),
    "pythia-410m": _pythia(24, 1024, 16),
    "pythia-1b": _pythia(16, 2048, 8),
    "pythia-2.8b": _pythia(32, 2560, 32),
    # For two CPU cores, minutes a run: 0.34M and 1.11M parameters with 2048 tokens.
    "laptop-small": {
        "num_layers": 4, "d_model": 64, "d_ff": 192, "num_heads": 2, "num_kv_heads": 2, "head_dim": 32,
        "scan_layers": False,
    },
    "laptop-large": {
        "num_layers": 4, "d_model": 128, "d_ff": 384, "num_heads": 4, "num_kv_heads": 4, "head_dim": 32,
        "scan_layers": False,
    },
    # For one GPU, a minute a run: 5M to 25M parameters with 16384 tokens.
    "gpu-5m": {"num_layers": 4, "d_model": 192, "d_ff": 528, "num_heads": 3, "num_kv_heads": 3, "head_dim": 64},
    "gpu-9m": {"num_layers": 6, "d_model": 256, "d_ff": 704, "num_heads": 4, "num_kv_heads": 4, "head_dim": 64},
    "gpu-15m": {"num_layers": 8, "d_model": 320, "d_ff": 880, "num_heads": 5, "num_kv_heads": 5, "head_dim": 64},
    "gpu-25m": {"num_layers": 10, "d_model": 384, "d_ff": 1056, "num_heads": 6, "num_kv_heads": 6, "head_dim": 64},
    # For one GPU, an hour a run: 34M, 67M and 101M parameters with 32768 tokens.
    "gpu-35m": {
        "num_layers": 6, "d_model": 512, "d_ff": 1408, "num_heads": 8, "num_kv_heads": 4, "head_dim": 64,
    },
    "gpu-65m": {
        "num_layers": 10, "d_model": 640, "d_ff": 1728, "num_heads": 10, "num_kv_heads": 5, "head_dim": 64,
    },
    "gpu-100m": {
        "num_layers": 12, "d_model": 768, "d_ff": 2048, "num_heads": 12, "num_kv_heads": 4, "head_dim": 64,
    },
}  # fmt: skip


def named(name: str, vocab_size: int, **overrides: Any) -> ModelConfig:
    """The config of a named size; `overrides` replace any of its fields.

    Raises:
      UserError: no size or field is called so.
    """
    one_of("model.size", name, NAMED)
    return ModelConfig.from_json({"vocab_size": vocab_size, **NAMED[name], **overrides})

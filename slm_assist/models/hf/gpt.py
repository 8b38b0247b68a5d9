"""GPT-NeoX (Pythia) and GPT-2."""

from typing import Any

from slm_assist.models.config import ModelConfig
from slm_assist.models.hf import common
from slm_assist.models.hf.common import HF_ACTIVATIONS, llama_json, tied
from slm_assist.models.hf.fields import Fields, rope, rope_json


def neox(f: Fields) -> dict[str, Any]:
    sizes = common.sizes(f)
    older = {"rotary_pct": f.take("rotary_pct", 0.25), "rotary_emb_base": f.take("rotary_emb_base", 10000.0)}
    angles = rope(f, older["rotary_emb_base"])
    head_dim, bias = common.head_dim(sizes), f.take("attention_bias", True)
    rotating = int(head_dim * angles.pop("partial", older["rotary_pct"]))
    if not rotating:
        f.refuse("rotary_pct", older["rotary_pct"], "some of each head must rotate")
    return (
        sizes
        | angles
        | {
            "head_dim": head_dim,
            "rotary_dim": rotating if rotating != head_dim else 0,
            "activation": f.activation("hidden_act", "gelu"),
            "gated_mlp": False,
            "norm": "layer",
            "norm_eps": f.take("layer_norm_eps", 1e-5),
            "tie_embeddings": f.take("tie_word_embeddings", False),
            "embed_scale": False,
            "attention_bias": bias,
            "attention_out_bias": bias,
            "mlp_bias": True,
            "parallel_residual": f.take("use_parallel_residual", True),
        }
    )


def neox_json(c: ModelConfig) -> dict[str, Any]:
    partial = (c.rotary_dim or c.head_dim) / c.head_dim
    values = llama_json(c) | rope_json(c.rope_theta, c.rope_scaling, partial)
    for name in ("num_key_value_heads", "head_dim", "rms_norm_eps", "mlp_bias", "rope_theta"):
        del values[name]
    return values | {
        "rotary_pct": partial,
        "rotary_emb_base": c.rope_theta,
        "layer_norm_eps": c.norm_eps,
        "use_parallel_residual": c.parallel_residual,
    }


def gpt2(f: Fields) -> dict[str, Any]:
    width, heads = f.take("n_embd"), f.take("n_head")
    for name, wanted in {
        "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False,
    }.items():  # fmt: skip
        f.require(name, wanted)
    return {
        "vocab_size": f.take("vocab_size"),
        "num_layers": f.take("n_layer"),
        "d_model": width,
        "d_ff": f.take("n_inner", 4 * width),
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": width // heads,
        "activation": f.activation("activation_function", "gelu_new"),
        "gated_mlp": False,
        "norm": "layer",
        "norm_eps": f.take("layer_norm_epsilon", 1e-5),
        "tie_embeddings": tied(f),
        "embed_scale": False,
        "attention_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
        "positions": "learned",
        "max_positions": f.take("n_positions"),
    }


def gpt2_json(c: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": c.vocab_size,
        "n_layer": c.num_layers,
        "n_embd": c.d_model,
        "n_inner": c.d_ff,
        "n_head": c.num_heads,
        "n_positions": c.max_positions,
        "activation_function": {"gelu": "gelu_new"}.get(c.activation, HF_ACTIVATIONS[c.activation]),
        "layer_norm_epsilon": c.norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
    }

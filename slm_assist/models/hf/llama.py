"""Llama and its kin: Mistral, Qwen 2 and 3, Gemma 1 to 3, Granite."""

import math
from typing import Any

from slm_assist.models.config import ModelConfig
from slm_assist.models.hf import common
from slm_assist.models.hf.common import FULL, SLIDING, layer_types, llama_json, tied, windows
from slm_assist.models.hf.fields import ACTIVATIONS, Fields, rope, rope_parameters


def _like_llama(f: Fields, **more: Any) -> dict[str, Any]:
    sizes = common.sizes(f)
    angles = _whole_heads(f, rope(f))
    biases = {"attention_bias": f.take("attention_bias", False), "mlp_bias": f.take("mlp_bias", False)}
    return (
        sizes
        | angles
        | biases
        | {
            "num_kv_heads": f.take("num_key_value_heads", sizes["num_heads"]),
            "head_dim": f.take("head_dim", common.head_dim(sizes)),
            "activation": f.activation("hidden_act", "silu"),
            "norm_eps": f.take("rms_norm_eps", 1e-6),
            "tie_embeddings": f.take("tie_word_embeddings", False),
            "attention_out_bias": biases["attention_bias"],
            "embed_scale": False,
        }
        | more
    )


def _whole_heads(f: Fields, angles: dict[str, Any]) -> dict[str, Any]:
    if (partial := angles.pop("partial", 1.0)) != 1.0:
        f.refuse("partial_rotary_factor", partial, "only gpt_neox rotates a part of a head")
    return angles


def llama(f: Fields) -> dict[str, Any]:
    return _like_llama(f)


def mistral(f: Fields) -> dict[str, Any]:
    window = f.take("sliding_window", 4096, null=None)
    return _like_llama(f) | ({"pattern": ("local",), "window": window} if window else {})


def mistral_json(c: ModelConfig) -> dict[str, Any]:
    return llama_json(c) | {"sliding_window": c.window or None}


def _qwen_windows(f: Fields) -> dict[str, Any]:
    layers, first = f.peek("num_hidden_layers"), f.take("max_window_layers", 28)
    window = f.take("sliding_window", None)
    window = window if f.take("use_sliding_window", False) else None
    return windows(f, layers, lambda i: i >= first, window)


def qwen2(f: Fields) -> dict[str, Any]:
    kinds = _qwen_windows(f)
    return _like_llama(f, attention_bias=True, attention_out_bias=False, **kinds)


def qwen3(f: Fields) -> dict[str, Any]:
    kinds = _qwen_windows(f)
    if f.peek("head_dim") is None:
        f.take("head_dim")  # the default, 128, is not that of a head of the stream's width
    return _like_llama(f, qk_norm=True, **kinds)


def qwen_json(c: ModelConfig) -> dict[str, Any]:
    local = "local" in c.pattern
    return llama_json(c) | {
        "use_sliding_window": local,
        "sliding_window": c.window or None,
        "max_window_layers": 0 if local else c.num_layers,
        "layer_types": layer_types(c),
    }


def qwen2_json(c: ModelConfig) -> dict[str, Any]:
    values = qwen_json(c)
    del values["attention_bias"], values["mlp_bias"]
    return values


def _gemma(f: Fields, **more: Any) -> dict[str, Any]:
    if not f.peek("use_bidirectional_attention"):
        f.take("use_bidirectional_attention", None)
    older = f.take("hidden_act", None)
    # A legacy value of the official releases, which transformers reads so.
    older = "gelu_pytorch_tanh" if older == "gelu" else older
    activation = f.take("hidden_activation", older or "gelu_pytorch_tanh")
    if activation not in ACTIVATIONS:
        f.refuse("hidden_activation", activation, f"only {', '.join(ACTIVATIONS)} are supported")
    if older and ACTIVATIONS.get(older) != ACTIVATIONS[activation]:
        f.refuse("hidden_act", older, f"hidden_activation={activation} contradicts it")
    for name in ("head_dim", "num_key_value_heads"):
        if f.peek(name) is None:
            f.take(name)
    values = _like_llama(f, norm="rms_offset", embed_scale=True, **more)
    return values | {"activation": ACTIVATIONS[activation]}


def gemma1(f: Fields) -> dict[str, Any]:
    return _gemma(f, tie_embeddings=tied(f))


def gemma1_json(c: ModelConfig) -> dict[str, Any]:
    values = llama_json(c)
    del values["mlp_bias"]
    return values | {"hidden_activation": values["hidden_act"]}


def gemma2(f: Fields) -> dict[str, Any]:
    kinds = windows(f, f.peek("num_hidden_layers"), lambda i: i % 2 == 0, f.take("sliding_window", 4096))
    return _gemma(
        f,
        tie_embeddings=tied(f),
        post_norms=True,
        attention_scale=float(f.take("query_pre_attn_scalar", 256)) ** -0.5,
        attention_softcap=float(f.take("attn_logit_softcapping", 50.0, null=0.0)),
        logit_softcap=float(f.take("final_logit_softcapping", 30.0, null=0.0)),
        **kinds,
    )


def gemma2_json(c: ModelConfig) -> dict[str, Any]:
    values = gemma1_json(c)
    del values["hidden_act"]
    return values | {
        "query_pre_attn_scalar": _whole((c.attention_scale or c.head_dim**-0.5) ** -2),
        "attn_logit_softcapping": c.attention_softcap or None,
        "final_logit_softcapping": c.logit_softcap or None,
        "sliding_window": c.window or 4096,
        "layer_types": layer_types(c),
    }


def _whole(value: float) -> float:
    return round(value) if math.isclose(value, round(value), rel_tol=1e-9) else value


def gemma3(f: Fields) -> dict[str, Any]:
    if cap := f.take("attn_logit_softcapping", None):
        f.refuse("attn_logit_softcapping", cap, "transformers computes Gemma 3 without it")
    every = f.take("sliding_window_pattern", f.take("_sliding_window_pattern", 6))
    f.take("_sliding_window_pattern", None)
    given = f.take("rope_parameters", {})
    local = f.take("rope_local_base_freq", 10000.0)
    if given:
        f.take("rope_theta", None), f.take("rope_scaling", None)
        inner = Fields(given, f"{f.where}: rope_parameters")
        kinds = {kind: inner.take(kind) for kind in (SLIDING, FULL)}
        inner.done()
        parts = {k: rope(Fields({"rope_parameters": v}, f"{f.where}: rope_parameters.{k}")) for k, v in kinds.items()}
        if "rope_scaling" in parts[SLIDING]:
            f.refuse("rope_parameters", kinds[SLIDING], f"{SLIDING} is not stretched here")
        local, angles = parts[SLIDING]["rope_theta"], parts[FULL]
    else:
        angles = rope(f, 1e6)
    angles = _whole_heads(f, angles)
    kinds = windows(f, f.peek("num_hidden_layers"), lambda i: (i + 1) % every != 0, f.take("sliding_window", 4096))
    return _gemma(
        f,
        tie_embeddings=tied(f),
        post_norms=True,
        qk_norm=True,
        attention_scale=float(f.take("query_pre_attn_scalar", 256)) ** -0.5,
        logit_softcap=float(f.take("final_logit_softcapping", 0.0)),
        local_rope_theta=local,
        **angles,
        **kinds,
    )


def gemma3_json(c: ModelConfig) -> dict[str, Any]:
    values = gemma2_json(c)
    local = c.local_rope_theta or c.rope_theta
    return values | {
        "rope_parameters": {
            FULL: rope_parameters(c.rope_theta, c.rope_scaling),
            SLIDING: rope_parameters(local, None),
        },
        "rope_local_base_freq": local,
    }


def granite(f: Fields) -> dict[str, Any]:
    f.require("residual_multiplier", 1.0)
    multiplier, width = f.take("embedding_multiplier", 1.0), f.peek("hidden_size") or 1
    scaled = math.isclose(multiplier, math.sqrt(width), rel_tol=1e-6)
    if not scaled and multiplier != 1.0:
        f.refuse(
            "embedding_multiplier", multiplier, f"only 1 and sqrt(hidden_size)={math.sqrt(width):.6g} are supported"
        )
    values = _like_llama(f, embed_scale=scaled, logit_scale=1.0 / f.take("logits_scaling", 1.0))
    return values | {"attention_scale": float(f.take("attention_multiplier", 1.0))}


def granite_json(c: ModelConfig) -> dict[str, Any]:
    return llama_json(c) | {
        "embedding_multiplier": math.sqrt(c.d_model) if c.embed_scale else 1.0,
        "attention_multiplier": c.attention_scale or c.head_dim**-0.5,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0 / c.logit_scale,
    }

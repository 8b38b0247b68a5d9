"""What families have in common: sizes, the fields that most share, kinds of layers."""

from collections.abc import Callable, Iterable
from typing import Any

from slm_assist.models.config import ModelConfig
from slm_assist.models.hf.fields import Fields, rope_json

HF_ACTIVATIONS = {"gelu_exact": "gelu", "gelu": "gelu_pytorch_tanh", "silu": "silu", "relu": "relu"}
SLIDING, FULL = "sliding_attention", "full_attention"


def sizes(f: Fields) -> dict[str, Any]:
    """What all families but GPT-2 call the same."""
    heads = f.take("num_attention_heads")
    return {
        "vocab_size": f.take("vocab_size"),
        "num_layers": f.take("num_hidden_layers"),
        "d_model": f.take("hidden_size"),
        "d_ff": f.take("intermediate_size"),
        "num_heads": heads,
        "num_kv_heads": heads,
    }


def head_dim(sizes: dict[str, Any]) -> int:
    return sizes["d_model"] // sizes["num_heads"]


def tied(f: Fields) -> bool:
    """Gemma's and GPT-2's default."""
    return f.take("tie_word_embeddings", True)


def llama_json(c: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": c.vocab_size,
        "num_hidden_layers": c.num_layers,
        "hidden_size": c.d_model,
        "intermediate_size": c.d_ff,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": HF_ACTIVATIONS[c.activation],
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
        "attention_bias": c.attention_bias,
        "mlp_bias": c.mlp_bias,
        **rope_json(c.rope_theta, c.rope_scaling),
    }


def pattern_of(kinds: Iterable[str]) -> tuple[str, ...]:
    """The shortest pattern that, repeated, gives the kinds of all layers."""
    kinds = tuple(kinds)
    for size in range(1, len(kinds)):
        if len(kinds) % size == 0 and kinds[:size] * (len(kinds) // size) == kinds:
            return kinds[:size]
    return kinds


def windows(f: Fields, layers: int, sliding: Callable[[int], bool], window: int | None) -> dict[str, Any]:
    """Kinds of the layers, by `layer_types` or, in older files, by the family's rule."""
    given = f.take("layer_types", [SLIDING if window and sliding(i) else FULL for i in range(layers)])
    if unknown := set(given) - {SLIDING, FULL}:
        f.refuse("layer_types", sorted(unknown)[0], f"only {FULL} and {SLIDING} are supported")
    if len(given) != layers:
        f.refuse("layer_types", f"{len(given)} kinds", f"there are {layers} layers")
    local = SLIDING in given
    if local and not window:
        f.refuse("sliding_window", window, f"layer_types has {SLIDING}")
    pattern = pattern_of("local" if kind == SLIDING else "global" for kind in given)
    return {"pattern": pattern, "window": window if local else 0}


def layer_types(c: ModelConfig) -> list[str]:
    kinds = {"local": SLIDING, "global": FULL}
    return [kinds[kind] for kind in c.pattern] * c.num_groups

"""Small models in Hugging Face's form, made by transformers itself from configs, offline."""

import functools
import json
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCAB = 300  # rows of the embeddings; the tokenizer has fewer
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 6, "intermediate_size": 28,
    "max_position_embeddings": 4096, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
BY_LAYER = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
EAGER = {"attn_implementation": "eager"}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "pythia": ("GPTNeoX", {"hidden_size": 48, "rotary_pct": 0.25}),
    "neox in turn": ("GPTNeoX", {
        "hidden_size": 48, "rotary_pct": 1.0, "use_parallel_residual": False, "attention_bias": False,
        "hidden_act": "relu", "tie_word_embeddings": True,
    }),
    "llama 3": ("Llama", {
        "num_key_value_heads": 2, "head_dim": 14, "rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True,
    }),
    "llama 2, stretched": ("Llama", {
        "num_key_value_heads": 6, "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4},
        "tie_word_embeddings": True,
    }),
    "llama, yarn": ("Llama", {"num_key_value_heads": 1, "head_dim": 16, "rope_parameters": YARN}),
    "mistral": ("Mistral", {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 7}),
    "qwen 2": ("Qwen2", {
        "num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1,
    }),
    "qwen 3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 10, "attention_bias": True, "rope_parameters": YARN}),
    "gemma": ("Gemma", {"num_key_value_heads": 1, "head_dim": 8}),
    "gemma 2": ("Gemma2", {
        "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 11, "query_pre_attn_scalar": 13,
        "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, **EAGER,
    }),
    "gemma 2, no caps": ("Gemma2", {
        "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 11, "attn_logit_softcapping": None,
        "final_logit_softcapping": None, **EAGER,
    }),
    "gemma 3": ("Gemma3Text", {
        "num_hidden_layers": 8, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 11,
        "query_pre_attn_scalar": 5, "rope_parameters": BY_LAYER, **EAGER,
    }),
    "granite": ("Granite", {
        "num_key_value_heads": 2, "attention_multiplier": 0.3, "logits_scaling": 2.0, "embedding_multiplier": 24**0.5,
    }),
    "gpt 2": ("GPT2", {}),
}  # fmt: skip
GPT2 = {
    "vocab_size": VOCAB, "n_embd": 24, "n_layer": 3, "n_head": 3, "n_inner": 50, "n_positions": 4096, "bos_token_id": 0,
    "eos_token_id": 0,
}  # fmt: skip


def model(name: str, **changes: Any) -> Any:
    """A model of transformers with random weights, one of `CONFIGS` with `changes`."""
    family, own = CONFIGS[name]
    sizes = (
        SIZES
        if family != "GPT2"
        else GPT2 | {key: SIZES[key] for key in ("vocab_size", "bos_token_id", "eos_token_id")}
    )
    config = getattr(transformers, f"{family}Config")(**(sizes | own | changes))
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in made.parameters():  # norms and biases as well
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return made


@functools.cache
def tokenizer_json() -> str:
    """Byte-level BPE with fewer tokens than `VOCAB`, <|endoftext|> first."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    text = (Path(sysconfig.get_paths()["stdlib"]) / "json" / "decoder.py").read_text(encoding="utf-8")
    made.train_from_iterator([text], trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    ))  # fmt: skip
    return made.to_str()


def folder(path: Path, name: str, *, tokenizer: bool = True, **changes: Any) -> Any:
    """Saves `model(name)` in `path`, with a tokenizer; returns it."""
    made = model(name, **changes)
    made.save_pretrained(path)
    if tokenizer:
        (path / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
    return made


def edit(path: Path, **changes: Any) -> None:
    """Changes fields of a folder's config.json; None removes one."""
    file = path / "config.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def logits(made: Any, tokens: np.ndarray, seen: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """[B, T, V] of transformers itself; `seen` is 0 where there is padding."""
    with torch.no_grad():
        given = {"attention_mask": torch.tensor(seen), "position_ids": torch.tensor(positions)}
        return made(torch.tensor(tokens), **given).logits.numpy()

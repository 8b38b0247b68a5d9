"""config.json field by field: what is not understood is an error that names it."""

import math
from collections.abc import Mapping
from typing import Any

from slm_assist.errors import UserError
from slm_assist.models.rope import RopeScaling

# Fields of transformers' configs that do not change what a causal model computes, whatever their value.
_NO_EFFECT = """
_attn_implementation _attn_implementation_autoset _name_or_path _num_labels architectures attention_dropout
attention_probs_dropout_prob attn_implementation attn_pdrop bad_words_ids begin_suppress_tokens bos_token_id
cache_implementation chunk_size_feed_forward classifier_dropout decoder_start_token_id diversity_penalty do_sample
dtype early_stopping embd_pdrop encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty
finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing hidden_dropout hidden_dropout_prob
id2label initializer_range is_decoder is_llama_config label2id length_penalty max_length max_position_embeddings
max_sequence_length min_length model_type n_ctx name_or_path no_repeat_ngram_size num_beam_groups num_beams
num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix pretraining_tp
problem_type remove_invalid_values reorder_and_upcast_attn repetition_penalty resid_pdrop return_dict
return_dict_in_generate sep_token_id summary_activation summary_first_dropout summary_proj_to_labels summary_type
summary_use_proj suppress_tokens task_specific_params temperature tokenizer_class top_k top_p torch_dtype
torchscript transformers.js_config transformers_version typical_p unk_token_id unsloth_fixed unsloth_version
use_bfloat16 use_cache
"""
WITHOUT_EFFECT = frozenset(_NO_EFFECT.split())
# Switches that are off in the models that we know, and would change the result.
OFF = (
    "rope_interleaved", "use_mrope", "is_encoder_decoder", "tie_encoder_decoder", "pruned_heads", "add_cross_attention",
)  # fmt: skip
ACTIVATIONS = {
    "gelu": "gelu_exact",
    "gelu_new": "gelu",
    "gelu_fast": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}
_MISSING = object()


class Fields:
    """The fields of a config.json that nobody has taken yet.

    Args:
      values: the JSON's contents.
      where: names the file in errors.
    """

    def __init__(self, values: Mapping[str, Any], where: str):
        self._left, self.where = dict(values), where

    def take(self, name: str, default: Any = _MISSING, *, null: Any = _MISSING) -> Any:
        """The field's value; `default` where it is missing, and where it is null unless that means `null`.

        Raises:
          UserError: it is missing and has no default.
        """
        if null is not _MISSING and name in self._left and self._left[name] is None:
            return null
        value = self._left.pop(name, None)
        if value is None:
            if default is _MISSING:
                raise UserError(f"{self.where}: {name} is missing; the file is not whole, or of another kind of model")
            return default
        return value

    def peek(self, name: str) -> Any:
        """The value without taking it, None where it is missing."""
        return self._left.get(name)

    def require(self, name: str, wanted: Any, default: Any = None) -> None:
        """Takes a field that must have one value.

        Raises:
          UserError: it has another.
        """
        value = self.take(name, wanted if default is None else default)
        if value != wanted:
            self.refuse(name, value, f"only {wanted!r} is supported")

    def refuse(self, name: str, value: Any, reason: str) -> None:
        raise UserError(f"{self.where}: {name}={value!r} would change the result, and {reason}; use another model")

    def activation(self, name: str, default: Any = _MISSING) -> str:
        """Our name of the activation function."""
        value = self.take(name, default)
        if value not in ACTIVATIONS:
            self.refuse(name, value, f"only {', '.join(ACTIVATIONS)} are supported")
        return ACTIVATIONS[value]

    def done(self) -> None:
        """Raises `UserError` for a field that nobody took, unless it is known to change nothing, or null."""
        for name, value in self._left.items():
            if value is not None and name not in WITHOUT_EFFECT and not (name in OFF and not value):
                raise UserError(
                    f"{self.where}: the field {name}={_short(value)} is not known here and might change the result; "
                    "remove it from the file if it does not"
                )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def rope(fields: Fields, theta: float = 10000.0) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` and perhaps `partial` (the share of a head that rotates), in either form:

    `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before).
    """
    given = dict(fields.take("rope_parameters", {}))
    older = dict(fields.take("rope_scaling", {}))
    if given and older and older != given:
        fields.refuse("rope_scaling", older, f"it is not what rope_parameters={given} says")
    inner = Fields(given or older, f"{fields.where}: {'rope_parameters' if given else 'rope_scaling'}")
    result: dict[str, Any] = {"rope_theta": float(inner.take("rope_theta", fields.take("rope_theta", theta)))}
    if (partial := inner.take("partial_rotary_factor", fields.take("partial_rotary_factor", None))) is not None:
        result["partial"] = partial
    kind = inner.take("rope_type", inner.take("type", "default"))
    inner.take("type", None)
    longest = fields.peek("max_position_embeddings")
    if kind == "default":
        inner.take("factor", None)
    else:
        result["rope_scaling"] = _scaling(inner, kind, longest)
    inner.done()
    return result


def _scaling(inner: Fields, kind: str, longest: int | None) -> RopeScaling:
    if kind == "linear":
        inner.take("original_max_position_embeddings", None)
        return RopeScaling("linear", float(inner.take("factor")))
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            float(inner.take("factor")),
            original_positions=inner.take("original_max_position_embeddings"),
            low=float(inner.take("low_freq_factor")),
            high=float(inner.take("high_freq_factor")),
        )
    if kind != "yarn":
        inner.refuse("rope_type", kind, "only default, linear, llama3 and yarn are supported")
    original = inner.take("original_max_position_embeddings", longest)
    factor = float(inner.take("factor", (longest or original) / original))
    inner.take("finetuned", None)
    scales = [inner.take(name, 0.0) for name in ("mscale", "mscale_all_dim")]
    amplitude = 0.0
    if all(scales) and factor > 1:
        above, below = (0.1 * scale * math.log(factor) + 1 for scale in scales)
        amplitude = above / below
    return RopeScaling(
        "yarn",
        factor,
        original_positions=original,
        low=float(inner.take("beta_slow", 1.0)),
        high=float(inner.take("beta_fast", 32.0)),
        attention_factor=float(inner.take("attention_factor", amplitude)),
        truncate=inner.take("truncate", True),
    )


def rope_json(theta: float, scaling: RopeScaling | None, partial: float | None = None) -> dict[str, Any]:
    """The fields that `rope` reads, in both forms, so that older tools read them too."""
    inner = rope_parameters(theta, scaling, partial)
    return {"rope_parameters": inner, "rope_theta": theta, "rope_scaling": inner if scaling else None}


def rope_parameters(theta: float, scaling: RopeScaling | None, partial: float | None = None) -> dict[str, Any]:
    """`rope_parameters` of one type of layer, as transformers 5 writes them."""
    result: dict[str, Any] = {"rope_type": scaling.kind if scaling else "default", "rope_theta": theta}
    if partial is not None:
        result["partial_rotary_factor"] = partial
    if scaling is None:
        return result
    result["factor"] = scaling.factor
    if scaling.kind != "linear":
        result["original_max_position_embeddings"] = scaling.original_positions
    if scaling.kind == "llama3":
        result |= {"low_freq_factor": scaling.low, "high_freq_factor": scaling.high}
    if scaling.kind == "yarn":
        result |= {"beta_slow": scaling.low, "beta_fast": scaling.high, "truncate": scaling.truncate}
        if scaling.attention_factor:
            result["attention_factor"] = scaling.attention_factor
    return result

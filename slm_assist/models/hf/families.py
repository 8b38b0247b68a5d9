"""The families of models: what their config.json means in terms of `ModelConfig`, and the other way round.

| family | what it has of its own |
|---|---|
| gpt_neox | Pythia: layer norms and biases, attention beside the MLP, a quarter of each head rotates |
| llama | Llama 2 and 3, with their RoPE scaling, and many others in their form |
| mistral | Llama's, all layers with a window |
| qwen2, qwen3 | Llama's; biases on queries, keys and values; queries and keys normalised |
| gemma, gemma2, gemma3_text | scales stored less 1, scaled embeddings; soft caps, norms behind, windows |
| gpt2 | layer norms and biases, learnt positions |
| granite | Llama's with factors: the form that models trained here are written in |
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

from slm_assist.errors import UserError
from slm_assist.models.config import ModelConfig
from slm_assist.models.hf import common, gpt, llama, tensors
from slm_assist.models.hf.fields import Fields
from slm_assist.models.hf.tensors import Tensor


@dataclasses.dataclass(frozen=True)
class Family:
    """Attributes:
    model_type: as config.json has it.
    architecture: the class of a causal model.
    read: fields -> what `ModelConfig` needs.
    write: a config -> fields; what it cannot say is lost (`family_of` notices).
    tensors: the parameters of a config.
    """

    model_type: str
    architecture: str
    read: Callable[[Fields], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]
    tensors: Callable[[ModelConfig], Iterator[Tensor]] = tensors.llama


FAMILIES = {
    family.model_type: family
    for family in (  # in the order in which one is looked for that can say what a model is
        Family("llama", "LlamaForCausalLM", llama.llama, common.llama_json),
        Family("gpt_neox", "GPTNeoXForCausalLM", gpt.neox, gpt.neox_json, tensors.neox),
        Family("qwen2", "Qwen2ForCausalLM", llama.qwen2, llama.qwen2_json),
        Family("qwen3", "Qwen3ForCausalLM", llama.qwen3, llama.qwen_json),
        Family("mistral", "MistralForCausalLM", llama.mistral, llama.mistral_json),
        Family("gemma", "GemmaForCausalLM", llama.gemma1, llama.gemma1_json),
        Family("gemma2", "Gemma2ForCausalLM", llama.gemma2, llama.gemma2_json),
        Family("gemma3_text", "Gemma3ForCausalLM", llama.gemma3, llama.gemma3_json),
        Family("gpt2", "GPT2LMHeadModel", gpt.gpt2, gpt.gpt2_json, tensors.gpt2),
        Family("granite", "GraniteForCausalLM", llama.granite, llama.granite_json),
    )
}


def read_config(values: dict[str, Any], where: str) -> tuple[Family, ModelConfig]:
    """Family and shape of a config.json.

    Args:
      where: names the file in errors.

    Raises:
      UserError: a family that is not known, or a field that would change the result and is not supported.
    """
    kind = values.get("model_type")
    if kind not in FAMILIES:
        raise UserError(
            f"{where}: model_type={kind!r} is not a family that is known here; there are {', '.join(FAMILIES)}"
        )
    for name in ("quantization_config", "auto_map"):
        if values.get(name):
            raise UserError(f"{where}: a model with {name} is not supported; use its plain form in floating point")
    fields = Fields(values, where)
    shape = FAMILIES[kind].read(fields)
    fields.done()
    return FAMILIES[kind], ModelConfig.from_json(_plain(shape))


def _plain(shape: dict[str, Any]) -> dict[str, Any]:
    """1 / sqrt(head_dim), said as a number, is our default."""
    scale = shape.get("attention_scale")
    if scale and math.isclose(scale, shape["head_dim"] ** -0.5, rel_tol=1e-9):
        shape = {**shape, "attention_scale": 0.0}
    if shape.get("local_rope_theta") == shape.get("rope_theta", 0.0) and shape.get("rope_scaling") is None:
        shape = {**shape, "local_rope_theta": 0.0}
    return shape


def family_of(config: ModelConfig) -> tuple[Family, dict[str, Any]]:
    """The first family whose config.json gives exactly this config, and that file's contents.

    Raises:
      UserError: there is none; says what stands in the way of the nearest.
    """
    pattern = common.pattern_of(config.pattern * config.num_groups)
    wanted = dataclasses.replace(config, scan_layers=True, pattern=pattern)
    nearest: tuple[int, str, list[str]] | None = None
    for family in FAMILIES.values():
        values = {"model_type": family.model_type, "architectures": [family.architecture]} | family.write(wanted)
        try:
            _, given = read_config(values, family.model_type)
        except UserError:
            continue
        if given == wanted:
            return family, values
        fields = [field.name for field in dataclasses.fields(wanted)]
        missed = [
            f"{name}={getattr(wanted, name)!r}" for name in fields if getattr(wanted, name) != getattr(given, name)
        ]
        if nearest is None or len(missed) < nearest[0]:
            nearest = len(missed), family.model_type, missed
    said = f"the nearest, {nearest[1]}, has not {', '.join(nearest[2])}" if nearest else "none takes its sizes"
    raise UserError(f"no family of transformers can hold this model: {said}; it cannot be exported")

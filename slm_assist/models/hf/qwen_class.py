"""Keeping `AutoTokenizer` from reading a Qwen 2 folder with Qwen's own class where its vocabulary is another.

For model_type qwen2, transformers 5 takes its class Qwen2Tokenizer whatever tokenizer_config.json names, and that
class takes only pieces and merges from the tokenizer.json: the rest is Qwen's. An `auto_map` makes it look at the
name. Without `trust_remote_code` the class named there is then read by no one; with it, it is the one-line module
that is written here, which does the same.
"""

from pathlib import Path
from typing import Any

_MODEL_TYPES = ("qwen2",)  # of the families that are exported here
_MODULE = "plain_tokenizer"
_CODE = """\
from transformers import PreTrainedTokenizerFast


class PlainTokenizer(PreTrainedTokenizerFast):
    \"\"\"tokenizer.json as it is.\"\"\"
"""
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def keep_off_qwen_class(directory: Path, contents: dict[str, Any], model_type: str) -> dict[str, Any]:
    """What to add to tokenizer_config.json; writes the module if there is anything to add.

    Args:
      directory: the model's folder.
      contents: of its tokenizer.json.
      model_type: of its config.json.
    """
    if model_type not in _MODEL_TYPES or _is_qwens(contents):
        return {}
    (directory / f"{_MODULE}.py").write_text(_CODE, encoding="utf-8")
    return {"auto_map": {"AutoTokenizer": [None, f"{_MODULE}.PlainTokenizer"]}}


def _is_qwens(contents: dict[str, Any]) -> bool:
    """Whether Qwen's class would make the same of it."""
    model, before = contents["model"], contents.get("pre_tokenizer") or {}
    split, letters = (before.get("pretokenizers") or [{}, {}])[:2] if before.get("type") == "Sequence" else ({}, {})
    return (
        model.get("type") == "BPE"
        and not any(model.get(key) for key in ("unk_token", "byte_fallback", "ignore_merges", "fuse_unk"))
        and not any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix"))
        and contents.get("normalizer") == {"type": "NFC"}
        and (split.get("pattern"), split.get("behavior"), split.get("invert")) == ({"Regex": _SPLIT}, "Isolated", False)
        and (letters.get("type"), letters.get("add_prefix_space"), letters.get("use_regex"))
        == ("ByteLevel", False, False)
        and (contents.get("decoder") or {}).get("type") == "ByteLevel"
        and any(t["content"] == "<|endoftext|>" for t in contents.get("added_tokens", []))
    )

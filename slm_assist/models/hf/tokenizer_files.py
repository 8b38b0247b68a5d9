"""Vocabularies in the folders of Hugging Face models: written for `transformers`, and read.

A folder that `write` made has tokenizer.json and tokenizer_config.json, which is what `AutoTokenizer` reads, and
what `Vocabulary.save` writes, for `read` to find the same vocabulary again: beside them, or in vocabulary/ where
the tokenizer.json it would write is not the one for `AutoTokenizer`. As everywhere in Hugging Face's tools, a text
that spells a special token (</s>) becomes that token there; `Vocabulary.encode` takes it for text.

Reading takes BOS and EOS by name from a tokenizer.json (data/hugging_face.py): right for GPT-NeoX and GPT-2
(<|endoftext|> ends a document and does not begin one, whatever the config's bos_token_id says), Llama, Qwen and
Gemma, chat models included: their config's eos_token_id ends an answer and not a document (`stop_ids`). Other
names are taken from the folder where it is plain that the model has read them: EOS if none of our names is there
or the folder picks another of them, BOS if the tokenizer puts it before every text.
"""

import json
import logging
import random
from pathlib import Path
from typing import Any

from slm_assist.data.hugging_face import EOS_NAMES, PAD_NAMES, HuggingFaceModel, without_chance
from slm_assist.data.tokenizers import FINGERPRINT_FILE, MODEL_FILE, Vocabulary
from slm_assist.errors import UserError
from slm_assist.models.hf import sentencepiece_json
from slm_assist.models.hf.qwen_class import keep_off_qwen_class

_log = logging.getLogger(__name__)
_JSON_FILE = HuggingFaceModel.file_name
_CONFIG_FILE = "tokenizer_config.json"
_OWN_FOLDER = "vocabulary"
_SAMPLE = (
    *("", " ", "   ", "\n", "\t", "a", " a", "a ", "  two  spaces  ", "\n\nlines\r\n\tand tabs\t\n ", " " * 33 + "x"),
    "Hello, World! It's 0 12 345 6789 3.14e-10 1,000,000",
    "def f(x: int) -> str:\n    return f'{x!r}'  # 0x1F\n\n\tif a[1] != {}: pass\n",
    "https://example.org/a?b=c&d=%20e#f <tag attr='v'/>",
    "aaaaaaaaaaaaaaaaa ababababa ------------ ======",
    "naïve Grüße, ça va? ñ Ω Жизнь العربية עברית",
    "e\u0301 ﬁ ① ｈａｌｆ ½ \u00a0 \u3000 \u200b\u200d\ufeff",
    "漢字かな交じり文、한국어 ไทย हिन्दी",
    "🙂🙃 👩\u200d👩\u200d👧 🇩🇪 x🙂y",
    "\u2581 \u2581\u2581a\u2581",
    "<0x0A> <0xFF> <0xZZ>",
    "\0\x01\x7f\x85\u2028",
)


def write(
    vocabulary: Vocabulary, directory: Path, *, model_max_length: int | None = None, model_type: str = ""
) -> None:
    """Writes what `transformers.AutoTokenizer` needs to give the ids of `vocabulary`, BOS first if it has one.

    A tokenizer.json is written as it is, unless it leaves something out: sentinels, BOS, or that a text has one
    encoding (truncation, padding, dropout). Sentinels become the special tokens <extra_id_0>, ...

    Args:
      vocabulary: what `read` will give back.
      directory: made if missing; what another vocabulary has left there goes.
      model_max_length: tokens that the model can read.
      model_type: of the folder's config.json; some make `AutoTokenizer` ignore parts of a tokenizer.json.

    Raises:
      UserError: no tokenizer.json gives the vocabulary's ids.
    """
    from tokenizers import Tokenizer

    contents = _for_others(vocabulary)
    tokenizer = Tokenizer.from_str(json.dumps(contents))
    _check(vocabulary, tokenizer, contents)
    directory.mkdir(parents=True, exist_ok=True)
    for stale in [directory, directory / _OWN_FOLDER]:
        for name in (MODEL_FILE, _JSON_FILE, FINGERPRINT_FILE):
            (stale / name).unlink(missing_ok=True)
    is_json = vocabulary.file_name == _JSON_FILE
    if is_json and contents == json.loads(vocabulary.model):
        vocabulary.save(directory)
    else:
        vocabulary.save(directory / _OWN_FOLDER if is_json else directory)
        _write_json(directory / _JSON_FILE, contents)
    config = _config(vocabulary) | ({"model_max_length": model_max_length} if model_max_length else {})
    if model_type:
        config |= keep_off_qwen_class(directory, contents, model_type)
    _write_json(directory / _CONFIG_FILE, config)


def _write_json(file: Path, contents: dict[str, Any]) -> None:
    file.write_text(json.dumps(contents, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _for_others(vocabulary: Vocabulary) -> dict[str, Any]:
    """The contents of a tokenizer.json with all that `vocabulary` has."""
    from tokenizers import Tokenizer

    if vocabulary.file_name == _JSON_FILE:
        contents = json.loads(vocabulary.model)
        if without_chance(contents) != {"truncation": None, "padding": None} | contents:
            contents = without_chance(contents)
    else:
        contents = sentencepiece_json.convert(vocabulary.model, "vocabulary")
        if rare := sentencepiece_json.rare_differences(vocabulary.model):
            _log.warning("the exported tokenizer.json can differ from the vocabulary %s", rare)
    if len(vocabulary.sentinel_ids):
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        base = vocabulary.size - len(vocabulary.sentinel_ids)
        names = enumerate(vocabulary.pieces()[base:], base)
        sentinels = [{"id": i, "content": name} | flags for i, name in names]
        contents = contents | {"added_tokens": [*contents.get("added_tokens", []), *sentinels]}
    if vocabulary.bos_id is not None and _first_of(Tokenizer.from_str(json.dumps(contents))) != vocabulary.bos_id:
        contents = contents | {"post_processor": _with_bos(contents.get("post_processor"), vocabulary)}
    return contents


def _first_of(tokenizer: Any) -> int | None:
    """The id that a tokenizer puts before a text; None if it puts none."""
    plain, framed = (tokenizer.encode("a", add_special_tokens=add).ids for add in (False, True))
    return framed[0] if framed[: len(plain)] != plain else None


def _with_bos(processor: dict[str, Any] | None, vocabulary: Vocabulary) -> dict[str, Any]:
    name = vocabulary.pieces()[vocabulary.bos_id]
    first, second = ({"SpecialToken": {"id": name, "type_id": n}} for n in (0, 1))
    text, pair = ({"Sequence": {"id": part, "type_id": n}} for n, part in enumerate("AB"))
    template = {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, second, pair],
        "special_tokens": {name: {"id": name, "ids": [vocabulary.bos_id], "tokens": [name]}},
    }
    return {"type": "Sequence", "processors": [processor, template]} if processor else template


def _config(vocabulary: Vocabulary) -> dict[str, Any]:
    """tokenizer_config.json: which class reads the tokenizer.json, and what the tokens are for."""
    pieces = vocabulary.pieces()
    ids = {"bos": vocabulary.bos_id, "eos": vocabulary.eos_id, "unk": vocabulary.unk_id}
    if pieces[vocabulary.pad_id] in PAD_NAMES:  # else it is an id of another purpose
        ids["pad"] = vocabulary.pad_id
    names = {f"{use}_token": pieces[i] for use, i in ids.items() if i is not None}
    # Since release 5 of transformers this name makes it take the tokenizer.json as it is, older ones know it too.
    return {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | names


def _check(vocabulary: Vocabulary, tokenizer: Any, contents: dict[str, Any]) -> None:
    """Raises `UserError` unless both give a sample of texts the same ids, and ids the same text.

    The sample is fixed and has texts of the vocabulary's own pieces; those that spell special tokens are left out.
    """
    pieces = vocabulary.pieces()
    if any(tokenizer.id_to_token(i) != pieces[i] for i in vocabulary.sentinel_ids.tolist()):
        raise UserError("data.sentinels: the vocabulary's ids have gaps, so no tokenizer.json can have sentinels")
    added = contents.get("added_tokens", [])
    special, own = ([t["content"] for t in added if t["special"] == kind] for kind in (True, False))
    for text in _sample(vocabulary, own):
        if any(name in text for name in special):
            continue
        ours, theirs = vocabulary.encode(text), tokenizer.encode(text, add_special_tokens=False).ids
        if ours != theirs:
            what = f"{text[:80]!r} has the ids {_few(ours)} here and {_few(theirs)} in a tokenizer.json"
        elif vocabulary.unk_id in ours or vocabulary.decode(ours) == tokenizer.decode(ours):
            continue
        else:
            what = f"the ids {_few(ours)} are {vocabulary.decode(ours)!r} here and {tokenizer.decode(ours)!r} there"
        raise UserError(f"the exported tokenizer would differ: {what}; use a vocabulary as those that are trained here")


def _few(ids: list[int]) -> str:
    return f"{ids[:8]}" if len(ids) <= 8 else f"{ids[:8]}... ({len(ids)})"


def _sample(vocabulary: Vocabulary, own: list[str]) -> list[str]:
    """Texts of many kinds, and pieces joined at random; `own` are tokens that stand in texts."""
    rng = random.Random(0)
    joined = []
    for _ in range(300):
        ids = rng.choices(range(vocabulary.size), k=rng.randrange(1, 30))
        joined.append(vocabulary.decode(ids) + " " * rng.choice((0, 0, 1, 3)))
    around = ("{}", "a{}b", " {} {}c")
    return [*_SAMPLE, *joined, *(form.format(token, token) for token in own[:50] for form in around)]


def read(directory: Path, rows: int) -> Vocabulary:
    """The vocabulary of a model's folder; tokenizer.json if there are several files.

    Added special tokens with ids from `rows` up are left out: they have no embedding.

    Args:
      directory: a Hugging Face model's, or one that was exported here.
      rows: of the model's embedding; there may be more than the vocabulary has ids.

    Raises:
      UserError: there is none, it is damaged, or it has more ids than `rows`.
    """
    for own in (directory / _OWN_FOLDER, directory):
        if (own / FINGERPRINT_FILE).exists():
            vocabulary = Vocabulary.load(own)
            break
    else:
        if (directory / _JSON_FILE).exists():
            vocabulary = _read_json(directory, rows)
        elif (directory / MODEL_FILE).exists():
            vocabulary = _read_model(directory / MODEL_FILE)
        else:
            raise UserError(_no_vocabulary(directory))
    if vocabulary.size > rows:
        raise UserError(
            f"{directory}: its vocabulary has {vocabulary.size} ids and the model's embedding {rows} rows; "
            "put the tokenizer of this model there"
        )
    return vocabulary


def _read_model(file: Path) -> Vocabulary:
    try:
        return Vocabulary(file.read_bytes(), str(file))
    except UserError as error:  # as Llama 3's, which is tiktoken's under SentencePiece's name
        raise UserError(f"{error}, or make a tokenizer.json: {_cure(file.parent)}") from error


def _cure(directory: Path) -> str:
    return f"transformers.AutoTokenizer.from_pretrained({str(directory)!r}).save_pretrained({str(directory)!r})"


def _no_vocabulary(directory: Path) -> str:
    has = "only vocab.json and merges.txt" if (directory / "merges.txt").exists() else "no"
    return f"{directory}: has {has} tokenizer.json or tokenizer.model; make the former in Python: {_cure(directory)}"


def _read_json(directory: Path, rows: int) -> Vocabulary:
    file = directory / _JSON_FILE
    model = file.read_bytes()
    vocabulary = Vocabulary(model, str(file))
    contents = json.loads(model)
    late = {t["content"] for t in contents.get("added_tokens", []) if t["special"] and t["id"] >= rows}
    if late:
        contents["added_tokens"] = [t for t in contents["added_tokens"] if t["content"] not in late]
        if isinstance(contents["model"]["vocab"], dict):
            kept = {name: i for name, i in contents["model"]["vocab"].items() if name not in late}
            contents["model"]["vocab"] = kept
        vocabulary = Vocabulary(json.dumps(contents, ensure_ascii=False).encode(), str(file))
    return _with_ends(vocabulary, contents, directory)


def _with_ends(vocabulary: Vocabulary, contents: dict[str, Any], directory: Path) -> Vocabulary:
    """`vocabulary` with the folder's BOS and EOS where it has others (see the module's text)."""
    from tokenizers import Tokenizer

    special = {t["content"]: t["id"] for t in contents.get("added_tokens", []) if t["special"]}
    config = _read_config(directory / _CONFIG_FILE)
    bos, eos = (_name(config.get(key)) for key in ("bos_token", "eos_token"))
    bos_id, eos_id = vocabulary.bos_id, vocabulary.eos_id
    if eos in special and (eos_id is None or eos in EOS_NAMES):
        eos_id = special[eos]
    first = _first_of(Tokenizer.from_str(json.dumps(contents)))
    if first is None and bos_id is None and config.get("add_bos_token") is True:
        first = special.get(bos)
    if first in special.values() and first != eos_id:
        bos_id = first
    return vocabulary.with_ends(bos_id, eos_id)


def _name(token: Any) -> Any:
    """A token's name; older files have its flags too."""
    return token.get("content") if isinstance(token, dict) else token


def _read_config(file: Path) -> dict[str, Any]:
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(contents, dict):
            raise ValueError
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read, or is no JSON object; get it again") from error
    return contents


def stop_ids(directory: Path) -> tuple[int, ...]:
    """The ids after which a model's answer ends, ascending, as its folder says; () where it says nothing.

    They are generation_config.json's eos_token_id, else config.json's. A chat model has several; a document
    still ends with the vocabulary's own `eos_id`.

    Raises:
      UserError: a file is damaged.
    """
    for name in ("generation_config.json", "config.json"):
        config = _read_config(directory / name)
        ids = config.get("eos_token_id", (config.get("text_config") or {}).get("eos_token_id"))
        ids = ids if isinstance(ids, list) else [ids]
        if ids := {i for i in ids if isinstance(i, int)}:
            return tuple(sorted(ids))
    return ()

"""Prompts and answers from records: how a set of examples becomes text to fine-tune on.

A template is text with fields of a record in braces, `Question: {question}\\nAnswer:`; dots lead into inner objects
(`{meta.title}`), braces that are meant are doubled. What the record has as a number or a code may be put into
words (`Choices`), and one field of the prompt may be shortened where an example is too long for a row.
"""

import string
from collections.abc import Mapping
from typing import Any

from slm_assist.data import sources
from slm_assist.data.documents import Document, Prompt
from slm_assist.data.examples import learnt_pattern
from slm_assist.data.text_files import field, value_at
from slm_assist.errors import UserError, nearest


class Templates:
    """How a record becomes a prompt and an answer.

    Args:
      prompt, answer: templates; the prompt's ids are the same here and where an answer is generated, as the two are
        tokenized apart. So a blank between them belongs to the answer for most vocabularies (" {answer}"), and to
        neither for those that put one before every text (Llama 2's).
      choices: "FIELD:word|word|word", the words for 0, 1, 2, or "FIELD:code=word|code=word"; several fields with
        semicolons between.
      shorten: a field of the prompt whose end is cut where an example is longer than a row; empty: none, such
        examples are left out.

    Attributes:
      fields: names of the record's fields that are used, each once.
      key_of: of each field, "prompt" or "answer", the template that has it.
      options: all arguments as a string, for fingerprints.

    Raises:
      UserError: a template or the choices cannot be read, or name a field that no template has.
    """

    def __init__(self, prompt: str, answer: str, *, choices: str = "", shorten: str = ""):
        self._prompt, self._answer = _parse(prompt, "prompt"), _parse(answer, "answer")
        named = {"answer": self._answer, "prompt": self._prompt}
        self.key_of = {name: key for key, parts in named.items() for _, name in parts if name}
        self.fields = tuple(sorted(self.key_of))
        if not any(name for _, name in self._answer):
            raise UserError(f"data.answer={answer!r}: no field in braces; write one, as ' {{answer}}'")
        self._choices = _parse_choices(choices, self.fields)
        self._shorten = shorten
        if shorten and [name for _, name in self._prompt].count(shorten) != 1:
            raise UserError(f"data.shorten={shorten!r}: must be a field that stands once in data.prompt={prompt!r}")
        self.options = repr((prompt, answer, choices, shorten))

    def document(self, record: Mapping[str, Any], domain_field: str, where: str) -> Document:
        """The example that a record is: its text is the answer, empty where that is blank.

        Raises:
          UserError: it lacks a field, or has something else than text or a number there; `where` names the record.
        """
        words = {name: self._word(record, name, where) for name in self.fields}
        prompt, cut = "", (0, 0)
        for literal, name in self._prompt:
            prompt += literal
            if name and name == self._shorten:
                cut = (len(prompt), len(prompt) + len(words[name]))
            prompt += words[name] if name else ""
        answer = "".join(literal + (words[name] if name else "") for literal, name in self._answer)
        domain = field(record, domain_field, where, "domain_field") if domain_field else ""
        return Document(answer if answer.strip() else "", domain, prompt=Prompt(prompt, cut))

    def _word(self, record: Mapping[str, Any], name: str, where: str) -> str:
        key = self.key_of[name]
        value = value_at(record, name, where, key)
        if isinstance(value, bytes):
            try:
                value = value.decode()
            except UnicodeDecodeError as error:
                raise UserError(f"{where}: field {name!r} is not UTF-8; leave the record out") from error
        if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:  # a numpy number
            value = value.item()
        if isinstance(value, list | tuple) and len(value) == 1:  # as tf.train.Example has them
            value = value[0]
        if name in self._choices and isinstance(value, str | int):
            words, code = self._choices[name], str(value).lower() if isinstance(value, bool) else str(value)
            if code not in words:
                raise UserError(f"{where}: field {name!r} is {value!r}, data.choices has words for {', '.join(words)}")
            return words[code]
        if not isinstance(value, str | int | float):
            raise UserError(
                f"{where}: field {name!r} is a {type(value).__name__}, not text or a number: set data.{key}"
            )
        text = str(value)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{where}: field {name!r} has half a surrogate pair at {error.start}; mend it") from error
        return text


def _parse(template: str, key: str) -> list[tuple[str, str]]:
    """(text, the field behind it or "") of each part of a template."""
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"data.{key}={template!r}: {error}; double the braces that stand for themselves") from error
    for _, name, spec, conversion in parsed:
        if name is not None and (not name.strip() or spec or conversion):
            raise UserError(
                f"data.{key}={template!r}: only names of fields may stand in braces, as {{question}}; double others"
            )
    return [(literal, name or "") for literal, name, _, _ in parsed]


def _parse_choices(choices: str, fields: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """Field -> what a record may have there, as text -> the word for it."""
    found: dict[str, dict[str, str]] = {}
    for item in filter(None, map(str.strip, choices.split(";"))):
        name, colon, words = item.partition(":")
        given = words.split("|")
        coded = [word.partition("=") for word in given]
        if not colon or not all(given) or len({bool(equals) for _, equals, _ in coded}) != 1:
            raise UserError(
                f"data.choices: {item!r} is neither FIELD:word|word|word (for 0, 1, 2) nor FIELD:code=word|code=word"
            )
        if name not in fields:
            raise UserError(f"data.choices: no field {name!r} in data.prompt or data.answer{nearest(name, fields)}")
        found[name] = {code: word for code, equals, word in coded if equals} or {
            str(number): word for number, word in enumerate(given)
        }
    return found


def from_config(data: Any) -> Templates | None:
    """The templates of a config's `data` section; None where it has none, for text without prompts.

    Raises:
      UserError: only one of the two, something in them cannot be read, or keys for examples without templates.
    """
    if not data.prompt and not data.answer:
        for key, plain in (("learn", "answer"), ("choices", ""), ("shorten", "")):
            if data[key] != plain and not (key == "learn" and data.source.partition(":")[0] not in sources.KINDS):
                raise UserError(
                    f"data.{key}={data[key]!r} is for examples: set data.prompt and data.answer, or leave it out"
                )
        return None
    if not data.prompt or not data.answer:
        has, lacks = ("prompt", "answer") if data.prompt else ("answer", "prompt")
        raise UserError(f"data.{has}={data[has]!r} without data.{lacks}: an example has both; set it")
    return Templates(data.prompt, data.answer, choices=data.choices, shorten=data.shorten)


def check(data: Any) -> None:
    """Raises `UserError` where the keys of `data` that examples depend on contradict each other."""
    learnt_pattern(data.learn)
    if from_config(data) is None:
        return
    for key in ("source", "validation"):
        if data[key]:
            sources.check_has_fields(data[key], f"data.{key}")
    if data.objective != "causal":
        raise UserError(
            f"data.objective={data.objective} with data.prompt: examples are learnt with data.objective=causal"
        )

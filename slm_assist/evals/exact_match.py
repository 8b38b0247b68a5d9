"""Exact match: answers written greedily to the prompts of a file, and how many have the right result in them."""

import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from slm_assist.data.sources import open_source
from slm_assist.data.templates import Templates
from slm_assist.errors import UserError
from slm_assist.run_dir import RunDir

if TYPE_CHECKING:
    from slm_assist.pretrained import Loaded

GSM8K = r"#### (-?[0-9.,]+)"  # what the results of GSM8K stand behind


class Writer(Protocol):
    """What writes answers: `decode.generate.Generator`, greedy by default."""

    def generate(self, prompts: Sequence[str], *, max_tokens: int, stop: Sequence[str] = ()) -> list[str]: ...


class Result(NamedTuple):
    """Counts, and one line a prompt: {"prompt", "answer", "said", "right"}.

    Attributes:
      right: answers whose result is the reference's; answered: those in which there is a result; count: all.
    """

    right: int
    answered: int
    count: int
    lines: list[dict[str, Any]]

    @property
    def fraction(self) -> float:
        return self.right / self.count

    @property
    def standard_error(self) -> float:
        """Of `fraction`: the sample's standard deviation over the root of the count, as in the EleutherAI harness."""
        return math.sqrt(self.fraction * (1 - self.fraction) / max(self.count - 1, 1))

    def describe(self) -> str:
        return (
            f"exact match {self.fraction:.4f} +- {self.standard_error:.4f} ({self.right:,} of {self.count:,} right, "
            f"{self.count - self.answered:,} without a result)"
        )


def pattern(match: str) -> re.Pattern | None:
    """`match` compiled; None for "".

    Raises:
      UserError: it is no regular expression, or has several groups.
    """
    try:
        compiled = re.compile(match) if match else None
    except re.error as error:
        raise UserError(f"match={match!r}: not a regular expression ({error}); for GSM8K it is {GSM8K!r}") from error
    if compiled and compiled.groups > 1:
        raise UserError(f"match={match!r}: {compiled.groups} groups; put the result in one, others as (?:...)")
    return compiled


def result_in(text: str, compiled: re.Pattern | None) -> str | None:
    """The result in a text: what the first match of the pattern has in its group (else all of it), or the whole text.

    Blanks around it do not count, nor do commas, dollar signs and a last full stop (what the harness's GSM8K leaves
    out), nor the case of letters. None: there is none.
    """
    if compiled:
        found = compiled.search(text)
        if not found:
            return None
        text = found[compiled.groups] or ""
    return re.sub(r"[,$]", "", text).strip().removesuffix(".").casefold()


def exact_match(
    writer: Writer,
    examples: Iterable[tuple[str, str]],
    *,
    match: str = "",
    max_tokens: int = 256,
    stop: Sequence[str] = (),
    at_once: int = 64,
    on_lines: Callable[[list[dict[str, Any]]], Any] = lambda lines: None,
) -> Result:
    """Has answers written and compares their results with those of reference answers.

    Args:
      writer: writes what follows a prompt; greedy unless it was made otherwise.
      examples: (prompt, reference answer).
      match: a regular expression with the result in its group; "" compares whole answers.
      max_tokens: of an answer.
      stop: strings that end an answer.
      at_once: prompts that the writer gets together.
      on_lines: called with the lines of `Result`, so many at a time.

    Raises:
      UserError: a bad `match`, a reference without a result, no examples.
    """
    compiled = pattern(match)
    everything, lines = iter(examples), []
    while some := list(itertools.islice(everything, at_once)):
        wanted = [result_in(answer, compiled) for _, answer in some]
        if None in wanted:
            answer = " ".join(some[wanted.index(None)][1].split())[-80:]
            raise UserError(f"match={match!r}: not in the reference answer ...{answer!r}; mend the pattern")
        said = writer.generate([prompt for prompt, _ in some], max_tokens=max_tokens, stop=stop)
        new = [
            {"prompt": prompt, "answer": answer, "said": text, "right": result_in(text, compiled) == result}
            for (prompt, answer), text, result in zip(some, said, wanted, strict=True)
        ]
        on_lines(new)
        lines += new
    if not lines:
        raise UserError("exact match: no examples; give a source that has some")
    answered = sum(result_in(line["said"], compiled) is not None for line in lines)
    return Result(sum(line["right"] for line in lines), answered, len(lines), lines)


def run_exact_match(
    loaded: "Loaded",
    source: str,
    prompt: str = "",
    answer: str = "",
    match: str = "",
    limit: int | None = None,
    max_tokens: int = 256,
    out: str | Path | None = None,
    *,
    choices: str = "",
    stop: Sequence[str] = (),
    writer: Writer | None = None,
    say: Callable[[str], Any] = print,
) -> Result:
    """Exact match of a model on a source of records; says the figures, and writes the lines to `out`.

    Args:
      loaded: the model.
      source: as data.source: jsonl:, parquet:, array_record: or tfds:.
      prompt, answer, choices: as in the config (see data/templates.py); by default what the model's run was fine-tuned
        with. Prompts are not shortened.
      match, max_tokens, stop: as for `exact_match`.
      limit: only the first so many examples; none: all.
      out: a file of JSON lines, written as answers come; none: no file.
      writer: by default a Generator of the model.

    Raises:
      UserError: no templates, a source that cannot be read, whatever `exact_match` says.
    """
    pattern(match)
    templates = _templates(loaded.name, prompt, answer, choices)
    if writer is None:
        from slm_assist.decode.generate import Generator

        writer = Generator(loaded.model, loaded.params, loaded.vocabulary, stop_ids=loaded.stop_ids)
    documents = itertools.islice(open_source(source, templates=templates).documents(), limit or None)
    examples = ((document.prompt.text, document.text) for document in documents)
    options = {"match": match, "max_tokens": max_tokens, "stop": stop}
    if not out:
        result = exact_match(writer, examples, **options)
    else:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        with open(out, "w", encoding="utf-8") as file:

            def write(lines: list[dict[str, Any]]) -> None:
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
                file.flush()

            result = exact_match(writer, examples, **options, on_lines=write)
    say(f"{source}: {result.describe()}" + (f"; each answer in {out}" if out else ""))
    return result


def _templates(name: str, prompt: str, answer: str, choices: str) -> Templates:
    """Those that are given, else the run's."""
    run = RunDir(name)
    data = run.read(run.config)["config"]["data"] if run.config.is_file() else {}
    its = {key: data.get(key, "") for key in ("prompt", "answer", "choices")}
    prompt, answer = prompt or its["prompt"], answer or its["answer"]
    if not prompt or not answer:
        raise UserError(f"{name}: not fine-tuned with data.prompt and data.answer; give a template for both")
    if (prompt, answer) == (its["prompt"], its["answer"]):
        choices = choices or its["choices"]
    return Templates(prompt, answer, choices=choices)

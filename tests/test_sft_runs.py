"""Fine-tuning: runs on examples, exact match of what a model writes, and the shipped experiments."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiny
from test_sft import ANSWER, PROMPT, RECORDS, T, error, write

from slm_assist import config as config_lib
from slm_assist import corpus, pretrained, report
from slm_assist.data.templates import from_config
from slm_assist.evals import exact_match

EXPERIMENTS = Path(__file__).parents[1] / "experiments" / "sft"
SFT = {"data__prompt": PROMPT, "data__answer": ANSWER, "data__domain_field": "set", "data__seq_len": T,
       "data__vocab_size": 330}  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small LM that learns sums, the source of them, and what was said."""
    tmp, messages = tmp_path_factory.mktemp("runs"), []
    spec = write(tmp, RECORDS)
    return tiny.run(tmp, "small", messages=messages, data__source=spec, model__d_model=16, **SFT), spec, messages


def test_the_loss_is_that_of_answers(small):
    run, spec, messages = small
    assert any(re.match(r"examples: \d+ whole, \d+% of the rows filled", line) for line in messages)
    loaded = pretrained.load(str(run), say=lambda line: None)
    config, _ = config_lib.resolve("", tiny.overrides(run.path.parent, data__source=spec, **SFT))
    held = corpus.prepare(config, say=lambda line: None).validation
    batch = held.get(np.arange(len(held)))
    hidden = loaded.model.apply(
        loaded.params, batch["tokens"], segment_ids=batch["segment_ids"], positions=batch["positions"]
    )
    logits = np.asarray(hidden, np.float64) @ np.asarray(loaded.model.head(loaded.params), np.float64)
    pieces, marks = loaded.vocabulary.pieces(), (loaded.vocabulary.bos_id, loaded.vocabulary.eos_id)
    total = count = 0
    for tokens, targets, logit in zip(batch["tokens"], batch["targets"], logits, strict=True):
        before = ""
        for token, target, row in zip(tokens.tolist(), targets.tolist(), logit, strict=True):
            before = "" if token in marks else before + pieces[token].replace("\u2581", " ")
            if "\nA:" in before:
                total += np.log(np.exp(row - row.max()).sum()) + row.max() - row[target]
                count += 1
    last = [record for record in tiny.records(run) if record["kind"] == "validation"][-1]
    assert last["tokens"] == count == held.tokens
    assert last["log_perplexity"] == pytest.approx(total / count, rel=1e-4)


def test_a_small_lm_assists_and_selects(small):
    teacher, spec, _ = small
    student = tiny.run(teacher.path.parent, "student", data__source=spec, assist__schedule="step", assist__steps=6,
                       assist__teacher=str(teacher), select__rows="online", select__pool_factor=2, select__sample=8,
                       select__scorer_step=9, select__k=200, **SFT)  # fmt: skip
    lines = [record for record in tiny.records(student) if record["kind"] == "train"]
    assert lines[0]["stage"] != lines[-1]["stage"] and lines[0]["distillation_kl"] > 0
    assert 0 < lines[-1]["tokens"] < 12 * 8 * T / 2  # answers are less than half of the rows
    report.run_report([str(teacher), str(student)], str(student.path.parent / "report"))
    assert (student.path.parent / "report" / "report.html").is_file()


class Reader:
    """Says of each prompt what is written down for it."""

    def __init__(self, said):
        self.said, self.batches = said, []

    def generate(self, prompts, *, max_tokens, stop=()):
        self.batches.append((len(prompts), max_tokens, tuple(stop)))
        return [self.said[prompt] for prompt in prompts]


def test_exact_match_counts_results():
    given = [("a", "so\n#### 1,234"), ("b", "#### -3.5"), ("c", "#### 7"), ("d", "x #### 8"), ("e", "#### 9")]
    said = {"a": " 617 * 2\n#### 1234.", "b": "#### -3.50", "c": "seven", "d": "#### $8 and #### 9", "e": "#### 9\nQ:"}
    writer, lines = Reader(said), []
    options = {"match": r"#### (\$?-?[0-9.,]+)", "max_tokens": 11, "stop": ["Q:"], "at_once": 2}
    result = exact_match.exact_match(writer, given, **options, on_lines=lines.extend)
    assert [line["right"] for line in result.lines] == [True, False, False, True, True]
    assert (result.right, result.answered, result.count) == (3, 4, 5) and lines == result.lines
    assert writer.batches == [(2, 11, ("Q:",)), (2, 11, ("Q:",)), (1, 11, ("Q:",))]
    scores = np.array([line["right"] for line in result.lines], float)
    assert result.fraction == scores.mean()
    assert result.standard_error == pytest.approx(scores.std(ddof=1) / np.sqrt(5))
    whole = exact_match.exact_match(Reader({"p": " True\n", "q": "no"}), [("p", " true"), ("q", " yes")])
    assert (whole.right, whole.count) == (1, 2)
    assert exact_match.result_in("so #### 1,234.50", exact_match.pattern(exact_match.GSM8K)) == "1234.50"


def test_bad_exact_match_in_one_line():
    writer = Reader({"a": ""})
    assert "not in the reference answer ...'no result'" in error(
        exact_match.exact_match, writer, [("a", "no result")], match="#### (.*)"
    )
    assert "not a regular expression" in error(exact_match.exact_match, writer, [("a", "")], match="(")
    assert "2 groups" in error(exact_match.exact_match, writer, [("a", "")], match="(a)(b)")
    assert "no examples" in error(exact_match.exact_match, writer, [])


def test_exact_match_of_a_run_on_a_file(small, tmp_path):
    run, spec, _ = small
    loaded = pretrained.load(str(run), say=lambda line: None)
    prompts = [f"Q: {record['question']['text']}\nA:" for record in RECORDS]
    said = {prompt: f"#### {sum(map(int, re.findall('[0-9]+', prompt)))}" for prompt in prompts}
    said[prompts[3]] = "#### 0"
    messages, out = [], tmp_path / "out" / "answers.jsonl"
    options = {"match": exact_match.GSM8K, "limit": 20, "writer": Reader(said), "say": messages.append}
    result = exact_match.run_exact_match(loaded, spec, **options, out=out)
    assert (result.right, result.count) == (19, 20)
    assert [json.loads(line) for line in out.read_text().splitlines()] == result.lines
    assert result.lines[0]["prompt"] == prompts[0] and result.lines[0]["answer"] == f" {RECORDS[0]['answer']}"
    assert "exact match 0.9500 +- 0.0500 (19 of 20 right" in messages[0] and str(out) in messages[0]
    another = exact_match.run_exact_match(loaded, spec, answer="{answer}!", **options)
    assert another.lines[0]["answer"] == f"{RECORDS[0]['answer']}!" and another.lines[0]["prompt"] == prompts[0]
    stranger = loaded._replace(name=str(tmp_path))
    assert "not fine-tuned with data.prompt" in error(exact_match.run_exact_match, stranger, spec)


@pytest.mark.parametrize("name", ["gsm8k", "xsum", "cnn_dm", "anli"])
def test_shipped_experiments(name):
    config, _ = config_lib.resolve(f"{EXPERIMENTS}/{name}.py")
    record = {
        "gsm8k": {"question": "q", "answer": "a"},
        "xsum": {"id": 1, "document": "q", "summary": "a"},
        "cnn_dm": {"article": "q", "highlights": "a"},
        "anli": {"context": "q", "hypothesis": "h", "label": 1},
    }[name]
    document = from_config(config.data).document(record, "", name)
    assert "q" in document.prompt.text and document.prompt.text[-1] == ":" and document.text[0] in " \n"
    assert document.text.strip() == ("Neither" if name == "anli" else "a")
    assert document.prompt.cut == ((9, 10) if config.data.shorten else (0, 0))

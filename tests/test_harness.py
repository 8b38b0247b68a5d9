"""The harness's own `hf` model and ours on the same weights, request by request; tasks from local files."""

import functools
import importlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import lm_eval
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from slm_assist import pretrained, sharding
from slm_assist.cli import main
from slm_assist.data.tokenizers import Vocabulary
from slm_assist.errors import UserError
from slm_assist.evals import continuations, evaluating, paper_tasks
from slm_assist.evals.harness import SlmAssistLM, context_length, text_prefix

VOCAB = 320  # more than the tokenizer will have: the rest is padding
TEXTS = ["The cat sat on the mat.", "the rain in Spain falls on the plain", "a small model helps a large model"]
TASKS = {
    "own_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "Q: {{question}}\nA:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        "num_fewshot": 1,
        "fewshot_split": "test",
    },
    "own_perplexity": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": m} for m in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    },
    "own_text": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["e", "\n"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    """Those tasks of the harness that may be named here; reading the files of all takes seconds."""
    folders = (
        "nq_open triviaqa webqs race squadv2 tydiqa arc hellaswag openbookqa piqa storycloze winogrande super_glue"
    )
    files = Path(lm_eval.tasks.__file__).parent
    folders = [files / name for name in f"{folders} lambada mbpp unitxt".split()]
    return TaskManager(include_path=folders, include_defaults=False)


@pytest.fixture(scope="module")
def reference() -> transformers.PreTrainedModel:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.4,
        bos_token_id=0,
        eos_token_id=1,
        max_position_embeddings=512,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folders(reference, tmp_path_factory) -> dict[bool, Path]:
    """The reference as a folder, by whether its tokenizer puts BOS before texts."""
    folders = {bos: tmp_path_factory.mktemp("hf") for bos in (False, True)}
    for bos, folder in folders.items():
        reference.save_pretrained(folder)
        make_hf(reference, bos, 8).tokenizer.save_pretrained(folder)
    return folders


def make_tokenizer(bos: bool) -> tokenizers.Tokenizer:
    """A byte-level BPE with <s> and </s>; with `bos`, texts begin with <s>."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    if bos:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def load_ours(folder: Path, *, data: int = 1, fsdp: int = 1, tensor: int = 1, **options: Any) -> SlmAssistLM:
    return SlmAssistLM(f"hf:{folder}", mesh=sharding.make_mesh(data, fsdp, tensor), **options)


def make_hf(reference, bos: bool, max_length: int) -> HFLM:
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer(bos), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    # Its cache of logits scores the wrong tokens where one text is split at several places (0.4.13).
    return HFLM(pretrained=reference, tokenizer=fast, max_length=max_length, batch_size=3, logits_cache=False)


def instances(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, args, i, ("t", i, 1)) for i, args in enumerate(arguments)]


def requests(reference, vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Contexts and continuations of every kind: none, cut off, with spaces, shared, the likeliest and many others."""
    pairs = [(text[:n], text[n:]) for text in TEXTS for n in range(1, len(text))]
    pairs += [("", " the cat"), ("", "Zebra ü"), ("trailing  ", "spaces"), ("a b c " * 20, "d e f")]
    pairs += [("The cat", " sat on the mat."), ("The cat sat", " on the mat."), ("<s>The", " cat"), ("ßx", "漢字")]
    pairs += [("Is it? It is", vocabulary.decode([i])) for i in range(3, vocabulary.size, 9)]
    for text in {text for text, _ in pairs if text}:
        logits = reference(torch.tensor([[0, *vocabulary.encode(text)]])).logits[0, -1]
        pairs.append((text, vocabulary.decode([int(logits.argmax())])))
    return [(a, b) for a, b in pairs if len(vocabulary.encode(a + b)) > len(vocabulary.encode(a))]


@pytest.mark.parametrize("bos", [False, True])
def test_log_likelihoods_are_those_of_hf(reference, folders, bos):
    hf, ours = make_hf(reference, bos, 24), load_ours(folders[bos], max_length=24, batch_size=5)
    asked = instances("loglikelihood", requests(reference, ours.vocabulary))
    wanted, got = hf.loglikelihood(asked, disable_tqdm=True), ours.loglikelihood(asked, disable_tqdm=True)
    np.testing.assert_allclose([p for p, _ in got], [p for p, _ in wanted], atol=1e-4)
    assert [g for _, g in got] == [g for _, g in wanted]
    assert 2 < sum(g for _, g in got) < len(got) // 2
    with pytest.raises(UserError, match="no tokens of its own: 't.' after 'The cat sat on the ma'"):
        ours.loglikelihood(instances("loglikelihood", [("The cat sat on the ma", "t.")]), disable_tqdm=True)
    assert len(asked) > 100 and ours.shapes == {(24, 8), (24, 24)}

    texts = [("",), (TEXTS[0],), (" ".join(TEXTS) * 3,), ("<s>" + TEXTS[1],)]
    asked = instances("loglikelihood_rolling", texts)
    wanted = hf.loglikelihood_rolling(asked, disable_tqdm=True)
    np.testing.assert_allclose(ours.loglikelihood_rolling(asked, disable_tqdm=True), wanted, rtol=1e-5)
    assert wanted[0] == 0 or bos  # with BOS that token is predicted, as hf does


def test_eight_devices_score_as_one_does(reference, folders):
    one = load_ours(folders[True], max_length=40, batch_size=13)
    eight = load_ours(folders[True], data=2, fsdp=2, tensor=2, max_length=40, batch_size=13)
    assert (one.batch_size, eight.batch_size) == (13, 16)
    asked = instances("loglikelihood", requests(reference, one.vocabulary))
    a, b = (lm.loglikelihood(asked, disable_tqdm=True) for lm in (one, eight))
    np.testing.assert_allclose([p for p, _ in a], [p for p, _ in b], atol=1e-4)
    assert [g for _, g in a] == [g for _, g in b]
    assert eight.shapes == {(40, 8), (40, 40)}


@pytest.mark.parametrize("bos", [False, True])
def test_texts_are_those_of_hf(reference, folders, bos):
    hf, ours = make_hf(reference, bos, 40), load_ours(folders[bos], max_length=40, batch_size=4)
    short = {"until": ["e", "\n"], "max_gen_toks": 12}
    plain = {"until": "the", "max_new_tokens": 7, "do_sample": False, "temperature": 0.0, "num_beams": 1}
    contexts = [*TEXTS, "x " * 60, "q"]
    asked = instances("generate_until", [(text, kwargs) for text in contexts for kwargs in (short, plain)])
    wanted = hf.generate_until(asked, disable_tqdm=True)
    assert ours.generate_until(asked, disable_tqdm=True) == wanted
    assert len(set(wanted)) > 4
    for bad, said in [({"max_gen_toks": 40}, "max_length=40"), ({"max_gen_toks": 4, "num_beams": 4}, "num_beams=4")]:
        with pytest.raises(UserError, match=said):
            ours.generate_until(instances("generate_until", [("a", bad)]), disable_tqdm=True)


def test_one_row_serves_all_answers_that_read_the_same(reference):
    same = [([1, 2, 3], [answer]) for answer in range(8)]
    (row,) = continuations.pack(same, 10)
    assert row.tokens == (1, 2, 3) and row.slots == 8
    assert len(continuations.pack(same + [([1, 2], [3, 9])], 10)) == 2  # no more than eight tokens a row
    (cut,) = continuations.pack([(list(range(20)), [50, 51])], 10)
    assert cut.tokens == (*range(11, 20), 50) and cut.answers[0].first == 8
    with pytest.raises(UserError, match="max_length=3"):
        continuations.pack([([1], [1, 2, 3, 4])], 3)
    assert [continuations.padded_length(n, 300) for n in (1, 64, 65, 200, 300)] == [64, 64, 128, 256, 300]


@pytest.fixture(scope="module")
def run(folders, tmp_path_factory) -> Path:
    """The reference as a run of ours."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    pretrained.keep(pretrained.HubModel(f"hf:{folders[False]}"), directory)
    return directory


def write_tasks(directory: Path) -> Path:
    directory.mkdir()
    rows = [{"question": text, "choices": [" a mat", " the plain", "x"], "answer": i} for i, text in enumerate(TEXTS)]
    (directory / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in TASKS.items():
        files = {"test": str(directory / "data.jsonl")}
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": files},
            "test_split": "test",
        } | task
        (directory / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
    return directory


def test_the_command_gives_the_figures_of_hf(reference, folders, tmp_path, capsys):
    include = write_tasks(tmp_path / "tasks")
    names = ["own_choice", "own_perplexity", "own_text"]
    out = tmp_path / "new" / "results.json"
    model = f"hf:{folders[False]}"
    arguments = ["evaluate", model, f"--include={include}", "--max_length=64", "--rows=2", "--mesh.data=1"]
    arguments += [f"--tasks={','.join(names)},own_*", f"--out={out}", f"--samples={tmp_path / 'samples'}"]
    with mock.patch.object(evaluating, "TaskManager", functools.partial(TaskManager, include_defaults=False)):
        assert main(arguments) == 0
    report, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert (report["step"], report["model"], report["rows"], report["text_prefix"]) == (0, model, 2, [])
    manager = TaskManager(include_path=str(include), include_defaults=False)
    hf = make_hf(reference, False, 64)
    with mock.patch("lm_eval.evaluator.add_env_info"):  # it asks pip, which takes seconds
        wanted = lm_eval.simple_evaluate(hf, tasks=list(names), task_manager=manager, bootstrap_iters=0)
    for name in names:
        assert report["tasks"][name]["shots"] == wanted["n-shot"][name]
        figures = {key: value for key, value in wanted["results"][name].items() if "," in key and "_stderr" not in key}
        for key, value in figures.items():
            assert report["tasks"][name]["figures"][key] == pytest.approx(value, rel=1e-4)
            shown = re.search(rf"{name} .* {key.partition(',')[0]} +(\S+)", printed)
            assert float(shown[1]) == pytest.approx(value, abs=1e-4, rel=1e-4)
        lines = (tmp_path / "samples" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        assert [row["arguments"] for row in rows] == json.loads(
            json.dumps([row["arguments"] for row in wanted["samples"][name]], default=str)
        )
    assert "64 tokens" in printed


def test_the_papers_group_is_what_can_be_run(run, tmp_path, capsys):
    include = write_tasks(tmp_path / "tasks")
    broken = json.loads((include / "own_text.yaml").read_text()) | {"task": "own_broken", "dataset_path": "no/where"}
    (include / "own_broken.yaml").write_text(json.dumps(broken))
    task = paper_tasks.PaperTask
    tasks = (
        task("A", "own_choice", "acc_norm,none", shots=2, scale=0.5),
        task("B", "own_text", "exact_match,none", shots=0),
        task("C", "own_broken"),
        task("D", "unheard_of"),
        task("E", "", note="there is none"),
        task("F", "own_perplexity", unsafe=True),
    )
    arguments = ["evaluate", str(run), f"--include={include}", "--max_length=64", "--mesh.data=1", "--tasks=paper28"]
    with (
        mock.patch.object(paper_tasks, "TASKS", tasks),
        mock.patch.object(evaluating, "TaskManager", functools.partial(TaskManager, include_defaults=False)),
    ):
        assert main([*arguments, "--limit=2", f"--out={tmp_path / 'o.json'}"]) == 0
    report, printed = json.loads((tmp_path / "o.json").read_text()), capsys.readouterr().out
    group, done = report["paper28"], report["tasks"]
    assert {name: task["shots"] for name, task in done.items()} == {"own_choice": 2, "own_text": 0}
    assert {task["samples"] for task in done.values()} == {2}
    a, b = done["own_choice"]["figures"]["acc_norm,none"] / 2, done["own_text"]["figures"]["exact_match,none"]
    assert group["of"] == {"A": a, "B": b} and group["mean"] == (a + b) / 2
    assert set(group["without"]) == set("CDEF") and "cannot be loaded" in group["without"]["C"]
    assert "paper28 without F: own_perplexity runs code" in printed and "mean of 2 of its 6 tasks" in printed


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--tasks=hellaswog"], r"no such task \(did you mean hellaswag\?\)"),
        (["--tasks=paper29"], "did you mean paper28"),
        (["--tasks=arc_easy"], "arc_easy: it cannot be loaded .*dataset_path: json"),
        (["--tasks=arc_easy", "--include=nowhere"], "no such directory"),
        (["--tasks=arc_easy", "--step=3"], "step 3 was not kept; there are 0"),
        (["--tasks=arc_easy", "--bos=yes", "--optimizer.b1=3"], "--optimizer.b1 is not an option of evaluate"),
        ([], "give --tasks"),
        (["--answers=jsonl:x"], "not fine-tuned with data.prompt"),
        (["--answers=jsonl:x", "--match=("], "not a regular expression"),
    ],
)
def test_mistakes_are_one_line(run, manager, capsys, arguments, said):
    with mock.patch.object(evaluating, "TaskManager", lambda include_path: manager):
        assert main(["evaluate", str(run), *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("slm-assist: error: ") and re.search(said, error)


def test_a_model_that_is_not_there_is_one_line(tmp_path, capsys):
    assert main(["evaluate", f"{tmp_path}/nowhere", "--tasks=hellaswag"]) == 2
    assert "there is no such directory" in capsys.readouterr().err.splitlines()[-1]


def test_without_the_harness_a_line_says_how_to_install_it():
    names = [name for name in sys.modules if name.partition(".")[0] == "lm_eval" or name.endswith("evals.harness")]
    with mock.patch.dict(sys.modules, dict.fromkeys(names), clear=False):
        del sys.modules["slm_assist.evals.harness"]
        with pytest.raises(UserError, match=r"pip install 'slm_assist\[eval\]'"):
            importlib.import_module("slm_assist.evals.harness")


def test_the_papers_tasks_are_in_the_harness(manager):
    chosen, left_out = paper_tasks.choose(manager.all_tasks, run_code=True)
    assert len(chosen) + len(left_out) == len({task.paper for task in paper_tasks.TASKS}) == 28
    lacking = {"TyDiQA no-context (en)", "RACE-M", "StoryCloze", "XLSum (en)", "XSum", "WikiLingua (en)"}
    assert set(left_out) == lacking and all(left_out.values())
    assert {task.task: task.shots for task in chosen if task.shots != 1} == {"mbpp": 3}
    for task in chosen:
        config = load_yaml(manager.task_index[task.task].yaml_path, resolve_func=False, recursive=True)
        metrics = {str(entry["metric"]).rpartition(".")[2].strip("'\"") for entry in config.get("metric_list", [])}
        filters = {entry["name"] for entry in config.get("filter_list", [{"name": "none"}])}
        metric, _, filtered = task.metric.partition(",")
        assert filtered in filters and (not metrics or metric in metrics | {"acc_norm"}), task
    assert "MBPP" in paper_tasks.choose(manager.all_tasks, run_code=False)[1]
    assert len(paper_tasks.choose([], run_code=True)[1]) == 28


def test_prefixes_and_lengths(folders, run, tmp_path):
    plain, with_bos = (pretrained.load(f"hf:{folders[bos]}") for bos in (False, True))
    assert text_prefix(plain) == text_prefix(with_bos, False) == []
    assert text_prefix(plain, True) == text_prefix(with_bos) == [0]
    assert context_length(f"hf:{folders[True]}") == context_length(str(run)) == 512
    trained = tmp_path / "trained"
    shutil.copytree(run, trained)
    (trained / "config.json").write_text('{"config": {"data": {"seq_len": 77}}}')
    assert context_length(str(trained)) == 77 and text_prefix(pretrained.load(str(trained))) == []
    (trained / "metrics.jsonl").write_text("")  # it was trained here, and documents began with BOS
    assert text_prefix(pretrained.load(str(trained))) == [0]

    folder = tmp_path / "other"
    shutil.copytree(folders[False], folder)
    assert load_ours(folder).prefix_token_id == 0
    facts = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(facts | {"bos_token": None, "eos_token": "<pad>"}))
    assert load_ours(folder).prefix_token_id == 2 and load_ours(folder, prefix_token_id=9).prefix_token_id == 9

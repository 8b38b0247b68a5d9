"""`slm-assist evaluate`: tasks of the EleutherAI harness, or exact matches with given answers, on any model."""

import argparse
import os
import ssl
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from slm_assist.commands.common import Command, number
from slm_assist.errors import UserError

EXAMPLES = """\
slm-assist evaluate runs/salt --tasks=hellaswag,lambada_openai --out=salt.json
slm-assist evaluate hf:EleutherAI/pythia-160m --tasks=paper28 --limit=200
slm-assist evaluate runs/sft --answers=jsonl:gsm8k/test.jsonl --match='#### (-?[0-9.,]+)'"""
NOTE = """\
Tasks of your own are YAML files in the harness's form: --include=my_tasks --tasks=my_task. paper28 is what the harness
has of the paper's 28 tasks. --mesh.data, --mesh.fsdp and --mesh.tensor lay a large model out over several devices."""
MESH_KEYS = ("data", "fsdp", "tensor")


def add(command: Command) -> None:
    """Adds the subcommand."""
    evaluate = command("evaluate", run, "evaluate a model, by the EleutherAI harness or given answers", EXAMPLES, NOTE)
    evaluate.add_argument("model", metavar="RUN_OR_HF", help="a run directory, or hf:PATH_OR_NAME")
    evaluate.add_argument("--tasks", default="", help="tasks, tags, groups or task files, separated by commas; paper28")
    evaluate.add_argument(
        "--shots", metavar="N", type=_count, help="examples before each question; by default as the task says"
    )
    evaluate.add_argument(
        "--limit", metavar="N", type=_count, default=0, help="only the first N questions of each task"
    )
    evaluate.add_argument(
        "--step", metavar="N", type=number(int), default=-1, help="a saved step of the run; by default the newest"
    )
    evaluate.add_argument(
        "--max_length", metavar="N", type=_count, default=0, help="tokens read at most; by default as trained"
    )
    evaluate.add_argument("--rows", metavar="N", type=_count, default=16, help="rows in a batch, over all devices (16)")
    evaluate.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="to compute in")
    evaluate.add_argument("--bos", default="auto", choices=("auto", "yes", "no"), help="whether texts begin with BOS")
    evaluate.add_argument("--include", metavar="DIR", default="", help="a directory of task files (YAML)")
    evaluate.add_argument("--run_code", action="store_true", help="tasks such as mbpp may run code the model wrote")
    evaluate.add_argument(
        "--out",
        metavar="FILE",
        default="",
        help="write the results to this file: JSON, or with --answers a line of JSON each",
    )
    evaluate.add_argument(
        "--samples", metavar="DIR", default="", help="write every question and answer into this directory"
    )
    evaluate.add_argument(
        "--answers", metavar="SOURCE", default="", help="questions with answers, as jsonl:test.jsonl, for exact match"
    )
    evaluate.add_argument(
        "--match", metavar="REGEX", default="", help="regular expression of what is compared in both answers"
    )
    evaluate.add_argument(
        "--prompt", metavar="TEMPLATE", default="", help="template of a prompt; by default the run's data.prompt"
    )
    evaluate.add_argument(
        "--answer", metavar="TEMPLATE", default="", help="template of an answer; by default the run's data.answer"
    )
    evaluate.add_argument("--choices", default="", help="words for labels, as data.choices")
    evaluate.add_argument("--max_tokens", metavar="N", type=_count, default=256, help="of a generated answer (256)")


def _count(text: str) -> int:
    count = number(int)(text)
    if count < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative; give 0 or more")
    return count


def run(options: argparse.Namespace, overrides: dict[str, str]) -> int:
    """Runs the command."""
    mesh_sizes = _mesh_sizes(overrides)
    if bool(options.tasks) == bool(options.answers):
        raise UserError("what shall be evaluated? give --tasks=hellaswag (or paper28), or --answers=jsonl:FILE")
    out = Path(options.out).expanduser() if options.out else None
    if out:
        if out.is_dir():
            raise UserError(f"--out={out} is a directory; give a file, as results.json")
        out.parent.mkdir(parents=True, exist_ok=True)
    if options.include and not Path(options.include).expanduser().is_dir():
        raise UserError(f"--include={options.include}: there is no such directory")
    if options.answers:
        return _answers(options, mesh_sizes, out)
    return _tasks(options, mesh_sizes, out)


def _mesh_sizes(overrides: dict[str, str]) -> dict[str, int]:
    sizes = {}
    for key, value in overrides.items():
        section, _, name = key.partition(".")
        if section != "mesh" or name not in MESH_KEYS:
            raise UserError(f"--{key} is not an option of evaluate; see slm-assist evaluate --help")
        try:
            sizes[name] = int(value)
        except ValueError:
            raise UserError(f"--{key}={value}: give a whole number of devices") from None
    return sizes


def _load(options: argparse.Namespace, mesh_sizes: dict[str, int]) -> Any:
    from slm_assist import pretrained, sharding
    from slm_assist.experiment import compute_dtype

    mesh = sharding.make_mesh(**mesh_sizes)
    dtype = compute_dtype(options.dtype, mesh.devices.flat[0])
    return pretrained.load(options.model, step=options.step, dtype=dtype, mesh=mesh, trim=False)


def _offline_if_alone() -> None:
    """Without a network the hub's packages try each data set for half a minute, unless they are told not to.

    They read the variable when they are imported, so this comes first.
    """
    if "HF_HUB_OFFLINE" in os.environ:
        return
    try:
        urllib.request.urlopen(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=10).close()
    except urllib.error.HTTPError:
        return  # somebody answers
    except OSError as error:
        if isinstance(getattr(error, "reason", error), ssl.SSLError):
            return  # these packages may know a certificate that this did not
        os.environ["HF_HUB_OFFLINE"] = "1"
        print("The Hugging Face hub cannot be reached: only data that are on this machine are used.")


def _tasks(options: argparse.Namespace, mesh_sizes: dict[str, int], out: Path | None) -> int:
    _offline_if_alone()
    from slm_assist import pretrained
    from slm_assist.evals import evaluating

    pretrained.open_model(options.model, "model", options.step)  # before what takes long
    include = str(Path(options.include).expanduser()) if options.include else None
    manager = evaluating.TaskManager(include_path=include)
    names = [name.strip() for name in options.tasks.split(",") if name.strip()]
    chosen, left_out = evaluating.find(manager, names, options.shots, options.run_code)
    for paper, reason in left_out.items():
        print(f"paper28 without {paper}: {reason}")
    bos = {"auto": None, "yes": True, "no": False}[options.bos]
    lm = evaluating.SlmAssistLM(
        _load(options, mesh_sizes), max_length=options.max_length, batch_size=options.rows or 16, add_bos_token=bos
    )
    evaluating.evaluate(
        lm,
        manager,
        chosen,
        left_out,
        limit=options.limit,
        run_code=options.run_code,
        out=out,
        samples=Path(options.samples).expanduser() if options.samples else None,
    )
    return 0


def _answers(options: argparse.Namespace, mesh_sizes: dict[str, int], out: Path | None) -> int:
    from slm_assist.decode.generate import Generator
    from slm_assist.evals.exact_match import pattern, run_exact_match

    pattern(options.match)  # before what takes long
    loaded = _load(options, mesh_sizes)
    run_exact_match(
        loaded,
        options.answers,
        options.prompt,
        options.answer,
        options.match,
        options.limit or None,
        options.max_tokens,
        out,
        choices=options.choices,
        writer=Generator(
            loaded.model,
            loaded.params,
            loaded.vocabulary,
            max_rows=options.rows or 16,
            stop_ids=loaded.stop_ids,
        ),
    )
    return 0

"""Tasks of the EleutherAI harness, one after the other: finding them, loading their data, figures as table and JSON."""

import json
import math
import os
import platform
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from slm_assist.errors import UserError, nearest
from slm_assist.evals import paper_tasks
from slm_assist.evals.harness import SlmAssistLM, TaskManager
from slm_assist.evals.harness import evaluate as run_harness
from slm_assist.metrics import write_json

SEED = 1234  # of the examples, as in the harness's own command
BOOTSTRAP = 1000  # resamplings for the standard error of what is not a mean
LOCAL = (
    "offline, name a task file on local data (dataset_path: json, dataset_kwargs: {data_files: {test: FILE}}) and its "
    "--include=DIRECTORY"
)
PACKAGES = ("slm_assist", "lm_eval", "datasets", "jax", "flax", "tokenizers")


class Chosen(NamedTuple):
    """A task, tag or group of the harness to run; `shots` None: as its file says."""

    name: str
    shots: int | None
    paper: paper_tasks.PaperTask | None = None


class Figure(NamedTuple):
    """One figure of a task; `error` is its standard error, None where the harness has none."""

    task: str
    shots: int | None
    metric: str
    value: float | None
    error: float | None
    samples: int | None


def find(manager: TaskManager, names: Sequence[str], shots: int | None, run_code: bool) -> tuple[list[Chosen], dict]:
    """The tasks that `names` mean, each once, and what `paper28` leaves out and why.

    Args:
      names: tasks, tags and groups of the harness, patterns of their names with `*`, task files, and "paper28".
      shots: examples before each question, for all tasks; None: as their files (or the paper) say.

    Raises:
      UserError: there is no such task.
    """
    found: dict[str, Chosen] = {}
    left_out: dict[str, str] = {}
    known = set(manager.all_tasks)
    for name in names:
        if name == paper_tasks.GROUP:
            entries, left_out = paper_tasks.choose(known, run_code=run_code)
            for entry in entries:
                found[entry.task] = Chosen(entry.task, entry.shots if shots is None else shots, entry)
            continue
        matching = [name] if name in known or _is_task_file(name) else manager.match_tasks([name])
        if not matching:
            close = nearest(name, known | {paper_tasks.GROUP})
            raise UserError(
                f"--tasks={name}: the harness has no such task{close}; --include=DIRECTORY adds those of your own files"
            )
        for match in matching:
            found.setdefault(match, Chosen(match, shots))
    if not found:
        raise UserError("--tasks names no task that can be run; name one, as hellaswag or paper28")
    return list(found.values()), left_out


def _is_task_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) and Path(name).is_file()


def load(manager: TaskManager, chosen: Chosen, *, run_code: bool = False) -> dict[str, Any]:
    """The harness's tasks and groups for one of the names, with their data.

    Raises:
      UserError: the data cannot be had, the task's file is not in order, or it runs code and may not.
    """
    try:
        found = manager.load([chosen.name])
    except Exception as error:  # whatever the task's own code and the data set's builder raise
        cure = LOCAL if isinstance(error, OSError) else "see its file in the harness for what it needs"
        raise UserError(f"task {chosen.name}: it cannot be loaded ({_one_line(error)}); {cure}") from error
    for name, task in found["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) and not run_code:
            raise UserError(f"task {name}: it runs code that the model wrote; allow it with --run_code")
        said = task.get_config("num_fewshot")
        if said is None or (chosen.shots is not None and said != 0):  # a 0 in its file: it takes none
            task.set_config(key="num_fewshot", value=chosen.shots or 0)
        task.set_fewshot_seed(seed=SEED)
    return found


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def evaluate(
    lm: SlmAssistLM,
    manager: TaskManager,
    chosen: Iterable[Chosen],
    left_out: Mapping[str, str],
    *,
    limit: int = 0,
    run_code: bool = False,
    out: Path | None = None,
    samples: Path | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Runs the tasks one by one and gives the report, which is also written to `out` after each of them.

    Args:
      chosen, left_out: as `find` gives them. A task of `paper28` that fails is left out, any other ends it all.
      limit: questions of each task, 0: all.
      run_code: code that the model wrote may be run.
      samples: a directory for one file of JSON lines a task, with every question, request and answer.

    Raises:
      UserError: a task cannot be loaded, or does not fit the model.
    """
    report = _facts(lm) | {"limit": limit or None, "tasks": {}}
    missing = dict(left_out)
    figures: dict[str, float] = {}
    started = time.time()
    say(_HEADER)
    for entry in chosen:
        try:
            results = _run(lm, manager, entry, limit, run_code, samples)
        except UserError as error:
            if entry.paper is None:
                raise
            missing[entry.paper.paper] = str(error)
            say(f"{error}; left out")
            continue
        report["tasks"] |= _tasks(results)
        for figure in _figures(results):
            say(_line(figure))
        if entry.paper:
            value = results["results"][entry.name].get(entry.paper.metric)
            if isinstance(value, int | float):
                figures[entry.paper.paper] = entry.paper.scale * float(value)
            else:
                missing[entry.paper.paper] = f"{entry.name} gave no {entry.paper.metric}"
        report |= {"seconds": time.time() - started, "compiled_shapes": sorted(lm.shapes)}
        if figures:
            report[paper_tasks.GROUP] = {"mean": paper_tasks.mean(figures), "of": figures, "without": missing}
        if out:
            write_json(out, _plain(report))
    if not report["tasks"]:
        raise UserError("none of the tasks can be run; see above what each of them lacks")
    if out:
        write_json(out, _plain(report))
    say(f"log-likelihoods took {len(lm.shapes)} compiled shapes: {_shapes(lm.shapes)}")
    if figures:
        count, mean = len(figures), paper_tasks.mean(figures)
        say(f"{paper_tasks.GROUP}: mean of {count} of its {len(paper_tasks.TASKS)} tasks: {mean:.4f}")
    return _plain(report)


def _run(
    lm: SlmAssistLM, manager: TaskManager, entry: Chosen, limit: int, run_code: bool, samples: Path | None
) -> dict[str, Any]:
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # the harness would fork for its bootstrap, and JAX has threads
    if run_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    found = load(manager, entry, run_code=run_code)
    random.seed(0)  # some tasks shuffle answers
    np.random.seed(SEED)
    try:
        results = run_harness(
            lm=lm,
            task_dict=found,
            limit=limit or None,
            bootstrap_iters=BOOTSTRAP,
            log_samples=samples is not None,
            fewshot_as_multiturn=True,
            confirm_run_unsafe_code=run_code,
        )
    except UserError as error:
        raise UserError(f"task {entry.name}: {error}") from error
    except Exception as error:  # of the task's own code: scorers are fetched from the hub only when they are used
        if entry.paper is None:
            raise
        raise UserError(f"task {entry.name}: {_one_line(error)}") from error
    for name, rows in results.pop("samples", {}).items() if samples else ():
        samples.mkdir(parents=True, exist_ok=True)
        with open(samples / f"{name}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, default=str, ensure_ascii=False) + "\n" for row in rows)
    return results


def _facts(lm: SlmAssistLM) -> dict[str, Any]:
    """What was evaluated, and with what."""
    info = lm.get_model_info()
    device = jax.tree.leaves(lm.loaded.params)[0].sharding.device_set
    return {
        "model": info["model"],
        "step": info["model_step"],
        "parameters": info["model_num_parameters"],
        "dtype": info["model_dtype"],
        "max_length": info["max_length"],
        "text_prefix": info["text_prefix"],
        "rows": lm.batch_size,
        "vocabulary": lm.vocabulary.fingerprint,
        "devices": f"{len(device)} x {next(iter(device)).device_kind}",
        "versions": {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()},
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _tasks(results: dict[str, Any]) -> dict[str, Any]:
    """For the report: of each task and group its figures, shots, version and counts."""
    return {
        name: {
            "figures": {key: value for key, value in values.items() if "," in key},
            "shots": results.get("n-shot", {}).get(name),
            "version": results.get("versions", {}).get(name),
            "samples": results.get("n-samples", {}).get(name, {}).get("effective"),
            "higher_is_better": results.get("higher_is_better", {}).get(name),
        }
        for name, values in results["results"].items()
    }


def _figures(results: dict[str, Any]) -> Iterator[Figure]:
    """The lines of the table: every metric but those that only say how sure another is."""
    for name, entry in _tasks(results).items():
        for key, value in entry["figures"].items():
            metric, _, filtered = key.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = entry["figures"].get(f"{metric}_stderr,{filtered}")
            shown = metric if filtered == "none" else f"{metric} ({filtered})"
            number = error if isinstance(error, int | float) and math.isfinite(error) else None
            yield Figure(name, entry["shots"], shown, value, number, entry["samples"])


_HEADER = f"{'task':32} {'shots':>5}  {'metric':32} {'value':>10}   {'+- error':>8} {'questions':>9}"


def _line(figure: Figure) -> str:
    error = "" if figure.error is None else f"{figure.error:.4f}"
    shots, samples = ("" if number is None else number for number in (figure.shots, figure.samples))
    return f"{figure.task:32} {shots:>5}  {figure.metric:32} {figure.value:>10.4f}   {error:>8} {samples:>9}"


def _shapes(shapes: Iterable[tuple[int, int]]) -> str:
    return ", ".join(f"{length} tokens ({slots} scored)" for length, slots in sorted(shapes)) or "none"


def _plain(value: Any) -> Any:
    """JSON's own values; what is no number ("N/A", NaN) becomes null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(inner) for inner in value]
    if isinstance(value, str | bool | None | int):
        return None if value == "N/A" else value
    number = float(value) if hasattr(value, "__float__") else None
    return str(value) if number is None else number if math.isfinite(number) else None

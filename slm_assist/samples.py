"""A few texts by the model that a run ends with, for its report."""

from typing import Any

from slm_assist import distributed, metrics
from slm_assist.decode import Generator, Sampling
from slm_assist.experiment import Experiment, Say
from slm_assist.run_dir import RunDir

PROMPT_TOKENS, NEW_TOKENS, TEMPERATURE = 24, 64, 0.8


def write(experiment: Experiment, run: RunDir, params: Any, say: Say) -> None:
    """Writes samples.json: validation rows' first tokens, continued with the likeliest tokens and with drawn ones.

    Nothing of it may end a run: what goes wrong is said. Runs of several processes write none.
    """
    count = experiment.config.log.samples
    if count == 0 or distributed.count() > 1:
        return
    try:
        made = _make(experiment, params, count)
        metrics.write_json(run.samples, {"step": experiment.config.steps, "temperature": TEMPERATURE, "samples": made})
    except Exception as error:  # noqa: BLE001 - the run itself is whole
        say(f"no samples for the report ({type(error).__name__}: {' '.join(str(error).split())[:200]})")


def _make(experiment: Experiment, params: Any, count: int) -> list[dict[str, str]]:
    model, vocabulary = experiment.student.model, experiment.prepared.vocabulary
    prompts = _prompts(experiment, count)
    room = model.config.max_positions or experiment.config.data.seq_len
    new = max(1, min(NEW_TOKENS, room - max(map(len, prompts))))
    generator = Generator(model, params, vocabulary, mesh=experiment.mesh, max_rows=count)
    samples = [{"prompt": vocabulary.decode(prompt), "greedy": "", "drawn": ""} for prompt in prompts]
    for name, sampling in (("greedy", Sampling()), ("drawn", Sampling(TEMPERATURE))):

        def keep(number: int, piece: str, name: str = name) -> None:
            samples[number][name] += piece

        generator.generate_ids(prompts, max_tokens=new, sampling=sampling, on_text=keep)
    return samples


def _prompts(experiment: Experiment, count: int) -> list[list[int]]:
    """First tokens of the first document in some validation rows."""
    row_ids = experiment.validation.row_ids
    row_ids = row_ids[:: max(1, len(row_ids) // count)][:count]
    rows = experiment.prepared.validation.get(row_ids)
    prompts = []
    for tokens, segment_ids in zip(rows["tokens"], rows["segment_ids"], strict=True):
        ids = tokens[segment_ids == segment_ids[0]][: min(PROMPT_TOKENS, len(tokens) // 2)].tolist()
        end = experiment.prepared.vocabulary.eos_id
        prompts.append(ids[:-1] if len(ids) > 1 and ids[-1] == end else ids)
    return prompts

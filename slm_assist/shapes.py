"""The student's shape: a named size with the config's changes, or that of another model."""

import dataclasses

import ml_collections

from slm_assist import pretrained
from slm_assist.data.tokenizers import Vocabulary, compare
from slm_assist.errors import UserError
from slm_assist.models import ModelConfig
from slm_assist.models.hf import load as hub
from slm_assist.models.sizes import named
from slm_assist.run_dir import RunDir


def model_config(config: ml_collections.ConfigDict, vocab_size: int, run: RunDir | None = None) -> ModelConfig:
    """The student's shape for a vocabulary of `vocab_size`.

    Args:
      run: one that goes on knows its shape even if the model that it began as is gone.

    Raises:
      UserError: no size or model is called so, or it does not go with the config.
    """
    given = {name: value for name, value in config.model.items() if isinstance(value, int) and value}
    if config.model.scan_layers != "auto":
        given["scan_layers"] = config.model.scan_layers == "true"
    elsewhere = config.init.model or (config.model.size if hub.is_name(config.model.size) else "")
    if not elsewhere:
        shape = named(config.model.size, vocab_size, **given)
    elif run is not None and run.model.is_file():
        shape = ModelConfig.from_json(run.read(run.model))
    elif config.branch.run:
        trunk = RunDir(config.branch.run)
        shape = ModelConfig.from_json(trunk.read(trunk.model))
    elif config.init.model:
        shape = _initial(config, given)
    else:
        shape = dataclasses.replace(pretrained.HubModel(elsewhere).shape(vocab_size=vocab_size), **given)
    if shape.max_positions and config.data.seq_len > shape.max_positions:
        raise UserError(
            f"data.seq_len={config.data.seq_len}: the model has {shape.max_positions} learnt positions; use "
            f"data.seq_len={shape.max_positions} or less"
        )
    return shape


def _initial(config: ml_collections.ConfigDict, given: dict[str, bool]) -> ModelConfig:
    model = pretrained.open_model(config.init.model, "init.model", config.init.step)
    return dataclasses.replace(model.shape(), **given)


def check_vocabulary(config: ml_collections.ConfigDict, vocabulary: Vocabulary) -> None:
    """Raises `UserError` where the model that the student begins as has another vocabulary than its data."""
    model = pretrained.open_model(config.init.model, "init.model", config.init.step)
    if difference := compare(vocabulary, model.vocabulary):
        raise UserError(
            f"init.model={config.init.model}: its vocabulary is not that of the data ({difference}); leave "
            "data.vocabulary empty, and give data.objective and data.sentinels as it was trained with"
        )

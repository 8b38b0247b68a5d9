"""A trained model by its name: a run directory, or one of Hugging Face's, `hf:PATH_OR_NAME`.

Both forms answer the same questions (`shape`, `vocabulary`, `identity`, `params`, ...), so that whatever names a model
takes either.
"""

import functools
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from slm_assist import checkpoint, sharding
from slm_assist.data.tokenizers import Vocabulary
from slm_assist.errors import UserError
from slm_assist.metrics import write_json
from slm_assist.models import ModelConfig, Transformer
from slm_assist.models.hf import load as hub
from slm_assist.models.transformer import Params
from slm_assist.run_dir import RunDir

Say = Callable[[str], None]


class RunModel:
    """The model that a run trains.

    Attributes:
      run: its directory.
      location: where it is, wherever the process stands.
      stop_ids: tokens that end a generated text beside the vocabulary's EOS: none.
    """

    stop_ids: tuple[int, ...] = ()

    def __init__(self, name: str):
        self.run = RunDir(name)

    def __str__(self) -> str:
        return str(self.run)

    @property
    def location(self) -> str:
        return str(self.run.path.resolve())

    @property
    def name(self) -> str:
        """Short, for people."""
        return self.run.path.name

    def shape(self) -> ModelConfig:
        return ModelConfig.from_json(self.run.read(self.run.model))

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary.load(self.run.tokenizer)

    @property
    def identity(self) -> str:
        """Hex, over what the run was started with."""
        return hashlib.blake2b(self.run.config.read_bytes(), digest_size=16).hexdigest()

    @property
    def max_positions(self) -> int | None:
        """The longest rows that it has seen, or the model that it began as; None where nobody knows."""
        stored = self.run.read(self.run.config) if self.run.config.is_file() else {"config": {}}
        began = stored.get("facts", {}).get("helpers", {}).get("initial", {})
        lengths = stored["config"].get("data", {}).get("seq_len"), began.get("max_positions")
        return max(filter(None, lengths), default=None)

    def steps(self) -> list[int]:
        """The saved steps."""
        return checkpoint.whole_steps(self.run.checkpoints)

    def kept_step(self) -> int:
        """The step that `checkpoint.keep_fraction` of its own run kept, whether it is there or not."""
        config = self.run.read(self.run.config)["config"]
        return round(config["checkpoint"].get("keep_fraction", 0.0) * config["steps"])

    def flops_at(self, step: int) -> float | None:
        """Training FLOPs spent up to `step`; None where nobody knows."""
        return self.run.flops_at(step)

    def params(self, like: Params, *, step: int = -1, say: Say = print) -> tuple[Params, int]:
        """The parameters as `like` says, shapes of `shape()`, and their step.

        Raises:
          UserError: they are gone or cannot be read.
        """
        return checkpoint.restore_params(self.run.checkpoints, like, step=step, say=say)


class HubModel:
    """A model of Hugging Face's, as `RunModel`; its only step is 0.

    Args:
      name: `hf:PATH_OR_NAME`, or `hf:NAME@REVISION`.

    Attributes:
      trim: rows that pad the vocabulary are left out.
    """

    def __init__(self, name: str):
        self._given, self.folder = name, hub.Folder(name)
        self.trim = True

    def __str__(self) -> str:
        return self._given

    @property
    def location(self) -> str:
        here = not self.folder.downloaded
        return f"{hub.PREFIX}{self.folder.path.resolve()}" if here else self._given

    @property
    def name(self) -> str:
        return self._given.removeprefix(hub.PREFIX).rstrip("/").rpartition("/")[2]

    def shape(self, *, vocab_size: int | None = None) -> ModelConfig:
        """Less the rows that pad its vocabulary: `vocab_size` are left, by default the tokenizer's if `trim`."""
        most = self.vocabulary.size if self.trim else self.folder.padded_vocab_size
        return self.folder.shape(most if vocab_size is None else vocab_size)

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        return self.folder.vocabulary

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self.folder.stop_ids

    @functools.cached_property
    def identity(self) -> str:
        return self.folder.identity

    @property
    def max_positions(self) -> int | None:
        return self.folder.max_positions

    def steps(self) -> list[int]:
        return [0]

    def kept_step(self) -> int:
        return 0

    def flops_at(self, step: int) -> None:
        return None

    def params(self, like: Params, *, step: int = -1, say: Say = print) -> tuple[Params, int]:
        return self.folder.params(like, self.shape()), 0


Pretrained = RunModel | HubModel


def is_there(name: str) -> bool:
    """Whether `name` is of Hugging Face's, or a run that has its model.json already."""
    return hub.is_name(name) or RunDir(name).model.is_file()


def open_model(name: str, key: str, step: int = -1) -> Pretrained:
    """The model called `name`, which has a checkpoint at `step` (below 0: at any step).

    Args:
      key: what names it, for errors: a key of the config or an argument.

    Raises:
      UserError: there is none, or no such checkpoint; says what there is.
    """
    if hub.is_name(name):
        model = HubModel(name)
        if step > 0:
            raise UserError(f"{key}={name}: it has no step {step}; another checkpoint is hf:NAME@REVISION, or a folder")
        return model
    model = RunModel(name)
    if not model.run.path.is_dir():
        raise UserError(
            f"{key}={name}: there is no such directory; name a run directory, or hf:PATH_OR_NAME of a model in Hugging "
            "Face's form"
        )
    if not model.run.model.is_file():
        hub_form = (model.run.path / "config.json").is_file()
        hint = f"; if it is a model in Hugging Face's form write hf:{name}" if hub_form else ""
        raise UserError(f"{key}={name}: not a run directory, it has no {model.run.model.name}{hint}")
    checkpoint.check_step(model.run.checkpoints, max(step, -1))
    return model


class Loaded(NamedTuple):
    """A model, its parameters on the devices, its vocabulary, and where it is from."""

    model: Transformer
    params: Params
    vocabulary: Vocabulary
    name: str
    step: int
    stop_ids: tuple[int, ...] = ()


def load(
    name: str,
    *,
    step: int = -1,
    dtype: Any = jnp.float32,
    mesh: jax.sharding.Mesh | None = None,
    key: str = "model",
    trim: bool = True,
    say: Say = print,
) -> Loaded:
    """Reads a model onto the devices.

    Args:
      name: a run directory, or `hf:PATH_OR_NAME`.
      step: one of a run's saved steps; -1: the newest.
      dtype: of the parameters, and what the model computes in.
      mesh: the devices; by default the first one. Parameters lie as the student's of a run do.
      key: what names it, for errors.
      trim: leave out the rows that pad the vocabulary of one of Hugging Face's. `transformers` gives them a little
        probability, so with them figures are comparable with those of its users.

    Raises:
      UserError: there is no such model, or it cannot be read.
    """
    found = open_model(name, key, step)
    if isinstance(found, HubModel):
        found.trim = trim
    model = Transformer(found.shape(), dtype=dtype)
    like = like_student(model, mesh or sharding.make_mesh(data=1), dtype)
    params, step = found.params(like, step=step, say=say)
    return Loaded(model, params, found.vocabulary, name, step, found.stop_ids)


def keep(model: HubModel, out: Path) -> RunDir:
    """Writes a model of Hugging Face's as a run directory whose only step is 0: what a helper or a student begins from.

    Raises:
      UserError: it cannot be read or written.
    """
    shape, aside = model.shape(), RunDir(out.with_name(f".{out.name}.partial"))
    params, _ = model.params(like_student(Transformer(shape), sharding.make_mesh(data=1), jnp.float32))
    try:
        shutil.rmtree(aside.path, ignore_errors=True)
        aside.path.mkdir(parents=True)
        checkpoint.save_params(aside.checkpoints, params)
        model.vocabulary.save(aside.tokenizer)
        write_json(aside.model, shape.to_json())
        origin = {"imported": {"from": str(model), "identity": model.identity}, "helpers": {}}
        known = {"data": {"seq_len": model.max_positions or 0}, "checkpoint": {"keep_fraction": 0.0}, "steps": 0}
        write_json(aside.config, {"config": known, "facts": origin})
        if out.exists():
            out.rmdir()
        aside.path.rename(out)
    except OSError as error:
        raise UserError(
            f"--out={out}: cannot be written ({error.strerror or error}); make room, or name another"
        ) from error
    finally:
        shutil.rmtree(aside.path, ignore_errors=True)
    return RunDir(out)


def like_student(model: Transformer, mesh: jax.sharding.Mesh, dtype: Any) -> Params:
    """Shapes and layout of parameters that lie as a student's do."""

    def one(names: sharding.Axes, x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=sharding.sharding(names, x, mesh))

    return jax.tree.map(one, model.logical_axes(), model.shapes(), is_leaf=sharding.is_names)

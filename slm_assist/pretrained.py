"""A trained model by its name, ready to be called: a run directory, or `hf:PATH_OR_NAME`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from slm_assist import checkpoint, sharding
from slm_assist.data.tokenizers import Vocabulary
from slm_assist.models import ModelConfig, Transformer
from slm_assist.models.transformer import Params
from slm_assist.run_dir import RunDir


class Loaded(NamedTuple):
    """A model, its parameters on the devices, its vocabulary, and where it is from."""

    model: Transformer
    params: Params
    vocabulary: Vocabulary
    name: str
    step: int


def load(
    name: str,
    *,
    step: int = -1,
    dtype: Any = jnp.float32,
    mesh: jax.sharding.Mesh | None = None,
    say: Callable[[str], None] = print,
) -> Loaded:
    """Reads a model onto the devices.

    Args:
      name: a run directory.
      step: one of the run's saved steps; -1: the newest.
      dtype: of the parameters, and what the model computes in.
      mesh: the devices; by default the first one. Parameters lie as the student's of a run do.

    Raises:
      UserError: there is no such model, or it cannot be read.
    """
    run = RunDir(name)
    model = Transformer(ModelConfig.from_json(run.read(run.model)), dtype=dtype)
    mesh = mesh or sharding.make_mesh(data=1)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), model.shapes())
    where = sharding.shardings(model.logical_axes(), shapes, mesh)
    like = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, where)
    params, step = checkpoint.restore_params(run.checkpoints, like, step=step, say=say)
    return Loaded(model, params, Vocabulary.load(run.tokenizer), name, step)

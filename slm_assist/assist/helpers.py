"""Small LMs from other runs' directories: found, checked, laid out, frozen, and dropped when their stage ends."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from slm_assist import checkpoint, sharding
from slm_assist.data.tokenizers import Vocabulary, compare
from slm_assist.errors import UserError
from slm_assist.models import ModelConfig, Transformer
from slm_assist.run_dir import RunDir

KEYS = {"teacher": "assist.teacher", "buckets": "validation.buckets"}  # where the config names a role's run


@dataclasses.dataclass(frozen=True)
class Helper:
    """A small LM in a role."""

    role: str  # one of KEYS
    run: RunDir
    step: int  # the saved step it is taken from; -1 until `load` has found the newest whole one
    model: Transformer

    def facts(self) -> dict[str, Any]:
        """What config.json and the report say about it."""
        return {
            "run": str(self.run.path.resolve()),
            "step": self.step,
            "parameters": self.model.num_params(),
            "train_flops": self.run.flops_at(self.step),
        }

    def shapes(self, mesh: Mesh) -> Any:
        """Shapes, dtypes and layout of its parameters: whole on every device, in the compute dtype."""
        whole = sharding.replicated(mesh)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, self.model.dtype, sharding=whole), self.model.shapes()
        )

    def load(self, mesh: Mesh, say: Callable[[str], None] = print) -> tuple["Helper", Any]:
        """The helper with the step that was found, and its parameters on the devices.

        Raises:
          UserError: the checkpoint is gone or cannot be read.
        """
        like = self.shapes(mesh)
        params, step = checkpoint.restore_params(self.run.checkpoints, like, step=self.step, say=say)
        return dataclasses.replace(self, step=step), params


def find(role: str, directory: str, *, step: int, vocabulary: Vocabulary, dtype: jnp.dtype) -> Helper:
    """The helper in a run's directory, checked against the student's vocabulary.

    Args:
      role: one of `KEYS`.
      directory: the run that trained it.
      step: one of that run's saved steps, or -1 for the newest whole checkpoint.
      vocabulary: the student's.
      dtype: the dtype its parameters are kept and used in.

    Raises:
      UserError: no such run or step, or vocabularies that differ.
    """
    run = open_run(role, directory, step)
    model = Transformer(ModelConfig.from_json(run.read(run.model)), dtype=dtype)
    difference = compare(vocabulary, Vocabulary.load(run.tokenizer))
    if difference:
        raise UserError(
            f"{KEYS[role]}={directory}: its vocabulary is not the student's ({difference}); train both with one "
            "data.vocabulary"
        )
    return Helper(role, run, step, model)


def open_run(role: str, directory: str, step: int = -1) -> RunDir:
    """The run in `directory`, which has a checkpoint at `step` (-1: at any step).

    Raises:
      UserError: there is no run, or no such checkpoint; says what there is.
    """
    run = RunDir(directory)
    if not run.path.is_dir():
        raise UserError(f"{KEYS[role]}={directory}: there is no such directory; name the small LM's run directory")
    if not run.model.is_file():
        raise UserError(f"{KEYS[role]}={directory}: not a run directory, it has no {run.model.name}")
    checkpoint.check_step(run.checkpoints, step)
    return run


def drop(helpers: dict[str, Any]) -> None:
    """Frees the parameters of all helpers now, and forgets them."""
    for leaf in jax.tree.leaves(helpers):
        leaf.delete()
    helpers.clear()

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


@dataclasses.dataclass(frozen=True)
class Helper:
    """A small LM in a role, before its parameters are read."""

    role: str  # "teacher"
    run: RunDir
    step: int  # the saved step it is taken from
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

    def load(self, mesh: Mesh, say: Callable[[str], None] = print) -> Any:
        """Its parameters, on the devices.

        Raises:
          UserError: the checkpoint is gone or cannot be read.
        """
        params, _ = checkpoint.restore_params(self.run.checkpoints, self.shapes(mesh), step=self.step, say=say)
        return params


def find(
    role: str, directory: str, *, step: int, vocabulary: Vocabulary, dtype: jnp.dtype, say: Callable[[str], None]
) -> Helper:
    """The helper in a run's directory, checked against the student's vocabulary.

    Args:
      role: what it does, as `teacher`.
      directory: the run that trained it.
      step: one of that run's saved steps, or -1 for the newest whole checkpoint.
      vocabulary: the student's.
      dtype: the dtype its parameters are kept and used in.

    Raises:
      UserError: no such run or step, or vocabularies that differ.
    """
    run = open_run(role, directory)
    model = Transformer(ModelConfig.from_json(run.read(run.model)), dtype=dtype)
    difference = compare(vocabulary, Vocabulary.load(run.tokenizer))
    if difference:
        raise UserError(
            f"assist.{role}={directory}: its vocabulary is not the student's ({difference}); train both with one "
            "data.vocabulary"
        )
    return Helper(role, run, _readable_step(run, step, say), model)


def open_run(role: str, directory: str) -> RunDir:
    """The run in `directory`, or `UserError` where there is none."""
    run = RunDir(directory)
    if not run.path.is_dir():
        raise UserError(f"assist.{role}={directory}: there is no such directory; name the small LM's run directory")
    return run


def _readable_step(run: RunDir, step: int, say: Callable[[str], None]) -> int:
    kept = checkpoint.whole_steps(run.checkpoints)
    if not kept:
        raise UserError(f"{run}: has no whole checkpoint; train that run first, or name another directory")
    if step == -1:
        return kept[-1]
    if step not in kept:
        raise UserError(
            f"{run}: step {step} was not kept; there are {', '.join(map(str, kept))} (checkpoint.keep={step} in "
            "its own run keeps it)"
        )
    return step


def drop(helpers: dict[str, Any]) -> None:
    """Frees the parameters of all helpers now, and forgets them."""
    for leaf in jax.tree.leaves(helpers):
        leaf.delete()
    helpers.clear()

"""Small LMs from other runs' directories: found, checked, laid out, frozen, and dropped when their stage ends."""

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from slm_assist import checkpoint, pretrained, sharding
from slm_assist.data.tokenizers import Vocabulary, compare
from slm_assist.errors import UserError
from slm_assist.models import Transformer
from slm_assist.pretrained import Pretrained
from slm_assist.run_dir import RunDir

KEYS = {  # where the config names a role's run
    "teacher": "assist.teacher",
    "scorer": "select.scorer",
    "reference": "select.reference",
    "guide": "represent.helper",
    "parent": "grow.helper",
    "buckets": "validation.buckets",
}
NEWEST, KEPT = -1, -2  # steps that are found out: the newest whole checkpoint, the one kept for scoring


class Placement(NamedTuple):
    """Where the parameters of helpers lie: the config's `mesh.helpers` and `mesh.helper_replicate_bytes`."""

    kind: str = "auto"
    replicate_bytes: int = 4 * 2**30

    @classmethod
    def of(cls, config: ml_collections.ConfigDict) -> "Placement":
        return cls(config.mesh.helpers, config.mesh.helper_replicate_bytes)


AUTO = Placement()


@dataclasses.dataclass(frozen=True)
class Helper:
    """A small LM in a role."""

    role: str  # one of KEYS
    run: Pretrained
    step: int  # the saved step it is taken from; -1 until `load` has found the newest whole one
    model: Transformer
    placement: Placement = AUTO

    def facts(self) -> dict[str, Any]:
        """What config.json and the report say about it."""
        return {
            "run": self.run.location,
            "step": self.step,
            "parameters": self.model.num_params(),
            "width": self.model.config.d_model,
            "train_flops": self.run.flops_at(self.step),
            "bytes": self.bytes(),
            "identity": self.run.identity,
        }

    def bytes(self) -> int:
        """Size of its parameters."""
        return self.model.num_params() * jnp.dtype(self.model.dtype).itemsize

    def device_bytes(self, mesh: Mesh) -> int:
        """Memory of its parameters on one device."""
        leaves = jax.tree.leaves(self.shapes(mesh))
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)

    def is_split(self, mesh: Mesh) -> bool:
        """Whether a device holds a part of its parameters only."""
        kind, most = self.placement
        return mesh.size > 1 and (kind == "fsdp" or (kind == "auto" and self.bytes() > most))

    def where(self, mesh: Mesh) -> str:
        """Its memory, for people."""
        if not self.is_split(mesh):
            return f"{self.bytes() / 1e6:,.1f} MB on every device"
        part = self.device_bytes(mesh) / 1e6
        return f"{self.bytes() / 1e6:,.1f} MB split over {mesh.size} devices, {part:,.1f} MB on each"

    def same(self, other: "Helper") -> bool:
        """Whether both are one checkpoint of one run."""
        if not isinstance(other, Helper):  # somebody's function
            return False
        return (self.run.location, self.step) == (other.run.location, other.step)

    def shapes(self, mesh: Mesh) -> Any:
        """Shapes, dtypes and layout of its parameters, in the compute dtype: whole on every device, or split."""
        whole, parts = sharding.replicated(mesh), self.is_split(mesh)

        def one(names: sharding.Axes, x: Any) -> jax.ShapeDtypeStruct:
            place = sharding.split(names, x, mesh) if parts else whole
            return jax.ShapeDtypeStruct(x.shape, self.model.dtype, sharding=place)

        return jax.tree.map(one, self.model.logical_axes(), self.model.shapes(), is_leaf=sharding.is_names)

    def with_dtype(self, dtype: jnp.dtype, placement: Placement) -> "Helper":
        """The same with its parameters in another dtype and at another place."""
        return dataclasses.replace(self, model=dataclasses.replace(self.model, dtype=dtype), placement=placement)

    def load(self, mesh: Mesh, say: Callable[[str], None] = print) -> tuple["Helper", Any]:
        """The helper with the step that was found, and its parameters on the devices.

        Raises:
          UserError: the checkpoint is gone or cannot be read.
        """
        like = self.shapes(mesh)
        params, step = self.run.params(like, step=self.step, say=say)
        return dataclasses.replace(self, step=step), params


def find(
    role: str,
    directory: str,
    *,
    step: int,
    vocabulary: Vocabulary,
    dtype: jnp.dtype,
    placement: Placement = AUTO,
) -> Helper:
    """The helper called `directory`, checked against the student's vocabulary.

    Args:
      role: one of `KEYS`.
      directory: the run that trained it, or `hf:PATH_OR_NAME`.
      step: one of that run's saved steps, `NEWEST`, or `KEPT`.
      vocabulary: the student's.
      dtype: the dtype its parameters are kept and used in.
      placement: where they lie.

    Raises:
      UserError: no such run or step, or vocabularies that differ.
    """
    run = open_model(role, directory, step)
    step = find_step(role, run, step)
    model = Transformer(run.shape(), dtype=dtype)
    difference = compare(vocabulary, run.vocabulary)
    if difference:
        raise UserError(
            f"{KEYS[role]}={directory}: its vocabulary is not the student's ({difference}); train both with one "
            "data.vocabulary, and the same data.sentinels or data.objective"
        )
    return Helper(role, run, step, model, placement)


def open_model(role: str, directory: str, step: int = -1) -> Pretrained:
    """`pretrained.open_model` of a role."""
    return pretrained.open_model(directory, KEYS[role], step)


def open_trunk(directory: str, step: int) -> RunDir:
    """The run that a branch goes on from.

    Raises:
      UserError: there is no such run or checkpoint.
    """
    trunk = RunDir(directory)
    if not trunk.config.is_file():
        raise UserError(f"branch.run={directory}: no run was started there; train it first, or name another directory")
    checkpoint.check_step(trunk.checkpoints, step)
    return trunk


def find_step(role: str, run: Pretrained, step: int) -> int:
    """The saved step that `KEPT` stands for; other steps are themselves. A model of Hugging Face's has only one.

    Raises:
      UserError: the run kept no checkpoint for scoring.
    """
    if step != KEPT:
        return step
    kept, saved = run.kept_step(), run.steps()
    if kept not in saved:
        raise UserError(
            f"{KEYS[role]}={run}: it kept no early checkpoint (checkpoint.keep_fraction=0.12 in its own run does); it "
            f"has {', '.join(map(str, saved))}: choose one with {KEYS[role]}_step"
        )
    return kept


def load_all(
    helpers: dict[str, Helper], mesh: Mesh, say: Callable[[str], None] = print
) -> tuple[dict[str, Helper], dict[str, Any]]:
    """Helpers and their parameters by role; a checkpoint that serves in two roles is in memory once."""
    loaded: dict[str, Helper] = {}
    params_of: dict[str, Any] = {}
    for role, helper in helpers.items():
        twin = next((other for other in loaded if loaded[other].same(helper)), None)
        if twin is None:
            helper, params = helper.load(mesh, say)
            twin = next((other for other in loaded if loaded[other].same(helper)), None)  # "the newest" is known now
        loaded[role], params_of[role] = helper, params if twin is None else params_of[twin]
    return loaded, params_of


def drop(params_of: dict[str, Any], names: Collection[str]) -> None:
    """Frees the parameters of the roles `names` now, unless another role shares them, and forgets the roles."""
    gone = [params_of.pop(name) for name in list(names)]
    left = {id(leaf) for leaf in jax.tree.leaves(params_of)}
    for leaf in jax.tree.leaves(gone):
        if id(leaf) not in left and not leaf.is_deleted():
            leaf.delete()

"""One mesh, two tables: how named dimensions map onto devices.

Parameters and activations carry the names of their dimensions (`"embed"`, `"heads"`, ...); `RULES` says
which mesh axes each name is split over. A dimension that its mesh axes do not divide stays whole. Without
a mesh every function here is a no-op, so models and losses work unchanged on one device and in other
people's code.

Frozen small LMs have a layout of their own, `HELPER_RULES`: each device runs the whole model on its part of the rows,
whatever the axes are called, so that a student split by `tensor` does not make a small model wait for its neighbours.
"""

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from slm_assist.errors import UserError

BATCH_AXES = ("data", "fsdp")
VOCAB_AXIS = "tensor"
MESH_AXES = ("data", "fsdp", "tensor")

RULES: dict[str, tuple[str, ...]] = {
    # activations
    "batch": BATCH_AXES,
    "length": (),
    "act_embed": (),
    # parameters (and the activation dimensions that follow them)
    "embed": ("fsdp",),
    "vocab": (VOCAB_AXIS,),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "head_dim": (),
    "layers": (),
    "positions": (),
}

HELPER_RULES = dict.fromkeys(RULES, ()) | {"batch": MESH_AXES}

_rules: ContextVar[dict[str, tuple[str, ...]]] = ContextVar("rules", default=RULES)

Axes = tuple[str, ...]


@contextlib.contextmanager
def helper_layout(rows: int) -> Iterator[None]:
    """What is traced within lies as `HELPER_RULES` says, if the whole mesh divides the batch's `rows`.

    If it does not, `RULES` stay: whole parameters may then be used in parts, by `tensor`, without being moved.
    """
    mesh = ambient_mesh()
    fits = mesh is not None and rows % mesh.size == 0
    token = _rules.set(HELPER_RULES if fits else _rules.get())
    try:
        yield
    finally:
        _rules.reset(token)


def axes_of(name: str) -> tuple[str, ...]:
    """The mesh axes that a dimension called `name` is split over where this is traced."""
    return _rules.get()[name]


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """A mesh with axes `data`, `fsdp`, `tensor`; at most one size may be -1, "the devices that are left".

    Args:
      data, fsdp, tensor: sizes of the axes. `data` and `fsdp` split the batch, `fsdp` also the parameters,
        `tensor` splits heads, MLP and vocabulary.
      devices: the devices to use, by default all of `jax.devices()`; with fixed sizes, the first of them.

    Raises:
      UserError: the mesh needs more devices than there are, or the sizes do not divide them.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = mesh_sizes(data, fsdp, tensor, len(devices))
    shape = tuple(sizes.values())
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[: math.prod(shape)])


def mesh_sizes(data: int, fsdp: int, tensor: int, count: int) -> dict[str, int]:
    """The axes of a mesh over `count` devices, or over the first of them; arguments and errors as of `make_mesh`."""
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    wild = [name for name, size in sizes.items() if size == -1]
    for name, size in sizes.items():
        if size < 1 and size != -1:
            raise UserError(f"mesh.{name}={size}: use a positive size, or -1 for the devices that are left")
    if len(wild) > 1:
        raise UserError(f"mesh.{wild[0]} and mesh.{wild[1]} are both -1: give one of them a size")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    asked = " x ".join(f"{name} {size}" for name, size in sizes.items())
    if fixed > count:
        raise UserError(
            f"mesh {asked} needs {fixed} devices and there are {count}: lower mesh.data, mesh.fsdp or mesh.tensor"
        )
    if wild:
        if count % fixed:
            raise UserError(f"mesh {asked}: {fixed} does not divide the {count} devices; change a size")
        sizes[wild[0]] = count // fixed
    return sizes


def ambient_mesh() -> AbstractMesh | None:
    """The mesh set by `jax.set_mesh` around the current trace or call, or None."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh is None or mesh.empty else mesh


def axes_on(mesh: Mesh | AbstractMesh, names: tuple[str, ...], size: int | None = None) -> tuple[str, ...]:
    """Those of the mesh axes `names` that exist on `mesh` with more than one device.

    With `size`, the dimension's length, an axis that would not divide it is left out.
    """
    kept: list[str] = []
    product = 1
    for name in names:
        count = mesh.shape.get(name, 1)
        if count > 1 and (size is None or size % (product * count) == 0):
            kept.append(name)
            product *= count
    return tuple(kept)


def spec(names: Axes, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The partition spec of an array of `shape` whose dimensions are called `names`."""
    if len(names) != len(shape):
        raise ValueError(f"names {names} do not fit shape {shape}")
    entries = []
    for name, size in zip(names, shape, strict=True):
        axes = axes_on(mesh, axes_of(name), size)
        entries.append(axes[0] if len(axes) == 1 else axes or None)
    return PartitionSpec(*entries)


def constrain(x: jax.Array, *names: str) -> jax.Array:
    """Asks XLA to lay `x` out as the table says for its dimension `names`; without a mesh, returns `x`."""
    mesh = ambient_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, spec(names, x.shape, mesh))


def deal_out(x: jax.Array, dim: int, *, back: bool = False) -> jax.Array:
    """Asks XLA to split `x` along `dim` over all mesh axes that divide it, whatever the dimension is called.

    One axis after the other, or XLA may replicate `x` on the way; `back`: and so it goes to whatever layout follows.
    """
    mesh = ambient_mesh()
    axes = () if mesh is None else axes_on(mesh, MESH_AXES, x.shape[dim])
    for count in sorted(range(1, len(axes) + 1), reverse=back):
        parts: list[Any] = [PartitionSpec.UNCONSTRAINED] * x.ndim
        parts[dim] = axes[:count]
        x = jax.lax.with_sharding_constraint(x, PartitionSpec(*parts))
    return x


def is_names(x: Any) -> bool:
    """Whether `x` is the tuple of dimension names of one array."""
    return isinstance(x, tuple) and all(isinstance(name, str) for name in x)


def shardings(axes: Any, shapes: Any, mesh: Mesh) -> Any:
    """A tree of `NamedSharding` from a tree of dimension names and a tree of things with a `.shape`."""
    return jax.tree.map(lambda names, x: sharding(names, x, mesh), axes, shapes, is_leaf=is_names)


def sharding(names: Axes, x: Any, mesh: Mesh) -> NamedSharding:
    """Where an array like `x` lies whose dimensions are called `names`."""
    return NamedSharding(mesh, spec(names, x.shape, mesh))


def split(names: Axes, x: Any, mesh: Mesh) -> NamedSharding:
    """Where a helper's parameter like `x` lies if it is not to be whole on every device.

    A matrix is split over every axis of the mesh that divides it: "embed" first, then the largest dimensions; but a
    vocabulary by `tensor`, as the student's loss wants it. Layers of a stack stay together, so that one at a time is
    gathered; vectors stay whole.
    """
    dims = [dim for dim, name in enumerate(names) if name != "layers"]
    dims = sorted(dims, key=lambda dim: (names[dim] != "embed", -x.shape[dim])) if len(dims) > 1 else []
    parts: list[tuple[str, ...]] = [()] * len(names)
    turns = [(dim, (VOCAB_AXIS,)) for dim in dims if names[dim] == "vocab"] + [(dim, MESH_AXES) for dim in dims]
    for dim, axes in turns:
        taken = {axis for part in parts for axis in part}
        free = tuple(axis for axis in axes if axis not in taken)
        size = x.shape[dim] // math.prod(mesh.shape[axis] for axis in parts[dim])
        parts[dim] += axes_on(mesh, free, size)
    return NamedSharding(mesh, PartitionSpec(*(axes or None for axes in parts)))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows (the first dimension) over the batch axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same values on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_shards(mesh: Mesh) -> int:
    """How many parts the batch is split into."""
    return math.prod(mesh.shape[name] for name in BATCH_AXES)

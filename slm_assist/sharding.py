"""One mesh, one table: how named dimensions map onto devices.

Parameters and activations carry the names of their dimensions (`"embed"`, `"heads"`, ...); `RULES` says
which mesh axes each name is split over. A dimension that its mesh axes do not divide stays whole. Without
a mesh every function here is a no-op, so models and losses work unchanged on one device and in other
people's code.
"""

import math
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
}

Axes = tuple[str, ...]


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
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    wild = [name for name, size in sizes.items() if size == -1]
    for name, size in sizes.items():
        if size < 1 and size != -1:
            raise UserError(f"mesh.{name}={size}: use a positive size, or -1 for the devices that are left")
    if len(wild) > 1:
        raise UserError(f"mesh.{wild[0]} and mesh.{wild[1]} are both -1: give one of them a size")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    asked = " x ".join(f"{name} {size}" for name, size in sizes.items())
    if fixed > len(devices):
        raise UserError(
            f"mesh {asked} needs {fixed} devices and there are {len(devices)}: lower mesh.data, mesh.fsdp or "
            "mesh.tensor"
        )
    if wild:
        if len(devices) % fixed:
            raise UserError(f"mesh {asked}: {fixed} does not divide the {len(devices)} devices; change a size")
        sizes[wild[0]] = len(devices) // fixed
    count = math.prod(sizes.values())
    return jax.make_mesh(tuple(sizes.values()), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:count])


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
        axes = axes_on(mesh, RULES[name], size)
        entries.append(axes[0] if len(axes) == 1 else axes or None)
    return PartitionSpec(*entries)


def constrain(x: jax.Array, *names: str) -> jax.Array:
    """Asks XLA to lay `x` out as `RULES` says for its dimension `names`; without a mesh, returns `x`."""
    mesh = ambient_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, spec(names, x.shape, mesh))


def is_names(x: Any) -> bool:
    """Whether `x` is the tuple of dimension names of one array."""
    return isinstance(x, tuple) and all(isinstance(name, str) for name in x)


def shardings(axes: Any, shapes: Any, mesh: Mesh) -> Any:
    """A tree of `NamedSharding` from a tree of dimension names and a tree of things with a `.shape`."""
    return jax.tree.map(
        lambda names, x: NamedSharding(mesh, spec(names, x.shape, mesh)),
        axes,
        shapes,
        is_leaf=is_names,
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows (the first dimension) over the batch axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same values on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_shards(mesh: Mesh) -> int:
    """How many parts the batch is split into."""
    return math.prod(mesh.shape[name] for name in BATCH_AXES)

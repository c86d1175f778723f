"""The mesh, and one table from logical axes to mesh axes for parameters, moments, reference and
batch.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from dpo_jax import config
from dpo_jax.model import decoder, shards

# logical axis of a parameter -> mesh axes
RULES: dict[str, str | tuple[str, ...] | None] = {
    "layers": None,
    "width": ("fsdp", "sequence"),
    "heads": "tensor",
    "key_value_heads": "tensor",
    "head_dim": None,
    "hidden": "tensor",
    "vocabulary": "tensor",
    "positions": None,
    "experts": None,
    "rank": None,
}
# rows of a batch lie on both, and a row's tokens, and its scored ones, on the third
BATCH_AXES = ("data", "fsdp")
TOKEN_AXIS = "sequence"
# what is found of a table's columns, [B, L, D], where it is found, and on its way to its rows: over
# one axis of the mesh at a time, which is an exchange; over both, the compiler would collect it
COLUMNS = P("data", None, RULES["width"]), P("data", TOKEN_AXIS, "fsdp")


def make_mesh(axes: config.Mesh, devices: Sequence[Any]) -> Mesh:
    """The mesh data x fsdp x sequence x tensor over the devices; ValueError where the product is
    not their number.
    """
    fsdp = axes.fsdp
    if fsdp is None:
        fsdp = len(devices) // (axes.data * axes.sequence * axes.tensor)
    sizes = {"data": axes.data, "fsdp": fsdp, "sequence": axes.sequence, "tensor": axes.tensor}
    if math.prod(sizes.values()) != len(devices):
        product = " x ".join(f"mesh.{name} {size}" for name, size in sizes.items())
        raise ValueError(
            f"{product} = {math.prod(sizes.values())} devices, and there are {len(devices)}: "
            "change --mesh.data, --mesh.fsdp, --mesh.sequence or --mesh.tensor"
        )
    shape, names, types = tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes)
    try:
        return jax.make_mesh(shape, names, axis_types=types, devices=devices)
    except NotImplementedError:
        # axes that are no products of whole axes of a TPU's torus
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(placed, names, axis_types=types)


def batch_shards(mesh: Mesh) -> int:
    """Over how many shards the rows of a batch lie."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def row_shards(mesh: Mesh) -> int:
    """Over how many shards the tokens of a row lie."""
    return mesh.shape[TOKEN_AXIS]


def check_batch_size(batch_size: int, microbatches: int, mesh: Mesh) -> None:
    """Raises ValueError unless batch_size divides over batch shards and microbatches."""
    shards = batch_shards(mesh)
    parts = shards * microbatches
    if batch_size % parts:
        lower = batch_size // parts * parts
        raise ValueError(
            f"batch_size {batch_size} does not divide over {shards} batch shards (data x fsdp) x "
            f"{microbatches} microbatches = {parts} parts: take "
            f"{f'{lower} or ' if lower else ''}{lower + parts}, or more sequence or tensor shards"
        )


def parameters(params, mesh: Mesh):
    """Sharding of each parameter: a tree like params (arrays or shapes).

    An axis lies over as many of its mesh axes as divide it. ValueError names a parameter without a
    rule or with one mesh axis twice.
    """

    def place(path, leaf, axes: tuple[str, ...]):
        names = [RULES[axis] for axis in axes]
        used = [name for entry in names for name in shards.names(entry)]
        if len(used) != len(set(used)):
            raise ValueError(
                f"parameter {jax.tree_util.keystr(path)} with axes {axes} would use a mesh axis "
                "twice"
            )
        return NamedSharding(mesh, shards.fit(P(*names), leaf.shape, mesh))

    axes = decoder.logical_axes(params)
    return jax.tree_util.tree_map_with_path(place, params, axes)


def place(params, mesh: Mesh):
    """Parameters (NumPy or JAX) on the mesh."""
    return jax.device_put(params, parameters(params, mesh))


def with_shardings(shapes, mesh: Mesh):
    """The ShapeDtypeStructs of parameters with their shardings."""

    def one(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(one, shapes, parameters(shapes, mesh))


def like_parameters(tree, params, shardings, mesh: Mesh):
    """Shardings for optimizer state: that of the parameter where path end and shape agree, else
    replicated.
    """
    by_path = {
        (jax.tree_util.keystr(path), leaf.shape): sharding
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings), strict=True
        )
    }

    def place(path, leaf):
        ends = (jax.tree_util.keystr(path[start:]) for start in range(len(path)))
        found = (by_path[(end, leaf.shape)] for end in ends if (end, leaf.shape) in by_path)
        return next(found, replicated(mesh))

    return jax.tree_util.tree_map_with_path(place, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, P())


def replicate(tree, mesh: Mesh):
    """Arrays and numbers of the host, the same in all processes, whole on every device."""

    def one(leaf) -> jax.Array:
        value = np.asarray(leaf)
        return jax.make_array_from_callback(value.shape, replicated(mesh), lambda _: value)

    return jax.tree.map(one, tree)


def rows(mesh: Mesh) -> NamedSharding:
    """First axis over the batch shards."""
    return NamedSharding(mesh, P(BATCH_AXES))


def tokens(mesh: Mesh) -> NamedSharding:
    """First axis over the batch shards, second over the shards of a row."""
    return NamedSharding(mesh, P(BATCH_AXES, TOKEN_AXIS))


def whole_rows(mesh: Mesh) -> NamedSharding:
    """First axis over the batch shards and the shards of a row: rows that are not cut."""
    return NamedSharding(mesh, P((*BATCH_AXES, TOKEN_AXIS)))


def of_batch(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Where an array of a batch lies: numbers of examples by row, those of tokens by token too;
    ValueError where a row does not divide over its shards.
    """
    if len(shape) < 2:
        return rows(mesh)
    if shape[1] % row_shards(mesh):
        raise ValueError(
            f"rows of {shape[1]} tokens do not divide over {row_shards(mesh)} shards: change "
            "--mesh.sequence to a divisor"
        )
    return tokens(mesh)


def constrain(array: jax.Array, mesh: AbstractMesh, spec: P) -> jax.Array:
    """The array with a sharding inside of a compiled function; without one where the mesh is empty.

    An axis lies over as many of its mesh axes as divide it.
    """
    if mesh.empty:
        return array
    fitting = shards.fit(spec, array.shape, mesh)
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, fitting))


def placement(mesh: Mesh, *, cuts_rows: bool = True) -> shards.Placement | None:
    """Where the decoder's activations lie, which may cut rows of tokens; None on one device."""
    if mesh.size == 1:
        return None
    where, columns = (tokens(mesh), COLUMNS) if cuts_rows else (whole_rows(mesh), COLUMNS[:1])
    found, *way = (NamedSharding(mesh, spec) for spec in columns)
    return shards.Placement(where, NamedSharding(mesh, P("data")), found, tuple(way))


def held_rows(mesh: Mesh) -> Callable[[int], np.ndarray]:
    """Says which of so many rows of a batch lie on devices of this process: bool [B]."""

    def held(count: int) -> np.ndarray:
        found = np.zeros(count, bool)
        for index in rows(mesh).addressable_devices_indices_map((count,)).values():
            found[index] = True
        return found

    return held


def put_batch(batch: dict, mesh: Mesh):
    """A host batch on the mesh, as `of_batch` says; `index` stays on the host.

    Of arrays of all rows, each process reads those that its devices hold.
    """

    def one(value) -> jax.Array:
        return put(np.asarray(value), of_batch(np.shape(value), mesh))

    return jax.tree.map(one, {name: value for name, value in batch.items() if name != "index"})


def put(array: np.ndarray, where: NamedSharding) -> jax.Array:
    """An array of the host, the same in all processes, laid there."""
    return jax.make_array_from_callback(array.shape, where, lambda index: array[index])


@dataclasses.dataclass(frozen=True)
class OnHost:
    """An array whose shards of this process's devices lie in host memory, by their slices."""

    shape: tuple[int, ...]
    sharding: Sharding
    parts: dict[str, np.ndarray]


def to_host(array: jax.Array) -> OnHost:
    """Copies this process's shards of an array into host memory, each once."""
    distinct = {str(shard.index): shard for shard in array.addressable_shards}
    parts = {index: np.asarray(shard.data) for index, shard in distinct.items()}
    return OnHost(array.shape, array.sharding, parts)


def from_host(held: OnHost) -> jax.Array:
    """The array on the devices again."""
    return jax.make_array_from_callback(
        held.shape, held.sharding, lambda index: held.parts[str(index)]
    )

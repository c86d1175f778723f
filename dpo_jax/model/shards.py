"""Where activations lie on a mesh, and over which of its axes an array divides.

Dimensions: B rows, L tokens, D width.
"""

import math
from typing import NamedTuple

from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


class Placement(NamedTuple):
    """Where activations lie on a mesh."""

    # hidden states [B, L, D]: B and L over axes of the mesh
    rows: NamedSharding
    # tokens [B, L] that are looked up in a table whose columns lie on several devices, and what is
    # found [B, L, D], with its columns on those devices, and on its way to the rows' place
    tokens: NamedSharding
    columns: NamedSharding
    way: tuple[NamedSharding, ...]


# what a PartitionSpec says of one axis of an array
Entry = str | tuple[str, ...] | None


def names(entry: Entry) -> tuple[str, ...]:
    """The axes of the mesh over which an axis lies."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def fit(spec: P, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
    """The spec with, of the mesh axes of each axis of the array, the first ones that divide it."""

    def one(entry: Entry, size: int) -> Entry:
        found = names(entry)
        while size % math.prod(mesh.shape[name] for name in found):
            found = found[:-1]
        return entry if found == names(entry) else found or None

    return P(*(one(entry, size) for entry, size in zip(spec, shape, strict=False)))


def divides(shape: tuple[int, ...], where: NamedSharding) -> bool:
    """Whether every axis of an array divides over its shards."""
    return tuple(fit(where.spec, shape, where.mesh)) == tuple(where.spec)[: len(shape)]


def of_rows(shape: tuple[int, ...], where: NamedSharding) -> NamedSharding | None:
    """Where an array [B, L, ...] lies; its tokens on one shard where they do not divide, and None
    where its rows do not.
    """
    if not divides(shape[:1], where):
        return None
    return NamedSharding(where.mesh, P(where.spec[0], *fit(where.spec, shape, where.mesh)[1:]))


def token_axis(shape: tuple[int, ...], where: NamedSharding) -> str | None:
    """The axis of the mesh over which the tokens of an array [B, L, ...] lie; None where they are
    whole.
    """
    lies = of_rows(shape, where)
    found = names(lies.spec[1]) if lies is not None and len(lies.spec) > 1 else ()
    return found[0] if found and where.mesh.shape[found[0]] > 1 else None

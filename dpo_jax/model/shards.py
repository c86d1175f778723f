"""Where activations lie on a mesh, and over which of its axes an array divides.

Dimensions: B rows, L tokens, D width.
"""

import math
from typing import NamedTuple

from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


class Placement(NamedTuple):
    """Where activations lie on a mesh."""

    # hidden states [B, L, D]
    rows: NamedSharding
    # tokens [B, L] that are looked up in a table whose columns lie on several devices, and what is
    # found [B, L, D], with its columns on those devices, before it goes to the rows' place
    tokens: NamedSharding
    columns: NamedSharding


def fit(spec: P, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
    """The spec with None where an axis of the array does not divide over its mesh axes."""

    def count(entry: str | tuple[str, ...] | None) -> int:
        names = (entry,) if isinstance(entry, str) else entry or ()
        return math.prod(mesh.shape[name] for name in names)

    pairs = zip(spec, shape, strict=False)
    return P(*(entry if size % count(entry) == 0 else None for entry, size in pairs))


def divides(shape: tuple[int, ...], where: NamedSharding) -> bool:
    """Whether every axis of an array divides over its shards."""
    return tuple(fit(where.spec, shape, where.mesh)) == tuple(where.spec)[: len(shape)]

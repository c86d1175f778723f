"""What devices that share a row's tokens send each other: keys and values before attention, and the
hidden states of scored tokens behind the last layer.

Gathered arrays' gradients are summed and scattered again, as in section 3.3.2 of
https://arxiv.org/abs/2407.21783.

Dimensions: B rows, L tokens, S scored tokens, D width.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dpo_jax.model import residuals, shards


def gather(array: jax.Array, axis: shards.Entry) -> jax.Array:
    """On a device of a mesh that has [B, L / shards, ...] of its rows: [B, L, ...]."""
    if axis is None:
        return array
    return residuals.keep_of_attention(jax.lax.all_gather(array, axis, axis=1, tiled=True))


def take(hidden: jax.Array, source: jax.Array, where: NamedSharding | None) -> jax.Array:
    """hidden [B, L, D] at source [B, S]: [B, S, D], which lies where hidden [B, L, D] does, by S as
    that does by L.

    Each device finds what its own tokens have of its rows' places; these are exchanged, and not the
    tokens.
    """
    axis = None if where is None else shards.token_axis(hidden.shape, where)
    if where is None or axis is None or axis != shards.token_axis(source.shape, where):
        return jnp.take_along_axis(hidden, source[..., None], axis=1)
    rows = where.spec[0]
    shared = jax.shard_map(
        functools.partial(take_own, axis),
        mesh=where.mesh,
        in_specs=(P(rows, axis), P(rows)),
        out_specs=P(rows, axis),
    )
    return shared(hidden, source)


def take_own(axis: str, hidden: jax.Array, source: jax.Array) -> jax.Array:
    """`take` on one device, of its tokens [B, L / shards, D] and all places [B, S] of its rows."""
    length = hidden.shape[1]
    own = source - jax.lax.axis_index(axis) * length
    found = jnp.take_along_axis(hidden, jnp.clip(own, 0, length - 1)[..., None], axis=1)
    found = jnp.where(((own >= 0) & (own < length))[..., None], found, 0)
    return jax.lax.psum_scatter(found, axis, scatter_dimension=1, tiled=True)


def shard_count(shape: tuple[int, ...], where: NamedSharding | None) -> int:
    """Over how many devices the tokens of each row of an array [B, L, ...] lie."""
    axis = None if where is None else shards.token_axis(shape, where)
    return 1 if where is None or axis is None else where.mesh.shape[axis]

"""Attention in blocks of tokens: only pairs of blocks in which one may see another are computed.

What `attention.attend` computes at once, with the logits of one pair of blocks in memory at a time,
as in https://arxiv.org/abs/2205.14135; which pairs there are is read from the ids at run time.

Dimensions: B rows, L tokens (Lq queries, Lk keys), H query heads, K key and value heads, G = H / K,
Dh dimensions a head, b tokens of a block, n blocks of a row, N = B * n.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dpo_jax import sharding
from dpo_jax.model import attention, residuals, sequence, shards

# tokens of a block: smaller ones compute less that nobody sees, in more and smaller products; twice
# as many in rows of so many tokens or more
BLOCK, LONG_ROW = 64, 2048
LOWEST = float(jnp.finfo(jnp.float32).min)


class Form(NamedTuple):
    """What of attention is fixed when it is compiled."""

    scale: float
    window: int | None
    cap: float | None
    # of kernels: whether to compute as they would where their device is not there
    interpret: bool = False


class Blocks(NamedTuple):
    """Queries, keys and values of all rows, in blocks."""

    query: jax.Array  # [N, K, G b, Dh]
    key: jax.Array  # [N, K, b, Dh]
    value: jax.Array  # [N, K, b, Dh]


class Pairs(NamedTuple):
    """Which blocks of keys the queries of each block see."""

    query_ids: attention.Ids  # int32 [N, b] each
    key_ids: attention.Ids  # int32 [N, b] each
    count: jax.Array  # int32 [N]: how many
    keys: jax.Array  # int32 [N, n]: their numbers, then any others


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_ids: attention.Ids,
    key_ids: attention.Ids,
    *,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
    rows: NamedSharding | None = None,
) -> jax.Array:
    """What `attention.attend` returns, [B, Lq, H, Dh], with a backward pass of its own.

    `rows` is where B lies: each device of its mesh computes its own rows and heads. B has to be a
    multiple of the shards; else the compiler shares the work out as it likes.
    """
    run = functools.partial(attend_rows, Form(scale, window, cap))
    return on_each_device(run, rows, query, key, value, query_ids, key_ids)


def attend_at_once(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_ids: attention.Ids,
    key_ids: attention.Ids,
    *,
    rows: NamedSharding | None = None,
    **options: Any,
) -> jax.Array:
    """`attention.attend` where a row's tokens lie on several devices."""
    run = functools.partial(attention.attend, **options)
    return on_each_device(run, rows, query, key, value, query_ids, key_ids)


def on_each_device(
    run: Callable[..., jax.Array],
    rows: NamedSharding | None,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_ids: attention.Ids,
    key_ids: attention.Ids,
) -> jax.Array:
    """What `run` makes of the rows, queries and heads of each device; of everything at once where B
    is no multiple of the shards, or `rows` is None.

    Where the rows' tokens lie on several devices, each has its own queries, and all keys of its
    rows.
    """
    inputs = query, key, value, query_ids, key_ids
    if rows is None or not shards.divides(query.shape[:1], rows):
        return run(*inputs)
    batch, tokens = rows.spec[0], shards.token_axis(query.shape, rows)
    heads = P(batch, tokens, sharding.RULES["key_value_heads"], None)
    heads = shards.fit(heads, key.shape, rows.mesh)

    def run_own(query, key, value, *ids: attention.Ids) -> jax.Array:
        return run(query, sequence.gather(key, tokens), sequence.gather(value, tokens), *ids)

    shared = jax.shard_map(
        run_own,
        mesh=rows.mesh,
        in_specs=(heads, heads, heads, P(batch, tokens), P(batch)),
        out_specs=heads,
        check_vma=False,
    )
    return shared(*inputs)


@functools.cache
def make_attend(
    attend: Callable[..., jax.Array], rows: NamedSharding | None
) -> Callable[..., jax.Array]:
    """`attend`, of this module or of kernels, for rows that lie there; the same function each time,
    so that decoders compare.
    """
    return functools.partial(attend, rows=rows)


def attend_rows(
    form: Form,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_ids: attention.Ids,
    key_ids: attention.Ids,
) -> jax.Array:
    """Attention of rows on one device: [B, Lq, H, Dh]."""
    pairs = list_pairs_of_rows(query_ids, key_ids, form.window)
    size = pairs.query_ids.example.shape[1]
    mixed: Any = attend_pairs(form, cut_heads(query, key, value, size), pairs)
    return join_heads(mixed, query.shape, size)


def cut_heads(query: jax.Array, key: jax.Array, value: jax.Array, size: int) -> Blocks:
    """Queries [B, Lq, H, Dh], keys and values [B, Lk, K, Dh] in blocks of `size` tokens."""
    batch, length, heads, head_dim = query.shape
    key_heads, groups = key.shape[2], heads // key.shape[2]
    cut = functools.partial(cut_rows, size=size)
    grouped = cut(query.reshape(batch, length, key_heads, groups, head_dim))
    return Blocks(
        grouped.transpose(0, 2, 3, 1, 4).reshape(-1, key_heads, groups * size, head_dim),
        cut(key).transpose(0, 2, 1, 3),
        cut(value).transpose(0, 2, 1, 3),
    )


def join_heads(mixed: jax.Array, shape: tuple[int, ...], size: int) -> jax.Array:
    """What queries of this shape see, [N, K, G b, Dh], in rows again: [B, Lq, H, Dh]."""
    batch, length, heads, head_dim = shape
    mixed = mixed.reshape(len(mixed), mixed.shape[1], -1, size, head_dim)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, -1, heads, head_dim)[:, :length]


def cut_rows(array: jax.Array, size: int) -> jax.Array:
    """Rows [B, L, ...] in blocks of `size` tokens, the last of a row padded with 0: [N, b, ...]."""
    rest = ((0, 0),) * (array.ndim - 2)
    padded = jnp.pad(array, ((0, 0), (0, -array.shape[1] % size), *rest))
    return padded.reshape(-1, size, *array.shape[2:])


def list_pairs_of_rows(
    query_ids: attention.Ids, key_ids: attention.Ids, window: int | None
) -> Pairs:
    """The pairs of blocks that must be computed, of ids [B, Lq] and [B, Lk]."""
    longest = max(query_ids.example.shape[1], key_ids.example.shape[1])
    # no larger than rows that are shorter than a block
    size = min(BLOCK * (2 if longest >= LONG_ROW else 1), -(-longest // 8) * 8)
    queries, keys = (cut_ids(ids, size) for ids in (query_ids, key_ids))
    return list_pairs(queries, keys, len(query_ids.example), window)


def cut_ids(ids: attention.Ids, size: int) -> attention.Ids:
    """Ids [B, L] in blocks of `size` tokens: [N, b]."""
    return attention.Ids(*(cut_rows(jnp.asarray(array), size) for array in ids))


def list_pairs(
    query_ids: attention.Ids, key_ids: attention.Ids, batch: int, window: int | None
) -> Pairs:
    """The pairs of blocks that must be computed, of ids [N, b] of B rows."""
    return Pairs(query_ids, key_ids, *order(find_needed(query_ids, key_ids, batch, window)))


def order(needed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How many inner blocks each outer one needs, of [B, outer, inner], and their numbers, then any
    others: int32 [B outer] and [B outer, inner].
    """
    batch, _, inner = needed.shape
    first = jnp.arange(batch, dtype=jnp.int32)[:, None, None] * inner
    numbers = jnp.argsort(1 - needed, axis=-1, stable=True).astype(jnp.int32) + first
    return needed.sum(axis=-1, dtype=jnp.int32).reshape(-1), numbers.reshape(-1, inner)


def find_needed(
    query_ids: attention.Ids, key_ids: attention.Ids, batch: int, window: int | None
) -> jax.Array:
    """1 where a query of a block may see a key of another, else 0: int32 [B, n, n].

    Told from the least and greatest ids of each block, so a pair may be listed in which none does.
    """
    (first, last), (key_first, key_last) = (
        span(ids.example, ids.example > 0) for ids in (query_ids, key_ids)
    )
    own = query_ids.example == first[:, None], key_ids.example == key_last[:, None]

    def spans(name: str) -> list[jax.Array]:
        mine, its = (
            span(getattr(ids, name), among)
            for ids, among in zip((query_ids, key_ids), own, strict=True)
        )
        return [*(lift(array) for array in mine), *(lift_key(array) for array in its)]

    def lift(array: jax.Array) -> jax.Array:
        return array.reshape(batch, -1, 1)

    def lift_key(array: jax.Array) -> jax.Array:
        return array.reshape(batch, 1, -1)

    found = (lift(first) <= lift_key(key_last)) & (lift_key(key_first) <= lift(last))
    # where the first example of the queries is the last of the keys, it is all that they share
    low, high, key_low, key_high = spans("branch")
    seen = (key_low == 0) | ((low <= key_high) & (key_low <= high))
    low, high, key_low, key_high = spans("position")
    seen &= key_low <= high
    if window is not None:
        seen &= key_high > low - window
    found &= seen | (lift(first) != lift_key(key_last))
    # no token sees one that is later by example, branch and position
    last, earliest = (
        (lift(array) for array in extreme(query_ids, largest=True)),
        (lift_key(array) for array in extreme(key_ids, largest=False)),
    )
    later = jnp.zeros_like(found)
    for mine, its in reversed(list(zip(last, earliest, strict=True))):
        later = (its > mine) | ((its == mine) & later)
    return jnp.where(found & ~later, 1, 0).astype(jnp.int32)


def span(array, among) -> tuple[jax.Array, jax.Array]:
    """Least and greatest number of each block [N, b] among some of its tokens: [N] both; the least
    is above the greatest where there are none.
    """
    least = jnp.where(among, array, np.iinfo(np.int32).max).min(axis=-1)
    return least, jnp.where(among, array, -1).max(axis=-1)


def extreme(ids: attention.Ids, *, largest: bool) -> tuple[jax.Array, ...]:
    """Example, branch and position of the first or last token of each block [N, b] in that order:
    [N] each.
    """
    among, found = jnp.asarray(ids.example) > 0, []
    for array in ids:
        found.append(span(array, among)[int(largest)])
        among &= array == found[-1][:, None]
    return tuple(found)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend_pairs(form: Form, blocks: Blocks, pairs: Pairs) -> jax.Array:
    """What the queries of each block see: [N, K, G b, Dh]."""
    return forward(form, blocks, pairs)[0]


def forward(form: Form, blocks: Blocks, pairs: Pairs) -> tuple[jax.Array, jax.Array]:
    """What the queries see [N, K, G b, Dh], and the log of their softmax's sum [N, K, G b]."""

    def of_block(i: jax.Array, results: tuple) -> tuple:
        query, keys = take(blocks.query, i), take(pairs.keys, i)

        def of_pair(c: jax.Array, so_far: tuple) -> tuple:
            largest, total, mixed = so_far
            j = take(keys, c)
            scores, mask = score(form, query, take(blocks.key, j), pairs, i, j)
            scores = jnp.where(mask, scores, LOWEST)
            new = jnp.maximum(largest, scores.max(axis=-1))
            weights = jnp.where(mask, jnp.exp(scores - new[..., None]), 0.0)
            shrunk = jnp.exp(largest - new)
            more = multiply("kij,kjd->kid", weights.astype(query.dtype), take(blocks.value, j))
            return new, total * shrunk + weights.sum(axis=-1), mixed * shrunk[..., None] + more

        zeros = jnp.zeros(query.shape[:-1], jnp.float32)
        start = zeros + LOWEST, zeros, jnp.zeros(query.shape, jnp.float32)
        largest, total, mixed = jax.lax.fori_loop(0, take(pairs.count, i), of_pair, start)
        # a query that sees nothing gives 0
        total = jnp.where(total > 0, total, 1.0)
        mixed = (mixed / total[..., None]).astype(query.dtype)
        log_total = jnp.where(largest > LOWEST, largest + jnp.log(total), 0.0)
        return results[0].at[i].set(mixed), results[1].at[i].set(log_total)

    shape = blocks.query.shape
    empty = jnp.zeros(shape, blocks.query.dtype), jnp.zeros(shape[:-1], jnp.float32)
    return jax.lax.fori_loop(0, len(blocks.query), of_block, empty)


def backward(form: Form, kept: tuple, cotangent: jax.Array) -> tuple[Blocks, Pairs]:
    """The gradients of the blocks; weights are computed again, pair by pair."""
    blocks, pairs, mixed, log_total = kept
    product = (cotangent.astype(jnp.float32) * mixed.astype(jnp.float32)).sum(axis=-1)

    def of_block(i: jax.Array, gradients: tuple) -> tuple:
        query, given, keys = take(blocks.query, i), take(cotangent, i), take(pairs.keys, i)
        logs_of_all, of_mixed = take(log_total, i)[..., None], take(product, i)[..., None]

        def of_pair(c: jax.Array, so_far: tuple) -> tuple:
            of_query, of_key, of_value = so_far
            j = take(keys, c)
            key, value = take(blocks.key, j), take(blocks.value, j)
            scores, mask = score(form, query, key, pairs, i, j)
            logs = jnp.where(mask, scores - logs_of_all, LOWEST)
            weights = jnp.where(mask, jnp.exp(logs), 0.0)
            more = multiply("kid,kjd->kij", given, value) - of_mixed
            slope = form.scale * weights * more
            if form.cap is not None:
                slope = slope * (1 - jnp.square(scores / form.cap))
            slope = slope.astype(query.dtype)
            of_query += multiply("kij,kjd->kid", slope, key)
            of_key = of_key.at[j].add(multiply("kij,kid->kjd", slope, query))
            more = multiply("kij,kid->kjd", weights.astype(query.dtype), given)
            return of_query, of_key, of_value.at[j].add(more)

        of_query, of_key, of_value = gradients
        start = jnp.zeros(query.shape, jnp.float32), of_key, of_value
        own, of_key, of_value = jax.lax.fori_loop(0, take(pairs.count, i), of_pair, start)
        return of_query.at[i].set(own.astype(query.dtype)), of_key, of_value

    start = (
        jnp.zeros_like(blocks.query),
        jnp.zeros(blocks.key.shape, jnp.float32),
        jnp.zeros(blocks.value.shape, jnp.float32),
    )
    of_query, of_key, of_value = jax.lax.fori_loop(0, len(blocks.query), of_block, start)
    found = Blocks(of_query, of_key.astype(blocks.key.dtype), of_value.astype(blocks.value.dtype))
    return found, jax.tree.map(lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0), pairs)


def keep(form: Form, blocks: Blocks, pairs: Pairs) -> tuple[jax.Array, tuple]:
    """`attend_pairs`, and what its backward pass needs."""
    mixed, log_total = residuals.keep_of_attention(forward(form, blocks, pairs))
    return mixed, (blocks, pairs, mixed, log_total)


attend_pairs.defvjp(keep, backward)


def score(
    form: Form, query: jax.Array, key: jax.Array, pairs: Pairs, i: jax.Array, j: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Logits float32 [K, G b, b] of the queries of block i and the keys of block j, and whether
    each sees each: bool [1, G b, b].
    """
    scores = form.scale * multiply("kid,kjd->kij", query, key)
    if form.cap is not None:
        scores = form.cap * jnp.tanh(scores / form.cap)
    mine, its = (
        attention.Ids(*(take(array, at)[None] for array in ids))
        for ids, at in ((pairs.query_ids, i), (pairs.key_ids, j))
    )
    mask = attention.visible(mine, its, form.window)  # [1, b, b]
    return scores, jnp.tile(mask, (1, query.shape[1] // mask.shape[1], 1))


def multiply(axes: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """A product that is summed in float32."""
    return jnp.einsum(axes, left, right, preferred_element_type=jnp.float32)


def take(array, at: jax.Array) -> jax.Array:
    """The entry of the first axis."""
    return jax.lax.dynamic_index_in_dim(array, at, 0, keepdims=False)

"""Attention in blocks of tokens as Pallas kernels for TPUs.

What `blocks.attend` computes, and the same pairs of blocks: they are listed in the order in which
they are computed, and a kernel has one step for each, so that its time follows the list's length,
which is data. A step computes several heads, lest what each step costs besides should count.

Dimensions: B rows, L tokens, H query heads, K key and value heads, k of them in a step, G = H / K,
Dh dimensions a head, b tokens of a block, n blocks of a row, N = B * n, R = G * b, T pairs.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas
from jax.experimental.pallas import tpu
from jax.sharding import NamedSharding

from dpo_jax.model import attention, blocks, residuals, tpu_pair

# tokens of a block, at least: what a vector register has lanes
BLOCK = 128
# pairs that may be listed, as numbers of 4 bytes in the scalar memory
LISTED = 2**16
# float32 numbers of logits and of results that a step may have in the vector memory
HELD = 2**18


class Listed(NamedTuple):
    """Pairs of blocks in the order in which they are computed: one of the outer blocks with all of
    the inner blocks that it needs, then the next.
    """

    count: jax.Array  # int32 [1]
    # int32 [T]: row, outer and inner block as one number; after the first `count`, any others
    order: jax.Array


class Lists(NamedTuple):
    """Which pairs of blocks are computed, and the ids from which their masks are made."""

    by_query: Listed
    by_key: Listed
    query_ids: jax.Array  # int32 [N, 3, b]: example, branch and position
    key_ids: jax.Array  # int32 [N, b, 3]


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
    interpret: bool = False,
) -> jax.Array:
    """What `blocks.attend` returns, [B, Lq, H, Dh].

    `interpret` computes as the kernels would where there is no TPU, for tests.
    """
    run = partial(attend_rows, blocks.Form(scale, window, cap, interpret))
    return blocks.on_each_device(run, rows, query, key, value, query_ids, key_ids)


def attend_rows(
    form: blocks.Form,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_ids: attention.Ids,
    key_ids: attention.Ids,
) -> jax.Array:
    """Attention of rows on one device: [B, Lq, H, Dh]."""
    size = block_size(len(query), query.shape[1], key.shape[1])
    lists = list_pairs(query_ids, key_ids, size, form.window)
    mixed: Any = attend_pairs(form, blocks.cut_heads(query, key, value, size), lists)
    return blocks.join_heads(mixed, query.shape, size)


def block_size(batch: int, query_length: int, key_length: int) -> int:
    """Tokens of a block: so many that all pairs of blocks could be listed."""
    size = BLOCK
    while batch * -(-query_length // size) * -(-key_length // size) > LISTED:
        size *= 2
    return size


def list_pairs(
    query_ids: attention.Ids, key_ids: attention.Ids, size: int, window: int | None
) -> Lists:
    """The pairs of blocks of `size` tokens that must be computed, of ids [B, Lq] and [B, Lk]."""
    queries, keys = (blocks.cut_ids(ids, size) for ids in (query_ids, key_ids))
    needed = blocks.find_needed(queries, keys, len(query_ids.example), window)
    by_query, by_key = order(needed), order(needed.transpose(0, 2, 1))
    return Lists(by_query, by_key, jnp.stack(queries, axis=1), jnp.stack(keys, axis=2))


def order(needed: jax.Array) -> Listed:
    """The pairs that are 1 in [B, outer, inner]. A block that needs none gets its first, lest what
    it sees stay unwritten.
    """
    none = needed.sum(axis=-1, keepdims=True) == 0
    first = jnp.arange(needed.shape[-1])[None, None] == 0
    listed = jnp.where(none & first, 1, needed).reshape(-1)
    found = jnp.argsort(1 - listed, stable=True).astype(jnp.int32)
    return Listed(listed.sum(dtype=jnp.int32)[None], found)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend_pairs(form: blocks.Form, cut: blocks.Blocks, lists: Lists) -> jax.Array:
    """What the queries of each block see: [N, K, R, Dh]."""
    return forward(form, cut, lists)[0]


def keep(form: blocks.Form, cut: blocks.Blocks, lists: Lists) -> tuple[jax.Array, tuple]:
    """`attend_pairs`, and what its backward pass needs."""
    mixed, log_total = residuals.keep_of_attention(forward(form, cut, lists))
    return mixed, (cut, lists, mixed, log_total)


def forward(form: blocks.Form, cut: blocks.Blocks, lists: Lists) -> tuple[jax.Array, jax.Array]:
    """What the queries see [N, K, R, Dh], and the log of their softmax's sum [N, K, 1, R]."""
    query, key, value = cut
    count, heads, rows, head_dim = query.shape
    log_total = jax.ShapeDtypeStruct((count, heads, 1, rows), jnp.float32)
    return run_pairs(
        partial(tpu_pair.attend_pair, form),
        form.interpret,
        lists.by_query,
        outer=(lists.query_ids, query),
        inner=(lists.key_ids, key, value),
        results=(like(query), log_total),
        sums=((1, rows), (1, rows), (head_dim, rows)),
        products=2,
    )


def backward(form: blocks.Form, kept: tuple, cotangent: jax.Array) -> tuple[blocks.Blocks, Lists]:
    """The gradients of the blocks; both kernels compute the weights again."""
    (query, key, value), lists, mixed, log_total = kept
    product = (cotangent.astype(jnp.float32) * mixed.astype(jnp.float32)).sum(axis=-1)
    of_queries = lists.query_ids, query, cotangent, log_total, product[:, :, None]
    of_keys = lists.key_ids, key, value
    (of_query,) = run_pairs(
        partial(tpu_pair.differentiate_query, form),
        form.interpret,
        lists.by_query,
        outer=of_queries,
        inner=of_keys,
        results=(like(query),),
        sums=(query.shape[:1:-1],),
        products=3,
    )
    of_key, of_value = run_pairs(
        partial(tpu_pair.differentiate_key, form),
        form.interpret,
        lists.by_key,
        outer=of_keys,
        inner=of_queries,
        results=(like(key), like(value)),
        sums=(key.shape[2:], value.shape[2:]),
        products=4,
    )
    nothing = jax.tree.map(lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0), lists)
    return blocks.Blocks(of_query, of_key, of_value), nothing


attend_pairs.defvjp(keep, backward)


def like(array: jax.Array) -> jax.ShapeDtypeStruct:
    """Its shape and type."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def run_pairs(
    kernel: partial[None],
    interpret: bool,
    listed: Listed,
    *,
    outer: tuple[jax.Array, ...],
    inner: tuple[jax.Array, ...],
    results: tuple[jax.ShapeDtypeStruct, ...],
    sums: tuple[tuple[int, ...], ...],
    products: int,
) -> Any:
    """What the kernel writes for the outer blocks, of arrays of these and of the inner blocks.

    `products` is how many it computes of a pair's logits or their like.

    Of arrays [N, K, ...] it is given k heads at a time, of others [N, ...] all.
    """
    # T = (blocks of the outer kind) * (inner blocks of a row)
    inner_count = len(listed.order) // len(outer[0])
    outer_count = len(listed.order) // len(inner[0])
    key_heads, head_dim = outer[1].shape[1], outer[1].shape[3]
    rows, columns = sides(outer, inner)
    heads = heads_of_step(outer, inner)

    def of_outer(h, t, count, order) -> tuple:
        return jax.lax.div(order[t], inner_count), h

    def of_inner(h, t, count, order) -> tuple:
        row = jax.lax.div(order[t], outer_count * inner_count)
        return row * inner_count + jax.lax.rem(order[t], inner_count), h

    def lie(at: Callable[..., tuple], array: Any) -> pallas.BlockSpec:
        if array.ndim == 3:
            return pallas.BlockSpec((None, *array.shape[1:]), lambda *step: (at(*step)[0], 0, 0))
        return pallas.BlockSpec((None, heads, *array.shape[2:]), lambda *step: (*at(*step), 0, 0))

    def body(count, order, *references) -> None:
        t, total = pallas.program_id(1), count[0]
        own, before, after = (
            jax.lax.div(order[at], inner_count)
            for at in (t, jnp.maximum(t - 1, 0), jnp.minimum(t + 1, total - 1))
        )
        ends = (t == 0) | (before != own), (t == total - 1) | (after != own)
        of_step = iter(references)
        parts = (tuple(next(of_step) for _ in part) for part in (outer, inner, results, sums))
        kernel(tpu_pair.Step(*ends, *parts))

    grid = tpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(key_heads // heads, listed.count[0]),
        in_specs=[*(lie(of_outer, one) for one in outer), *(lie(of_inner, one) for one in inner)],
        out_specs=[lie(of_outer, one) for one in results],
        scratch_shapes=[tpu.VMEM((heads, *shape), jnp.float32) for shape in sums],
    )
    # as if every row were one example without branches: how many pairs there are is data
    logits = (len(listed.order) + len(outer[0])) // 2 * key_heads * rows * columns
    called = pallas.pallas_call(
        body,
        name=kernel.func.__name__,
        cost_estimate=pallas.CostEstimate(
            flops=2 * products * logits * head_dim,
            transcendentals=logits,
            bytes_accessed=sum(one.size * one.dtype.itemsize for one in (*outer, *inner, *results)),
        ),
        out_shape=results,
        grid_spec=grid,
        interpret=interpret,
        compiler_params=tpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
    )
    return called(*listed, *outer, *inner)


def sides(outer: tuple[jax.Array, ...], inner: tuple[jax.Array, ...]) -> tuple[int, int]:
    """Rows and columns of a pair's logits, of arrays of outer and of inner blocks."""
    rows, columns = (max(array.shape[-2] for array in arrays[1:3]) for arrays in (outer, inner))
    return rows, columns


def heads_of_step(outer: tuple[jax.Array, ...], inner: tuple[jax.Array, ...]) -> int:
    """As many heads of keys, a divisor of all, as a step may hold logits and sums of."""
    key_heads, head_dim = outer[1].shape[1], outer[1].shape[3]
    shorter, longer = sorted(sides(outer, inner))
    fitting = max(1, HELD // (longer * max(shorter, head_dim)))
    return max(k for k in range(1, key_heads + 1) if key_heads % k == 0 and k <= fitting)

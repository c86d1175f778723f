"""Attention in blocks of tokens as Pallas kernels for GPUs.

What `blocks.attend` computes, and the same pairs of blocks: each program of a kernel goes over the
blocks that are listed for its own, so that its time follows the list's length, which is data.

Dimensions: B rows, L tokens, H query heads, K key and value heads, G = H / K, Dh dimensions a head,
a power of 2, b tokens of a block, n blocks of a row, N = B * n.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas
from jax.experimental.pallas import triton
from jax.sharding import NamedSharding

from dpo_jax.model import attention, blocks, residuals

# tokens of a block whose rows have at most so many bytes, and half as many of longer ones, which
# would not all fit in a multiprocessor's memory
BLOCK, ROW_BYTES = 64, 256
# how Triton computes a program: with how many warps, and stages of a loop that overlap
WARPS, STAGES = 4, 2
LOWEST = blocks.LOWEST
# dimensions of a head up to which GPUs have run the kernels, in bfloat16
MOST_DIMENSIONS = 128


class Lists(NamedTuple):
    """Which blocks of keys each block of queries needs, and the other way round."""

    key_counts: jax.Array  # int32 [N]: how many
    keys: jax.Array  # int32 [N, n]: their numbers, then any others
    query_counts: jax.Array
    queries: jax.Array
    query_ids: jax.Array  # int32 [N, 3, b]: example, branch and position
    key_ids: jax.Array


def is_proven(device_kind: str, head_dim: int, dtype: str) -> bool:
    """Whether GPUs of a maker (of which JAX calls one so) have run the kernels in that type, with
    heads of as many dimensions or more.
    """
    return "NVIDIA" in device_kind and head_dim <= MOST_DIMENSIONS and dtype == "bfloat16"


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

    `interpret` computes as the kernels would where there is no GPU, for tests.
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
    # products are of sizes that are powers of 2, from 16
    head_dim = query.shape[3]
    padded = max(16, pallas.next_power_of_2(head_dim))
    size = block_size(padded, query.dtype)
    lists = list_pairs(query_ids, key_ids, form.window, size)
    wider = partial(jnp.pad, pad_width=((0, 0), (0, 0), (0, 0), (0, padded - head_dim)))
    cut = blocks.cut_heads(wider(query), wider(key), wider(value), size)
    mixed: Any = attend_pairs(form, cut, lists)
    return blocks.join_heads(mixed, (*query.shape[:3], padded), size)[..., :head_dim]


def block_size(head_dim: int, dtype: np.dtype) -> int:
    """Tokens of a block of heads with so many dimensions."""
    return BLOCK if head_dim * dtype.itemsize <= ROW_BYTES else BLOCK // 2


def list_pairs(
    query_ids: attention.Ids, key_ids: attention.Ids, window: int | None, size: int
) -> Lists:
    """The pairs of blocks that must be computed, of ids [B, Lq] and [B, Lk]."""
    queries, keys = (blocks.cut_ids(ids, size) for ids in (query_ids, key_ids))
    needed = blocks.find_needed(queries, keys, len(query_ids.example), window)
    stacked = (jnp.stack(ids, axis=1) for ids in (queries, keys))
    return Lists(*blocks.order(needed), *blocks.order(needed.transpose(0, 2, 1)), *stacked)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend_pairs(form: blocks.Form, cut: blocks.Blocks, lists: Lists) -> jax.Array:
    """What the queries of each block see: [N, K, G b, Dh]."""
    return forward(form, cut, lists)[0]


def keep(form: blocks.Form, cut: blocks.Blocks, lists: Lists) -> tuple[jax.Array, tuple]:
    """`attend_pairs`, and what its backward pass needs."""
    mixed, log_total = residuals.keep_of_attention(forward(form, cut, lists))
    return mixed, (cut, lists, mixed, log_total)


def forward(form: blocks.Form, cut: blocks.Blocks, lists: Lists) -> tuple[jax.Array, jax.Array]:
    """What the queries see [N, K, G b, Dh], and the log of their softmax's sum [N, K, G b]."""
    log_total = jax.ShapeDtypeStruct(cut.query.shape[:3], jnp.float32)
    results = jax.ShapeDtypeStruct(cut.query.shape, cut.query.dtype), log_total
    return call(attend_block, form, True, (lists, *cut), results)


def backward(form: blocks.Form, kept: tuple, cotangent: jax.Array) -> tuple[blocks.Blocks, Lists]:
    """The gradients of the blocks; both kernels compute the weights again."""
    cut, lists, mixed, log_total = kept
    product = (cotangent.astype(jnp.float32) * mixed.astype(jnp.float32)).sum(axis=-1)
    inputs = (lists, *cut, cotangent, log_total, product)
    shapes = tuple(jax.ShapeDtypeStruct(one.shape, one.dtype) for one in cut)
    (of_query,) = call(differentiate_query, form, True, inputs, shapes[:1])
    of_key, of_value = call(differentiate_key, form, False, inputs, shapes[1:])
    nothing = jax.tree.map(lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0), lists)
    return blocks.Blocks(of_query, of_key, of_value), nothing


attend_pairs.defvjp(keep, backward)


def call(
    kernel: Callable[..., None], form: blocks.Form, by_group: bool, inputs: tuple, results: tuple
) -> Any:
    """What a kernel writes, with a program for each block and head of keys, and of queries where it
    goes by them. Arrays are given whole: a program reads what it needs.
    """
    (count, heads, rows), size = results[0].shape[:3], inputs[0].key_ids.shape[2]
    grid = count, heads, rows // size if by_group else 1
    lists, *arrays = inputs
    run = pallas.pallas_call(
        partial(kernel, form),
        name=kernel.__name__,
        out_shape=results,
        grid=grid,
        interpret=form.interpret,
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=STAGES),
    )
    return run(*lists, *arrays)


def attend_block(form: blocks.Form, *references: Any) -> None:
    """What the queries of a block and head see."""
    lists, cut = Lists(*references[:6]), blocks.Blocks(*references[6:9])
    mixed, log_total = references[9:]
    i, head, own = place(lists)
    query = cut.query[i, head, own, :]

    def of_pair(at: jax.Array, so_far: tuple) -> tuple:
        largest, total, summed = so_far
        j = lists.keys[i, at]
        scores, mask = score(form, lists, i, j, query, cut.key[j, head, :, :])
        new = jnp.maximum(largest, jnp.where(mask, scores, LOWEST).max(axis=1))
        weights = jnp.where(mask, jnp.exp(jnp.where(mask, scores - new[:, None], LOWEST)), 0.0)
        shrunk = jnp.exp(largest - new)
        more = triton.dot(weights.astype(query.dtype), cut.value[j, head, :, :])
        return new, total * shrunk + weights.sum(axis=1), summed * shrunk[:, None] + more

    zeros = jnp.zeros(query.shape[0], jnp.float32)
    start = zeros + LOWEST, zeros, jnp.zeros(query.shape, jnp.float32)
    largest, total, summed = jax.lax.fori_loop(0, lists.key_counts[i], of_pair, start)
    # a query that sees nothing gives 0
    total = jnp.where(total > 0, total, 1.0)
    mixed[i, head, own, :] = (summed / total[:, None]).astype(mixed.dtype)
    log_total[i, head, own] = jnp.where(largest > LOWEST, largest + jnp.log(total), 0.0)


def differentiate_query(form: blocks.Form, *references: Any) -> None:
    """The gradient of the queries of a block and head."""
    lists, inputs = Lists(*references[:6]), references[6:12]
    i, head, own = place(lists)

    def of_pair(at: jax.Array, so_far: jax.Array) -> jax.Array:
        j = lists.keys[i, at]
        _, slopes, key, _ = weigh(form, lists, inputs, (i, head, own), j)
        return so_far + triton.dot(slopes.astype(key.dtype), key)

    gradient = references[12]
    start = jnp.zeros((own.size, gradient.shape[3]), jnp.float32)
    found = jax.lax.fori_loop(0, lists.key_counts[i], of_pair, start)
    gradient[i, head, own, :] = found.astype(gradient.dtype)


def differentiate_key(form: blocks.Form, *references: Any) -> None:
    """The gradients of keys and values of a block and head."""
    lists, inputs = Lists(*references[:6]), references[6:12]
    of_key, of_value = references[12:]
    j, head, own_keys = place(lists)
    size = own_keys.size
    groups = jnp.int32(inputs[0].shape[2] // size)

    def of_pair(at: jax.Array, so_far: tuple) -> tuple:
        number, group = jax.lax.div(at, groups), jax.lax.rem(at, groups)
        i, own = lists.queries[j, number], pallas.ds(group * size, size)
        weights, slopes, _, (query, given) = weigh(form, lists, inputs, (i, head, own), j)
        of_key = so_far[0] + triton.dot(slopes.astype(query.dtype).T, query)
        return of_key, so_far[1] + triton.dot(weights.astype(given.dtype).T, given)

    zeros = jnp.zeros((size, of_key.shape[3]), jnp.float32)
    found = jax.lax.fori_loop(0, lists.query_counts[j] * groups, of_pair, (zeros, zeros))
    of_key[j, head, :, :] = found[0].astype(of_key.dtype)
    of_value[j, head, :, :] = found[1].astype(of_value.dtype)


def place(lists: Lists) -> tuple[jax.Array, jax.Array, Any]:
    """A program's block, head of keys, and queries among those of that head."""
    size = lists.key_ids.shape[2]
    return (
        pallas.program_id(0),
        pallas.program_id(1),
        pallas.ds(pallas.program_id(2) * size, size),
    )


def weigh(form: blocks.Form, lists: Lists, inputs: tuple, own: tuple, j: jax.Array) -> tuple:
    """The softmax of a pair's logits and the gradient of the products that these are of, float32
    [b, b] each; keys; queries and the cotangent.
    """
    queries, keys, values, cotangent, log_total, product = inputs
    i, head, _ = own
    query, key, given = queries[*own, :], keys[j, head, :, :], cotangent[*own, :]
    scores, mask = score(form, lists, i, j, query, key)
    logs = jnp.where(mask, scores - log_total[own][:, None], LOWEST)
    weights = jnp.where(mask, jnp.exp(logs), 0.0)
    more = triton.dot(given, values[j, head, :, :].T)
    slopes = form.scale * weights * (more - product[own][:, None])
    if form.cap is not None:
        slopes = slopes * (1 - jnp.square(scores / form.cap))
    return weights, slopes, key, (query, given)


def score(
    form: blocks.Form, lists: Lists, i: jax.Array, j: jax.Array, query: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A pair's logits, float32 [b, b], and whether each query sees each key."""
    scores = form.scale * triton.dot(query, key.T)
    if form.cap is not None:
        scores = form.cap * jnp.tanh(scores / form.cap)
    mine = attention.Ids(*(lists.query_ids[i, at, :][:, None] for at in range(3)))
    its = attention.Ids(*(lists.key_ids[j, at, :][None, :] for at in range(3)))
    return scores, attention.sees(mine, its, form.window)

"""What kernels for TPUs compute of a pair of blocks of tokens, of queries and of keys.

Dimensions: H query heads, K key and value heads, k of them in a step, G = H / K, Dh dimensions a
head, b tokens of a block, R = G * b.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas

from dpo_jax.model import attention, blocks

LOWEST = blocks.LOWEST


class Step(NamedTuple):
    """What a kernel reads and writes for a pair of blocks, references to vector memory."""

    # whether the pair is the first, and the last, of its outer block
    first: jax.Array
    last: jax.Array
    outer: tuple[Any, ...]
    inner: tuple[Any, ...]
    results: tuple[Any, ...]
    # float32, and kept until the next pair
    sums: tuple[Any, ...]


def attend_pair(form: blocks.Form, step: Step) -> None:
    """What the queries see, from the keys so far."""
    query_ids, query = step.outer
    key_ids, key, value = step.inner
    mixed, log_total = step.results
    largest, total, so_far = step.sums

    @pallas.when(step.first)
    def _():
        largest[...] = jnp.full(largest.shape, LOWEST, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        so_far[...] = jnp.zeros(so_far.shape, jnp.float32)

    scores, mask = score(form, query, key, query_ids, key_ids)
    scores = jnp.where(mask, scores, LOWEST)
    before = largest[...]
    new = jnp.maximum(before, scores.max(axis=1, keepdims=True))
    weights = jnp.where(mask, jnp.exp(scores - new), 0.0)
    shrunk = jnp.exp(before - new)
    largest[...] = new
    total[...] = total[...] * shrunk + weights.sum(axis=1, keepdims=True)
    more = blocks.multiply("kjd,kji->kdi", value[...], weights.astype(value.dtype))
    so_far[...] = so_far[...] * shrunk + more

    @pallas.when(step.last)
    def _():
        # a query that sees nothing gives 0
        whole = jnp.where(total[...] > 0, total[...], 1.0)
        mixed[...] = jnp.swapaxes(so_far[...] / whole, 1, 2).astype(mixed.dtype)
        log_total[...] = jnp.where(largest[...] > LOWEST, largest[...] + jnp.log(whole), 0.0)


def differentiate_query(form: blocks.Form, step: Step) -> None:
    """The gradient of the queries, from the keys so far."""
    key = step.inner[1]
    gradient, so_far = step.results[0], step.sums[0]

    @pallas.when(step.first)
    def _():
        so_far[...] = jnp.zeros(so_far.shape, jnp.float32)

    slopes = weigh(form, step.outer, step.inner)[1]
    so_far[...] += blocks.multiply("kjd,kji->kdi", key[...], slopes.astype(key.dtype))

    @pallas.when(step.last)
    def _():
        gradient[...] = jnp.swapaxes(so_far[...], 1, 2).astype(gradient.dtype)


def differentiate_key(form: blocks.Form, step: Step) -> None:
    """The gradients of keys and values, from the queries so far."""
    query, given = step.inner[1:3]

    @pallas.when(step.first)
    def _():
        for so_far in step.sums:
            so_far[...] = jnp.zeros(so_far.shape, jnp.float32)

    weights, slopes = weigh(form, step.inner, step.outer)
    of_key, of_value = step.sums
    of_key[...] += blocks.multiply("kji,kid->kjd", slopes.astype(query.dtype), query[...])
    of_value[...] += blocks.multiply("kji,kid->kjd", weights.astype(given.dtype), given[...])

    @pallas.when(step.last)
    def _():
        for gradient, so_far in zip(step.results, step.sums, strict=True):
            gradient[...] = so_far[...].astype(gradient.dtype)


def weigh(
    form: blocks.Form, of_queries: tuple[Any, ...], of_keys: tuple[Any, ...]
) -> tuple[jax.Array, jax.Array]:
    """The softmax of a pair's logits and the gradient of the products that these are of:
    float32 [k, b, R] each.
    """
    query_ids, query, given, log_total, product = of_queries
    key_ids, key, value = of_keys
    scores, mask = score(form, query, key, query_ids, key_ids)
    logs = jnp.where(mask, scores - log_total[...], LOWEST)
    weights = jnp.where(mask, jnp.exp(logs), 0.0)
    more = blocks.multiply("kjd,kid->kji", value[...], given[...])
    slopes = form.scale * weights * (more - product[...])
    if form.cap is not None:
        slopes = slopes * (1 - jnp.square(scores / form.cap))
    return weights, slopes


def score(
    form: blocks.Form, query: Any, key: Any, query_ids: Any, key_ids: Any
) -> tuple[jax.Array, jax.Array]:
    """A pair's logits, float32 [k, b, R], and whether each key is seen by each query, [1, b, R].

    Keys come first, so that what is told of a query, such as its greatest logit, lies along the
    lanes and meets every key's logits as it is.
    """
    scores = form.scale * blocks.multiply("kjd,kid->kji", key[...], query[...])
    if form.cap is not None:
        scores = form.cap * jnp.tanh(scores / form.cap)
    mine = attention.Ids(*(query_ids[at : at + 1, :] for at in range(3)))
    its = attention.Ids(*(key_ids[:, at : at + 1] for at in range(3)))
    mask = attention.sees(mine, its, form.window)
    # a mask cannot be laid out anew, numbers can
    mask = jnp.concatenate([mask.astype(jnp.int32)] * (query.shape[1] // mask.shape[1]), axis=1)
    return scores, (mask != 0)[None]

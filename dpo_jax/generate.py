"""Sampling with a KV cache: a pure function for jit, and one for lists of prompts on the host.

Dimensions: B rows, E stop tokens, P slots of the prompt, V vocabulary.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dpo_jax import sharding
from dpo_jax.model import decoder as model_decoder
from dpo_jax.model.attention import Ids

# logits float32 [B, V], keys [B], temperature -> token ids int32 [B]
Select = Callable[[jax.Array, jax.Array, jax.Array | float], jax.Array]


def greedy(logits: jax.Array, keys: jax.Array, temperature: jax.Array | float) -> jax.Array:
    """The likeliest token of each row; keys and temperature are not used."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@functools.cache
def make_sampler(top_k: int | None = None, top_p: float | None = None) -> Select:
    """A `select` that draws from softmax(logits / temperature), cut to top_k and then to top_p.

    top_p keeps the likeliest tokens up to and including the one at which their probability, among
    the top_k, reaches it. Equal arguments give the same function, so that jit compiles once.
    """
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be at least 1, or None for all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must be in (0, 1], or None for all tokens")
    draw = jax.vmap(jax.random.categorical)

    def sample(logits: jax.Array, keys: jax.Array, temperature: jax.Array | float) -> jax.Array:
        return draw(keys, logits / temperature).astype(jnp.int32)

    def sample_from_top(logits, keys, temperature):
        count = logits.shape[-1] if top_k is None else min(top_k, logits.shape[-1])
        # In order of rank, so that ties at the border cannot let in more than top_k tokens.
        values, tokens = jax.lax.top_k(logits / temperature, count)  # [B, top_k]
        if top_p is not None:
            probabilities = jax.nn.softmax(values, axis=-1)
            before = jnp.cumsum(probabilities, axis=-1) - probabilities
            # The likeliest stays whatever rounding does to its own sum.
            kept = (before < top_p) | (jnp.arange(count) == 0)[None, :]
            values = jnp.where(kept, values, -jnp.inf)
        rank = draw(keys, values)
        return jnp.take_along_axis(tokens, rank[:, None], axis=1)[:, 0].astype(jnp.int32)

    return sample if top_k is None and top_p is None else sample_from_top


class State(NamedTuple):
    """What a step of the sampling loop takes and returns."""

    step: jax.Array  # int32: tokens sampled so far
    tokens: jax.Array  # int32 [B, max_tokens]
    lengths: jax.Array  # int32 [B]: sampled tokens of each row
    ended: jax.Array  # bool [B]
    cache: model_decoder.Cache


def generate(
    decoder: model_decoder.Decoder,
    params: dict,
    prompts: jax.Array,
    lengths: jax.Array,
    keys: jax.Array,
    *,
    select: Select,
    max_tokens: int,
    temperature: jax.Array | float,
    stop_ids: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Continues each row: tokens int32 [B, max_tokens], and how many were sampled, int32 [B].

    prompts [B, P] are padded on the right, lengths [B] say to where; a row of length 0 is not
    continued. keys [B] is one key a row, so that what a row draws does not depend on its batch. A
    row ends with any of stop_ids [E], which counts; the first of them fills the rest of the row.
    """
    head = model_decoder.head(params, decoder.config)
    head = head._replace(matrix=head.matrix.astype(decoder.dtype))

    def sample(state: State, hidden: jax.Array) -> State:
        """The state after one more token, drawn from what follows hidden [B, D]."""
        logits = model_decoder.logits(hidden, head)
        step_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, state.step)
        return append(state, select(logits, step_keys, temperature), stop_ids)

    def unfinished(state: State) -> jax.Array:
        return (state.step < max_tokens) & ~jnp.all(state.ended)

    def advance(state: State) -> State:
        hidden, cache = read_last(decoder, params, state, prompts.shape[1], lengths)
        return sample(state._replace(cache=cache), hidden)

    hidden, cache = read_prompts(decoder, params, prompts, lengths, max_tokens)
    start = State(
        step=jnp.int32(0),
        tokens=jnp.full((len(prompts), max_tokens), stop_ids[0], jnp.int32),
        lengths=jnp.zeros_like(lengths),
        ended=lengths == 0,
        cache=cache,
    )
    final = jax.lax.while_loop(unfinished, advance, sample(start, hidden))
    return final.tokens, final.lengths


def append(state: State, chosen: jax.Array, stop_ids: jax.Array) -> State:
    """The state after the chosen tokens [B]; a row that has ended gets stop_ids[0] instead."""
    token = jnp.where(state.ended, stop_ids[0], chosen)
    stops = jnp.any(token[:, None] == stop_ids[None, :], axis=1)
    return state._replace(
        step=state.step + 1,
        tokens=jax.lax.dynamic_update_slice_in_dim(
            state.tokens, token[:, None], state.step, axis=1
        ),
        lengths=state.lengths + ~state.ended,
        ended=state.ended | stops,
    )


def read_prompts(
    decoder: model_decoder.Decoder,
    params: dict,
    prompts: jax.Array,
    lengths: jax.Array,
    max_tokens: int,
) -> tuple[jax.Array, model_decoder.Cache]:
    """The hidden state [B, D] of each prompt's last token, and a cache with room for max_tokens."""
    batch, width = prompts.shape
    index = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32)[None, :], prompts.shape)
    ids = Ids((index < lengths[:, None]).astype(jnp.int32), jnp.zeros_like(index), index)
    # The last token is sampled and never read again.
    cache = model_decoder.init_cache(decoder.config, batch, width + max_tokens - 1, decoder.dtype)
    prefilled: Any = decoder.apply({"params": params}, prompts, ids, cache=cache, at=0)
    hidden, cache = prefilled
    end = jnp.maximum(lengths - 1, 0)[:, None, None]
    return jnp.take_along_axis(hidden, end, axis=1)[:, 0], cache


def read_last(
    decoder: model_decoder.Decoder, params: dict, state: State, width: int, lengths: jax.Array
) -> tuple[jax.Array, model_decoder.Cache]:
    """The hidden state [B, D] of the token sampled last, and the cache with it.

    Sampled tokens lie in the cache behind all `width` slots of the prompts, of which each row has
    filled lengths [B].
    """
    last = state.step - 1
    token = jax.lax.dynamic_slice_in_dim(state.tokens, last, 1, axis=1)  # [B, 1]
    example = (lengths > 0).astype(jnp.int32)[:, None]
    ids = Ids(example, jnp.zeros_like(example), lengths[:, None] + last)
    advanced: Any = decoder.apply(
        {"params": params}, token, ids, cache=state.cache, at=width + last
    )
    hidden, cache = advanced
    return hidden[:, 0], cache


def complete(
    decoder: model_decoder.Decoder,
    params: dict,
    prompts: Sequence[Sequence[int]],
    key: jax.Array,
    *,
    select: Select,
    max_tokens: int,
    temperature: float = 1.0,
    stop_ids: Sequence[int],
    batch_size: int,
    mesh: Mesh | None = None,
) -> list[list[int]]:
    """Continuations of prompts of token ids, in order; each ends with one of stop_ids, or has
    max_tokens.

    All batches have one shape, whose width is the power of two over the longest prompt. Prompt i
    draws with fold_in(key, i), whatever the batch size. With a mesh, rows lie over its batch
    shards and, since they are not cut, over those of a row. Other stop_ids, as many, compile
    nothing.
    """
    check_prompts(decoder, prompts, max_tokens, temperature)
    if not stop_ids:
        raise ValueError("stop_ids is empty; give at least one id, such as the tokenizer's EOS")
    if not prompts:
        return []
    put, shards, everywhere = (lambda array: array), 1, None
    if mesh is not None:
        put = functools.partial(sharding.put, where=sharding.whole_rows(mesh))
        shards = sharding.batch_shards(mesh) * sharding.row_shards(mesh)
        everywhere = sharding.replicated(mesh)
        decoder = decoder.clone(placement=sharding.placement(mesh, cuts_rows=False))
    run = jax.jit(
        generate_numbered,
        static_argnames=("decoder", "select", "max_tokens"),
        out_shardings=everywhere,
    )
    completions: list[list[int]] = []
    for batch in batches(prompts, -(-batch_size // shards) * shards):
        tokens, lengths = run(
            decoder,
            params,
            *map(put, batch),
            key,
            select=select,
            max_tokens=max_tokens,
            temperature=np.float32(temperature),
            stop_ids=np.asarray(stop_ids, np.int32),
        )
        sampled = zip(np.asarray(tokens), np.asarray(lengths), strict=True)
        completions += [row[:length].tolist() for row, length in sampled]
    return completions[: len(prompts)]


def generate_numbered(
    decoder: model_decoder.Decoder,
    params: dict,
    prompts: jax.Array,
    lengths: jax.Array,
    numbers: jax.Array,
    key: jax.Array,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    """`generate` where row i draws with fold_in(key, numbers[i])."""
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, numbers)
    return generate(decoder, params, prompts, lengths, keys, **options)


def batches(
    prompts: Sequence[Sequence[int]], batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Prompts int32 [B, P], their lengths [B] and numbers [B], in batches of one shape."""
    width = max(16, 1 << (max(map(len, prompts)) - 1).bit_length())
    for start in range(0, len(prompts), batch_size):
        tokens, lengths = pad(prompts[start : start + batch_size], batch_size, width)
        yield tokens, lengths, np.arange(start, start + batch_size, dtype=np.int32)


def pad(
    prompts: Sequence[Sequence[int]], batch_size: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as int32 [B, P], padded on the right and with empty rows, and lengths [B]."""
    tokens = np.zeros((batch_size, width), np.int32)
    lengths = np.zeros((batch_size,), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
        lengths[row] = len(prompt)
    return tokens, lengths


def check_prompts(
    decoder: model_decoder.Decoder,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    temperature: float,
) -> None:
    """Raises ValueError for a prompt that cannot be continued, or numbers out of range."""
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; it must be at least 1")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be over 0 (select=greedy for 0)")
    most = decoder.config.max_positions - max_tokens
    vocabulary_size = decoder.config.vocabulary_size
    for number, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= most:
            raise ValueError(
                f"prompt {number} has {len(prompt)} tokens; a model of "
                f"{decoder.config.max_positions} positions continues 1 to {most} by {max_tokens}"
            )
        if not 0 <= min(prompt) <= max(prompt) < vocabulary_size:
            raise ValueError(
                f"prompt {number} has token ids {min(prompt)} to {max(prompt)}; the model's "
                f"vocabulary is 0 to {vocabulary_size - 1}"
            )

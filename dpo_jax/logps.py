"""Hidden states to the log-probabilities of completions, never with logits of every position.

Dimensions: B rows, L tokens, S scored tokens, N = B * E examples, D width, V vocabulary, c
tokens of a chunk.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax import vocabulary
from dpo_jax.data import pack, tokenise
from dpo_jax.model import attention, decoder, layers, sequence

# logits held at once, over all devices: 128 MiB in float32
CHUNK_ELEMENTS = 2**25
# the key of the log-probability itself beside statistics
TOTAL = "total"
# the key of a batch's seeds of dropout, uint32 [B], where a step has any
NOISE = "noise"


class Logps(NamedTuple):
    """Of one completion of each example."""

    total: jax.Array  # float32 [N]: sum of its tokens' log-probabilities, in nats
    length: jax.Array  # int32 [N]: its tokens, EOS included
    # float32 [N] each: sums over its tokens that the loss declared, by the names it gave them
    statistics: Mapping[str, jax.Array] = {}


class Tokens(NamedTuple):
    """A chunk of scored tokens, of which a statistic makes one number a token."""

    logits: jax.Array  # float32 [B, c, V]: what predicts them
    logp: jax.Array  # float32 [B, c]: log-probability of the token itself, in nats
    index: jax.Array  # int32 [B, c]: place in its completion, from 0
    shortest: jax.Array  # int32 [B, c]: tokens of its example's shortest completion


# a chunk's tokens -> [B, c] float32, which is summed over each completion
Statistic = Callable[[Tokens], jax.Array]


def score(
    model: decoder.Decoder,
    params,
    batch: dict,
    statistics: Mapping[str, Statistic] | None = None,
    dropout: float = 0.0,
) -> dict[str, Logps]:
    """Log-probabilities of every completion under the model, by completion name.

    Reads tokens, example, branch, position [B, L], source, target, slot [B, S], length {name: [N]}
    and, where `dropout` of an adapter's inputs is over 0, noise [B], if there is any. `statistics`
    are summed over each completion too.
    """
    statistics, noise = statistics or {}, None
    ids = attention.Ids(batch["example"], batch["branch"], batch["position"])
    if dropout and NOISE in batch:
        noise = layers.Dropout(jax.vmap(jax.random.key)(batch[NOISE]), dropout)
    hidden: Any = model.apply({"params": params}, batch["tokens"], ids, dropout=noise)
    where = None if model.placement is None else model.placement.rows
    hidden = sequence.take(hidden, batch["source"], where)  # [B, S, D]
    head = decoder.head(params, model.config)
    names = sorted(batch["length"])
    slots_of_row = len(batch["weight"]) // len(hidden) * len(names)
    places = locate(batch, slots_of_row) if statistics else None
    ends = jnp.where(batch["slot"] > 0, jnp.arange(1, batch["slot"].shape[1] + 1), 0)
    shards = sequence.shard_count(hidden.shape, where)
    by_token = token_values(
        hidden,
        head,
        batch["target"],
        places,
        statistics,
        ends.max(),
        shards=shards,
        partly_trained=tokenise.MISMATCHED in names,
    )
    by_completion = {
        name: sum_slots(values, batch["slot"], slots_of_row).reshape(-1, len(names))  # [N, C]
        for name, values in by_token.items()
    }
    totals = by_completion.pop(TOTAL)
    return {
        name: Logps(
            totals[:, c],
            batch["length"][name],
            {statistic: sums[:, c] for statistic, sums in by_completion.items()},
        )
        for c, name in enumerate(names)
    }


def differentiable(scored: Mapping[str, Logps]) -> dict[str, dict]:
    """Of each completion what depends on the parameters: its fields total and statistics."""
    return {
        name: {"total": one.total, "statistics": one.statistics} for name, one in scored.items()
    }


def locate(batch: dict, slots_of_row: int) -> tuple[jax.Array, jax.Array]:
    """Of each scored token its place in its completion and the tokens of its example's shortest
    completion: int32 [B, S] both.
    """
    slot = batch["slot"]
    at = jnp.broadcast_to(jnp.arange(slot.shape[1], dtype=jnp.int32)[None, :], slot.shape)
    # a completion's tokens stand together
    starts = jnp.pad(slot[:, 1:] != slot[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    index = at - jax.lax.cummax(jnp.where(starts, at, 0), axis=1)
    lengths = [length for name, length in batch["length"].items() if name != pack.PROMPT]
    shortest = jnp.min(jnp.stack(lengths), axis=0)  # [N]
    by_slot = jnp.repeat(shortest, len(batch["length"])).reshape(len(slot), slots_of_row)
    return index, jnp.take_along_axis(by_slot, jnp.maximum(slot - 1, 0), axis=1)


def token_values(
    hidden: jax.Array,
    head: decoder.Head,
    target: jax.Array,
    places: tuple[jax.Array, jax.Array] | None,
    statistics: Mapping[str, Statistic],
    filled: jax.Array | None = None,
    *,
    shards: int = 1,
    partly_trained: bool = False,
) -> dict[str, jax.Array]:
    """Log-probability (under TOTAL) and statistics of each scored token: float32 [B, S] each.

    No row has filled more than the first `filled` tokens, int32 [], or all may be; what is given
    for others means nothing. `partly_trained`: the last of them have no gradient.

    Statistics read whole rows of logits: chunks of S, whose logits the backward pass computes
    again, bound what is held at once. S lies on so many shards.
    """
    if places is None:
        logp = vocabulary.token_logps(hidden, head, target, filled, partly_trained=partly_trained)
        return {TOTAL: logp}
    rows, scored, _ = hidden.shape
    count = chunk_count(rows * shards, scored // shards, decoder.vocabulary_size(head))
    head = head._replace(matrix=head.matrix.astype(hidden.dtype))

    @jax.checkpoint
    def one(chunk):
        hidden, target, places = chunk
        logits = decoder.logits(hidden, head)
        picked = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        logp = picked - jax.nn.logsumexp(logits, axis=-1)
        tokens = Tokens(logits, logp, *places)
        return {TOTAL: logp, **{name: make(tokens) for name, make in statistics.items()}}

    def part(array: jax.Array) -> jax.Array:
        # every count-th token to one chunk, so that none moves to another shard of its row
        apart = array.reshape(rows, scored // count, count, *array.shape[2:])
        return jnp.moveaxis(apart, 2, 0)

    if count == 1:
        return one((hidden, target, places))
    values = jax.lax.map(one, jax.tree.map(part, (hidden, target, places)))
    return jax.tree.map(lambda array: jnp.moveaxis(array, 0, 2).reshape(rows, scored), values)


def chunk_count(rows: int, scored: int, logits: int) -> int:
    """Smallest divisor of S whose chunks hold at most CHUNK_ELEMENTS, so many logits a token; rows
    and S are those of shards.
    """
    fitting = (
        n
        for n in range(1, scored + 1)
        if scored % n == 0 and rows * (scored // n) * logits <= CHUNK_ELEMENTS
    )
    return next(fitting, scored)


def sum_slots(values: jax.Array, slot: jax.Array, slots: int) -> jax.Array:
    """Sums of values [B, S] within each row by slot [B, S] in 1..slots (0: none) -> [B, slots].

    A masked sum and no scatter: the same on every back end, and rows stay on their shard.
    """
    numbers = jnp.arange(1, slots + 1, dtype=slot.dtype)[None, None, :]
    return jnp.where(slot[..., None] == numbers, values[..., None], 0.0).sum(axis=1)

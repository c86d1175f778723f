"""Hidden states to the log-probabilities of completions, never with logits of every position.

Dimensions: B rows, L tokens, S scored tokens, N = B * E examples, D width, V vocabulary.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax.model import attention, decoder

# logits held at once, over all devices: 128 MiB in float32
CHUNK_ELEMENTS = 2**25


class Logps(NamedTuple):
    """Of one completion of each example: total [N] float32 in nats, length [N] int32 in tokens."""

    total: jax.Array
    length: jax.Array


def score(model: decoder.Decoder, params, batch: dict) -> dict[str, Logps]:
    """Log-probabilities of every completion under the model, by completion name.

    Reads tokens, example, branch, position [B, L], source, target, slot [B, S] and length {name:
    [N]}.
    """
    ids = attention.Ids(batch["example"], batch["branch"], batch["position"])
    hidden: Any = model.apply({"params": params}, batch["tokens"], ids)
    hidden = jnp.take_along_axis(hidden, batch["source"][..., None], axis=1)  # [B, S, D]
    tokens = token_logps(hidden, decoder.head(params, model.config), batch["target"])
    names = sorted(batch["length"])
    slots_of_row = len(batch["weight"]) // len(tokens) * len(names)
    totals = sum_slots(tokens, batch["slot"], slots_of_row).reshape(-1, len(names))  # [N, C]
    return {name: Logps(totals[:, c], batch["length"][name]) for c, name in enumerate(names)}


def token_logps(hidden: jax.Array, head: jax.Array, target: jax.Array) -> jax.Array:
    """log p(target) of each scored token: hidden [B, S, D], head [D, V], target [B, S] -> [B, S]
    float32.

    Chunks of S, whose logits the backward pass computes again, bound what is held at once.
    """
    rows, scored, width = hidden.shape
    count = chunk_count(rows, scored, head.shape[1])
    head = head.astype(hidden.dtype)

    @jax.checkpoint
    def one(chunk):
        hidden, target = chunk
        logits = jnp.einsum("bsd,dv->bsv", hidden, head, preferred_element_type=jnp.float32)
        picked = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        return picked - jax.nn.logsumexp(logits, axis=-1)

    if count == 1:
        return one((hidden, target))
    hidden = hidden.reshape(rows, count, scored // count, width).swapaxes(0, 1)
    target = target.reshape(rows, count, scored // count).swapaxes(0, 1)
    return jax.lax.map(one, (hidden, target)).swapaxes(0, 1).reshape(rows, scored)


def chunk_count(rows: int, scored: int, vocabulary: int) -> int:
    """Smallest divisor of S whose chunks hold at most CHUNK_ELEMENTS logits."""
    fitting = (
        n
        for n in range(1, scored + 1)
        if scored % n == 0 and rows * (scored // n) * vocabulary <= CHUNK_ELEMENTS
    )
    return next(fitting, scored)


def sum_slots(values: jax.Array, slot: jax.Array, slots: int) -> jax.Array:
    """Sums of values [B, S] within each row by slot [B, S] in 1..slots (0: none) -> [B, slots].

    A masked sum and no scatter: the same on every back end, and rows stay on their shard.
    """
    numbers = jnp.arange(1, slots + 1, dtype=slot.dtype)[None, None, :]
    return jnp.where(slot[..., None] == numbers, values[..., None], 0.0).sum(axis=1)

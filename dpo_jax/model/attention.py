"""Which token sees which, and attention under that rule.

Dimensions: B rows, L tokens (Lq queries, Lk keys), H query heads, K key and value heads, G = H / K
query heads to each, Dh dimensions a head.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.model import residuals


class Ids(NamedTuple):
    """Where each token belongs."""

    example: jax.Array | np.ndarray  # int32 [B, L]: which example of the row, from 1; 0 is padding
    branch: (
        jax.Array | np.ndarray
    )  # int32 [B, L]: which completion of the example, from 1; 0 is the prompt
    position: (
        jax.Array | np.ndarray
    )  # int32 [B, L]: from 0 in each prompt; completions go on from its end


def visible(query_ids: Ids, key_ids: Ids, window: int | None) -> jax.Array:
    """Whether query i sees key j: bool [B, Lq, Lk].

    It does in its own example, in the prompt or its own branch, up to its own position and less
    than `window` positions back. Padding sees nothing and is seen by nothing.
    """
    query = Ids(*(array[:, :, None] for array in query_ids))
    key = Ids(*(array[:, None, :] for array in key_ids))
    return sees(query, key, window)


def sees(query: Ids, key: Ids, window: int | None) -> jax.Array:
    """`visible` of ids that are broadcast against each other."""
    distance = query.position - key.position
    mask = (query.example == key.example) & (key.example != 0)
    mask &= (key.branch == 0) | (key.branch == query.branch)
    mask &= distance >= 0
    return mask if window is None else mask & (distance < window)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_ids: Ids,
    key_ids: Ids,
    *,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
) -> jax.Array:
    """Attention of query [B, Lq, H, Dh] to key and value [B, Lk, K, Dh]: [B, Lq, H, Dh].

    With a cap, logits x become cap tanh(x / cap). The softmax is in float32. A query that sees
    nothing gives 0, and passes no gradient on.
    """
    batch, length, heads, head_dim = query.shape
    key_value_heads = key.shape[2]
    query = query.reshape(batch, length, key_value_heads, heads // key_value_heads, head_dim)
    logits = residuals.keep_of_attention(
        jnp.einsum("bikgd,bjkd->bkgij", query, key, preferred_element_type=jnp.float32)
    )  # [B, K, G, Lq, Lk]
    logits = scale * logits
    if cap is not None:
        logits = cap * jnp.tanh(logits / cap)
    mask = visible(query_ids, key_ids, window)[:, None, None, :, :]
    # The lowest finite number and not -inf, of which a row that sees nothing would make nan on the
    # way (masked below, yet a stop under jax_debug_nans).
    logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = jnp.where(mask, jax.nn.softmax(logits, axis=-1), 0.0)
    mixed = jnp.einsum("bkgij,bjkd->bikgd", weights.astype(value.dtype), value)
    return residuals.keep_of_attention(mixed.reshape(batch, length, heads, head_dim))

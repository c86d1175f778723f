"""Products with weights, which may be quantised. All that the project uses of qwix is here.

Dimensions: M rows of all tokens, E experts, D inputs, F outputs.
"""

from typing import Any

import jax
import jax.numpy as jnp
import qwix

# weights: an array, or int8 values with a float32 scale for each output
Weights = Any


def product(hidden: jax.Array, weights: Weights, inputs: int) -> jax.Array:
    """hidden over its last `inputs` axes times the weights over their first: in hidden's type."""
    axes = tuple(range(hidden.ndim - inputs, hidden.ndim)), tuple(range(inputs))
    if not is_quantised(weights):
        return jax.lax.dot_general(hidden, weights.astype(hidden.dtype), (axes, ((), ())))

    # what backpropagation keeps is the int8 values, and not what they are multiplied out to
    @jax.checkpoint
    def multiply(hidden: jax.Array, weights: Weights) -> jax.Array:
        return qwix.dot_general(hidden, weights, (axes, ((), ()))).astype(hidden.dtype)

    return multiply(hidden, weights)


def ragged_product(rows: jax.Array, weights: Weights, sizes: jax.Array) -> jax.Array:
    """rows [M, D], the first sizes[0] of them times the first expert's weights, and so on.

    weights [E, D, F], sizes int32 [E] -> [M, F] in the rows' type.
    """
    if not is_quantised(weights):
        return jax.lax.ragged_dot(rows, weights.astype(rows.dtype), sizes)

    @jax.checkpoint
    def multiply(rows: jax.Array, weights: Weights) -> jax.Array:
        return jax.lax.ragged_dot(rows, dequantise(weights).astype(rows.dtype), sizes)

    return multiply(rows, weights)


def quantise(weights: jax.Array, inputs: tuple[int, ...]) -> Weights:
    """int8 values of weights, and for each place along the other axes than `inputs` the float32
    scale that makes the largest of them 127.
    """
    kept = [axis for axis in range(weights.ndim) if axis not in inputs]
    return qwix.quantize(weights.astype(jnp.float32), jnp.int8, channelwise_axes=kept)


def dequantise(weights: Weights) -> jax.Array:
    """The float32 array that quantised weights stand for; an array as it is."""
    return qwix.dequantize(weights) if is_quantised(weights) else weights


def is_quantised(weights: Weights) -> bool:
    """Whether weights are int8 values and scales."""
    return isinstance(weights, qwix.QArray)

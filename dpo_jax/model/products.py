"""Products with weights, which may be quantised. All that the project uses of qwix is here.

Dimensions: M rows of all tokens, E experts, D inputs, F outputs.
"""

import functools
import math
import sys
from typing import Any

import jax
import jax.numpy as jnp

# weights: an array, or int8 values with a float32 scale for each output
Weights = Any


def product(hidden: jax.Array, weights: Weights, inputs: int) -> jax.Array:
    """hidden over its last `inputs` axes times the weights over their first: in hidden's type."""
    if not is_quantised(weights):
        return dense(inputs, hidden, weights.astype(hidden.dtype))
    # a fifth of a second, which runs without int8 do without
    import qwix

    axes = tuple(range(hidden.ndim - inputs, hidden.ndim)), tuple(range(inputs))

    # what backpropagation keeps is the int8 values, and not what they are multiplied out to
    @jax.checkpoint
    def multiply(hidden: jax.Array, weights: Weights) -> jax.Array:
        return qwix.dot_general(hidden, weights, (axes, ((), ()))).astype(hidden.dtype)

    return multiply(hidden, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def dense(inputs: int, hidden: jax.Array, weights: jax.Array) -> jax.Array:
    """`product` with an array of hidden's type."""
    axes = tuple(range(hidden.ndim - inputs, hidden.ndim)), tuple(range(inputs))
    return jax.lax.dot_general(hidden, weights, (axes, ((), ())))


def dense_forward(inputs: int, hidden: jax.Array, weights: jax.Array) -> tuple[jax.Array, tuple]:
    """`dense`, and what its backward pass reads."""
    return dense(inputs, hidden, weights), (hidden, weights)


def dense_backward(inputs: int, kept: tuple, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The gradients of hidden and weights.

    On a CPU one side of the weights' product is turned round in memory, together with whatever
    computes it: of both sides the one with fewer numbers a token, and never the wide activations of
    an MLP, as JAX's own rule has it.
    """
    hidden, weights = kept
    outputs = weights.ndim - inputs
    tokens = tuple(range(hidden.ndim - inputs))
    of_outputs = tuple(range(len(tokens), cotangent.ndim)), tuple(range(inputs, weights.ndim))
    of_hidden = jax.lax.dot_general(cotangent, weights, (of_outputs, ((), ())))
    over = (tokens, tokens), ((), ())
    if math.prod(weights.shape[:inputs]) <= math.prod(weights.shape[inputs:]):
        return of_hidden, jax.lax.dot_general(hidden, cotangent, over)
    of_weights = jax.lax.dot_general(cotangent, hidden, over)
    order = *range(outputs, weights.ndim), *range(outputs)
    return of_hidden, of_weights.transpose(order)


dense.defvjp(dense_forward, dense_backward)


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
    import qwix

    kept = [axis for axis in range(weights.ndim) if axis not in inputs]
    return qwix.quantize(weights.astype(jnp.float32), jnp.int8, channelwise_axes=kept)


def dequantise(weights: Weights) -> jax.Array:
    """The float32 array that quantised weights stand for; an array as it is."""
    if not is_quantised(weights):
        return weights
    import qwix

    return qwix.dequantize(weights)


def is_quantised(weights: Weights) -> bool:
    """Whether weights are int8 values and scales."""
    qwix = sys.modules.get("qwix")
    return qwix is not None and isinstance(weights, qwix.QArray)

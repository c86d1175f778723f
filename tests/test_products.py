"""Products with weights: gradients, and what a CPU turns round in memory for them.

Dimensions: B rows, L tokens, D width, F units, H heads, Dh dimensions of a head.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.hlo import text
from dpo_jax.model import products

ROWS, TOKENS, WIDTH, UNITS = 2, 24, 8, 40
# hidden, weights, how many of the weights' axes are inputs
SHAPES = {
    "wider": ((2, 5, 4), (4, 6), 1),
    "narrower": ((2, 5, 6), (6, 4), 1),
    "heads out": ((2, 5, 4), (4, 3, 2), 1),
    "heads in": ((2, 5, 3, 4), (3, 4, 7), 2),
    "heads in, narrower": ((2, 5, 3, 4), (3, 4, 2), 2),
}


@pytest.mark.parametrize("name", SHAPES)
def test_products_and_gradients_are_those_of_sums_in_float64(name):
    of_hidden, of_weights, inputs = SHAPES[name]
    generator = np.random.default_rng(0)
    hidden, weights = (generator.normal(size=shape) for shape in (of_hidden, of_weights))
    tokens = of_hidden[: len(of_hidden) - inputs]
    cotangent = generator.normal(size=(*tokens, *of_weights[inputs:]))
    flat = (
        hidden.reshape(np.prod(tokens), -1),
        weights.reshape(np.prod(of_weights[:inputs]), -1),
        cotangent.reshape(np.prod(tokens), -1),
    )
    given = (jnp.asarray(array, jnp.float32) for array in (hidden, weights))
    found, pull = jax.vjp(lambda left, right: products.product(left, right, inputs), *given)
    by_hidden, by_weights = pull(jnp.asarray(cotangent, jnp.float32))
    expected = (flat[0] @ flat[1]).reshape(cotangent.shape)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    expected = (flat[2] @ flat[1].T).reshape(of_hidden)
    np.testing.assert_allclose(by_hidden, expected, rtol=1e-5, atol=1e-5)
    expected = (flat[0].T @ flat[2]).reshape(of_weights)
    np.testing.assert_allclose(by_weights, expected, rtol=1e-5, atol=1e-5)


def test_no_wide_activations_are_turned_round_for_the_gradient_of_a_gated_mlp():
    hidden = jnp.ones((ROWS, TOKENS, WIDTH))
    wide, narrow = jnp.ones((WIDTH, UNITS)), jnp.ones((UNITS, WIDTH))

    def total(hidden: jax.Array, weights: tuple) -> jax.Array:
        gate, up, down = weights
        units = jax.nn.silu(products.product(hidden, gate, 1)) * products.product(hidden, up, 1)
        return jnp.sum(jnp.square(products.product(units, down, 1)))

    gradient = jax.jit(jax.grad(total, argnums=(0, 1)))
    compiled = gradient.lower(hidden, (wide, wide, narrow)).compile()
    program = text.parse(str(compiled.as_text()))
    dims = [
        array.dims
        for computation in program.computations.values()
        for instruction in computation.instructions.values()
        for array in instruction.arrays
    ]
    # of a product's sides only the one of fewer numbers a token is made with its tokens last
    assert (WIDTH, ROWS * TOKENS) in dims
    assert not {(UNITS, ROWS * TOKENS), (UNITS, ROWS, TOKENS)} & set(dims)

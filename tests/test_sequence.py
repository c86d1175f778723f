"""What devices that share a row's tokens exchange."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import config, sharding
from dpo_jax.hlo import collectives, text
from dpo_jax.model import sequence

B, L, S, D = 4, 24, 8, 6


def draw() -> tuple[jax.Array, jax.Array, jax.Array]:
    """Hidden states, places with some of them twice, and a cotangent."""
    generator = np.random.default_rng(0)
    hidden, cotangent = (
        jnp.asarray(generator.normal(size=(B, count, D)), jnp.float32) for count in (L, S)
    )
    return hidden, jnp.asarray(generator.integers(0, L, (B, S)), jnp.int32), cotangent


def value_and_gradient(where: Any) -> Any:
    def run(hidden, source, cotangent):
        found, pull = jax.vjp(lambda one: sequence.take(one, source, where), hidden)
        return found, pull(cotangent)[0]

    return jax.jit(run)


@pytest.mark.parametrize(
    "axes",
    [config.Mesh(fsdp=1, sequence=8), config.Mesh(fsdp=2, sequence=2, tensor=2)],
    ids=["sequence 8", "fsdp 2, sequence 2, tensor 2"],
)
def test_hidden_states_of_scored_tokens_are_exchanged_and_no_others(axes):
    mesh = sharding.make_mesh(axes, jax.devices())
    where = sharding.tokens(mesh)
    hidden, source, cotangent = draw()
    placed = jax.device_put((hidden, source, cotangent), where)
    run = value_and_gradient(where)
    found, gradient = run(*placed)
    np.testing.assert_array_equal(found, jnp.take_along_axis(hidden, source[..., None], axis=1))
    expected = np.zeros((B, L, D), np.float32)
    np.add.at(expected, (np.arange(B)[:, None], np.asarray(source)), np.asarray(cotangent))
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)
    assert found.sharding.is_equivalent_to(where, 3)
    program = text.parse(str(run.lower(*placed).compile().as_text()))
    rows = B // sharding.batch_shards(mesh)
    sent = {(one.kind, one.axes, one.bytes) for one in collectives.collectives(program, mesh.shape)}
    assert sent == {
        ("all-gather", ("sequence",), 4 * rows * S),
        ("reduce-scatter", ("sequence",), 4 * rows * S * D),
        ("all-gather", ("sequence",), 4 * rows * S * D),
    }


@pytest.mark.parametrize(
    "axes", [config.Mesh(fsdp=3, sequence=2), config.Mesh(fsdp=1, sequence=5), config.Mesh(fsdp=4)]
)
def test_rows_and_tokens_that_do_not_divide_are_taken_too(axes):
    count = (axes.fsdp or 1) * axes.sequence
    where = sharding.tokens(sharding.make_mesh(axes, jax.devices()[:count]))
    arrays = draw()
    for found, expected in zip(
        value_and_gradient(where)(*arrays), value_and_gradient(None)(*arrays), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_tokens_of_a_row_lie_on_as_many_shards_as_divide_them():
    where = sharding.tokens(sharding.make_mesh(config.Mesh(2, 2, 1, 2), jax.devices()))
    assert sequence.shard_count((8, 6, 3), where) == 2
    assert sequence.shard_count((8, 7, 3), where) == 1
    assert sequence.shard_count((6, 6, 3), where) == 1
    assert sequence.shard_count((8, 6, 3), None) == 1

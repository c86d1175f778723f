"""What JAX reports of compiling, counted and added up."""

import jax
import jax.numpy as jnp

from dpo_jax import compiling
from dpo_jax.compiling import Span


def test_a_function_is_counted_once_for_each_shape_and_not_when_it_is_called_again():
    def doubled(values):
        return 2 * values

    jitted, one, two = jax.jit(doubled), jnp.ones(1), jnp.ones(2)
    with compiling.recorded() as spans:
        for values in (one, two, one):
            jitted(values)
        with compiling.recorded() as inner:
            jitted(two)
    jitted(jnp.ones(3))
    assert compiling.count(spans, "doubled") == 2
    assert compiling.count(spans, "tripled") == 0
    assert compiling.seconds(spans) > 0 and inner == []


def test_seconds_of_what_lies_within_or_overlaps_count_once():
    times = [(5.0, 6.0), (0.0, 2.0), (0.5, 1.0), (1.0, 3.0), (1.5, 2.5), (7.0, 7.5)]
    spans = [Span(compiling.TRACED, "", start, stop) for start, stop in times]
    assert compiling.seconds(spans) == 3.0 + 1.0 + 0.5
    assert compiling.seconds([]) == 0.0

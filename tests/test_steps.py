"""Which examples a step takes."""

import numpy as np
import pytest

from dpo_jax.data import epochs, rows, steps


def test_steps_by_number_start_at_multiples():
    assert steps.by_number(3, 4).tolist() == [0, 3, 6, 9, 12]


@pytest.mark.parametrize(("limit", "number"), [(9, 60), (20, 30), (200, 10)])
def test_steps_by_tokens_end_before_the_example_that_is_too_much(limit, number):
    tokens = np.random.default_rng(1).integers(1, 10, 11)
    starts = steps.by_tokens(tokens, limit, 5, number)
    order = epochs.between(epochs.Order(11, 5), 0, int(starts[-1]) + 1)
    assert starts[0] == 0 and len(starts) == number + 1
    for first, last in zip(starts[:-1], starts[1:], strict=True):
        taken = tokens[order[first:last]].sum()
        assert taken <= limit < taken + tokens[order[last]]


def test_an_example_of_just_the_limit_is_a_step():
    assert steps.by_tokens(np.array([4, 4]), 4, 0, 5).tolist() == [0, 1, 2, 3, 4, 5]


def test_sizes_of_steps_are_those_of_their_examples_and_then_0():
    all_sizes = rows.Sizes(np.arange(1, 6), np.arange(10, 60, 10))
    found = steps.sizes(all_sizes, np.array([2, 5, 6, 8]), epochs.Order(5, 1))
    order = epochs.between(epochs.Order(5, 1), 2, 8)
    expected = [[*order[:3]], [order[3]], [*order[4:]]]
    for scale, one in zip((1, 10), found, strict=True):
        padded = [[scale * (i + 1) for i in step] + [0] * (3 - len(step)) for step in expected]
        assert one.tolist() == padded

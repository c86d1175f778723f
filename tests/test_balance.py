"""Exchanges among steps."""

import numpy as np
import pytest

from dpo_jax.data import balance, rows


def draw(count: int, seed: int = 0) -> rows.Sizes:
    """Sizes with a long tail, as those of real pairs have."""
    generator = np.random.default_rng(seed)
    scored = np.ceil(generator.lognormal(4, 0.8, count)).astype(np.int64)
    return rows.Sizes(scored + generator.integers(10, 200, count), scored)


def sums(members: np.ndarray, sizes: rows.Sizes) -> np.ndarray:
    return np.stack([one[members].sum(axis=1) for one in sizes])


def test_shares_are_whole_numbers_with_the_average_at_1024():
    found = balance.shares(rows.Sizes(np.array([10, 30, 20]), np.array([1, 0, 5])))
    assert found.tolist() == [[512, 1536, 1024], [512, 0, 2560]] and found.dtype == np.int64
    # a corpus of examples of nothing but one token each, of which none is scored
    found = balance.shares(rows.Sizes(np.ones(2, int), np.zeros(2, int)))
    assert found.tolist() == [[1024, 1024], [0, 0]]


def test_the_fullest_group_is_dealt_the_smallest_of_each_rank():
    own = np.array([[9, 8, 7, 5, 2, 1], [0, 0, 0, 0, 0, 0]])
    # ranks 9 8 7 and 5 2 1
    found = balance.deal(3, own)
    assert sorted(own[0][found].sum(axis=1).tolist()) == [10, 10, 12]
    assert sorted(map(sorted, found.tolist())) == [[0, 5], [1, 4], [2, 3]]


def test_the_exchange_that_makes_two_groups_most_equal_is_made():
    own = np.array([[9, 8, 2, 1], [1, 1, 1, 1]]) * balance.UNIT // 5
    # 17 and 3: 9 for 2 leaves 10 and 10
    found = balance.exchange(np.array([[0, 1], [2, 3]]), own)
    assert sorted(map(sorted, found.tolist())) == [[0, 3], [1, 2]]
    even = np.array([[0, 3], [1, 2]])
    np.testing.assert_array_equal(balance.exchange(even, own), even)


def test_an_example_is_not_exchanged_where_that_makes_two_groups_less_equal():
    # any exchange would leave the first too small
    own = np.array([[6, 5, 5, 5], [6, 5, 5, 5]]) * balance.UNIT // 5
    members = np.array([[0, 1], [2, 3]])
    np.testing.assert_array_equal(balance.exchange(members, own), members)


@pytest.mark.parametrize(
    ("size", "count", "less", "room"),
    [
        (4, 200, 2.5, 1.05),
        (8, 200, 4, 1.015),
        (32, 20, 4, 1.015),
        (100, 9, 4, 1.015),
        (8, 2, 4, 1.015),
        (2, 3, 1, np.inf),
    ],
)
def test_groups_of_examples_with_a_long_tail_become_even(size, count, less, room):
    sizes = draw(size * count)
    found = balance.even(count, balance.shares(sizes))
    assert sorted(found.ravel().tolist()) == list(range(size * count))
    before, after = sums(np.arange(size * count).reshape(count, size), sizes), sums(found, sizes)
    spread = [one.std(axis=1) / one.mean(axis=1) for one in (before, after)]
    assert (spread[1] < spread[0] / less).all()
    # but for a step of a few that are all there is of the longest
    full = np.quantile(after, 0.9, axis=1) / after.mean(axis=1)
    assert (full < room).all(), full


def test_examples_of_other_ranks_are_tried_in_every_round():
    # 64 examples of which 16 are tried: all are alike but two, at ranks that the first round skips
    own = np.full((2, 128), balance.UNIT)
    own[:, [5, 6]] = 2 * balance.UNIT
    found = balance.exchange(np.arange(128).reshape(2, 64), own)
    assert own[0][found].sum(axis=1).tolist() == [65 * balance.UNIT] * 2

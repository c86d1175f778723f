"""Which examples share a row."""

import itertools

import numpy as np
import pytest

from dpo_jax.data import rows


def draw(steps: int, examples: int, seed: int = 0) -> rows.Sizes:
    generator = np.random.default_rng(seed)
    tokens = generator.integers(20, 200, (steps, examples))
    return rows.Sizes(tokens, generator.integers(5, tokens))


def test_nothing_exceeds_tokens_scored_and_examples_of_the_shape():
    found = 0
    for tokens, scored, examples in itertools.product((450, 700), (250, 400), (4, 9)):
        shape = rows.Shape(8, tokens, scored, examples)
        for step in map(rows.Sizes, *draw(20, 24)):
            assigned = rows.assign(step, shape)
            if assigned is None:
                continue
            found += 1
            assert len(assigned) == 8
            assert sorted(place for row in assigned for place in row) == list(range(24))
            assert all(step.tokens[row].sum() <= tokens for row in assigned)
            assert all(step.scored[row].sum() <= scored for row in assigned)
            assert max(map(len, assigned)) <= examples
    assert 20 < found < 160


def test_scored_tokens_alone_can_close_a_row():
    step = rows.Sizes(np.array([4, 4, 4]), np.array([3, 3, 3]))
    assert rows.assign(step, rows.Shape(1, 100, 6, 9)) is None
    assigned = rows.assign(step, rows.Shape(2, 100, 6, 9))
    assert assigned is not None and sorted(map(len, assigned)) == [1, 2]


def test_a_step_that_would_fit_if_its_examples_could_be_cut_does_not_fit():
    three, one = np.full(3, 5), np.full(3, 1)
    for step in (rows.Sizes(three, one), rows.Sizes(three, three)):
        assert rows.assign(step, rows.Shape(2, 10, 10, 3)) is not None
    assert rows.assign(rows.Sizes(three, one), rows.Shape(2, 9, 10, 3)) is None
    assert rows.assign(rows.Sizes(three, three), rows.Shape(2, 10, 9, 3)) is None


def test_the_examples_of_a_row_alone_can_close_it():
    step = rows.Sizes(np.full(4, 1), np.full(4, 1))
    assert rows.assign(step, rows.Shape(2, 100, 100, 1)) is None
    assert rows.assign(step, rows.Shape(4, 100, 100, 1)) is not None


def test_a_step_that_fills_its_rows_to_the_last_token_is_found():
    # largest first gives 5 + 4 + 3 = 12 and 5 + 4 + 3; exchanged for 6 + 5 and 4 + 4 + 3
    step = rows.Sizes(np.array([6, 5, 4, 4, 3]), np.ones(5, int))
    assigned = rows.assign(step, rows.Shape(2, 11, 5, 5))
    assert assigned is not None
    assert [step.tokens[row].sum() for row in assigned] == [11, 11]


@pytest.mark.parametrize("number", [1, 2, 7, 24, 30])
def test_a_spread_is_the_same_for_a_step_alone_and_among_others(number):
    sizes = draw(9, 24)
    room = rows.Sizes(*(one.sum(axis=1, keepdims=True) // number + 1 for one in sizes))
    together = rows.spread(sizes, number, room)
    for step in range(9):
        own, own_room = (rows.Sizes(*(a[[step]] for a in one)) for one in (sizes, room))
        alone = rows.spread(own, number, own_room)
        np.testing.assert_array_equal(together[[step]], alone)


def test_places_without_an_example_change_nothing():
    sizes = draw(3, 24)
    padded = rows.Sizes(*(np.pad(one, ((0, 0), (0, 5))) for one in sizes))
    room = rows.Shape(6, 400, 200, 9)
    row = rows.spread(padded, 6, room)
    np.testing.assert_array_equal(row[:, :24], rows.spread(sizes, 6, room))
    for one, other in zip(
        rows.loads(padded, row, 6), rows.loads(sizes, row[:, :24], 6), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_rows_are_spread_nearly_evenly_by_tokens_and_by_scored_tokens():
    sizes = draw(50, 64)
    room = rows.Sizes(*(one.sum(axis=1, keepdims=True) // 10 for one in sizes))
    tokens, scored, examples = rows.loads(sizes, rows.spread(sizes, 10, room), 10)
    assert (examples.sum(axis=1) == 64).all()
    for one in (tokens, scored):
        assert (one.max(axis=1) / one.mean(axis=1)).mean() < 1.02
    # without an exchange they are less even
    row = rows._place(np.stack([sizes.tokens * room.scored, sizes.scored * room.tokens]), 10)
    first, _, _ = rows.loads(sizes, row, 10)
    assert (first.max(axis=1) / first.mean(axis=1)).mean() > 1.02


def test_loads_are_the_sums_of_each_row():
    sizes = rows.Sizes(np.array([[3, 1, 2], [5, 0, 4]]), np.array([[2, 1, 1], [4, 0, 3]]))
    tokens, scored, examples = rows.loads(sizes, np.array([[1, 0, 1], [0, 0, 0]]), 2)
    assert tokens.tolist() == [[1, 5], [9, 0]]
    assert scored.tolist() == [[1, 3], [7, 0]]
    assert examples.tolist() == [[1, 2], [2, 0]]

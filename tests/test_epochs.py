"""The order of the examples in each epoch."""

import dataclasses

import numpy as np
import pytest

from dpo_jax.data import epochs, rows, tokenise


def steps(order: epochs.Order, size: int, number: int) -> np.ndarray:
    return epochs.between(order, 0, number * size).reshape(number, size)


def balanced_order(data: tokenise.Tokenised, size: int, seed: int) -> epochs.Balanced:
    found = epochs.order(data, size, seed, balanced=True)
    assert isinstance(found, epochs.Balanced)
    return found


def test_every_epoch_has_an_order_of_its_own_with_every_example_once():
    orders = [epochs.permutation(30, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(30)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize("balanced", [False, True])
def test_places_that_straddle_epochs_are_their_orders_end_to_end(draw_examples, balanced):
    order = epochs.order(draw_examples(7), 3, 3, balanced=balanced)
    whole = epochs.between(order, 0, 35)
    for epoch in range(5):
        assert sorted(whole[7 * epoch : 7 * (epoch + 1)].tolist()) == list(range(7))
    for first, last in [(0, 7), (5, 9), (6, 30), (14, 15), (20, 35)]:
        np.testing.assert_array_equal(epochs.between(order, first, last), whole[first:last])


def test_steps_that_are_not_balanced_are_a_plain_shuffle(draw_examples):
    data = draw_examples(20)
    for order in (
        epochs.order(data, 4, 5, balanced=False),
        epochs.order(data, 1, 5, balanced=True),
        epochs.shuffled(data, 5),
    ):
        shuffles = [epochs.permutation(20, 5, epoch) for epoch in (0, 1)]
        np.testing.assert_array_equal(epochs.between(order, 0, 40), np.concatenate(shuffles))


@pytest.mark.parametrize(
    ("count", "size"), [(200, 4), (203, 4), (200, 7), (50, 64), (64, 64), (65, 64), (3, 16), (1, 2)]
)
def test_every_epoch_of_balanced_steps_has_every_example_once(
    draw_examples, monkeypatch, count, size
):
    monkeypatch.setattr(epochs, "WINDOW", 5)
    data = draw_examples(count, tokens=(1, 60))
    order = epochs.order(data, size, 2, balanced=True)
    found = epochs.between(order, 0, 4 * count)
    for epoch in range(4):
        assert sorted(found[epoch * count : (epoch + 1) * count].tolist()) == list(range(count))
    # a step asked for alone, of an order made anew, is what it was
    again = epochs.order(data, size, 2, balanced=True)
    for first in range(0, 4 * count - size + 1, size):
        np.testing.assert_array_equal(
            epochs.between(again, first, first + size), found[first : first + size]
        )


@pytest.mark.parametrize("count", [1600, 1603])
def test_balanced_steps_have_about_equally_many_tokens_and_scored_tokens(
    draw_examples, monkeypatch, count
):
    monkeypatch.setattr(epochs, "WINDOW", 80)
    data = draw_examples(count, tokens=(1, 100))
    sizes, spread = rows.sizes(data), {}
    for balanced in (False, True):
        taken = steps(epochs.order(data, 8, 0, balanced=balanced), 8, 400)
        for name, one in sizes._asdict().items():
            totals = one[taken].sum(axis=1)
            spread[name, balanced] = totals.std() / totals.mean()
    for name in sizes._fields:
        assert spread[name, True] < 0.02 < 0.08 < spread[name, False]


def test_examples_are_exchanged_within_windows_alone(draw_examples, monkeypatch):
    monkeypatch.setattr(epochs, "WINDOW", 5)
    order = balanced_order(draw_examples(203), 4, 1)
    for epoch in (0, 1):
        bounds = epochs.windows(order, epoch)
        # whole steps, but for what an epoch begins and ends with
        assert ((epoch * 203 + bounds[1:-1]) % 4 == 0).all()
        assert bounds[0] == 0 and bounds[-1] == 203 and np.diff(bounds).max() <= 5 * 4 + 3
        shuffled = epochs.permutation(203, 1, epoch)
        found = epochs.between(order, epoch * 203, (epoch + 1) * 203)
        assert not np.array_equal(found, shuffled)
        for first, last in zip(bounds[:-1], bounds[1:], strict=True):
            assert sorted(found[first:last]) == sorted(shuffled[first:last])


def test_windows_of_large_steps_have_few(draw_examples):
    order = balanced_order(draw_examples(40000), 4096, 0)
    assert np.diff(epochs.windows(order, 0)).tolist() == [8192] * 3 + [3 * 4096 + 40000 % 4096]


def test_every_example_is_as_likely_in_every_step(draw_examples):
    data = draw_examples(12, tokens=(1, 90))
    seen, number = np.zeros((3, 12)), 1000
    for seed in range(number):
        found = steps(epochs.order(data, 4, seed, balanced=True), 4, 3)
        for step, members in enumerate(found):
            seen[step, members] += 1
    # a third each, within four standard deviations
    np.testing.assert_allclose(seen / number, 1 / 3, atol=4 * np.sqrt(2 / 9 / number))


def test_balanced_steps_depend_on_lengths_seed_and_their_size_alone(draw_examples):
    data = draw_examples(100, tokens=(1, 60))

    def of(data, size=4, seed=0) -> np.ndarray:
        return epochs.between(epochs.order(data, size, seed, balanced=True), 0, 300)

    found = of(data)
    np.testing.assert_array_equal(of(dataclasses.replace(data, tokens=data.tokens * 0)), found)
    # the mean is what counts, so that all lengths may be twice as many
    longer = dataclasses.replace(data, prompts=2 * data.prompts, completions=2 * data.completions)
    np.testing.assert_array_equal(of(longer), found)
    others = of(draw_examples(100, seed=1, tokens=(1, 60))), of(data, size=5), of(data, seed=1)
    assert not any(np.array_equal(other, found) for other in others)

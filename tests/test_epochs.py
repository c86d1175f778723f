"""The order of the examples in each epoch."""

import dataclasses

import numpy as np
import pytest

from dpo_jax.data import balance, epochs, rows


def steps(order: epochs.Order, size: int, number: int) -> np.ndarray:
    return epochs.between(order, 0, number * size).reshape(number, size)


def test_every_epoch_has_an_order_of_its_own_with_every_example_once():
    orders = [epochs.permutation(30, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(30)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize("balanced", [False, True])
def test_places_that_straddle_epochs_are_their_orders_end_to_end(draw_examples, balanced):
    data = draw_examples(7)
    order = epochs.balanced(data, 3, 3) if balanced else epochs.shuffled(data, 3)
    whole = epochs.between(order, 0, 35)
    for epoch in range(5):
        assert sorted(whole[7 * epoch : 7 * (epoch + 1)].tolist()) == list(range(7))
    for first, last in [(0, 7), (5, 9), (6, 30), (14, 15), (20, 35)]:
        np.testing.assert_array_equal(epochs.between(order, first, last), whole[first:last])


def test_steps_that_are_not_balanced_are_a_plain_shuffle(draw_examples):
    data = draw_examples(20)
    for order in (
        epochs.shuffled(data, 5),
        epochs.balanced(data, 1, 5),
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
    order = epochs.balanced(data, size, 2)
    found = epochs.between(order, 0, 4 * count)
    for epoch in range(4):
        assert sorted(found[epoch * count : (epoch + 1) * count].tolist()) == list(range(count))
    # a step asked for alone, of an order made anew, is what it was
    again = epochs.balanced(data, size, 2)
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
    orders = epochs.shuffled(data, 0), epochs.balanced(data, 8, 0)
    for balanced, order in enumerate(orders):
        taken = steps(order, 8, 400)
        for name, one in sizes._asdict().items():
            totals = one[taken].sum(axis=1)
            spread[name, balanced] = totals.std() / totals.mean()
    for name in sizes._fields:
        assert spread[name, True] < 0.02 < 0.08 < spread[name, False]


def test_examples_are_exchanged_within_windows_alone(draw_examples, monkeypatch):
    monkeypatch.setattr(epochs, "WINDOW", 5)
    order = epochs.balanced(draw_examples(203), 4, 1)
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
    order = epochs.balanced(draw_examples(40000), 4096, 0)
    assert np.diff(epochs.windows(order, 0)).tolist() == [8192] * 3 + [3 * 4096 + 40000 % 4096]


@pytest.mark.parametrize(("count", "epoch"), [(12, 0), (13, 0), (13, 1), (15, 1)])
def test_every_example_is_as_likely_at_every_step(draw_examples, count, epoch):
    data, number = draw_examples(count, tokens=(1, 90)), 1000
    seen = np.zeros((count // 4 + 2, count))
    steps_of = (epoch * count + np.arange(count)) // 4 - epoch * count // 4
    for seed in range(number):
        order = epochs.balanced(data, 4, seed)
        seen[steps_of, epochs.between(order, epoch * count, (epoch + 1) * count)] += 1
    expected = np.bincount(steps_of, minlength=len(seen))[:, None] / count
    # within four and a half standard deviations
    room = 4.5 * np.sqrt(expected * (1 - expected) / number)
    assert (abs(seen / number - expected) <= room + 1e-9).all()


def places(order: epochs.Order, number: int) -> np.ndarray:
    """Where the examples of a window of the first epoch stood in the shuffle."""
    first, last = epochs.windows(order, 0)[number : number + 2]
    shuffled = epochs.permutation(order.count, order.seed, 0)[first:last]
    return np.argsort(shuffled)[np.argsort(np.argsort(epochs.between(order, first, last)))]


def test_windows_draw_their_steps_order_from_streams_of_their_own(draw_examples, monkeypatch):
    monkeypatch.setattr(epochs, "WINDOW", 10)
    # of equal lengths, so that windows differ in that order alone
    order = epochs.balanced(draw_examples(120, tokens=(5, 5)), 4, 0)
    found = [places(order, number).tolist() for number in range(3)]
    assert len({tuple(one) for one in found}) == 3
    # and not from the stream of the shuffle
    groups = balance.even(10, balance.shares(rows.Sizes(*np.ones((2, 40), int))))
    again = np.random.Generator(np.random.Philox(key=[0, 0])).permutation(groups)
    assert again.ravel().tolist() not in found


def test_what_was_asked_for_last_is_kept_and_no_more(draw_examples, monkeypatch):
    monkeypatch.setattr(epochs, "WINDOW", 5)
    order = epochs.balanced(draw_examples(200), 4, 0)
    found = epochs.between(order, 0, 800)
    assert len(order.made) == epochs.KEPT
    assert not any(one.flags.writeable for one in order.made.values())
    other = dataclasses.replace(order, seed=1)
    assert not other.made and other.shares is order.shares
    np.testing.assert_array_equal(epochs.between(order, 0, 800), found)


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [(balance, "ROUNDS", 1), (balance, "TRIED", 4), (balance, "EVEN", 0.1), (epochs, "WINDOW", 99)],
)
def test_the_rules_are_told_by_what_they_make(monkeypatch, module, name, value):
    before = epochs.rules()
    assert epochs.rules() == before
    monkeypatch.setattr(module, name, value)
    assert epochs.rules() != before


def test_balanced_steps_depend_on_lengths_seed_and_their_size_alone(draw_examples):
    data = draw_examples(100, tokens=(1, 60))

    def of(data, size=4, seed=0) -> np.ndarray:
        return epochs.between(epochs.balanced(data, size, seed), 0, 300)

    found = of(data)
    np.testing.assert_array_equal(of(dataclasses.replace(data, tokens=data.tokens * 0)), found)
    # the mean is what counts, so that all lengths may be twice as many
    longer = dataclasses.replace(data, prompts=2 * data.prompts, completions=2 * data.completions)
    np.testing.assert_array_equal(of(longer), found)
    others = of(draw_examples(100, seed=1, tokens=(1, 60))), of(data, size=5), of(data, seed=1)
    assert not any(np.array_equal(other, found) for other in others)

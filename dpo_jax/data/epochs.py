"""The order of the examples in each epoch, a pure function of (lengths, seed, epoch, examples a
step): every example once, shuffled, and then so that steps have about equally many tokens.

Dimensions: N examples of the data, b examples a step.
"""

import dataclasses
import functools

import numpy as np

from dpo_jax.data import balance, rows, tokenise

# steps among which examples are exchanged, or so many that they have about as many examples
WINDOW, WINDOW_EXAMPLES = 256, 8192


@dataclasses.dataclass(frozen=True, eq=False)
class Order:
    """What the epochs' orders depend on: plain shuffles."""

    count: int
    seed: int


@dataclasses.dataclass(frozen=True, eq=False)
class Balanced(Order):
    """The same for orders of even steps."""

    # examples a step
    batch_size: int
    # of tokens and scored tokens, int64 [2, N]
    shares: np.ndarray


def order(data: tokenise.Tokenised, batch_size: int, seed: int, *, balanced: bool) -> Order:
    """The epochs' orders of the data for steps of so many examples."""
    if not balanced or batch_size == 1:
        return shuffled(data, seed)
    # whether prompts are scored too does not count, so that all losses take the same steps
    return Balanced(len(data.prompts), seed, batch_size, balance.shares(rows.sizes(data)))


def shuffled(data: tokenise.Tokenised, seed: int) -> Order:
    """Plain shuffles of the data."""
    return Order(len(data.prompts), seed)


def between(order: Order, first: int, last: int) -> np.ndarray:
    """Examples at the places [first, last) of the epochs' orders, end to end: int64. They may
    straddle epochs.
    """
    found = []
    for epoch in range(first // order.count, (last - 1) // order.count + 1):
        start = epoch * order.count
        inside = max(first - start, 0), min(last - start, order.count)
        found.append(_within(order, epoch, *inside))
    return np.concatenate(found)


@functools.lru_cache(maxsize=2)
def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """The shuffled examples of an epoch: int64 [count]."""
    found = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)
    found.flags.writeable = False
    return found


def _within(order: Order, epoch: int, first: int, last: int) -> np.ndarray:
    """Those at the places [first, last) of one epoch."""
    if not isinstance(order, Balanced):
        return permutation(order.count, order.seed, epoch)[first:last]
    bounds = windows(order, epoch)
    numbers = range(
        int(np.searchsorted(bounds, first, side="right")) - 1,
        int(np.searchsorted(bounds, last)),
    )
    found = np.concatenate([_window(order, epoch, number) for number in numbers])
    return found[first - bounds[numbers[0]] : last - bounds[numbers[0]]]


def windows(order: Balanced, epoch: int) -> np.ndarray:
    """Places of an epoch at which windows start, and the last one's end: int64 [n + 1]. They start
    where steps do; the first and the last also have the part of a step that lies in this epoch.
    """
    size = order.batch_size
    before = -epoch * order.count % size
    whole = max(order.count - before, 0) // size
    each = max(min(WINDOW, WINDOW_EXAMPLES // size), 2)
    number = max(whole // each, 1)
    bounds = before + np.arange(number + 1) * whole // number * size
    bounds[0], bounds[-1] = 0, order.count
    return bounds


@functools.lru_cache(maxsize=8)
def _window(order: Balanced, epoch: int, number: int) -> np.ndarray:
    """The examples of a window: steps in random order, each of which may hold any of them."""
    first, last = windows(order, epoch)[number : number + 2].tolist()
    inside = permutation(order.count, order.seed, epoch)[first:last]
    size = order.batch_size
    # parts of steps that straddle epochs keep their places, filled up with average examples
    before, after = (-(epoch * order.count + place) % size for place in (first, last))
    start = (size - before) % size
    places = np.pad(np.arange(last - first), (start, after), constant_values=balance.NONE)
    members = balance.even(places.reshape(-1, size), order.shares[:, inside])
    whole = np.flatnonzero((members != balance.NONE).all(axis=1))
    # a stream of its own beside that of the permutation
    philox = np.random.Philox(key=[order.seed, epoch], counter=[0, 0, 0, number + 1])
    members[whole] = members[np.random.Generator(philox).permutation(whole)]
    taken = members[members != balance.NONE]
    return inside[taken]

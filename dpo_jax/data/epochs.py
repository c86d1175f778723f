"""The order of the examples in each epoch, a pure function of (lengths, seed, epoch, examples a
step): every example once, shuffled, and then so that steps have about equally many tokens.

Dimensions: N examples of the data, b examples a step.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

from dpo_jax.data import balance, rows, tokenise

# steps among which examples are exchanged, or fewer with about so many examples; less than twice as
# many where they do not divide an epoch
WINDOW, WINDOW_EXAMPLES = 256, 8192
# permutations and windows that an order keeps of those it has made
KEPT = 2


@dataclasses.dataclass(frozen=True, eq=False)
class Order:
    """What the epochs' orders depend on, and those parts of them that were asked for last."""

    count: int
    seed: int
    # examples a step, and each one's shares of tokens and scored tokens, int64 [2, N], by which
    # steps are made even; None: a plain shuffle
    batch_size: int = 1
    shares: np.ndarray | None = None
    made: dict[Any, np.ndarray] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )


def shuffled(data: tokenise.Tokenised, seed: int) -> Order:
    """Plain shuffles of the data."""
    return Order(len(data.prompts), seed)


def balanced(data: tokenise.Tokenised, batch_size: int, seed: int) -> Order:
    """Shuffles in which steps of so many examples are even; of one, plain ones."""
    if batch_size == 1:
        return shuffled(data, seed)
    # whether prompts are scored too does not count, so that all losses take the same steps
    return Order(len(data.prompts), seed, batch_size, balance.shares(rows.sizes(data)))


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


def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """The shuffled examples of an epoch: int64 [count]."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)


def rules() -> str:
    """Hash of the rules by which orders are made: of one of made-up lengths."""
    number = np.arange(4000)
    # with a long tail
    scored = 1 + (7919 * number % 4001) ** 4 // 10**12
    sizes = rows.Sizes(scored + 10 + 104729 * number % 1009 // 5, scored)
    order = Order(4000, 0, 8, balance.shares(sizes))
    return hashlib.blake2b(between(order, 0, 8001).tobytes(), digest_size=16).hexdigest()


def windows(order: Order, epoch: int) -> np.ndarray:
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


def _within(order: Order, epoch: int, first: int, last: int) -> np.ndarray:
    """Those at the places [first, last) of one epoch."""
    shares = order.shares
    if shares is None:
        return _shuffle(order, epoch)[first:last]
    bounds = windows(order, epoch)
    start = int(np.searchsorted(bounds, first, side="right")) - 1
    stop = int(np.searchsorted(bounds, last))
    found = []
    for number in range(start, stop):
        make = functools.partial(_make_window, order, shares, epoch, number)
        found.append(_kept(order, (epoch, number), make))
    return np.concatenate(found)[first - bounds[start] : last - bounds[start]]


def _shuffle(order: Order, epoch: int) -> np.ndarray:
    return _kept(order, epoch, lambda: permutation(order.count, order.seed, epoch))


def _make_window(order: Order, shares: np.ndarray, epoch: int, number: int) -> np.ndarray:
    """The examples of a window: what it has of steps that straddle epochs as they were shuffled,
    and its whole steps in random order, each of which may hold any of the others.
    """
    first, last = windows(order, epoch)[number : number + 2].tolist()
    examples, size = _shuffle(order, epoch)[first:last], order.batch_size
    before = min(-(epoch * order.count + first) % size, len(examples))
    count = (len(examples) - before) // size
    if count < 2:
        return examples
    whole = slice(before, before + count * size)
    groups = examples[whole][balance.even(count, shares[:, examples[whole]])]
    # a stream of its own beside that of the permutation
    philox = np.random.Philox(key=[order.seed, epoch], counter=[0, 0, 0, number + 1])
    examples = examples.copy()
    examples[whole] = np.random.Generator(philox).permutation(groups).ravel()
    return examples


def _kept(order: Order, key: Any, make: Callable[[], np.ndarray]) -> np.ndarray:
    """What was made under a key, or is now; the oldest is forgotten."""
    if key not in order.made:
        found = make()
        found.flags.writeable = False
        while len(order.made) >= KEPT:
            del order.made[next(iter(order.made))]
        order.made[key] = found
    return order.made[key]

"""Which examples a step takes from the epochs' orders, end to end: so many, or as many as fill it.

Dimensions: N examples of the data, n steps of at most b examples.
"""

import numpy as np

from dpo_jax.data import epochs, rows


def by_number(batch_size: int, steps: int) -> np.ndarray:
    """Places at which steps of so many examples start, and the last one's end: int64 [n + 1]."""
    return np.arange(steps + 1) * batch_size


def by_tokens(tokens: np.ndarray, limit: int, seed: int, steps: int) -> np.ndarray:
    """The same for steps that take examples of a plain shuffle as long as their tokens [N] are at
    most `limit` together, of which no example has more.
    """
    starts = [0]
    # sums of tokens before the places from `base` on
    base, sums, epoch = 0, np.zeros(1, np.int64), 0
    for _ in range(steps):
        while sums[-1] - sums[starts[-1] - base] <= limit:
            more = sums[-1] + np.cumsum(tokens[epochs.permutation(len(tokens), seed, epoch)])
            sums = np.concatenate([sums[starts[-1] - base :], more])
            base, epoch = starts[-1], epoch + 1
        enough = sums[starts[-1] - base] + limit
        starts.append(base + int(np.searchsorted(sums, enough, side="right")) - 1)
    return np.array(starts)


def within_epochs(starts: np.ndarray, count: int) -> np.ndarray:
    """Which steps have all their examples from one epoch of so many: bool [n]."""
    return starts[:-1] // count == (starts[1:] - 1) // count


def sizes(all_sizes: rows.Sizes, starts: np.ndarray, order: epochs.Order) -> rows.Sizes:
    """Sizes of the examples of each step, [n, b], where a step with fewer than b ends with 0."""
    taken_in_order = epochs.between(order, int(starts[0]), int(starts[-1]))
    place = (starts[:-1] - starts[0])[:, None] + np.arange(np.diff(starts).max())
    is_taken = place < (starts[1:] - starts[0])[:, None]
    found = taken_in_order[np.minimum(place, len(taken_in_order) - 1)]
    return rows.Sizes(*(np.where(is_taken, one[found], 0) for one in all_sizes))

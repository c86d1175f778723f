"""Which of the examples that lie together in an epoch's order go into which of their steps, so that
steps have about equally many tokens and scored tokens.

Dimensions: N examples, G groups of b of them.
"""

import numpy as np

from dpo_jax.data import rows

# the average example's share of tokens, and of scored tokens
UNIT = 1024
# exchanges end where no group is this share fuller than the average
EVEN = 1 / 256
# rounds of exchanges, in each of which every group takes part in one
ROUNDS = 16
# examples of a group that are tried against as many of the other
TRIED = 16


def shares(sizes: rows.Sizes) -> np.ndarray:
    """Tokens and scored tokens of each example, the average as UNIT: int64 [2, N]. Whole numbers,
    so that every machine finds the same groups.
    """
    return np.stack([one * UNIT * len(one) // max(int(one.sum()), 1) for one in sizes])


def even(count: int, own: np.ndarray) -> np.ndarray:
    """So many groups of the examples whose shares are given, int64 [2, G b], with about equal sums
    of both: indices, int64 [G, b].
    """
    return exchange(deal(count, own), own)


def deal(count: int, own: np.ndarray) -> np.ndarray:
    """Groups by rank: each gets one of the largest G examples, one of the next, and so on, the
    fullest always the smallest of them.
    """
    by_size = np.argsort(-own.sum(axis=0), kind="stable").reshape(-1, count)
    full = np.zeros((2, count), np.int64)
    found = np.zeros((count, len(by_size)), np.int64)
    for rank, some in enumerate(by_size):
        to = np.argsort(full.max(axis=0), kind="stable")
        found[to, rank] = some
        full[:, to] += own[:, some]
    return found


def exchange(members: np.ndarray, own: np.ndarray) -> np.ndarray:
    """One example of a fuller group for one of an emptier, the pair of examples that makes the two
    most equal, of all groups by pairs and over again: the fullest with the emptiest, the next with
    the next, by tokens, by scored tokens and by both in turn.
    """
    members, (count, size) = members.copy(), members.shape
    half, tried = count // 2, min(size, TRIED)
    enough = UNIT * size * (1 + EVEN)
    for number in range(ROUNDS):
        full = own[:, members].sum(axis=2)  # [2, G]
        if full.max() <= enough:
            break
        by = np.argsort(full.sum(axis=0) if number % 3 == 2 else full[number % 3], kind="stable")
        low, high = by[:half], by[::-1][:half]
        # of all ranks, others in each round
        places = (number + np.arange(tried) * size // tried) % size
        given, got = own[:, members[high][:, places]], own[:, members[low][:, places]]
        moved = given[:, :, :, None] - got[:, :, None, :]  # [2, G / 2, tried, tried]
        gap = full[:, high] - full[:, low]
        apart = ((gap[:, :, None, None] - 2 * moved) ** 2).sum(axis=0).reshape(half, -1)
        best = apart.argmin(axis=1)
        helps = apart[np.arange(half), best] < (gap**2).sum(axis=0)
        first, second = (places[one[helps]] for one in np.divmod(best, tried))
        high, low = high[helps], low[helps]
        members[high, first], members[low, second] = members[low, second], members[high, first]
    return members

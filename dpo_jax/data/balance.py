"""Which of the examples that lie together in an epoch's order go into which of their steps, so that
steps have about equally many tokens and scored tokens.

Dimensions: N examples of a window, G groups of b places, of which one example each.
"""

import numpy as np

from dpo_jax.data import rows

# a place that none of the window's examples takes, as an average one does in another window
NONE = -1
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


def even(members: np.ndarray, own: np.ndarray) -> np.ndarray:
    """The members int64 [G, b] of each group, exchanged so that groups' sums of the shares [2, N]
    are about equal. NONE stays where it is.
    """
    own = np.concatenate([own, np.full((2, 1), UNIT)], axis=1)  # of NONE, by its index
    return exchange(deal(members, own), own)


def deal(members: np.ndarray, own: np.ndarray) -> np.ndarray:
    """The members of the groups without NONE, by rank: each group gets one of the largest G, one of
    the next, and so on, the fullest always the smallest of them.
    """
    whole = np.flatnonzero((members != NONE).all(axis=1))
    inside = members[whole].ravel()
    by_size = inside[np.argsort(-own[:, inside].sum(axis=0), kind="stable")]
    dealt = by_size.reshape(members.shape[1], len(whole))
    full = np.zeros((2, len(whole)), np.int64)
    found = members.copy()
    for rank, some in enumerate(dealt):
        to = np.argsort(full.max(axis=0), kind="stable")
        found[whole[to], rank] = some
        full[:, to] += own[:, some]
    return found


def exchange(members: np.ndarray, own: np.ndarray) -> np.ndarray:
    """One example of a fuller group for one of an emptier, the pair of groups that makes most
    equal, of all groups by pairs and over again: the fullest with the emptiest, the next with the
    next, by tokens, by scored tokens and by both in turn.
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
        places = (number + np.arange(tried) * size // tried) % size
        given, got = members[high][:, places], members[low][:, places]
        moved = (
            own[:, given][:, :, :, None] - own[:, got][:, :, None, :]
        )  # [2, G / 2, tried, tried]
        gap = full[:, high] - full[:, low]
        apart = ((gap[:, :, None, None] - 2 * moved) ** 2).sum(axis=0)
        stays = (given == NONE)[:, :, None] | (got == NONE)[:, None, :]
        apart = np.where(stays, np.iinfo(np.int64).max, apart).reshape(half, tried * tried)
        best = apart.argmin(axis=1)
        helps = apart[np.arange(half), best] < (gap**2).sum(axis=0)
        first, second = (places[one[helps]] for one in np.divmod(best, tried))
        high, low = high[helps], low[helps]
        members[high, first], members[low, second] = members[low, second], members[high, first]
    return members

"""What preparing data draws at random: held-out rows, mismatched completions, label noise.

Each draw has a generator of its own, seeded by data.seed, so that none shifts another.
"""

import functools
import hashlib
from collections.abc import Sequence

import numpy as np

from dpo_jax.data import sources

HELD_OUT, MISMATCHED, NOISE = 1, 2, 3


def held_out(rows: int, count: int, seed: int) -> np.ndarray:
    """Which of the rows that can be used are held out, so many of them: bool [rows]."""
    if count >= rows:
        raise ValueError(
            f"data.held_out is {count} and only {rows} rows can be used, so none is left "
            "to train on; lower it"
        )
    held = np.zeros(rows, bool)
    held[np.random.default_rng([seed, HELD_OUT]).permutation(rows)[:count]] = True
    return held


def mismatch(prompts: Sequence[str], seed: int) -> np.ndarray:
    """For each example another one, of another prompt, each taken once: int64 [N].

    Examples are put in an order in which those of one prompt stand together, prompts and the
    examples of a prompt at random, and each takes the one that is further on by the size of the
    largest group.
    """
    firsts, groups = sorted_groups(prompts)
    sizes = np.bincount(groups)
    largest = int(sizes.max())
    if 2 * largest > len(prompts):
        shared = sources.shorten(prompts[firsts[sizes.argmax()]])
        raise ValueError(
            "kind unpaired (KTO) takes for each example the completion of another prompt, and "
            f"{largest} of the {len(prompts)} examples share the prompt {shared}; at most half "
            "may. Add rows of other prompts (for held-out rows: raise data.held_out)"
        )
    generator = np.random.default_rng([seed, MISMATCHED])
    rank = generator.permutation(len(sizes))[groups]
    order = np.lexsort((generator.permutation(len(prompts)), rank))
    taken = np.empty(len(prompts), np.int64)
    taken[order] = np.roll(order, -largest)
    return taken


def sorted_groups(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The groups of equal texts in sorted order: where each first stands, and of each text [N] the
    number of its group.

    Texts are looked up and not kept, since they may be more than memory holds.
    """
    digests = np.empty((len(texts), 2), np.uint64)
    for i, text in enumerate(texts):
        digest = hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()
        digests[i] = np.frombuffer(digest, np.uint64)
    _, firsts, groups = np.unique(digests, axis=0, return_index=True, return_inverse=True)

    def compare(one: int, other: int) -> int:
        first: str = texts[int(firsts[one])]
        second: str = texts[int(firsts[other])]
        return (first > second) - (first < second)

    order = np.array(sorted(range(len(firsts)), key=functools.cmp_to_key(compare)))
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    return firsts[order], place[groups.reshape(-1)]


def flips(count: int, share: float, seed: int) -> np.ndarray:
    """Which labels are flipped, round(share * count) of them: bool [count]."""
    flipped = np.zeros(count, bool)
    flipped[np.random.default_rng([seed, NOISE]).permutation(count)[: round(share * count)]] = True
    return flipped

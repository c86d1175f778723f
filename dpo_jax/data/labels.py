"""What preparing data draws at random: held-out rows, mismatched completions, label noise.

Each draw has a generator of its own, seeded by data.seed, so that none shifts another.
"""

from collections.abc import Sequence

import numpy as np

from dpo_jax.data import formats, sources

HELD_OUT, MISMATCHED, NOISE = 1, 2, 3


def split(
    found: list[formats.Example], held_out: int, seed: int
) -> tuple[list[formats.Example], list[formats.Example]]:
    """Examples to train on and those of held_out rows, in the order of the rows.

    All examples of a row go to one side, and the same rows are held out whatever the kind of the
    examples.
    """
    rows = list(dict.fromkeys(example.where for example in found))
    if held_out >= len(rows):
        raise ValueError(
            f"data.held_out is {held_out} and only {len(rows)} rows can be used, so none is left "
            "to train on; lower it"
        )
    drawn = np.random.default_rng([seed, HELD_OUT]).permutation(len(rows))[:held_out]
    held = {rows[i] for i in drawn}
    return (
        [example for example in found if example.where not in held],
        [example for example in found if example.where in held],
    )


def mismatch(prompts: Sequence[str], seed: int) -> np.ndarray:
    """For each example another one, of another prompt, each taken once: int64 [N].

    Examples are put in an order in which those of one prompt stand together, prompts and the
    examples of a prompt at random, and each takes the one that is further on by the size of the
    largest group.
    """
    names, groups = np.unique(np.asarray(prompts, dtype=object), return_inverse=True)
    sizes = np.bincount(groups)
    largest = int(sizes.max())
    if 2 * largest > len(prompts):
        shared = sources.shorten(str(names[sizes.argmax()]))
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


def flips(count: int, share: float, seed: int) -> np.ndarray:
    """Which labels are flipped, round(share * count) of them: bool [count]."""
    flipped = np.zeros(count, bool)
    flipped[np.random.default_rng([seed, NOISE]).permutation(count)[: round(share * count)]] = True
    return flipped

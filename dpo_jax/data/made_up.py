"""Examples of planned lengths, for a plan of a run whose rows are not at hand: lengths and no text.

Dimensions: N examples, C completions of each.
"""

from typing import NamedTuple

import numpy as np

from dpo_jax.data import tokenise

# how many are drawn, of which the shapes of batches are chosen
DRAWN = 8192
# of the logarithm of a length
SPREAD = 0.6
# completions by kind of example, as data.examples names it
COMPLETIONS = {
    "pairs": ("chosen", "rejected"),
    "triples": ("chosen", "gold", "rejected"),
    "ranked": ("completion_0", "completion_1", "completion_2", "completion_3"),
    "unpaired": ("completion", "mismatched"),
    "sft": ("completion",),
}


class Lengths(NamedTuple):
    """How long the examples are, and how many."""

    # medians, in tokens
    prompt: int
    completion: int
    # of an epoch
    examples: int


# of pairs of the built-in task, whose completions a model has yet to write
BUILTIN = Lengths(5, 26, 10_000)


def draw(lengths: Lengths, longest: int, kind: str) -> tokenise.Tokenised:
    """DRAWN examples whose prompts and completions have log-normal lengths, cut to `longest` tokens
    of a prompt and a completion, of which a prompt takes half at most.

    ValueError where the medians leave no room.
    """
    if min(lengths) < 1:
        raise ValueError(f"planned lengths are {lengths}; each must be 1 or more")
    if lengths.prompt + lengths.completion > longest:
        raise ValueError(
            f"a prompt of {lengths.prompt} tokens and a completion of {lengths.completion} are "
            f"planned, and data.max_length is {longest}: raise --data.max-length"
        )
    names = COMPLETIONS[kind]
    generator = np.random.default_rng(0)
    noise = np.exp(SPREAD * generator.normal(size=(DRAWN, 1 + len(names))))
    medians = np.array([lengths.prompt] + [lengths.completion] * len(names))
    sizes = np.maximum(np.rint(noise * medians), 1).astype(np.int64)
    prompts = np.minimum(sizes[:, 0], longest // 2)
    answers = np.minimum(sizes[:, 1:], (longest - prompts)[:, None])
    sizes = np.concatenate([prompts[:, None], answers], axis=1)
    columns = {"desirable": np.ones(DRAWN, np.float32)} if kind == "unpaired" else {}
    tokens = np.zeros(int(sizes.sum()), np.int32)
    return lay_out(names, sizes, tokens, f"made up {lengths} {longest} {kind}", columns)


def lay_out(
    names: tuple[str, ...],
    sizes: np.ndarray,
    tokens: np.ndarray,
    fingerprint: str,
    columns: dict[str, np.ndarray],
) -> tokenise.Tokenised:
    """Examples of so many tokens of prompt and completions [N, 1 + C], which follow each other in
    `tokens`.
    """
    stops = sizes.cumsum().reshape(sizes.shape)
    spans = np.stack([stops - sizes, stops], axis=-1)  # [N, 1 + C, 2]
    return tokenise.Tokenised(
        names=names,
        tokens=tokens,
        prompts=spans[:, 0],
        completions=spans[:, 1:],
        columns=columns,
        fingerprint=fingerprint,
        report={},
    )

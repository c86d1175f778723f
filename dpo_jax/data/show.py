"""Tokenised examples and packed rows in a form that a person can check."""

import collections
import itertools

import numpy as np

from dpo_jax import config
from dpo_jax.data import encode, formats, pack, sides, sources, tokenise, tokenizer

# between tokens
BAR = "|"


def examples(data: config.Data, words: tokenizer.Tokenizer, count: int) -> str:
    """The source's first usable examples: every token, which are scored, and what was cut."""
    rows = sources.read(data.source, data.split)
    found = formats.examples(rows, data, data.examples, collections.Counter())
    shown = (one for example in found if (one := describe(example, words, data)) is not None)
    return "\n\n".join(itertools.islice(shown, count))


def describe(example: formats.Example, words: tokenizer.Tokenizer, data: config.Data) -> str | None:
    """One example, a line a token sequence; None where it is dropped."""
    counts: collections.Counter[str] = collections.Counter()
    encoded = next(encode.encode([example], words, data, counts), None)
    if encoded is None:
        return None
    cut = ", cut at its start" if counts["cut prompts"] else ""
    label = "" if example.desirable is None else f"  desirable: {example.desirable}"
    lines = [
        f"{example.where}{label}",
        f"  prompt: {len(encoded.prompt)} tokens, none scored, BOS "
        f"{places(encoded.prompt, words.bos_id)}{cut}",
        f"    {BAR}{text(encoded.prompt, words)}{BAR}",
    ]
    for name, ids in encoded.completions.items():
        ended = ids[-1] == words.eos_id
        cut = "" if ended else ", cut at its end"
        eos = places(ids, words.eos_id)
        lines += [
            f"  {name}: {len(ids)} tokens, all scored, EOS {eos}{cut}",
            f"    {BAR}{text(ids, words)}{BAR}",
        ]
    return "\n".join(lines)


def places(ids: np.ndarray, special: int | None) -> str:
    """Where a special token stands: first, last, nowhere, or its indices."""
    found = [] if special is None else np.flatnonzero(ids == special).tolist()
    named = {0: "first", len(ids) - 1: "last"}
    return ", ".join(named.get(index, f"at {index}") for index in found) or "nowhere"


def text(ids: np.ndarray, words: tokenizer.Tokenizer) -> str:
    """The tokens with bars between them, line breaks written as \\n."""
    return BAR.join(words.token_text(int(token)) for token in ids).replace("\n", "\\n")


def rows(data: tokenise.Tokenised, experiment: config.Experiment) -> str:
    """How the steps lie in rows on one shard: the compiled shapes and the fill."""
    plan = pack.plan_run(data, experiment, 1)
    fill = pack.fill(data, plan, pack.batch(data, plan, 0))
    return (
        f"{sides.describe(data.report)}\n"
        f"{pack.describe(plan, len(data.prompts), experiment.steps)}\n"
        f"step 0 fills {fill['fill/tokens']:.0%} of its positions and "
        f"{fill['fill/scored']:.0%} of its scored positions"
    )

"""Examples -> token ids of prompts and completions that fit into max_length, with counted drops.

Prompt and completion are tokenised separately, so that where the prompt ends never depends on the
completion.
"""

import collections
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from dpo_jax import config
from dpo_jax.data import formats, tokenizer, transcripts

CHUNK = 1024

Counts = collections.Counter[str]


class Encoded(NamedTuple):
    """Token ids of an example, int32, and the example that they come of."""

    prompt: np.ndarray
    completions: dict[str, np.ndarray]
    example: formats.Example


class Rendered(NamedTuple):
    """The text of an example, completions in the sorted order of their names."""

    prompt: str
    completions: list[str]
    example: formats.Example


def encode(
    found: Iterable[formats.Example], words: tokenizer.Tokenizer, data: config.Data, counts: Counts
) -> Iterator[Encoded]:
    """Token ids of the examples, CHUNK of them at a time; those dropped and cut are added to counts
    by reason.
    """
    if data.max_prompt_length is not None and data.max_prompt_length >= data.max_length:
        raise ValueError(
            f"data.max_prompt_length is {data.max_prompt_length}; it must be below data.max_length "
            f"({data.max_length}), or no token of a completion fits"
        )
    counts.update({"cut prompts": 0, "cut completions": 0})
    texts = render_all(found, words, data, counts)
    while chunk := list(itertools.islice(texts, CHUNK)):
        flat = [text for one in chunk for text in (one.prompt, *map(words.trim, one.completions))]
        ids = iter(words.encode_batch(flat))
        for one in chunk:
            prompt, names = words.begin(next(ids)), sorted(one.example.completions)
            completions = {name: words.finish(next(ids)) for name in names}
            try:
                check_ids(prompt, completions)
                fitted = fit(prompt, completions, words.bos_id, one.example.where, data, counts)
            except transcripts.BadRow as error:
                counts[f"dropped {formats.refuse(error, one.example.where, data)}"] += 1
                continue
            if fitted is not None:
                prompt, completions = fitted
                arrays = {name: np.asarray(part, np.int32) for name, part in completions.items()}
                yield Encoded(np.asarray(prompt, np.int32), arrays, one.example)


def render_all(
    found: Iterable[formats.Example], words: tokenizer.Tokenizer, data: config.Data, counts: Counts
) -> Iterator[Rendered]:
    """The texts of the examples; those that the chat template refuses are bad rows."""
    for example in found:
        try:
            yield render(example, words)
        except transcripts.BadRow as error:
            counts[f"dropped {formats.refuse(error, example.where, data)}"] += 1


def render(example: formats.Example, words: tokenizer.Tokenizer) -> Rendered:
    """The text of an example; of messages, a completion is what it adds to the prompt's text."""
    answers = [example.completions[name] for name in sorted(example.completions)]
    if isinstance(example.prompt, str):
        return Rendered(example.prompt, [str(answer) for answer in answers], example)
    if words.chat_template is None:
        raise ValueError(
            f"{example.where}: the row is made of chat messages and the tokenizer has no chat "
            "template; give the path of a Jinja file as --data.chat-template"
        )
    try:
        prompt = words.apply_chat_template(example.prompt)
        wholes = [
            words.apply_chat_template([*example.prompt, *answer], add_generation_prompt=False)
            for answer in answers
            if not isinstance(answer, str)
        ]
    except ValueError as error:
        raise transcripts.BadRow("refused by the chat template", str(error)) from error
    for whole in wholes:
        if not whole.startswith(prompt):
            raise transcripts.BadRow(
                "chat template rewrites the prompt",
                "the chat template's text of prompt and completion does not begin with its text "
                f"of the prompt, which ends in {prompt[-40:]!r}, so where the completion begins "
                "is unknown; give another template as --data.chat-template",
            )
    return Rendered(prompt, [whole.removeprefix(prompt) for whole in wholes], example)


def check_ids(prompt: list[int], completions: dict[str, list[int]]) -> None:
    """Raises BadRow where the ids, not the texts, are empty or equal."""
    if not prompt:
        raise transcripts.BadRow(
            "empty prompt",
            "the prompt is empty and the tokenizer adds no BOS, so nothing predicts the first "
            "token of the completion; name a token that starts each prompt: --data.bos-token",
        )
    for name, ids in completions.items():
        if len(ids) == 1:
            raise transcripts.BadRow("empty completion", f"{name} has no token before EOS")
    for one, other in equal(completions):
        raise transcripts.BadRow(
            f"{one} equal to {other}",
            f"{one} and {other} differ as text and have the same token ids",
        )


def equal(completions: dict[str, list[int]]) -> list[tuple[str, str]]:
    """The pairs of completions that have the same ids; a gold one may be the chosen one too."""
    return [
        (one, other)
        for one, other in itertools.combinations(completions, 2)
        if completions[one] == completions[other] and {one, other} != {"chosen", formats.GOLD}
    ]


def fit(
    prompt: list[int],
    completions: dict[str, list[int]],
    bos_id: int | None,
    where: str,
    data: config.Data,
    counts: Counts,
) -> tuple[list[int], dict[str, list[int]]] | None:
    """Prompt and completions made to fit into max_length as data.over_length says; None: dropped.

    "cut" keeps the last max_prompt_length tokens of a longer prompt, its BOS among them in front,
    then the first tokens of each completion, all against the same prompt. A completion that is cut
    ends without EOS.
    """
    longest = max(map(len, completions.values()))
    if len(prompt) + longest <= data.max_length:
        return prompt, completions
    if data.over_length == "error":
        raise ValueError(
            f"{where}: a prompt of {len(prompt)} tokens and a completion of {longest} exceed "
            f"data.max_length ({data.max_length}); raise it, or give --data.over-length cut or "
            "--data.over-length drop"
        )
    if data.over_length == "drop":
        counts["dropped over max_length"] += 1
        return None
    short = cut_prompt(prompt, bos_id, data.max_prompt_length or data.max_length // 2)
    room = data.max_length - len(short)
    cut = {name: ids[:room] for name, ids in completions.items()}
    if equal(cut):
        counts["dropped equal after truncation"] += 1
        return None
    counts["cut prompts"] += len(short) < len(prompt)
    counts["cut completions"] += sum(len(cut[name]) < len(completions[name]) for name in cut)
    return short, cut


def cut_prompt(prompt: list[int], bos_id: int | None, most: int) -> list[int]:
    """The last tokens of a prompt longer than most, its BOS kept in front as one of them."""
    if len(prompt) <= most:
        return prompt
    bos = prompt[:1] if prompt[0] == bos_id else []
    return bos + prompt[len(prompt) - most + len(bos) :]

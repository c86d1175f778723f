r"""Rows of published forms -> examples: a prompt and its named completions.

    pairs        prompt, chosen, rejected: strings, or lists of {"role", "content"}, where those of
                 chosen and rejected are the answer alone
    transcripts  chosen, rejected: whole conversations, the prompt within both (transcripts.py): HH
                 text, or message lists as in UltraFeedback, whose further field prompt is not read
    triples      prompt, gold, chosen, rejected, the gold completion better than both
    ranked       prompt, completions: a list, best first, or in any order with scores, a list of
                 numbers that tells them apart, higher being better
    unpaired     prompt, completion, label: true (desirable) or false; optionally density_ratio, how
                 much likelier the prompt is among desirable examples (losses.bco_weighted)
    judged       instruction, optionally input, output_1, output_2, preference as AlpacaEval writes
                 it: 1 plus the judge's probability that output_2 is better, so below 1.5 output_1
                 is chosen and above it output_2; 1.5, and 0 in older files, are ties, which are
                 left out and counted. The prompt is the instruction [, "\n\n" and the input], and
                 "\n\n", all as plain text
    text         text, whose prompt is empty; or prompt, completion

Strings are joined as they stand: a space or newline between prompt and completion belongs to one of
them. Where any part of a row is a list of messages, its strings become messages (user, assistant).
"""

import collections
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from dpo_jax import config
from dpo_jax.data import sources, transcripts
from dpo_jax.data.transcripts import BadRow

Text = str | list[dict]

PAIRED = ("pairs", "transcripts", "judged", "triples")
GIVES = {
    "pairs": PAIRED,
    "triples": ("triples",),
    "ranked": ("ranked",),
    "unpaired": (*PAIRED, "unpaired"),
    "sft": (*PAIRED, "unpaired", "text"),
}
GOLD = "gold"
MOST_RANKED = 10
CURE = "; correct the row, or leave such rows out and count them: --data.bad-rows drop"
TYPES = {
    str: "a string",
    bool: "true or false",
    float: "a number",
    list: "a list",
    dict: "an object",
}


class Example(NamedTuple):
    """A prompt and its completions by name; either all are strings or all are lists of messages."""

    prompt: Text
    completions: dict[str, Text]
    desirable: bool | None
    where: str
    # the row's density_ratio
    density_ratio: float | None = None


class Tie(Exception):
    """A judged row without a preference, which is left out whatever data.bad_rows says."""


def examples(
    rows: sources.Rows, data: config.Data, kind: str, drops: collections.Counter[str]
) -> Iterator[Example]:
    """The examples of a kind that the rows give, read one after the other; rows that give none are
    counted in drops, by reason.

    Two examples come of a pair where kind is unpaired, one after the other, with the same `where`.
    ValueError where the rows' form cannot give the kind, and for a row that cannot be used unless
    data.bad_rows is "drop".
    """
    form = form_of(rows, data)
    if form not in GIVES[kind]:
        raise ValueError(
            f"{rows.where(0)}: rows of form {form!r} cannot give examples of kind {kind!r} "
            f"(data.examples), which need rows of form {' or '.join(GIVES[kind])}"
        )
    first: Example | None = None
    for i in range(len(rows)):
        try:
            found = convert(PARSERS[form](rows[i]), kind, rows.where(i))
            if not found:
                drops["undesirable"] += 1
                continue
            first = found[0] if first is None else first
            check_alike(first, found[-1])
        except Tie:
            drops["tie"] += 1
        except BadRow as error:
            drops[refuse(error, rows.where(i), data)] += 1
        else:
            yield from found


def check_alike(first: Example, last: Example) -> None:
    """Raises BadRow where the last example has other completions or numbers than the first."""
    if len(first.completions) != len(last.completions):
        raise BadRow(
            "another number of completions",
            f"field 'completions' has {len(last.completions)} of them and that of the first row "
            f"{len(first.completions)}; all rows must have as many",
        )
    if (first.density_ratio is None) != (last.density_ratio is None):
        raise BadRow(
            "density_ratio in some rows",
            f"field 'density_ratio' is {last.density_ratio} and in the first row "
            f"{first.density_ratio}; it must be in all rows or in none",
        )


def refuse(error: BadRow, where: str, data: config.Data) -> str:
    """The reason to count a bad row by, where data.bad_rows says drop; else raises ValueError."""
    if data.bad_rows == "drop":
        return error.reason
    raise ValueError(f"{where}: {error}{CURE}") from error


def form_of(rows: sources.Rows, data: config.Data) -> str:
    """data.form, or the form that the first row's fields fit; ValueError for none or several."""
    if data.form is not None:
        return data.form
    fitting = forms_that_fit(rows[0])
    if len(fitting) == 1:
        return fitting[0]
    fields = ", ".join(rows[0])
    if fitting:
        raise ValueError(
            f"{rows.where(0)}: the fields {fields} fit the forms {' and '.join(fitting)}; say "
            f"which is meant: --data.form {' or --data.form '.join(fitting)}"
        )
    raise ValueError(
        f"{rows.where(0)}: the fields {fields or '(none)'} fit no form. Forms: pairs (prompt, "
        "chosen, rejected), transcripts (chosen, rejected), triples (prompt, gold, chosen, "
        "rejected), ranked (prompt, completions), unpaired (prompt, completion, label), judged "
        "(instruction, output_1, output_2, preference), text (text, or prompt and completion)"
    )


def forms_that_fit(row: dict[str, Any]) -> list[str]:
    """The forms whose fields a row has.

    With chosen, rejected and prompt it is pairs (with gold: triples), transcripts where chosen is a
    list of messages that begins with the prompt's, and both where chosen is HH text.
    """
    fields = set(row)
    forms = []
    if {"chosen", "rejected"} <= fields:
        chosen = row["chosen"]
        messages = isinstance(chosen, list) and any(
            isinstance(message, dict) and message.get("role") != "assistant" for message in chosen
        )
        if "prompt" in fields and not messages:
            forms.append("triples" if isinstance(row.get(GOLD), (str, list)) else "pairs")
        text = isinstance(chosen, str) and transcripts.MARKER.match(chosen) is not None
        if "prompt" not in fields or messages or text:
            forms.append("transcripts")
    if {"prompt", "completions"} <= fields:
        forms.append("ranked")
    if {"prompt", "completion", "label"} <= fields:
        forms.append("unpaired")
    if {"instruction", "output_1", "output_2", "preference"} <= fields:
        forms.append("judged")
    if "text" in fields or ({"prompt", "completion"} <= fields and "label" not in fields):
        forms.append("text")
    return forms


def convert(example: Example, kind: str, where: str) -> list[Example]:
    """The examples of a kind that come of a row's own example."""
    example = example._replace(where=where)
    if kind in ("triples", "ranked"):
        return [example]
    if "chosen" not in example.completions:
        return [example] if kind == "unpaired" or example.desirable is not False else []
    if kind == "pairs":
        pair = {name: example.completions[name] for name in ("chosen", "rejected")}
        return [example._replace(completions=pair)]
    halves = [
        Example(example.prompt, {"completion": example.completions[name]}, name == "chosen", where)
        for name in ("chosen", "rejected")
    ]
    return halves if kind == "unpaired" else [halves[0]._replace(desirable=None)]


def parse_pair(row: dict[str, Any]) -> Example:
    """An example of a row with prompt, chosen and rejected."""
    fields = {name: text_or_messages(row, name) for name in ("prompt", "chosen", "rejected")}
    if any(isinstance(value, list) for value in fields.values()):
        fields = {name: as_messages(value, name) for name, value in fields.items()}
        for name in ("chosen", "rejected"):
            check_answer(fields[name], name)
    return pair(fields["prompt"], fields["chosen"], fields["rejected"])


def parse_triple(row: dict[str, Any]) -> Example:
    """An example of a row with prompt, gold, chosen and rejected."""
    parsed, gold = parse_pair(row), text_or_messages(row, GOLD)
    prompt, completions = parsed.prompt, {**parsed.completions, GOLD: filled(gold, GOLD)}
    if isinstance(prompt, list) or isinstance(gold, list):
        prompt = as_messages(prompt, "prompt")
        completions = {name: as_messages(one, name) for name, one in completions.items()}
        check_answer(completions[GOLD], GOLD)
    if completions[GOLD] == completions["rejected"]:
        raise BadRow(
            "gold equal to rejected",
            f"fields 'gold' and 'rejected' are equal, {sources.shorten(gold)}, and must differ",
        )
    return parsed._replace(prompt=prompt, completions=completions)


def parse_ranked(row: dict[str, Any]) -> Example:
    """An example of a row with prompt and completions, best first or with scores."""
    prompt, given = text_or_messages(row, "prompt"), required(row, "completions", list)
    if not 2 <= len(given) <= MOST_RANKED:
        raise BadRow(
            "number of completions",
            f"field 'completions' has {len(given)} of them; it must have 2 to {MOST_RANKED}",
        )
    fields = [f"completions[{place}]" for place in range(len(given))]
    found = [text_or_messages({name: one}, name) for name, one in zip(fields, given, strict=True)]
    if isinstance(prompt, list) or any(isinstance(one, list) for one in found):
        prompt = as_messages(prompt, "prompt")
        found = [as_messages(one, "completion") for one in found]
        for name, one in zip(fields, found, strict=True):
            check_answer(one, name)
    for name, one in zip(fields, found, strict=True):
        filled(one, name)
    for (first, one), (second, other) in itertools.combinations(enumerate(found), 2):
        if one == other:
            raise BadRow(
                "equal completions",
                f"completions[{first}] and completions[{second}] are equal, "
                f"{sources.shorten(one)}, and must differ",
            )
    order = rank(row, len(found))
    completions = {f"completion_{place}": found[one] for place, one in enumerate(order)}
    return Example(prompt, completions, None, "")


def rank(row: dict[str, Any], count: int) -> list[int]:
    """Places of a row's completions, best first."""
    if "scores" not in row:
        return list(range(count))
    scores = required(row, "scores", list)
    fields = [f"scores[{place}]" for place in range(len(scores))]
    numbers = [required({name: one}, name, float) for name, one in zip(fields, scores, strict=True)]
    if len(numbers) != count or len(set(numbers)) != count:
        raise BadRow(
            "scores that do not rank",
            f"field 'scores' is {sources.shorten(scores)}; it must have a number for each of the "
            f"{count} completions, no two equal",
        )
    return sorted(range(count), key=lambda place: -numbers[place])


def parse_transcripts(row: dict[str, Any]) -> Example:
    """An example of a row whose chosen and rejected hold the prompt."""
    chosen, rejected = text_or_messages(row, "chosen"), text_or_messages(row, "rejected")
    if chosen == rejected:
        raise equal(chosen)
    if isinstance(chosen, str) and isinstance(rejected, str):
        return pair(*transcripts.part_text(chosen, rejected))
    if isinstance(chosen, list) and isinstance(rejected, list):
        return pair(*transcripts.part_messages(chosen, rejected))
    raise BadRow(
        "wrong type",
        f"field 'chosen' is of type {type(chosen).__name__} and 'rejected' of type "
        f"{type(rejected).__name__}: transcripts must be two strings or two lists of messages",
    )


def parse_judged(row: dict[str, Any]) -> Example:
    """An example of a row with two outputs and a preference; Tie where it prefers neither."""
    preference = required(row, "preference", float)
    if not (preference == 0 or 1 <= preference <= 2):
        raise BadRow(
            "unknown preference",
            f"field 'preference' is {preference!r}; it must be a number from 1 (output_1 is "
            "better) to 2 (output_2 is better), or 0 for a tie",
        )
    if preference in (0, 1.5):
        raise Tie
    parts = [required(row, "instruction", str)]
    if row.get("input") not in (None, ""):
        parts.append(required(row, "input", str))
    outputs = [required(row, name, str) for name in ("output_1", "output_2")]
    chosen, rejected = outputs if preference < 1.5 else reversed(outputs)
    return pair("\n\n".join([*parts, ""]), chosen, rejected)


def parse_unpaired(row: dict[str, Any]) -> Example:
    """An example of a row with prompt, completion and label."""
    label, ratio = required(row, "label", bool), row.get("density_ratio")
    if ratio is not None and required(row, "density_ratio", float) <= 0:
        raise BadRow(
            "density_ratio not positive",
            f"field 'density_ratio' is {ratio!r}; it must be over 0",
        )
    parsed = parse_prompt_and_completion(row)
    return parsed._replace(desirable=label, density_ratio=ratio)


def parse_text(row: dict[str, Any]) -> Example:
    """An example of a row with text, or with prompt and completion."""
    if "text" not in row and "prompt" in row:
        return parse_prompt_and_completion(row)
    return Example("", {"completion": filled(required(row, "text", str), "text")}, None, "")


def parse_prompt_and_completion(row: dict[str, Any]) -> Example:
    """An example without a label of the fields prompt and completion."""
    prompt, completion = text_or_messages(row, "prompt"), text_or_messages(row, "completion")
    if isinstance(prompt, list) or isinstance(completion, list):
        prompt, completion = as_messages(prompt, "prompt"), as_messages(completion, "completion")
        check_answer(completion, "completion")
    return Example(prompt, {"completion": filled(completion, "completion")}, None, "")


PARSERS: dict[str, Callable[[dict[str, Any]], Example]] = {
    "pairs": parse_pair,
    "triples": parse_triple,
    "ranked": parse_ranked,
    "transcripts": parse_transcripts,
    "judged": parse_judged,
    "unpaired": parse_unpaired,
    "text": parse_text,
}


def pair(prompt: Text, chosen: Text, rejected: Text) -> Example:
    """An example of a prompt and two completions; BadRow where one is empty or both are equal."""
    filled(chosen, "chosen")
    filled(rejected, "rejected")
    if chosen == rejected:
        raise equal(chosen)
    return Example(prompt, {"chosen": chosen, "rejected": rejected}, None, "")


def equal(value: Text) -> BadRow:
    """The BadRow of a pair that has no preference."""
    return BadRow(
        "chosen equal to rejected",
        f"fields 'chosen' and 'rejected' are equal, {sources.shorten(value)}, and must differ",
    )


def filled(completion: Text, field: str) -> Text:
    """The completion; BadRow where it is blank."""
    text = completion if isinstance(completion, str) else "".join(m["content"] for m in completion)
    if not text.strip():
        raise BadRow(
            "empty completion",
            f"the completion of field {field!r} is empty ({sources.shorten(completion)}) and "
            "must have text",
        )
    return completion


def required(row: dict[str, Any], field: str, kind: type) -> Any:
    """A field's value, which must be of a type; int counts as float, and bool as neither."""
    if field not in row or row[field] is None:
        state = "is missing" if field not in row else "is null"
        raise BadRow(
            "missing field", f"field {field!r} {state}; the row's fields are {', '.join(row)}"
        )
    value = row[field]
    kinds = (int, float) if kind is float else kind
    if isinstance(value, kinds) and (kind is bool or not isinstance(value, bool)):
        if not (isinstance(value, float) and math.isnan(value)):
            return value
    name = "label not a bool" if field == "label" else "wrong type"
    raise BadRow(
        name,
        f"field {field!r} is {sources.shorten(value)}, of type {type(value).__name__}; it must "
        f"be {TYPES[kind]}",
    )


def text_or_messages(row: dict[str, Any], field: str) -> Text:
    """A field that holds a string or a list of messages."""
    if not isinstance(row.get(field), list):
        return required(row, field, str)
    messages = row[field]
    for number, message in enumerate(messages):
        part = f"{field}[{number}]"
        if not isinstance(message, dict):
            required({part: message}, part, dict)
        for name in ("role", "content"):
            try:
                required(message, name, str)
            except BadRow as error:
                raise BadRow(error.reason, f"message {part}: {error}") from None
    # a table gives every message the fields of all
    return [{name: value for name, value in m.items() if value is not None} for m in messages]


def as_messages(value: Text, field: str) -> list[dict]:
    """Messages, a string being the user's or, for a completion, the assistant's."""
    if isinstance(value, list):
        return value
    return [{"role": "user" if field == "prompt" else "assistant", "content": value}]


def check_answer(messages: Text, field: str) -> None:
    """Raises BadRow unless all messages of a completion are the assistant's."""
    roles = [message["role"] for message in messages if isinstance(message, dict)]
    if any(role != "assistant" for role in roles):
        raise BadRow(
            "completion not the assistant's",
            f"field {field!r} has messages of {', '.join(roles)}; a completion must be the "
            "assistant's alone. Where chosen and rejected hold the prompt's messages too, give "
            "--data.form transcripts",
        )

"""Two transcripts of one conversation, parted into their common prompt and two completions.

A transcript is text in the form of Anthropic's HH ("\\n\\nHuman: ...\\n\\nAssistant: ...") or a
list of chat messages. The prompt is made of whole common turns and never of common characters or
tokens, so that two answers that begin with the same words keep them.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

MARKER = re.compile(r"\n\n(Human|Assistant):")


class BadRow(ValueError):
    """A row that no example can be made of: the reason, by which it is counted, and a message."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class Turn(NamedTuple):
    """A speaker's turn; text begins after the marker, and neither holds the other's."""

    role: str
    text: str


def part_text(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Prompt, chosen and rejected of two HH texts; prompt + completion is the very transcript.

    The prompt ends with the "\\n\\nAssistant:" of the turn where they part. Where one goes on after
    the end of the other, that is the last common Assistant turn. Later Assistant turns without a
    Human turn between belong to the completion, marker included. BadRow where a completion would
    hold a Human turn.
    """
    turns = {"chosen": turns_of(chosen, "chosen"), "rejected": turns_of(rejected, "rejected")}
    at = parting(turns["chosen"], turns["rejected"])
    for field, own in turns.items():
        check_answer([turn.role for turn in own[at:]], "Assistant", field)
    prompt = render(turns["chosen"][:at]) + "\n\nAssistant:"
    return prompt, chosen[len(prompt) :], rejected[len(prompt) :]


def part_messages(
    chosen: list[dict], rejected: list[dict]
) -> tuple[list[dict], list[dict], list[dict]]:
    """Prompt, chosen and rejected of two lists of messages that both hold the prompt's messages."""
    turns = {
        field: [Turn(message["role"], message["content"]) for message in messages]
        for field, messages in (("chosen", chosen), ("rejected", rejected))
    }
    at = parting(turns["chosen"], turns["rejected"])
    if at == 0:
        raise BadRow(
            "no common prompt",
            "the messages of chosen and rejected differ from the first one on, so there is no "
            "common prompt; where the prompt is a field of its own, give --data.form pairs",
        )
    for field, own in turns.items():
        check_answer([turn.role for turn in own[at:]], "assistant", field)
    return chosen[:at], chosen[at:], rejected[at:]


def parting(chosen: Sequence[Turn], rejected: Sequence[Turn]) -> int:
    """How many turns the two have in common, without a last Assistant turn that one has alone."""
    common = 0
    shorter = min(len(chosen), len(rejected))
    while common < shorter and chosen[common] == rejected[common]:
        common += 1
    if common == shorter and common > 0 and chosen[common - 1].role.lower() == "assistant":
        return common - 1
    return common


def check_answer(roles: list[str], assistant: str, field: str) -> None:
    """Raises BadRow unless all turns of a completion are the assistant's."""
    if not roles:
        raise BadRow(
            "empty completion", f"field {field!r} has no answer after the turns that both share"
        )
    if any(role != assistant for role in roles):
        raise BadRow(
            "parted before the last answer",
            f"after the turns that chosen and rejected share, field {field!r} goes on with turns "
            f"of {', '.join(roles)}; all of them must be {assistant}'s, for they are what is "
            "trained on",
        )


def turns_of(text: str, field: str) -> list[Turn]:
    """The turns of an HH text; text before the first marker is a turn of role ''."""
    markers = list(MARKER.finditer(text))
    if not any(marker[1] == "Assistant" for marker in markers):
        raise BadRow(
            "not a transcript",
            f"field {field!r} has no turn that begins with '\\n\\nAssistant:', as a transcript "
            "must; where the prompt is a field of its own, give --data.form pairs",
        )
    ends = [marker.start() for marker in markers[1:]] + [len(text)]
    turns = [
        Turn(marker[1], text[marker.end() : end]) for marker, end in zip(markers, ends, strict=True)
    ]
    before = text[: markers[0].start()]
    return [Turn("", before), *turns] if before else turns


def render(turns: Sequence[Turn]) -> str:
    """The text that turns_of would give these turns for."""
    return "".join(f"\n\n{turn.role}:{turn.text}" if turn.role else turn.text for turn in turns)

"""The tokens that end a completion: the tokenizer's EOS, the model's own ends, a user's."""

import json
from collections.abc import Sequence

from dpo_jax import origins, paths
from dpo_jax.data import hub, tokenizer
from dpo_jax.model import presets

# of a model in HF format; chat models name the ends of a turn and of a text here
GENERATION = "generation_config.json"


def find(source: str, words: tokenizer.Tokenizer, texts: Sequence[str] = ()) -> list[int]:
    """The ids that end what the model of a source writes: EOS, those of the generation_config.json
    of the HF model that it is or started from, and those of the texts.
    """
    ids = [words.eos_id, *of_model(source), *(of_text(words, text) for text in texts)]
    return list(dict.fromkeys(ids))


def of_model(source: str) -> list[int]:
    """The ids of the HF model that a source is or started from; none where it is a preset."""
    runs = origins.lineage(source)
    # ids of the model's own tokenizer are other words in another
    if any(experiment["data"]["tokenizer"] is not None for experiment in runs):
        return []
    return end_ids(origins.origin(source))


def end_ids(source: str) -> list[int]:
    """The eos_token_id of an HF model's generation_config.json, in a list; [] without one."""
    found = read_generation(source).get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(one, int) for one in ids):
        raise ValueError(
            f"eos_token_id is {found!r} in the {GENERATION} of {source}; it must be an id, a list "
            "of ids, or null"
        )
    return ids


def read_generation(source: str) -> dict:
    """The generation_config.json of a folder or hub name; {} without one."""
    if source in presets.PRESETS:
        return {}
    is_folder = paths.is_folder(source)
    file = paths.join(source, GENERATION) if is_folder else hub.find_file(source, GENERATION)
    if file is None or not paths.exists(file):
        return {}
    try:
        return json.loads(paths.read_text(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}; correct it, or remove it") from None


def of_text(words: tokenizer.Tokenizer, text: str) -> int:
    """The id of a text that is one token; ValueError shows the tokens of any other."""
    ids = words.encode(text)
    if len(ids) != 1:
        parts = ", ".join(repr(words.token_text(one)) for one in ids) or "none"
        raise ValueError(
            f"the stop token {text!r} is {len(ids)} tokens of the tokenizer ({parts}), and must be "
            "one: give --stop one of them, or a special token by its name"
        )
    return ids[0]

"""A run's newest weights, or those of another source, as a folder that transformers loads.

vLLM and lm-eval load it too: they read the same files.
"""

import json
import math
import os
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np

from dpo_jax import config, initial, model_card, origins, paths, sharding, stops
from dpo_jax.data import tokenizer
from dpo_jax.model import hf_files, lora, peft, presets, weights

# names in an error
LISTED = 3


class Options(NamedTuple):
    """How to export."""

    # of the weights' files: float32 or bfloat16
    dtype: str = "float32"
    # most that a weights' file holds, in 10^9 bytes
    max_file_gigabytes: float = 5.0
    # a folder, a tokenizer.json or a hub name; None: the one that lies beside the model
    tokenizer: str | None = None
    # token that ends a completion; None: the tokenizer's own
    eos_token: str | None = None
    # of a run with an adapter: write it alone, in PEFT's form, and not merged into its base
    adapter: bool = False
    # folder or hub name of the base that the adapter's files name; None: the one it was trained on
    base_model: str | None = None


class Source(NamedTuple):
    """A model and what belongs to it."""

    # as it was asked for: a run folder, a preset, or a model in HF format
    name: str
    initial: initial.Initial
    words: tokenizer.Tokenizer
    # the ids that end what it writes, the tokenizer's EOS first
    stop_ids: list[int]


class Written(NamedTuple):
    """What was written."""

    folder: str
    dtype: str
    # the checkpoint's step; None where the source is no run
    step: int | None
    parameters: int
    # bytes of each file by name
    files: dict[str, int]


def export(source: str, out: str, options: Options) -> Written:
    """Writes the model of a source into a new or empty local folder.

    ValueError for a folder that is not empty, a run without a checkpoint, and options out of range.
    """
    folder = check_out(out)
    dtype = np.dtype(check_dtype(options.dtype))
    file_bytes = check_size(options.max_file_gigabytes)
    found = load(source, options)
    params = trained_weights(found, options)
    folder.mkdir(parents=True, exist_ok=True)
    # config.json is the last of all, so that what was cut short is taken for no model
    if options.adapter:
        settings = adapter_settings(found, options)
        write_beside_weights(folder, found, options.dtype, settings.base_model)
        peft.save(folder, found.initial.model.config, params, settings, dtype)
    else:
        write_beside_weights(folder, found, options.dtype)
        weights.save(folder, found.initial.model.config, params, dtype, file_bytes)
        write_special_tokens(folder, found.words)
    return Written(
        str(folder),
        options.dtype,
        found.initial.step,
        sum(leaf.size for leaf in jax.tree.leaves(params)),
        {file.name: file.stat().st_size for file in sorted(folder.iterdir())},
    )


def trained_weights(found: Source, options: Options) -> dict:
    """The parameters that are written: all, an adapter merged into them, or the adapter alone."""
    start = found.initial
    if not options.adapter:
        return start.params if start.adapter is None else jax.jit(lora.merge)(initial.policy(start))
    if start.adapter is None:
        raise ValueError(f"{found.name} has no adapter: leave --adapter out")
    return start.params


def adapter_settings(found: Source, options: Options) -> peft.Settings:
    """What PEFT has to know of an adapter; ValueError where its base is no model in HF format."""
    adapter = found.initial.adapter
    assert adapter is not None
    settings = adapter.lora
    base = options.base_model or origins.base_of(adapter)
    if base in presets.PRESETS or paths.exists(paths.join(base, origins.MODEL)):
        raise ValueError(
            f"the adapter of {found.name} was trained on {base}, which is no model in HF format: "
            f"export that first (python -m scripts.export {base} BASE), and give --base-model BASE"
        )
    return peft.Settings(
        settings.rank or 0, settings.alpha, settings.rank_stabilised, settings.dropout, base
    )


def load(source: str, options: Options) -> Source:
    """The model of a source with its tokenizer; ValueError where they do not fit each other."""
    if source in presets.PRESETS and options.tokenizer is None:
        raise ValueError(
            f"{source} is a preset, which has no tokenizer: give --tokenizer a folder, a "
            "tokenizer.json file or a hub name"
        )
    mesh = sharding.make_mesh(config.Mesh(), jax.devices())
    model = initial.load(source, config.Model(), 0, mesh)
    words = with_bos_in_template(load_words(options, model.tokenizer))
    vocabulary = model.model.config.vocabulary_size
    if words.vocabulary_size > vocabulary:
        raise ValueError(
            f"the tokenizer {options.tokenizer or model.tokenizer} has {words.vocabulary_size} "
            f"tokens and the model {source} a vocabulary of {vocabulary}: give --tokenizer another"
        )
    # ids of the model's own tokenizer are other words in another
    stop_ids = [words.eos_id] if options.tokenizer else stops.find(source, words)
    return Source(source, model, words, stop_ids)


def load_words(options: Options, beside: str | None) -> tokenizer.Tokenizer:
    """The tokenizer that the options choose, or the one beside the model."""
    data = config.Data(tokenizer=options.tokenizer, eos_token=options.eos_token)
    try:
        return tokenizer.load_tokenizer(data, beside)
    except ValueError as error:
        # a run's flags have the names of its config's sections
        raise ValueError(str(error).replace("--data.", "--")) from error


def with_bos_in_template(words: tokenizer.Tokenizer) -> tokenizer.Tokenizer:
    """The tokenizer with a chat template that writes BOS, where prompts begin with it.

    Programs other than this one add nothing to what a template has written.
    """
    if words.bos_id is None or words.chat_template is None:
        return words
    rendered = words.apply_chat_template([{"role": "user", "content": "a"}])
    if words.encode(rendered)[:1] == [words.bos_id]:
        return words
    bos = str(words.backend.id_to_token(words.bos_id))
    template = "{{ " + json.dumps(bos) + " }}" + words.chat_template
    return tokenizer.Tokenizer(
        words.fast, bos_token=bos, eos_token=words.eos_token, chat_template=template
    )


def write_beside_weights(
    folder: pathlib.Path, found: Source, dtype: str, base_model: str | None = None
) -> None:
    """Writes all that is no weights: tokenizer, chat template, generation_config.json, README.md.

    `base_model` is what an adapter lies on; None: the weights are a whole model's.
    """
    found.words.save(str(folder))
    ends = {**special_ids(found.words), "eos_token_id": found.stop_ids}
    # what the losses train is the distribution, not its likeliest text
    settings = {"do_sample": True, **{name: ids for name, ids in ends.items() if ids is not None}}
    hf_files.write_json(folder / stops.GENERATION, settings)
    facts = model_card.read(found.name, found.initial.step)
    has_chat = found.words.chat_template is not None
    card = model_card.write(facts, folder.resolve().name, dtype, has_chat, base_model)
    paths.write_text(str(folder / "README.md"), card)


def write_special_tokens(folder: pathlib.Path, words: tokenizer.Tokenizer) -> None:
    """Enters the tokenizer's special tokens into the model's config.json."""
    values = hf_files.read_json(folder / hf_files.CONFIG)
    text = json.dumps({**values, **special_ids(words)}, indent=2) + "\n"
    paths.write_text(str(folder / hf_files.CONFIG), text)


def special_ids(words: tokenizer.Tokenizer) -> dict[str, int | None]:
    """The ids of a tokenizer's special tokens, as config.json calls them; null for none."""
    bos: Any = words.fast.bos_token_id if words.bos_id is None else words.bos_id
    return {
        "bos_token_id": bos,
        "eos_token_id": words.eos_id,
        "pad_token_id": words.fast.pad_token_id,
    }


def describe(written: Written) -> str:
    """What was written, a line a file."""
    step = "" if written.step is None else f", step {written.step}"
    lines = [f"  {name}  {size:,} bytes" for name, size in written.files.items()]
    total = sum(written.files.values())
    return "\n".join(
        [
            f"{written.folder}: {written.parameters:,} parameters in {written.dtype}{step}",
            *lines,
            f"  {total:,} bytes in all",
        ]
    )


def check_out(out: str) -> pathlib.Path:
    """The folder to write; ValueError unless it is local, and new or empty."""
    if not paths.is_local(out):
        raise ValueError(f"{out} is not on this machine's disk: export to a folder, and copy it")
    folder = pathlib.Path(os.path.expanduser(out))
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{out} is a file; give the name of a new folder")
    names = sorted(file.name for file in folder.iterdir()) if folder.exists() else []
    if names:
        more = ", ..." if len(names) > LISTED else ""
        raise ValueError(
            f"{out} is not empty ({', '.join(names[:LISTED])}{more}): give a new folder, or remove "
            "what is in it"
        )
    return folder


def check_dtype(dtype: str) -> str:
    """The dtype's name; ValueError for one that is not exported."""
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype is {dtype!r}; it must be float32 or bfloat16")
    return dtype


def check_size(gigabytes: float) -> int:
    """Gigabytes as bytes; ValueError unless they are over 0 and finite."""
    if not 0 < gigabytes < math.inf:
        raise ValueError(f"max_file_gigabytes is {gigabytes}; it must be over 0")
    return max(1, round(gigabytes * 1e9))

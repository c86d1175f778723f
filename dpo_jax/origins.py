"""The files that make a run folder a model's folder too, and where models come from."""

import dataclasses
import json
import os
from typing import NamedTuple

from dpo_jax import config, flags, paths
from dpo_jax.model import config as model_config
from dpo_jax.model import presets

# files of a run folder that make it a model's folder too
MODEL, TOKENIZER, ADAPTER = "model.json", "tokenizer", "adapter.json"
# the run's experiment; HF folders have a file of that name too
RECORD = "config.json"


class Adapter(NamedTuple):
    """What a run's adapter is, and what it lies on; adapter.json holds it."""

    lora: config.Lora
    targets: tuple[str, ...]
    # the model that the base was made of, as `prepare` makes it
    source: str
    # of the source, where it is a preset, and of the new adapter
    seed: int
    # how the base's linear maps and its other matrices are held
    held_as: str
    others_as: str
    # hash of what the base was made of
    base: str


def absolute(source: str) -> str:
    """A local folder by its absolute path, so that it is found from elsewhere too; any other source
    as it is.
    """
    is_here = source not in presets.PRESETS and paths.is_local(source)
    return (
        os.path.abspath(os.path.expanduser(source)) if is_here and os.path.isdir(source) else source
    )


def with_absolute_sources(experiment: config.Experiment) -> config.Experiment:
    """The experiment with the absolute paths of model and reference, so that a run folder tells
    where they lie wherever it is read.
    """
    model, anchor = experiment.model, experiment.reference
    source = None if anchor.source is None else absolute(anchor.source)
    return experiment.replace(
        model=dataclasses.replace(model, source=absolute(model.source)),
        reference=dataclasses.replace(anchor, source=source),
    )


def tokenizer_of(source: str) -> str | None:
    """Where the tokenizer of a model lies; None for a preset."""
    if source in presets.PRESETS:
        return None
    is_run = paths.exists(paths.join(source, MODEL))
    return paths.join(source, TOKENIZER) if is_run else source


def lineage(source: str) -> list[dict]:
    """The experiments of a run folder and of the runs that it started from, the latest first; none
    for another source. They are as config.json has them.
    """
    found = []
    while paths.exists(paths.join(source, MODEL)) and paths.exists(paths.join(source, RECORD)):
        found.append(flags.read_config(source)["experiment"])
        source = found[-1]["model"]["source"]
    return found


def origin(source: str) -> str:
    """The preset or HF model that a run folder started from in the end; another source itself."""
    runs = lineage(source)
    return runs[-1]["model"]["source"] if runs else source


def base_of(adapter: Adapter) -> str:
    """The source of an adapter's base, through the runs whose adapter it went on with."""
    while adapter.lora.start == "continue" and paths.exists(paths.join(adapter.source, ADAPTER)):
        adapter = read_adapter(adapter.source)
    return adapter.source


def write(folder: str, shape: model_config.DecoderConfig, adapter: Adapter | None) -> None:
    """Writes into a run folder what makes it a model's folder too, but for the tokenizer."""
    if adapter is not None:
        record = adapter._asdict() | {"lora": dataclasses.asdict(adapter.lora)}
        paths.write_text(paths.join(folder, ADAPTER), json.dumps(record, indent=2))
    # last: a folder that has it has the others too
    record = dataclasses.asdict(shape)
    paths.write_text(paths.join(folder, MODEL), json.dumps(record, indent=2))


def read_adapter(folder: str) -> Adapter:
    """What the adapter of a run folder is."""
    record = json.loads(paths.read_text(paths.join(folder, ADAPTER)))
    targets = tuple(record["targets"])
    settings = config.Lora(**{**record["lora"], "targets": targets})
    return Adapter(**{**record, "lora": settings, "targets": targets})


def read_shape(folder: str) -> model_config.DecoderConfig:
    """The model's shape of a run folder."""
    return model_config.from_json(json.loads(paths.read_text(paths.join(folder, MODEL))))

"""The model that a run starts from: a preset, a folder in HF format, or a run folder."""

import dataclasses
import functools
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax import checkpoint, config, flags, paths, sharding
from dpo_jax.model import config as model_config
from dpo_jax.model import decoder, presets, weights

# files of a run folder that make it a model's folder too
MODEL, TOKENIZER = "model.json", "tokenizer"
# the run's experiment; HF folders have a file of that name too
RECORD = "config.json"


class Initial(NamedTuple):
    """A model before the first step."""

    model: decoder.Decoder
    # float32, on the mesh
    params: dict
    # where its tokenizer lies; None for a preset
    tokenizer: str | None
    # of the checkpoint that it is read from; None where the source is no run folder
    step: int | None = None


def load(source: str, settings: config.Model, seed: int, mesh) -> Initial:
    """The model of a source, its parameters on the mesh; ValueError says what a source may be."""
    if source in presets.PRESETS:
        shape = presets.PRESETS[source]
        placed = sharding.parameters(decoder_shapes(shape), mesh)
        make = jax.jit(functools.partial(decoder.init, shape), out_shardings=placed)
        return Initial(make_decoder(shape, settings), make(jax.random.key(seed)), None)
    if paths.exists(paths.join(source, MODEL)):
        shape = read_shape(source)
        step, params = checkpoint.load_params(
            source, sharding.with_shardings(decoder_shapes(shape), mesh)
        )
        return Initial(make_decoder(shape, settings), params, tokenizer_of(source), step)
    shape, params = weights.load(source, mesh)
    return Initial(make_decoder(shape, settings), params, tokenizer_of(source))


def decoder_shapes(shape: model_config.DecoderConfig):
    """Shapes and types of the parameters."""
    return decoder.shapes(shape)


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


def make_decoder(shape: model_config.DecoderConfig, settings: config.Model) -> decoder.Decoder:
    """The decoder of a shape with the run's compute type and remat policy."""
    name = settings.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    return decoder.Decoder(shape, dtype=jnp.dtype(name), remat=settings.remat)


def write_shape(folder: str, shape: model_config.DecoderConfig) -> None:
    """Writes the model's shape into a run folder."""
    paths.write_text(paths.join(folder, MODEL), json.dumps(dataclasses.asdict(shape), indent=2))


def read_shape(folder: str) -> model_config.DecoderConfig:
    """The model's shape of a run folder."""
    return model_config.from_json(json.loads(paths.read_text(paths.join(folder, MODEL))))

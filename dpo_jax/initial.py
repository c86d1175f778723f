"""The model that a run starts from: a preset, a folder in HF format, or a run folder; and the
adapter that is trained in its stead.
"""

import dataclasses
import functools
import json
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import checkpoint, config, flags, paths, reference, sharding
from dpo_jax.model import config as model_config
from dpo_jax.model import decoder, frozen, lora, presets, weights

# files of a run folder that make it a model's folder too
MODEL, TOKENIZER, ADAPTER = "model.json", "tokenizer", "adapter.json"
# the run's experiment; HF folders have a file of that name too
RECORD = "config.json"


class Initial(NamedTuple):
    """A model before the first step."""

    model: decoder.Decoder
    # float32, on the mesh: what is trained, all parameters or an adapter's
    params: dict
    # where its tokenizer lies; None for a preset
    tokenizer: str | None
    # of the checkpoint that it is read from; None where the source is no run folder
    step: int | None = None
    # the parameters under an adapter; {} where all are trained
    base: dict = {}
    # how to find the base again; None where all parameters are trained
    adapter: "Adapter | None" = None
    # whether the adapter has not been trained yet
    is_new: bool = False


class Adapter(NamedTuple):
    """What a run's adapter is, and what it lies on; adapter.json holds it."""

    lora: config.Lora
    targets: tuple[str, ...]
    # the model that the base was made of, as `prepare` makes it
    source: str
    # how the base is held
    held_as: str
    # of the source, where it is a preset, and of the new adapter
    seed: int
    # content hash of the base
    base: str


class Source(NamedTuple):
    """Where a model comes from: the arguments of `load`."""

    name: str
    settings: config.Model
    seed: int


def load(source: str, settings: config.Model, seed: int, mesh, *, trained: bool = True) -> Initial:
    """The model of a source on the mesh, as it was trained: a run with an adapter is base and
    adapter. Where its parameters will not be trained, files are read in the type that they will be
    held in. ValueError says what a source may be.
    """
    if source in presets.PRESETS:
        shape = presets.PRESETS[source]
        placed = sharding.parameters(decoder.shapes(shape), mesh)
        make = jax.jit(functools.partial(decoder.init, shape), out_shardings=placed)
        return Initial(make_decoder(shape, settings, mesh), make(jax.random.key(seed)), None)
    if paths.exists(paths.join(source, ADAPTER)):
        return load_adapted(source, settings, mesh)
    if paths.exists(paths.join(source, MODEL)):
        shape = read_shape(source)
        step, params = checkpoint.load_params(
            source, sharding.with_shardings(decoder.shapes(shape), mesh)
        )
        return Initial(make_decoder(shape, settings, mesh), params, tokenizer_of(source), step)
    dtype = np.float32 if trained else np.dtype(read_as(settings))
    shape, params = weights.load(source, mesh, dtype)
    return Initial(make_decoder(shape, settings, mesh), params, tokenizer_of(source))


def load_adapted(source: str, settings: config.Model, mesh) -> Initial:
    """Base and adapter of a run folder; ValueError where the base is not what it was."""
    adapter = read_adapter(source)
    held = dataclasses.replace(settings, frozen=adapter.held_as)
    try:
        start = prepare(
            load(adapter.source, held, adapter.seed, mesh, trained=False),
            adapter.lora,
            Source(adapter.source, held, adapter.seed),
            mesh,
        )
    except ValueError as error:
        raise ValueError(f"{source} is an adapter of {adapter.source}: {error}") from error
    if start.adapter is None or start.adapter.base != adapter.base:
        raise ValueError(
            f"{source} is an adapter of {adapter.source}, whose weights have changed since: put "
            "them back"
        )
    shapes = lora.shapes(start.model.config, adapter.targets, start.adapter.lora.rank or 0)
    step, params = checkpoint.load_params(source, sharding.with_shardings(shapes, mesh))
    return Initial(
        start.model, params, tokenizer_of(source), step, base=start.base, adapter=adapter
    )


def prepare(start: Initial, settings: config.Lora, source: Source, mesh) -> Initial:
    """The model with what a run trains: an adapter, new or as it is, or else all parameters, in
    which an adapter is then merged.
    """
    if settings.rank is None:
        return merged(start, mesh)
    is_new = start.adapter is None or settings.start == "new"
    if start.adapter is not None and not is_new:
        check_same(settings, start.adapter, source)
        base, params, targets = start.base, start.params, start.adapter.targets
    else:
        targets = lora.find_targets(start.model.config, settings.targets)
        whole = merged(start, mesh).params
        base = frozen.hold(whole, held_as(source.settings), donated=True)
        params = new_adapter(start.model.config, settings, targets, source.seed, mesh)
    is_here = paths.is_local(source.name) and os.path.exists(source.name)
    adapter = Adapter(
        settings,
        targets,
        os.path.abspath(source.name) if is_here else source.name,
        held_as(source.settings),
        source.seed,
        reference.fingerprint(base),
    )
    return start._replace(params=params, base=base, adapter=adapter, is_new=is_new)


def merged(start: Initial, mesh) -> Initial:
    """The model with its adapter, if it has one, merged into float32 parameters."""
    if start.adapter is None:
        return start
    placed = sharding.parameters(decoder.shapes(start.model.config), mesh)
    params = jax.jit(lora.merge, out_shardings=placed)(policy(start))
    return start._replace(params=params, base={}, adapter=None, is_new=False)


def policy(start: Initial) -> dict:
    """The parameters that the decoder takes."""
    return lora.join(start.base, start.params, scale(start))


def scale(start: Initial) -> float:
    """What the product of the model's adapter is multiplied by; 1 where there is none."""
    if start.adapter is None:
        return 1.0
    settings = start.adapter.lora
    return lora.scale(settings.alpha, settings.rank or 1, rank_stabilised=settings.rank_stabilised)


def new_adapter(
    shape: model_config.DecoderConfig,
    settings: config.Lora,
    targets: tuple[str, ...],
    seed: int,
    mesh,
) -> dict:
    """The parameters of a new adapter on the mesh."""
    rank = settings.rank or 0
    placed = sharding.parameters(lora.shapes(shape, targets, rank), mesh)
    make = jax.jit(functools.partial(lora.init, shape, targets, rank), out_shardings=placed)
    # another key than that of a preset's random weights
    return make(jax.random.fold_in(jax.random.key(seed), 1))


def check_same(settings: config.Lora, adapter: Adapter, source: Source) -> None:
    """Raises ValueError where a run would go on with an adapter of another form."""
    for name in ("rank", "alpha", "rank_stabilised", "targets"):
        mine, its = getattr(settings, name), getattr(adapter.lora, name)
        if name == "targets":
            mine, its = mine and tuple(sorted(mine)), tuple(sorted(adapter.targets))
        if mine != its and not (name == "targets" and mine is None):
            raise ValueError(
                f"lora.{name} is {mine}, and the adapter of {source.name} has {its}: give the "
                "same to train it on, or --lora.start new to merge it and train a new one"
            )
    if source.settings.frozen not in (None, adapter.held_as):
        raise ValueError(
            f"model.frozen is {source.settings.frozen}, and the base of {source.name} is held in "
            f"{adapter.held_as}: leave it out, or give --lora.start new"
        )


def held_as(settings: config.Model) -> str:
    """The type of matrices that are not trained."""
    return settings.frozen or compute_type(settings)


def read_as(settings: config.Model) -> str:
    """The type in which parameters are read that are not trained."""
    # the other parameters of a base in int8 are in the compute type
    return compute_type(settings) if settings.frozen == frozen.INT8 else held_as(settings)


def compute_type(settings: config.Model) -> str:
    """The compute type."""
    return settings.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")


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


def make_decoder(
    shape: model_config.DecoderConfig, settings: config.Model, mesh
) -> decoder.Decoder:
    """The decoder of a shape with the run's compute type and remat policy, on the mesh."""
    return decoder.Decoder(
        shape,
        dtype=jnp.dtype(compute_type(settings)),
        remat=settings.remat,
        placement=sharding.placement(mesh),
    )


def write_model(folder: str, start: Initial) -> None:
    """Writes into a run folder what makes it a model's folder too, but for the tokenizer."""
    shape = dataclasses.asdict(start.model.config)
    paths.write_text(paths.join(folder, MODEL), json.dumps(shape, indent=2))
    if start.adapter is not None:
        record = start.adapter._asdict() | {"lora": dataclasses.asdict(start.adapter.lora)}
        paths.write_text(paths.join(folder, ADAPTER), json.dumps(record, indent=2))


def read_adapter(folder: str) -> Adapter:
    """What the adapter of a run folder is."""
    record = json.loads(paths.read_text(paths.join(folder, ADAPTER)))
    targets = tuple(record["targets"])
    settings = config.Lora(**{**record["lora"], "targets": targets})
    return Adapter(**{**record, "lora": settings, "targets": targets})


def read_shape(folder: str) -> model_config.DecoderConfig:
    """The model's shape of a run folder."""
    return model_config.from_json(json.loads(paths.read_text(paths.join(folder, MODEL))))

"""The model that a run starts from: a preset, a folder in HF format, or a run folder; and the
adapter that is trained in its stead.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from dpo_jax import checkpoint, config, origins, paths, reference, sharding
from dpo_jax.model import (
    attention,
    blocks,
    decoder,
    frozen,
    gpu_kernel,
    lora,
    presets,
    tpu_kernel,
    weights,
)
from dpo_jax.model import config as model_config


class Initial(NamedTuple):
    """A model before the first step."""

    model: decoder.Decoder
    # float32, on the mesh: what is trained, all parameters or an adapter's
    params: dict
    # where its tokenizer lies; None for a preset
    tokenizer: str | None
    # hash of what its parameters were made of: the same on every mesh, however they were rounded
    identity: str
    # of the checkpoint that it is read from; None where the source is no run folder
    step: int | None = None
    # the parameters under an adapter; {} where all are trained
    base: dict = {}
    # how to find the base again; None where all parameters are trained
    adapter: origins.Adapter | None = None
    # whether the adapter has not been trained yet
    is_new: bool = False


class Source(NamedTuple):
    """Where a model comes from."""

    name: str
    settings: config.Model
    seed: int


def load(
    source: str, settings: config.Model, seed: int, mesh, *, read_as: str = "float32"
) -> Initial:
    """The model of a source on the mesh, as it was trained: a run with an adapter is base and
    adapter. Matrices of HF files are read as float32, or in the type that they will be held in.
    ValueError says what a source may be.
    """
    if source in presets.PRESETS:
        shape = presets.PRESETS[source]
        placed = sharding.parameters(decoder.shapes(shape), mesh)
        make = jax.jit(decoder.init, static_argnums=0, out_shardings=placed)
        params = make(shape, jax.random.key(seed))
        # no hash of the values, whose last bits differ between meshes
        identity = reference.digest(source, dataclasses.asdict(shape), seed)
        return Initial(make_decoder(shape, settings, mesh), params, None, identity)
    if paths.exists(paths.join(source, origins.ADAPTER)):
        return load_adapted(source, settings, mesh)
    step = None
    if paths.exists(paths.join(source, origins.MODEL)):
        shape = origins.read_shape(source)
        step, params = checkpoint.load_params(
            source, sharding.with_shardings(decoder.shapes(shape), mesh)
        )
    else:
        shape, params = weights.load(source, mesh, np.dtype(read_as))
    identity = reference.fingerprint(params)
    return Initial(
        make_decoder(shape, settings, mesh), params, origins.tokenizer_of(source), identity, step
    )


def load_adapted(source: str, settings: config.Model, mesh) -> Initial:
    """Base and adapter of a run folder; ValueError where the base is not what it was."""
    adapter = origins.read_adapter(source)
    try:
        found = load(adapter.source, settings, adapter.seed, mesh, read_as=adapter.others_as)
        start = make_base(found, adapter, mesh)
    except ValueError as error:
        raise ValueError(
            f"{source} is an adapter of {adapter.source}, as {origins.ADAPTER} there says: {error}"
        ) from error
    if hash_of_base(found, adapter.lora) != adapter.base:
        raise ValueError(
            f"{source} is an adapter of {adapter.source}, whose weights have changed since: put "
            "them back"
        )
    shapes = lora.shapes(found.model.config, adapter.targets, adapter.lora.rank or 0)
    step, params = checkpoint.load_params(source, sharding.with_shardings(shapes, mesh))
    return start._replace(
        params=params,
        tokenizer=origins.tokenizer_of(source),
        identity=reference.digest(adapter.base, reference.fingerprint(params)),
        step=step,
        adapter=adapter,
    )


def prepare(start: Initial, settings: config.Lora, source: Source, mesh) -> Initial:
    """The model with what a run trains: an adapter, new or as it is, or else all parameters, in
    which an adapter is then merged.
    """
    if settings.rank is None:
        return merged(start, mesh)
    if start.adapter is None and settings.start == "new":
        raise ValueError(
            f"lora.start is new, and {source.name} has no adapter that could be trained on: leave "
            "it out"
        )
    goes_on = continues(start, settings)
    if goes_on and start.adapter is not None:
        check_same(settings, start.adapter, source)
        targets, linear, others = (
            start.adapter.targets,
            start.adapter.held_as,
            start.adapter.others_as,
        )
    else:
        targets = lora.find_targets(start.model.config, settings.targets)
        linear, others = held_as(source.settings), others_as(source.settings)
    adapter = origins.Adapter(
        settings,
        targets,
        origins.absolute(source.name),
        source.seed,
        linear,
        others,
        hash_of_base(start, settings),
    )
    made = make_base(start, adapter, mesh)
    if goes_on:
        return made
    params = new_adapter(start.model.config, settings, adapter.targets, source.seed, mesh)
    identity = reference.digest(adapter.base, adapter.held_as, source.seed, *adapter.targets)
    return made._replace(params=params, identity=identity, is_new=True)


def continues(start: Initial, settings: config.Lora) -> bool:
    """Whether the adapter of a model is trained on."""
    return start.adapter is not None and settings.start == "continue"


def make_base(start: Initial, adapter: origins.Adapter, mesh) -> Initial:
    """The model with the base that an adapter lies on: its own where that adapter goes on, else all
    of its parameters, whose arrays are deleted.
    """
    if continues(start, adapter.lora):
        return start._replace(adapter=adapter)
    whole = merged(start, mesh).params
    base = frozen.hold(whole, adapter.held_as, adapter.others_as, donated=True)
    return start._replace(params={}, base=base, adapter=adapter)


def hash_of_base(start: Initial, settings: config.Lora) -> str:
    """Hash of what the base of an adapter on a model is made of."""
    if start.adapter is not None and continues(start, settings):
        return start.adapter.base
    return start.identity


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
    make = jax.jit(lora.init, static_argnums=(0, 1, 2), out_shardings=placed)
    # another key than that of a preset's random weights
    return make(shape, targets, rank, jax.random.fold_in(jax.random.key(seed), 1))


def check_same(settings: config.Lora, adapter: origins.Adapter, source: Source) -> None:
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
    """The type of an adapter's base's linear maps."""
    return settings.frozen or compute_type(settings)


def others_as(settings: config.Model) -> str:
    """The type of other matrices that are not trained."""
    return compute_type(settings) if settings.frozen == frozen.INT8 else held_as(settings)


def compute_type(settings: config.Model) -> str:
    """The compute type."""
    return settings.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")


def make_decoder(
    shape: model_config.DecoderConfig, settings: config.Model, mesh
) -> decoder.Decoder:
    """The decoder of a shape as the run computes with it, on the mesh."""
    placement = sharding.placement(mesh)
    return decoder.Decoder(
        shape,
        dtype=jnp.dtype(compute_type(settings)),
        remat=settings.remat,
        placement=placement,
        attend=choose_attention(
            shape, settings, mesh, None if placement is None else placement.rows
        ),
    )


def choose_attention(
    shape: model_config.DecoderConfig, settings: config.Model, mesh, rows: NamedSharding | None
) -> Callable:
    """How the run attends on the mesh, which may be one that is compiled for and not here."""
    device = mesh.devices.flat[0]
    platform, by_default = device.platform, {"cpu": "blocks", "tpu": "kernel"}
    if platform in ("gpu", "cuda") and gpu_kernel.is_proven(
        device.device_kind, shape.head_dim, compute_type(settings)
    ):
        by_default[platform] = "kernel"
    match settings.attention or by_default.get(platform, "plain"), platform:
        case "plain", _ if sharding.row_shards(mesh) == 1:
            return attention.attend
        case "plain", _:
            return blocks.make_attend(blocks.attend_at_once, rows)
        case "blocks", _:
            return blocks.make_attend(blocks.attend, rows)
        case "kernel", "tpu":
            return blocks.make_attend(tpu_kernel.attend, rows)
        case "kernel", "gpu" | "cuda":
            return blocks.make_attend(gpu_kernel.attend, rows)
    raise ValueError(
        f"model.attention is kernel, and there is none for the mesh's platform, {platform}: "
        "leave it out, or give blocks"
    )

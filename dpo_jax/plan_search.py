"""Meshes, microbatches, rematerialisation and kinds of reference that a run could have: a rough
estimate of each says which are compiled, and what the compiler says of those decides.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from dpo_jax import abstract_step, assemble, config, contract, plan, targets
from dpo_jax.data import rows
from dpo_jax.model import config as model_config

GIB = 2**30
MICROBATCHES = (1, 2, 4, 8)
# how often a layer's forward pass is computed, by model.remat
FORWARDS = {"none": 1.0, "dots": 1.2, "full": 2.0}
# from what takes most memory to what takes least
THRIFT = ("none", "dots", "full")
# tokens of the longest example on a device, at least, where a row's tokens lie on several
SHARD = 1024


class Bounds(NamedTuple):
    """How much is compiled."""

    # settings at most
    tries: int
    # after so many minutes no further ones; the first are compiled always
    minutes: float = 60.0


class Candidate(NamedTuple):
    """Settings of a run, and what they would roughly take."""

    experiment: config.Experiment
    # of a step
    seconds: float
    # bytes of a device
    memory: float


def search(
    experiment: config.Experiment,
    examples: abstract_step.Examples,
    target: targets.Target,
    bounds: Bounds,
    price: float | None = None,
) -> list[dict[str, Any]]:
    """The plans of the most promising settings within the bounds, those that fit first and the
    fastest of them at the front.

    ValueError where no settings divide the batch.
    """
    left = candidates(plan.resolve(experiment, target), examples, target)
    if not left:
        raise ValueError(
            f"batch_size is {experiment.batch_size}, and no mesh of {len(target.devices)} devices "
            "divides it: take a multiple of a smaller power of two more"
        )
    count, records, failed = len(left), [], []
    end = time.monotonic() + 60 * bounds.minutes
    while left and len(records) < bounds.tries and (not records or time.monotonic() < end):
        tried = left.pop(0)
        if any(is_greedier(tried.experiment, other) for other in failed):
            continue
        print(
            f"compiling {len(records) + 1} of {bounds.tries}: {name(tried.experiment)}", flush=True
        )
        record = plan.plan(tried.experiment, examples, target, price)
        records.append(record | {"settings": name(tried.experiment), "candidates": count})
        if not record["fits"]:
            failed.append(tried.experiment)
    return sorted(records, key=rank)


def rank(record: dict[str, Any]) -> tuple:
    """What fits first, by the step's time where communication is not hidden, the rest by memory."""
    if record["fits"]:
        return 0, record["seconds"]["none hidden"]
    return 1, sum(record["memory_bytes_per_device"].values())


def name(experiment: config.Experiment) -> str:
    """The flags of what is tried."""
    mesh = experiment.mesh
    cached = "cached" if experiment.reference.cached else "no-cached"
    text = (
        f"--mesh.data {mesh.data} --mesh.fsdp {mesh.fsdp} --mesh.sequence {mesh.sequence} "
        f"--mesh.tensor {mesh.tensor} "
        f"--microbatches {experiment.microbatches} --model.remat {experiment.model.remat}"
    )
    return text if experiment.reference.source is None else f"{text} --reference.{cached}"


def candidates(
    experiment: config.Experiment, examples: abstract_step.Examples, target: targets.Target
) -> list[Candidate]:
    """All settings that divide the batch, those that seem to fit first, the fastest first."""
    found = [
        Candidate(one, *estimate(one, examples, target))
        for one in variants(experiment, target, longest(examples))
    ]
    return sorted(found, key=lambda one: (one.memory > target.capacity, one.seconds))


def longest(examples: abstract_step.Examples) -> int:
    """Most tokens that an example takes in a row."""
    return int(rows.sizes(examples.data).tokens.max())


def variants(
    experiment: config.Experiment, target: targets.Target, longest: int
) -> Iterator[config.Experiment]:
    """The run with each mesh, number of microbatches, rematerialisation and kind of reference that
    it may have.
    """
    shape = abstract_step.read_shape(experiment)
    settings = experiment.reference
    can_cache = settings.source is not None and settings.update_every is None
    references = {settings.cached, True} if can_cache else {settings.cached}
    apart = contract.accumulates_apart(experiment.loss.function)
    laid_out = meshes(len(target.devices), shape, longest, target.slices)
    choices = itertools.product(laid_out, MICROBATCHES, THRIFT, sorted(references))
    for mesh, parts, remat, cached in choices:
        if experiment.batch_size % ((mesh.data * (mesh.fsdp or 1)) * parts):
            continue
        if experiment.statistics == "microbatch" and not (parts > 1 and apart):
            continue
        yield experiment.replace(
            mesh=mesh,
            microbatches=parts,
            model=dataclasses.replace(experiment.model, remat=remat),
            reference=dataclasses.replace(settings, cached=cached),
        )


def meshes(
    devices: int, shape: model_config.DecoderConfig, longest: int, slices: int = 1
) -> Iterator[config.Mesh]:
    """Meshes of so many devices, axes powers of two; tensor divides the heads, and sequence leaves
    each device SHARD tokens of the longest example. Both lie inside of a slice.
    """
    heads, tokens = powers(shape.key_value_heads), powers(max(longest // SHARD, 1))
    for tensor, sequence, data in itertools.product(heads, tokens, powers(devices)):
        others = tensor * sequence * data
        if devices % (tensor * sequence * slices) or shape.key_value_heads % tensor:
            continue
        if devices % others == 0:
            yield config.Mesh(data, devices // others, tensor, sequence)


def powers(most: int) -> list[int]:
    """1, 2, 4, ... up to a number."""
    return [2**power for power in range(most.bit_length()) if 2**power <= most]


def estimate(
    experiment: config.Experiment, examples: abstract_step.Examples, target: targets.Target
) -> tuple[float, float]:
    """Roughly the seconds of a step and the bytes of a device: good enough to choose what is
    compiled, and for nothing else.
    """
    shape, mesh = abstract_step.read_shape(experiment), experiment.mesh
    shards, devices = mesh.data * (mesh.fsdp or 1), len(target.devices)
    parameters = float(model_config.parameter_count(shape))
    tokens = experiment.batch_size * float(rows.sizes(examples.data).tokens.mean())
    is_live = assemble.has_live_reference(experiment)
    has_adapter = experiment.lora.rank is not None
    forwards = FORWARDS[experiment.model.remat] + is_live
    backwards = 1 if has_adapter else 2
    compute = 2 * parameters * tokens * (forwards + backwards) / devices / target.flops
    own = parameters / mesh.tensor
    trained = 0.02 if has_adapter else 1.0
    # parameters for every pass of every microbatch in two bytes, and gradients in four
    passes = experiment.microbatches * (2 * (forwards + 1) + (0 if has_adapter else 4))
    sent = own * passes if shards * mesh.sequence > 1 else 0.0
    if mesh.tensor > 1:
        sent += shape.layers * 8 * (forwards + 1) * tokens / shards / mesh.sequence * shape.width
    if mesh.sequence > 1:
        # keys and values in two bytes, and what they get back
        keys = 4 * shape.key_value_heads * shape.head_dim / mesh.tensor
        sent += shape.layers * keys * (forwards + 1) * tokens / shards
    links = 2 * sent / target.links if target.links else 0.0
    links += seconds_between(mesh, own, passes, trained, target)
    held = (0.0 if not has_adapter else 2.0) + (2.0 if is_live and not has_adapter else 0.0)
    memory = own / ((mesh.fsdp or 1) * mesh.sequence) * (16 * trained + held)
    each = tokens / shards / mesh.sequence / experiment.microbatches
    # in bfloat16
    memory += 2 * shape.layers * each * kept(shape, experiment.model.remat, mesh.tensor)
    return compute + links, memory


def kept(shape: model_config.DecoderConfig, remat: str, tensor: int = 1) -> float:
    """Numbers that a layer keeps of a token for its backward pass, on each of so many devices over
    which its heads and units are shared out.
    """
    if remat == "full":
        return shape.width
    queries, keys = (heads * shape.head_dim for heads in (shape.heads, shape.key_value_heads))
    units, experts = shape.hidden * (2 if shape.gated else 1), shape.experts
    # what comes in, and what attention and experts add to it
    stream = 2 * shape.width
    if experts is not None:
        units *= experts.chosen
        stream += experts.chosen * shape.width
    of_attention = queries if remat == "none" else 0
    return stream + (queries + 2 * keys + units + of_attention) / tensor


def seconds_between(
    mesh: config.Mesh, own: float, passes: float, trained: float, target: targets.Target
) -> float:
    """Roughly the seconds of a step in which slices exchange the parameters of a tensor shard, so
    many bytes of each for all passes, where fsdp lies across them, and gradients.
    """
    if target.slices == 1:
        return 0.0
    # data takes what it can, fsdp the rest
    replicas = math.gcd(mesh.data, target.slices)
    parts, held = target.slices // replicas, (mesh.fsdp or 1) * mesh.sequence
    gathered = own * passes * (parts - 1) / parts / (held / parts)
    reduced = 4 * own * trained * 2 * (replicas - 1) / replicas / held
    return (gathered + reduced) / target.network


def is_greedier(experiment: config.Experiment, failed: config.Experiment) -> bool:
    """Whether settings take at least the memory of others that did not fit."""
    return (
        experiment.mesh == failed.mesh
        and experiment.microbatches <= failed.microbatches
        and THRIFT.index(experiment.model.remat) <= THRIFT.index(failed.model.remat)
        and experiment.reference.cached <= failed.reference.cached
    )


def describe(records: Sequence[dict[str, Any]]) -> str:
    """What was compiled, the best first."""
    minutes = sum(record["compile_seconds"] for record in records) / 60
    lines = [
        f"{len(records)} of {records[0]['candidates']} settings compiled in {minutes:.0f} minutes, "
        "the best first:",
        "",
        "| flags | GiB of a device | step, s (hidden to none hidden) | MFU |",
        "| --- | ---: | ---: | ---: |",
    ]
    for record in records:
        memory = sum(record["memory_bytes_per_device"].values()) / GIB
        if not record["fits"]:
            lines.append(f"| {record['settings']} | {memory:.2f}: does not fit | | |")
            continue
        seconds, mfu = record["seconds"], record["mfu"]
        times = f"{seconds['all communication hidden']:.3f} to {seconds['none hidden']:.3f}"
        share = f"{mfu['hidden']:.1%} to {mfu['exposed']:.1%}"
        lines.append(f"| {record['settings']} | {memory:.2f} | {times} | {share} |")
    return "\n".join([*lines, ""])

"""A run's train step compiled ahead of time for devices that need not be there: does it fit, what
does it send, and how long does it take at least.
"""

import dataclasses
import math
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from dpo_jax import (
    abstract_step,
    assemble,
    benchmark_flops,
    benchmark_layouts,
    chips,
    config,
    roofline,
    sharding,
    targets,
)
from dpo_jax.data import pack, rows
from dpo_jax.hlo import costs, text, work
from dpo_jax.model import config as model_config

GIB = 2**30
# sizes in the compiler's error
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Compiled(NamedTuple):
    """What came of compiling a step."""

    # None where it needs more memory than a device has
    program: text.Program | None
    # bytes of one device by kind
    memory: dict[str, float]
    seconds: float
    # the compiler's words where it does not fit
    error: str = ""


def plan(
    experiment: config.Experiment,
    examples: abstract_step.Examples,
    target: targets.Target,
    price: float | None = None,
    make: Callable = abstract_step.make,
) -> dict[str, Any]:
    """Everything that `plan_text.describe` prints, as JSON values, for the step that `make` gives.
    ValueError for what a run refuses too.
    """
    experiment = resolve(experiment, target)
    mesh = sharding.make_mesh(experiment.mesh, target.devices)
    step = make(experiment, examples, mesh)
    compiled = compile_step(step)
    record = describe_run(step, target) | {
        "compile_seconds": compiled.seconds,
        "memory_bytes_per_device": compiled.memory,
        "capacity_bytes_per_device": target.capacity,
        "published_bytes_per_chip": target.published,
        "fits": compiled.program is not None and total(compiled.memory) <= target.capacity,
    }
    if compiled.program is None or not record["fits"]:
        record["error"] = compiled.error
        record["advice"] = advise(step, compiled.memory)
    if compiled.program is not None:
        record |= predict(step, compiled.program, target, price)
    return record


def resolve(experiment: config.Experiment, target: targets.Target) -> config.Experiment:
    """The run with the compute type that it would have on the target."""
    is_cpu = target.devices[0].platform == "cpu"
    dtype = experiment.model.dtype or ("float32" if is_cpu else "bfloat16")
    return experiment.replace(model=dataclasses.replace(experiment.model, dtype=dtype))


def compile_step(step: abstract_step.Step) -> Compiled:
    """Compiles a step; one that does not fit is no error."""
    known = argument_memory(step)
    started = time.perf_counter()
    lowered: Any = step.step.lower(step.state, step.held, step.batch, step.numbers)
    try:
        with targets.quiet():
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = temporaries_in(str(error))
        memory = known if needed is None else known | {"temporaries": needed}
        reason = str(error).partition("\n")[0]
        return Compiled(None, memory, time.perf_counter() - started, reason)
    seconds = time.perf_counter() - started
    memory = known | compiled_memory(compiled.memory_analysis(), sum(known.values()))
    return Compiled(text.parse(compiled.as_text()), memory, seconds)


def argument_memory(step: abstract_step.Step) -> dict[str, float]:
    """Bytes of one device that a step's arguments take, by kind."""
    return {
        "parameters": shard_bytes(step.state.params),
        "moments": shard_bytes(step.state.opt_state),
        "base of the adapter": shard_bytes(step.held.base),
        "reference": shard_bytes(step.held.reference),
        "batch": shard_bytes(step.batch),
    }


def shard_bytes(tree: Any) -> float:
    """Bytes that one device holds of abstract arrays."""
    return float(
        sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
            for leaf in jax.tree.leaves(tree)
        )
    )


def compiled_memory(analysis: Any, arguments: float) -> dict[str, float]:
    """What a compiled step takes beside its arguments' own bytes."""
    fresh = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return {
        "padding of arguments": max(analysis.argument_size_in_bytes - arguments, 0.0),
        "temporaries": float(analysis.temp_size_in_bytes),
        "results": float(max(fresh, 0)),
        "program": float(analysis.generated_code_size_in_bytes),
    }


def temporaries_in(error: str) -> float | None:
    """Bytes of temporaries that the compiler says are needed; None where it says nothing of
    them.
    """
    found = re.search(r"HLO temporaries \(([\d.]+)([KMGT])\)", error)
    return float(found[1]) * UNITS[found[2]] if found else None


def total(memory: Mapping[str, float]) -> float:
    """All kinds together."""
    return sum(memory.values())


def describe_run(step: abstract_step.Step, target: targets.Target) -> dict[str, Any]:
    """What is planned, and for what."""
    experiment, shape = step.experiment, step.plan.ladder[-1]
    piece = target.piece
    return {
        "target": target.name,
        "topology": None if piece is None else chips.topology(piece),
        "accelerator_type": None if piece is None else chips.accelerator(piece),
        "slices": target.slices,
        "chips": target.chip_count,
        "devices": len(target.devices),
        "mesh": dict(step.mesh.shape),
        "model": experiment.model.source,
        "parameters": model_config.parameter_count(step.model.config),
        "trained_parameters": sum(leaf.size for leaf in jax.tree.leaves(step.state.params)),
        "loss": experiment.loss.function.__name__,
        "reference": describe_reference(experiment),
        "optimizer": experiment.optimizer.kind,
        "lora_rank": experiment.lora.rank,
        "remat": experiment.model.remat,
        "dtype": experiment.model.dtype,
        "lengths": step.examples.note,
        "batch_size": experiment.batch_size,
        "microbatches": experiment.microbatches,
        "batch_shape": shape._asdict(),
        "fill": abstract_step.fill(step)._asdict(),
    }


def describe_reference(experiment: config.Experiment) -> str:
    """How the reference is held."""
    if experiment.reference.source is None:
        return "none"
    return "cached" if experiment.reference.cached else "live"


def predict(
    step: abstract_step.Step, program: text.Program, target: targets.Target, price: float | None
) -> dict[str, Any]:
    """FLOPs, what is sent, and times."""
    devices = len(target.devices)
    lengths: Mapping[str, float] = {}
    if "slot" in step.batch:
        example = pack.batch(step.examples.data, step.plan, 0)
        lengths = benchmark_layouts.loop_lengths(step.model, example, step.experiment.microbatches)
    done = list(work.work(program, lengths))
    sent = roofline.sent_by(program, step.mesh, target)
    seconds = roofline.seconds_of(done, sent, target)
    model_flops = useful_flops(step)
    tokens, peak = abstract_step.useful_tokens(step), devices * target.flops
    times = {"hidden": roofline.hidden(seconds), "exposed": roofline.exposed(seconds)}
    epoch = abstract_step.epoch_tokens(step) / tokens
    hours = {name: one * epoch / 3600 for name, one in times.items()}
    dear = None if price is None else price * target.chip_count
    return {
        "flops_per_step": costs.flops(program, lengths) * devices,
        "model_flops_per_step": model_flops,
        "uncounted": costs.uncounted(program, lengths),
        "estimated_cycles": sum(one.cycles * one.times for one in done),
        "clock": None if target.piece is None else chips.clock(target.piece.chip),
        "collectives": [one._asdict() for one in sent],
        "seconds": roofline.by_name(seconds),
        "mfu": {name: model_flops / one / peak for name, one in times.items()},
        "tokens_per_step": tokens,
        "tokens_per_second": {name: tokens / one for name, one in times.items()},
        "steps_per_epoch": epoch,
        "hours_per_epoch": hours,
        "cost_per_epoch": dear and {name: dear * h for name, h in hours.items()},
        "price_per_chip_hour": price,
        "assumptions": roofline.assumptions(target),
    }


def useful_flops(step: abstract_step.Step) -> float:
    """FLOPs that a step of the compiled shape needs at least, filled as the run's steps are on
    average: `benchmark_flops.floor_flops` with the passes that this run has.
    """
    data = step.examples.data
    chosen = np.arange(min(len(data.prompts), 4096))
    tokens = float(rows.sizes(data, indices=chosen).tokens.sum())
    needed = benchmark_flops.floor_flops(
        step.model.config,
        data,
        chosen,
        has_reference=assemble.has_live_reference(step.experiment),
        is_adapter=step.experiment.lora.rank is not None,
    )
    return needed * abstract_step.useful_tokens(step) / tokens


def advise(step: abstract_step.Step, memory: Mapping[str, float]) -> list[str]:
    """What takes less memory, what saves most first where that is known."""
    experiment, sizes = step.experiment, step.mesh.shape
    found: list[tuple[float, str]] = []
    if memory["reference"]:
        found.append(
            (memory["reference"], "--reference.cached: no second set of parameters is held")
        )
    if experiment.optimizer.kind == "adamw" and experiment.optimizer.moments_dtype == "float32":
        found.append((memory["moments"] / 4, "--optimizer.moments-dtype bfloat16"))
    if experiment.lora.rank is None:
        found.append((memory["moments"], "--lora.rank 16: moments of an adapter alone"))
    if sizes["data"] > 1:
        held = memory["parameters"] + memory["moments"] + memory["reference"]
        shards = f"--mesh.data 1 --mesh.fsdp {sizes['data'] * sizes['fsdp']}"
        found.append((held * (1 - 1 / sizes["data"]), f"{shards}: parameters in more shards"))
    lines = [
        f"{name} (saves {gib(saved)} a device)"
        for saved, name in sorted(found, reverse=True)
        if saved > 0.02 * total(memory)
    ]
    temporaries = []
    if experiment.model.remat != "full":
        temporaries.append("--model.remat full: a layer's activations are computed again")
    each = step.plan.ladder[-1].rows // sharding.batch_shards(step.mesh)
    if each > experiment.microbatches:
        temporaries.append(
            f"--microbatches {2 * experiment.microbatches}: {each} rows a device are computed "
            f"{each // experiment.microbatches} at once"
        )
    if each == experiment.microbatches:
        if sizes["fsdp"] % 2 == 0:
            temporaries.append(
                f"--mesh.fsdp {sizes['fsdp'] // 2} --mesh.sequence {2 * sizes['sequence']} "
                f"--microbatches {2 * experiment.microbatches}: half of a row's tokens on a device"
            )
    if sizes["tensor"] < step.model.config.key_value_heads:
        temporaries.append(
            f"--mesh.tensor {2 * sizes['tensor']}: heads, hidden units and logits in more shards"
        )
    temporaries.append("--data.max-length lower: attention's logits grow with a row's length")
    is_large = memory.get("temporaries", 0.0) > total(memory) / 2
    lines = [*temporaries, *lines] if is_large else [*lines, *temporaries]
    return [*lines, "more chips, or ones with more memory"]


def gib(size: float) -> str:
    """Bytes as GiB."""
    return f"{size / GIB:,.2f} GiB"

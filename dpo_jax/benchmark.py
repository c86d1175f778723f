"""Training steps of this project and of other trainers on the same examples, timed in turn.

Each contender is a process of its own that takes orders from standard input, one JSON object a
line: it answers {"ready": ...} once every shape that it will meet has been compiled, then for each
line with a number of steps their seconds, and its peak memory at the end of input. Its answers are
lines of `benchmark_worker.ANSWER` and a JSON object: trainers print lines of their own, some of
them dicts. One runs while the others wait.

Dimensions: N examples of a step.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dpo_jax import (
    benchmark_flops,
    benchmark_layouts,
    benchmark_peers,
    benchmark_worker,
    config,
    environment,
    flags,
    initial,
    inputs,
    sharding,
    task,
)
from dpo_jax.data import pack, rows, tokenise
from dpo_jax.hlo import costs, text
from dpo_jax.model import presets

# glibc's: keep freed memory, so that every step does not ask the kernel for it again. It ignores
# thresholds of mmap over 32 MiB.
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "68719476736",
    "MALLOC_TOP_PAD_": "268435456",
}
# Of a GPU, which contenders share, each takes what it needs, and this process gives back what it
# has read. JAX would take three quarters of the memory at once, and keep it.
CONTENDER_MEMORY = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_PYTHON_CLIENT_ALLOCATOR": "default",
}
OWN_MEMORY = {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}
# steps of the run of which the first are timed: its shapes are those of a run that is worth them
LONG_RUN = 10_000


class Settings(NamedTuple):
    """What is timed, and for how long."""

    layouts: tuple[str, ...] = ("packed", "cached", "plain", "padded")
    # Python interpreters of other trainers' environments, by a name of `benchmark_peers.PEERS`
    peers: Mapping[str, str] = {}
    # each round has so many steps of every contender, in turn
    rounds: int = 5
    steps: int = 3
    # whether each contender draws the weights of a preset itself, so that none are written
    random_weights: bool = False
    # whether this project's contenders are started a second time, with all compiled
    again: bool = True


class Contender(NamedTuple):
    """A process that waits for orders."""

    name: str
    process: subprocess.Popen
    # what it said when it was ready
    ready: dict[str, Any]


class Result(NamedTuple):
    """Of one contender."""

    name: str
    # useful tokens per second of each round
    rates: list[float]
    # share of the computed positions that are useful; None where it does not say
    fill: float | None
    # for each useful token by type; empty where it does not say
    flops: dict[str, float]
    # FLOPs per second of matrix products by type, as another trainer measured them in its process
    products: dict[str, float]
    # what is not in it
    uncounted: list[str]
    # of the first step, in nats
    loss: float
    # seconds until the first step is done, where nothing was compiled or tokenised before
    first_step: float
    # the same where all was; None where that was not tried
    first_step_again: float | None
    # seconds
    compile: float | None
    # bytes
    peak: int


def count_steps(settings: Settings) -> int:
    """Steps that every contender runs while it is timed."""
    return settings.rounds * settings.steps


def run(
    experiment: config.Experiment,
    experiment_file: Path,
    arguments: Sequence[str],
    settings: Settings,
) -> dict[str, Any]:
    """Times every contender; returns what `describe` prints, as JSON values. ValueError for a
    source that is built in.
    """
    refuse_built_in(experiment)
    refuse_drawn(experiment, settings)
    steps = count_steps(settings)
    experiment = trimmed(experiment, steps)
    mesh = sharding.make_mesh(experiment.mesh, jax.devices())
    found = inputs.load(experiment, mesh)
    plan = pack.plan_run(found.train, experiment, 1)
    examples = [pack.examples(plan, number) for number in range(steps)]
    mixed = shuffled(examples, experiment.seed)
    even, uneven = (useful_tokens(found.train, one) for one in (examples, mixed))
    layouts, left_out = benchmark_layouts.possible(experiment, settings.layouts)
    with tempfile.TemporaryDirectory(prefix="dpo_jax_benchmark_") as folder:
        own = [sys.executable, "-m", "scripts.benchmark", str(experiment_file), *arguments]
        if settings.random_weights:
            own.append("--random-weights")
        commands = {
            name: [*own, "--worker", name, "--folder", folder, "--count", str(steps)]
            for name in layouts
        }
        peers, lacking = benchmark_peers.commands(
            settings.peers, experiment, folder, settings.random_weights
        )
        for line in [*left_out, *lacking]:
            print(line, flush=True)
        benchmark_peers.write_model(Path(folder), found, mesh, settings.random_weights)
        free(found.initial)
        benchmark_peers.write_examples(Path(folder), experiment, found.train, mixed)
        benchmark_layouts.write_steps(folder, mixed)
        useful = {
            name: even if name in benchmark_layouts.PACKED else uneven
            for name in (*commands, *peers)
        }
        results = race(commands, peers, folder, useful, settings)
    dtype = found.initial.model.dtype
    # the same examples, in whatever steps
    tokens = sum(even)
    return {
        "settings": {**settings._asdict(), "batch_size": experiment.batch_size},
        "left_out": [*left_out, *lacking],
        "loss": experiment.loss.function.__name__,
        "model": experiment.model.source,
        "adapter": experiment.lora.rank,
        "data": experiment.data.source,
        "dtype": np.dtype(dtype).name,
        "device": jax.devices()[0].device_kind,
        "devices": len(jax.devices()),
        "environment": environment.environment(flags.ROOT),
        "useful_tokens_per_step": tokens / steps,
        "floor_flops_per_useful_token": floor_flops(experiment, found, examples) / tokens,
        "matmul_flops_per_second": machine_rate(dtype),
        "results": [result._asdict() for result in results],
    }


def free(start: initial.Initial) -> None:
    """Gives the memory of a model's weights back to the contenders."""
    for leaf in jax.tree.leaves((start.params, start.base)):
        leaf.delete()


def floor_flops(
    experiment: config.Experiment, found: inputs.Inputs, steps: Sequence[np.ndarray]
) -> float:
    """FLOPs that steps of these examples need at least."""
    return sum(
        benchmark_flops.floor_flops(
            found.initial.model.config,
            found.train,
            examples,
            has_reference=experiment.reference.source is not None,
            is_adapter=experiment.lora.rank is not None,
        )
        for examples in steps
    )


def machine_rate(dtype: Any) -> float:
    """FLOPs per second of products on all devices; those of CPUs are one machine's."""
    devices = 1 if jax.default_backend() == "cpu" else len(jax.devices())
    return devices * benchmark_layouts.matmul_rate(dtype)


def shuffled(examples: Sequence[np.ndarray], seed: int) -> list[np.ndarray]:
    """The same examples in other steps, as a plain shuffle has them: what is padded to the longest
    of a step loses where each has one of the longest, as balanced steps have.
    """
    together = np.random.default_rng(seed).permutation(np.concatenate(examples))
    return np.split(together, np.cumsum([len(one) for one in examples])[:-1])


def useful_tokens(data: tokenise.Tokenised, examples: Sequence[np.ndarray]) -> list[int]:
    """Tokens of each step, those of a prompt once."""
    return [int(rows.sizes(data, indices=one).tokens.sum()) for one in examples]


def refuse_built_in(experiment: config.Experiment) -> None:
    """Raises ValueError for the built-in task, of which model and data are made by a training run
    before its own.
    """
    if task.SOURCE in (experiment.data.source, experiment.model.source):
        raise ValueError(
            f"data.source is {experiment.data.source!r} and model.source "
            f"{experiment.model.source!r}: the built-in task is not made for a benchmark; give "
            "--data.source and --model.source, and --data.tokenizer where the model has none"
        )


def refuse_drawn(experiment: config.Experiment, settings: Settings) -> None:
    """Raises ValueError where contenders would draw the weights of a model that has its own."""
    if settings.random_weights and experiment.model.source not in presets.PRESETS:
        raise ValueError(
            f"model.source is {experiment.model.source!r}, and --random-weights are those of a "
            "preset: give a preset's name, or leave the flag out"
        )


def trimmed(experiment: config.Experiment, steps: int) -> config.Experiment:
    """The run without what is no training step; the learning rate stays at its peak.

    ValueError where it counts its batches in tokens.
    """
    if experiment.batch_tokens is not None:
        raise ValueError(
            f"batch_tokens is {experiment.batch_tokens}, and every contender takes batch_size "
            "examples a step: leave it out"
        )
    return without_extras(experiment, steps)


def without_extras(experiment: config.Experiment, steps: int) -> config.Experiment:
    """The run without evaluations, samples and schedule."""
    optimizer = dataclasses.replace(experiment.optimizer, schedule="constant", warmup_steps=0)
    data = dataclasses.replace(experiment.data, evaluation_source=None, held_out=0)
    return experiment.replace(
        steps=steps,
        optimizer=optimizer,
        data=data,
        evaluate_every=None,
        samples=config.Samples(),
        log=config.Log(tensorboard=False, progress=False),
    )


def race(
    layouts: Mapping[str, Sequence[str]],
    peers: Mapping[str, Sequence[str]],
    folder: str,
    useful: Mapping[str, Sequence[int]],
    settings: Settings,
) -> list[Result]:
    """Starts the contenders one after another, and lets each run a round in turn: A B A B.

    `useful` has the useful tokens of each one's steps.
    """
    contenders: list[Contender] = []
    with contextlib.ExitStack() as running:
        for name, command in [*layouts.items(), *peers.items()]:
            begin = start_twice if name in layouts and settings.again else start
            contenders.append(begin(name, command, folder))
            running.callback(end, contenders[-1].process)
        return take_turns(contenders, useful, settings)


def start_twice(name: str, command: Sequence[str], folder: str) -> Contender:
    """A contender of this project that finds what a first one has compiled and tokenised."""
    first = start(name, command, folder)
    end(first.process)
    second = start(name, command, folder)
    again = second.ready["first_step"]
    return second._replace(ready={**first.ready, "first_step_again": again})


def take_turns(
    contenders: Sequence[Contender], useful: Mapping[str, Sequence[int]], settings: Settings
) -> list[Result]:
    """The results of contenders that are ready."""
    rates: dict[str, list[float]] = {one.name: [] for one in contenders}
    for first in range(0, count_steps(settings), settings.steps):
        for contender in contenders:
            tokens = sum(useful[contender.name][first : first + settings.steps])
            seconds = order(contender, {"steps": settings.steps})["seconds"]
            rates[contender.name].append(tokens / sum(seconds))
            print(f"{contender.name}: {rates[contender.name][-1]:,.0f} useful tokens/s", flush=True)
    return [
        summarise(contender, rates[contender.name], finish(contender), sum(useful[contender.name]))
        for contender in contenders
    ]


def summarise(
    contender: Contender, rates: list[float], last: dict[str, Any], useful: int
) -> Result:
    """A contender's result from its rates and its last words."""
    flops, uncounted = count(last)
    return Result(
        name=contender.name,
        rates=rates,
        fill=useful / last["computed"] if last.get("computed") else None,
        flops={kind: number / useful for kind, number in flops.items()},
        products=last.get("products", {}),
        uncounted=uncounted,
        loss=contender.ready["loss"],
        first_step=contender.ready["first_step"],
        first_step_again=contender.ready.get("first_step_again"),
        compile=contender.ready.get("compile"),
        peak=last["peak"],
    )


def count(last: dict[str, Any]) -> tuple[dict[str, float], list[str]]:
    """FLOPs by type, and what is not in them: as a contender says, or of the compiled float32
    programs that it names.
    """
    if "programs" not in last:
        return last.get("flops", {}), last.get("uncounted", [])
    total, uncounted = 0.0, set()
    for one in last["programs"]:
        program = text.parse(Path(one["path"]).read_text())
        total += one["runs"] * costs.flops(program) * program.devices
        uncounted |= set(costs.uncounted(program))
    return {"float32": total}, sorted(uncounted)


def start(name: str, command: Sequence[str], folder: str) -> Contender:
    """A contender that has said it is ready; ValueError with its last words where it does not."""
    print(f"{name}: starting", flush=True)
    keeps_memory = name in benchmark_peers.PEERS and benchmark_peers.PEERS[name].keeps_memory
    variables = {
        **os.environ,
        # nothing of others
        "DPO_JAX_CACHE": os.path.join(folder, "cache", name),
        **(ALLOCATOR if keeps_memory else {}),
        **CONTENDER_MEMORY,
    }
    started = time.time()
    process = subprocess.Popen(
        list(command),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**variables, "BENCHMARK_STARTED": str(started)},
        text=True,
        cwd=flags.ROOT,
    )
    try:
        return Contender(name, process, answer(name, process))
    except BaseException:
        end(process)
        raise


def order(contender: Contender, message: dict[str, Any]) -> dict[str, Any]:
    """A contender's answer to an order."""
    stream: Any = contender.process.stdin
    stream.write(json.dumps(message) + "\n")
    stream.flush()
    return answer(contender.name, contender.process)


def finish(contender: Contender) -> dict[str, Any]:
    """What a contender says at the end of its orders."""
    stream: Any = contender.process.stdin
    stream.close()
    return answer(contender.name, contender.process)


def end(process: subprocess.Popen) -> None:
    """Ends a contender's process, whatever state it is in."""
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


def answer(name: str, process: subprocess.Popen) -> dict[str, Any]:
    """The next answer of a contender; it may print other lines between."""
    stream: Any = process.stdout
    for line in stream:
        if line.startswith(benchmark_worker.ANSWER):
            return json.loads(line.removeprefix(benchmark_worker.ANSWER))
    raise ValueError(f"{name} ended with exit code {process.wait()}; its error is above")

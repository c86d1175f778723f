"""A sweep in one process against its points alone, each in a process of its own with an empty
cache: what sharing a table of reference log-probabilities, rows and compiled programs saves.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from dpo_jax import (
    benchmark,
    benchmark_worker,
    compiling,
    config,
    environment,
    flags,
    inputs,
    losses,
    sharding,
    sweep,
    sweep_process,
)

LOSSES: tuple[Callable, ...] = (losses.dpo, losses.ipo, losses.hinge, losses.robust)
BETAS = (0.1, 0.5)
# what a sweep may cost of its points alone, where nothing is compiled
GOAL = 0.85


class Timed(NamedTuple):
    """One process, in seconds."""

    names: list[str]
    # from its start to its end
    wall: float
    # of that, tracing, lowering and compiling
    compiling: float
    # train steps that it compiled
    steps: int


def points(experiment: config.Experiment, file: Path, folder: Path) -> list[sweep.Point]:
    """Each loss with each beta, one after the other, in folders below this one."""
    cached = dataclasses.replace(experiment.reference, cached=True)
    found = []
    for loss in LOSSES:
        for beta in BETAS:
            name = f"{loss.__name__}, beta {beta}"
            run = experiment.replace(
                loss=config.Loss(loss, beta=beta),
                reference=cached,
                workdir=str(folder / name.replace(", ", "-").replace(" ", "-")),
            )
            found.append(sweep.Point(len(found), name, run, file))
    return found


def run(experiment: config.Experiment, file: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """Times half of the points alone, the sweep, and the other half; returns what `describe`
    prints, as JSON values. ValueError for a source that is built in.
    """
    benchmark.refuse_built_in(experiment)
    mesh = sharding.make_mesh(experiment.mesh, jax.devices())
    examples = len(inputs.load(benchmark.trimmed(experiment, 1), mesh).train.prompts)
    steps = -(-examples // experiment.batch_size)
    own = [sys.executable, "-m", "scripts.benchmark", str(file), *arguments, "--worker", "sweep"]
    count = len(LOSSES) * len(BETAS)
    orders = [[one] for one in range(count)]
    orders.insert(count // 2, list(range(count)))
    timed = []
    for order in orders:
        with tempfile.TemporaryDirectory(prefix="dpo_jax_sweep_") as folder:
            chosen = ["--points", *map(str, order), "--count", str(steps), "--folder", folder]
            timed.append(time_process([*own, *chosen], folder))
        print(f"{len(order)} point(s): {timed[-1].wall:,.1f} s", flush=True)
    together = timed.pop(count // 2)
    return {
        "model": experiment.model.source,
        "data": experiment.data.source,
        "examples": examples,
        "batch_size": experiment.batch_size,
        "steps": steps,
        "device": jax.devices()[0].device_kind,
        "devices": len(jax.devices()),
        "environment": environment.environment(flags.ROOT),
        "alone": [one._asdict() for one in timed],
        "together": together._asdict(),
    }


def time_process(command: Sequence[str], folder: str) -> Timed:
    """A process from its start to its end, with an empty cache; ValueError where it fails."""
    variables = {**os.environ, "DPO_JAX_CACHE": os.path.join(folder, "cache")}
    started = time.perf_counter()
    done = subprocess.run(
        list(command), env=variables, stdout=subprocess.PIPE, text=True, cwd=flags.ROOT
    )
    wall = time.perf_counter() - started
    if done.returncode:
        raise ValueError(
            f"a process ended with exit code {done.returncode}; its error is above; it printed "
            f"last: {done.stdout[-500:]}"
        )
    answer = done.stdout.splitlines()[-1].removeprefix(benchmark_worker.ANSWER)
    return Timed(wall=wall, **json.loads(answer))


def work(experiment: config.Experiment, file: Path, folder: Path, chosen: Sequence[int]) -> None:
    """One process: trains these points as a sweep does, and says what it compiled.

    ValueError where one fails.
    """
    every = points(experiment, file, folder)
    found = [every[one] for one in chosen]
    with compiling.recorded() as spans:
        training = sweep_process.make_training()
        failures = sweep.run(found, training.train)
    if failures:
        raise ValueError(sweep.summary(failures, len(found)))
    said = {
        "names": [point.name for point in found],
        "compiling": compiling.seconds(spans),
        "steps": compiling.count(spans, "step"),
    }
    benchmark_worker.say(said)


def describe(record: dict[str, Any]) -> str:
    """The record as Markdown: a row for each process, and the ratio without compiling."""
    alone = [Timed(**one) for one in record["alone"]]
    together = Timed(**record["together"])
    lines = [
        f"{record['model']} on {record['data']}, {record['devices']} x {record['device']}: "
        f"{record['examples']} examples once over, {record['steps']} steps of "
        f"{record['batch_size']}, reference log-probabilities cached",
        "",
        "| process | seconds | of which compiling | without | train steps compiled |",
        "| --- | ---: | ---: | ---: | ---: |",
        *(row(", ".join(one.names), one) for one in alone),
        row(f"all {len(alone)} alone", add_up(alone)),
        row(f"the sweep of {len(alone)}", together),
    ]
    apart = add_up(alone)
    ratio = without(together) / without(apart)
    lines += [
        "",
        f"Without compiling, the sweep takes {ratio:.3f} of its points alone (at most {GOAL} is "
        f"wanted). Compiling saved apart from that: {apart.compiling - together.compiling:,.1f} s "
        f"of {apart.compiling:,.1f}. All in all it takes {together.wall / apart.wall:.3f}.",
    ]
    return "\n".join(lines)


def row(name: str, timed: Timed) -> str:
    """A line of the table."""
    return (
        f"| {name} | {timed.wall:,.1f} | {timed.compiling:,.1f} | {without(timed):,.1f} | "
        f"{timed.steps} |"
    )


def without(timed: Timed) -> float:
    """Seconds in which nothing was compiled."""
    return timed.wall - timed.compiling


def add_up(timed: Sequence[Timed]) -> Timed:
    """Processes one after the other."""
    return Timed(
        [name for one in timed for name in one.names],
        sum(one.wall for one in timed),
        sum(one.compiling for one in timed),
        sum(one.steps for one in timed),
    )

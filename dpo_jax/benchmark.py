"""Training steps of this project and of other trainers on the same examples, timed in turn.

Each contender is a process of its own that takes orders from standard input, one JSON object a
line: it answers {"ready": ...} once every shape that it will meet has been compiled, then for each
line with a number of steps their seconds, and its peak memory at the end of input. Its answers are
lines of `ANSWER` and a JSON object: trainers print lines of their own, some of them dicts. One runs
while the others wait.

Dimensions: N examples of a step.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dpo_jax import benchmark_layouts, config, environment, inputs, sharding
from dpo_jax.data import rows, tokenise
from dpo_jax.data import steps as data_steps
from dpo_jax.model import config as model_config
from dpo_jax.model import weights

ROOT = Path(__file__).resolve().parents[1]
TRL = ROOT / "scripts" / "benchmark_trl.py"
# what a line that is an answer begins with
ANSWER = "benchmark: "
# glibc's: keep freed memory, so that every step does not ask the kernel for it again
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "68719476736",
    "MALLOC_TOP_PAD_": "268435456",
}


class Settings(NamedTuple):
    """What is timed, and for how long."""

    layouts: tuple[str, ...] = ("packed", "cached", "plain", "padded")
    # Python interpreters of other trainers' environments by name: trl, trl-fast
    peers: Mapping[str, str] = {}
    # each round has so many steps of every contender, in turn
    rounds: int = 5
    steps: int = 3


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
    # of the compiled step for each useful token; None where it does not say
    flops: float | None
    # what is not in it
    uncounted: list[str]
    first_step: float
    compile: float | None
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
    """Times every contender; returns what `describe` prints, as JSON values."""
    steps = count_steps(settings)
    experiment = trimmed(experiment, steps)
    mesh = sharding.make_mesh(experiment.mesh, jax.devices())
    found = inputs.load(experiment, mesh)
    count, starts = len(found.train.prompts), data_steps.by_number(experiment.batch_size, steps)
    examples = [
        data_steps.between(count, experiment.seed, int(first), int(last))
        for first, last in itertools.pairwise(starts)
    ]
    useful = [int(rows.sizes(found.train).tokens[chosen].sum()) for chosen in examples]
    with tempfile.TemporaryDirectory(prefix="dpo_jax_benchmark_") as folder:
        write_model(Path(folder), found)
        write_examples(Path(folder), found.train, examples)
        own = [sys.executable, "-m", "scripts.benchmark", str(experiment_file), *arguments]
        commands = {
            name: [*own, "--worker", name, "--folder", folder, "--count", str(steps)]
            for name in settings.layouts
        }
        for name, python in settings.peers.items():
            commands[name] = [python, str(TRL), folder, name]
        results = race(commands, folder, useful, settings)
    floor = sum(floor_flops(found.initial.model.config, found.train, one) for one in examples)
    dtype = found.initial.model.dtype
    return {
        "settings": {**settings._asdict(), "batch_size": experiment.batch_size},
        "model": experiment.model.source,
        "data": experiment.data.source,
        "dtype": np.dtype(dtype).name,
        "device": jax.devices()[0].device_kind,
        "devices": len(jax.devices()),
        "environment": environment.environment(ROOT),
        "useful_tokens_per_step": sum(useful) / steps,
        "floor_flops_per_useful_token": floor / sum(useful),
        "matmul_flops_per_second": benchmark_layouts.matmul_rate(dtype),
        "results": [result._asdict() for result in results],
    }


def trimmed(experiment: config.Experiment, steps: int) -> config.Experiment:
    """The run without what is no training step; the learning rate stays at its peak.

    ValueError where it counts its batches in tokens.
    """
    if experiment.batch_tokens is not None:
        raise ValueError(
            f"batch_tokens is {experiment.batch_tokens}, and every contender takes batch_size "
            "examples a step: leave it out"
        )
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


def write_model(folder: Path, found: inputs.Inputs) -> None:
    """The initial policy and its tokenizer, which every contender starts from."""
    weights.save(folder / "model", found.initial.model.config, found.initial.params)
    found.tokenizer.save(str(folder / "model"))


def write_examples(folder: Path, data: tokenise.Tokenised, examples: Sequence[np.ndarray]) -> None:
    """The token ids of the examples of each step, for other trainers."""
    steps = [
        [
            {
                "prompt": data.tokens[slice(*data.prompts[one])].tolist(),
                **{
                    name: data.tokens[slice(*span)].tolist()
                    for name, span in zip(data.names, data.completions[one], strict=True)
                },
            }
            for one in chosen
        ]
        for chosen in examples
    ]
    (folder / "examples.json").write_text(json.dumps(steps))


def race(
    commands: Mapping[str, Sequence[str]], folder: str, useful: Sequence[int], settings: Settings
) -> list[Result]:
    """Starts the contenders one after another, and lets each run a round in turn: A B A B."""
    contenders: list[Contender] = []
    with contextlib.ExitStack() as running:
        for name, command in commands.items():
            contenders.append(start(name, command, folder))
            running.callback(end, contenders[-1].process)
        return take_turns(contenders, useful, settings)


def take_turns(
    contenders: Sequence[Contender], useful: Sequence[int], settings: Settings
) -> list[Result]:
    """The results of contenders that are ready."""
    rates: dict[str, list[float]] = {one.name: [] for one in contenders}
    for first in range(0, count_steps(settings), settings.steps):
        tokens = sum(useful[first : first + settings.steps])
        for contender in contenders:
            seconds = order(contender, {"steps": settings.steps})["seconds"]
            rates[contender.name].append(tokens / sum(seconds))
            print(f"{contender.name}: {rates[contender.name][-1]:,.0f} useful tokens/s", flush=True)
    results = []
    for contender in contenders:
        last = finish(contender)
        results.append(
            Result(
                contender.name,
                rates[contender.name],
                sum(useful) / last["computed"] if last.get("computed") else None,
                last["flops"] / sum(useful) if "flops" in last else None,
                last.get("uncounted", []),
                contender.ready["first_step"],
                contender.ready.get("compile"),
                last["peak"],
            )
        )
    return results


def start(name: str, command: Sequence[str], folder: str) -> Contender:
    """A contender that has said it is ready; ValueError with its last words where it does not."""
    print(f"{name}: starting", flush=True)
    variables = {
        **os.environ,
        # nothing compiled before
        "DPO_JAX_CACHE": os.path.join(folder, "cache", name),
        **(ALLOCATOR if name.endswith("-fast") else {}),
    }
    started = time.time()
    process = subprocess.Popen(
        list(command),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**variables, "BENCHMARK_STARTED": str(started)},
        text=True,
        cwd=ROOT,
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
        if line.startswith(ANSWER):
            return json.loads(line.removeprefix(ANSWER))
    raise ValueError(f"{name} ended with exit code {process.wait()}; its error is above")


def work(stepper: benchmark_layouts.Stepper, orders: Iterator[str]) -> None:
    """A contender of this project: compiles all shapes, says so, and obeys."""
    begun = time.time() - float(os.environ.get("BENCHMARK_STARTED", time.time()))
    batches, state = list(stepper.batches), stepper.state
    seen, compile_seconds, first_step = set(), 0.0, 0.0
    start = time.perf_counter()
    for batch, _ in batches:
        shape = jax.tree.map(lambda leaf: leaf.shape, batch)
        if str(shape) in seen:
            continue
        seen.add(str(shape))
        once = time.perf_counter()
        state, values = stepper.step(state, batch)
        jax.block_until_ready(values)
        compile_seconds += time.perf_counter() - once
        first_step = first_step or begun + time.perf_counter() - start
        state, values = stepper.step(state, batch)
        jax.block_until_ready(values)
    say({"ready": True, "first_step": first_step, "compile": compile_seconds})
    done = 0
    for line in orders:
        seconds = []
        for batch, _ in batches[done : done + json.loads(line)["steps"]]:
            once = time.perf_counter()
            state, values = stepper.step(state, batch)
            jax.block_until_ready(values)
            seconds.append(time.perf_counter() - once)
        done += len(seconds)
        say({"seconds": seconds})
    peak, computed = benchmark_layouts.peak_memory(), sum(tokens for _, tokens in batches)
    counted = benchmark_layouts.count_flops(stepper, state, [batch for batch, _ in batches])
    say({"peak": peak, "computed": computed, **counted})


def say(message: dict[str, Any]) -> None:
    """One line to whoever gives the orders."""
    print(f"{ANSWER}{json.dumps(message)}", flush=True)


def floor_flops(
    shape: model_config.DecoderConfig, data: tokenise.Tokenised, chosen: np.ndarray
) -> float:
    """FLOPs that a step with a live reference needs at least: each distinct token once through the
    layers, each scored one once through the head, each pair of tokens that see each other once
    through attention; three times for the policy, whose gradient costs two, and once for the
    reference.
    """
    kernels = shape.width * shape.head_dim * 2 * (shape.heads + shape.key_value_heads)
    matrices = 3 if shape.gated else 2
    of_token = shape.experts.chosen if shape.experts else 1
    body = shape.layers * (kernels + of_token * matrices * shape.width * shape.hidden)
    prompts = (data.prompts[chosen, 1] - data.prompts[chosen, 0]).astype(float)
    answers = (data.completions[chosen, :, 1] - data.completions[chosen, :, 0]).astype(float)
    tokens, scored = prompts.sum() + answers.sum(), answers.sum()
    pairs = (prompts * (prompts + 1) / 2).sum()
    pairs += (answers * prompts[:, None] + answers * (answers + 1) / 2).sum()
    forward = 2 * body * tokens + 2 * shape.width * shape.vocabulary_size * scored
    forward += 4 * shape.layers * shape.heads * shape.head_dim * pairs
    return float(4 * forward)


def describe(record: Mapping[str, Any]) -> str:
    """The record as a Markdown table: medians, and ratios to the first contender round by round."""
    results, floor = record["results"], record["floor_flops_per_useful_token"]
    rate = record["matmul_flops_per_second"]
    first = np.array(results[0]["rates"])
    lines = [
        f"{record['model']} on {record['data']}, {record['dtype']}, {record['devices']} x "
        f"{record['device']}, {record['settings']['batch_size']} examples a step; matrix products "
        f"at {rate / 1e9:,.0f} GFLOP/s; the floor is {floor / 1e6:,.1f} MFLOP a useful token",
        "",
        "| layout | useful tokens/s | slower than the first by | fill | FLOPs / floor |"
        " share of the product rate | peak memory | first step | compile |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for result in results:
        rates = np.array(result["rates"])
        median = float(np.median(rates))
        ratio = float(np.median(first / rates))
        fill = "" if result["fill"] is None else f"{result['fill']:.1%}"
        flops = "" if result["flops"] is None else f"{result['flops'] / floor:.2f}"
        compiled = "" if result["compile"] is None else f"{result['compile']:.1f} s"
        lines.append(
            f"| {result['name']} | {median:,.0f} ({rates.min():,.0f} to {rates.max():,.0f}) | "
            f"{ratio:.2f} | {fill} | {flops} | {median * floor / rate:.0%} | "
            f"{result['peak'] / 2**30:.2f} GiB | {result['first_step']:.1f} s | {compiled} |"
        )
    for result in results:
        if result["uncounted"]:
            left_out = "; ".join(result["uncounted"])
            lines += ["", f"Not in the FLOPs of {result['name']}: {left_out}."]
    return "\n".join(lines)

"""A contender of this project: takes the steps that it is ordered to, and says how long each
took.
"""

import itertools
import json
import os
import time
from collections.abc import Iterator
from typing import Any

import jax

from dpo_jax import benchmark_layouts

# what a line that is an answer begins with
ANSWER = "benchmark: "


def work(stepper: benchmark_layouts.Stepper, orders: Iterator[str], dtype: str, count: int) -> None:
    """A contender of this project, whose products are of that type: compiles the shapes of its
    first `count` steps, says so, and obeys.
    """
    begun = time.time() - float(os.environ.get("BENCHMARK_STARTED", time.time()))
    batches, state = list(itertools.islice(stepper.batches, count)), stepper.state
    seen, compile_seconds, first_step, loss = set(), 0.0, 0.0, float("nan")
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
        if not first_step:
            first_step, loss = begun + time.perf_counter() - start, float(values["loss"])
        state, values = stepper.step(state, batch)
        jax.block_until_ready(values)
    say({"ready": True, "first_step": first_step, "compile": compile_seconds, "loss": loss})
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
    flops = {dtype: counted.pop("flops")}
    say({"peak": peak, "computed": computed, "flops": flops, **counted})


def say(message: dict[str, Any]) -> None:
    """One line to whoever gives the orders."""
    print(f"{ANSWER}{json.dumps(message)}", flush=True)

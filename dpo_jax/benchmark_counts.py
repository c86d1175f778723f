"""FLOPs of a run's compiled steps over an epoch, against those that it needs at least; no step is
run.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dpo_jax import assemble, benchmark, benchmark_flops, benchmark_layouts, config, sharding
from dpo_jax.data import pack, rows

HEADER = """\
| a step | shapes | steps | tokens filled | scored filled | MFLOP a useful token | FLOPs / floor |
| --- | --- | ---: | ---: | ---: | ---: | ---: |"""


def count(experiment: config.Experiment) -> dict[str, Any]:
    """Counts one epoch of a long run; returns what `describe` prints, as JSON values.

    The floor is `benchmark_flops.floor_flops`; FLOPs are those of the compiled programs, with
    loops counted as they run on each batch.
    """
    benchmark.refuse_built_in(experiment)
    experiment = benchmark.without_extras(experiment, benchmark.LONG_RUN)
    mesh = sharding.make_mesh(experiment.mesh, jax.devices())
    run, state = assemble.assemble(experiment, mesh)
    data, plan, _ = run.train
    examples = epoch(len(data.prompts), plan)
    batches = [
        sharding.put_batch(pack.batch(data, plan, number), mesh) for number in range(len(examples))
    ]
    counted = benchmark_layouts.count_flops(benchmark_layouts.of_run(run, state), state, batches)
    floor = sum(
        benchmark_flops.floor_flops(
            run.initial.model.config,
            data,
            one,
            has_reference=assemble.has_live_reference(experiment),
            is_adapter=experiment.lora.rank is not None,
        )
        for one in examples
    )
    useful = rows.sizes(data, plan.scores_prompt, np.concatenate(examples))
    tokens = int(useful.tokens.sum())
    return {
        "loss": experiment.loss.function.__name__,
        "model": experiment.model.source,
        "data": experiment.data.source,
        "batch_size": experiment.batch_size,
        "batch_tokens": experiment.batch_tokens,
        "devices": mesh.size,
        "shapes": sorted({(*one["tokens"].shape, one["slot"].shape[1]) for one in batches}),
        "steps": len(examples),
        "fill": tokens / sum(one["tokens"].size for one in batches),
        "fill_scored": int(useful.scored.sum()) / sum(one["slot"].size for one in batches),
        "flops_per_useful_token": counted["flops"] / tokens,
        "flops_over_floor": counted["flops"] / floor,
        "uncounted": counted["uncounted"],
    }


def epoch(count: int, plan: pack.Plan) -> list[np.ndarray]:
    """The examples of each step until all, so many, have had their turn."""
    found: list[np.ndarray] = []
    while sum(map(len, found)) < count:
        found.append(pack.examples(plan, len(found)))
    return found


def describe(record: Mapping[str, Any]) -> str:
    """Two lines of heading and one of a Markdown table, and what could not be counted."""
    tokens = record["batch_tokens"]
    step = f"{record['batch_size']} examples" if tokens is None else f"{tokens:,} tokens"
    shapes = ", ".join(
        f"{count} x {length} ({scored})" for count, length, scored in record["shapes"]
    )
    lines = [
        f"{record['loss']} of {record['model']} on {record['data']}, {record['devices']} devices",
        "",
        HEADER,
        f"| {step} | {shapes} | {record['steps']} | {record['fill']:.1%} | "
        f"{record['fill_scored']:.1%} | {record['flops_per_useful_token'] / 1e6:.1f} | "
        f"{record['flops_over_floor']:.2f} |",
    ]
    if record["uncounted"]:
        lines += ["", f"Not counted: {'; '.join(record['uncounted'])}."]
    return "\n".join(lines)

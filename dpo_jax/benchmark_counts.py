"""FLOPs of a run's compiled steps over an epoch, against those that it needs at least; no step is
run.
"""

from collections.abc import Mapping
from typing import Any

import jax

from dpo_jax import assemble, benchmark, benchmark_flops, benchmark_layouts, config, sharding
from dpo_jax.data import pack, rows
from dpo_jax.hlo import costs, text

HEADER = """\
| a step | shapes | steps | tokens filled | scored filled | MFLOP a useful token | FLOPs / floor |
| --- | --- | ---: | ---: | ---: | ---: | ---: |"""


def run(experiment: config.Experiment) -> dict[str, Any]:
    """Counts one epoch of a long run; returns what `describe` prints, as JSON values.

    The floor is `benchmark_flops.floor_flops`; FLOPs are those of the compiled programs, with
    loops counted as they run on each batch.
    """
    benchmark.refuse_built_in(experiment)
    experiment = benchmark.without_extras(experiment, benchmark.LONG_RUN)
    mesh = sharding.make_mesh(experiment.mesh, jax.devices())
    assembled, state = assemble.assemble(experiment, mesh)
    model, (data, plan, _) = assembled.initial.model, assembled.train
    has_reference = assemble.has_live_reference(experiment)
    is_adapter = experiment.lora.rank is not None
    programs: dict[tuple[int, ...], text.Program] = {}
    flops = floor = useful = positions = scored = scored_positions = 0.0
    uncounted, steps, seen = set(), 0, 0
    while seen < len(data.prompts):
        batch = pack.batch(data, plan, steps)
        shape = (*batch["tokens"].shape, batch["slot"].shape[1])
        if shape not in programs:
            placed = sharding.put_batch(batch, mesh)
            lowered = assembled.step.lower(state, assembled.held, placed, assembled.numbers)
            programs[shape] = text.parse(lowered.compile().as_text())
        lengths = benchmark_layouts.loop_lengths(model, batch, experiment.microbatches)
        flops += costs.flops(programs[shape], lengths) * programs[shape].devices
        uncounted |= set(costs.uncounted(programs[shape], lengths))
        chosen = batch["index"][batch["weight"] > 0]
        floor += benchmark_flops.floor_flops(
            model.config, data, chosen, has_reference=has_reference, is_adapter=is_adapter
        )
        found = rows.sizes(data, plan.scores_prompt, chosen)
        useful, scored = useful + found.tokens.sum(), scored + found.scored.sum()
        positions, scored_positions = (
            positions + batch["tokens"].size,
            scored_positions + batch["slot"].size,
        )
        steps, seen = steps + 1, seen + len(chosen)
    return {
        "loss": experiment.loss.function.__name__,
        "model": experiment.model.source,
        "data": experiment.data.source,
        "batch_size": experiment.batch_size,
        "batch_tokens": experiment.batch_tokens,
        "devices": mesh.size,
        "shapes": sorted(map(list, programs)),
        "steps": steps,
        "fill": float(useful / positions),
        "fill_scored": float(scored / scored_positions),
        "flops_per_useful_token": float(flops / useful),
        "flops_over_floor": float(flops / floor),
        "uncounted": sorted(uncounted),
    }


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

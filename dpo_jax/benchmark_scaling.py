"""Seconds of a DPO step over the length of its examples and over their number.

Two series: one example a step, longer and longer, whose parts have the mean shares of the
distribution of lengths; and more and more examples a step of that distribution as it is. The first
should follow FLOPs, of which more and more are attention's pairs of tokens that see each other,
the second useful tokens.

Dimensions: N examples.
"""

import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import (
    benchmark_flops,
    benchmark_layouts,
    config,
    contract,
    environment,
    figures,
    flags,
    initial,
    inputs,
    logps,
    losses,
    optimizer,
    sharding,
    train_step,
)
from dpo_jax.data import made_up, pack, rows, tokenise
from dpo_jax.model import config as model_config
from dpo_jax.model import decoder

NAMES = ("chosen", "rejected")
# a small Llama
MODEL = model_config.DecoderConfig(
    vocabulary_size=8192,
    width=192,
    layers=4,
    heads=4,
    key_value_heads=4,
    head_dim=48,
    hidden=512,
    max_positions=8192,
    tied_head=True,
)
# of the drawn lengths: medians of prompt and completions, and the deviation of their logarithms
MEDIANS, DEVIATION = (96.0, 64.0, 64.0), 0.7
EXAMPLES = 4096
# untimed steps: the first compiles, and the very first's state lies elsewhere than what it returns
WARM = 2


class Sizes(NamedTuple):
    """What is timed."""

    # tokens of a step's one example: its prompt and both completions
    lengths: Sequence[int] = (256, 512, 1024, 2048, 4096, 8192)
    # examples of a step
    examples: Sequence[int] = (1, 2, 4, 8, 16, 32, 64)
    # times that each step is taken, of which the median counts
    rounds: int = 5
    # steps of so many examples
    steps: int = 3
    seed: int = 0


def run(sizes: Sizes, experiment: config.Experiment | None = None) -> dict[str, Any]:
    """Times both series; with an experiment of its model and its data's lengths."""
    mesh = sharding.make_mesh(config.Mesh(), jax.devices())
    shape, lengths = MODEL, draw_lengths(EXAMPLES, sizes.seed)
    settings = config.Model()
    if experiment is not None:
        mesh = sharding.make_mesh(experiment.mesh, jax.devices())
        found = inputs.load(experiment, mesh)
        shape, settings = found.initial.model.config, experiment.model
        lengths = lengths_of(found.train)
    longest = max(*sizes.lengths, int(lengths.sum(axis=1).max()))
    if shape.max_positions < longest:
        raise ValueError(
            f"the model has {shape.max_positions} positions, and the longest example is to have "
            f"{longest} tokens: lower --lengths or --data.max-length, or take another model"
        )
    time_steps = make_timer(shape, settings, mesh, sizes)
    series = {"length": [], "examples": []}
    for length in sizes.lengths:
        data = make_examples(share_out(lengths, length)[None], shape.vocabulary_size, sizes.seed)
        series["length"].append(time_steps(data, 1, 1))
    for count in sizes.examples:
        data = make_examples(lengths, shape.vocabulary_size, sizes.seed)
        series["examples"].append(time_steps(data, count, sizes.steps))
    return {
        "series": series,
        "slopes": {
            name: {by: slope(points, by) for by in ("tokens", "flops", "floor")}
            for name, points in series.items()
        },
        "lengths_from": "a seed" if experiment is None else experiment.data.source,
        "settings": sizes._asdict(),
        "device": jax.devices()[0].device_kind,
        "environment": environment.environment(flags.ROOT),
    }


def draw_lengths(count: int, seed: int) -> np.ndarray:
    """Log-normal lengths of prompt, chosen and rejected: int64 [N, 3], at least 4 tokens each."""
    drawn = np.random.default_rng(seed).normal(scale=DEVIATION, size=(count, len(MEDIANS)))
    return np.clip(np.exp(drawn) * MEDIANS, 4, 1024).astype(np.int64)


def lengths_of(data: tokenise.Tokenised) -> np.ndarray:
    """The lengths of prompt, chosen and rejected of pairs: int64 [N, 3]."""
    if data.names != NAMES:
        raise ValueError(
            f"the data give {', '.join(data.names)}, and pairs (chosen, rejected) are timed: set "
            "--data.examples pairs"
        )
    spans = np.concatenate([data.prompts[:, None], data.completions], axis=1)
    return spans[..., 1] - spans[..., 0]


def share_out(lengths: np.ndarray, total: int) -> np.ndarray:
    """An example's lengths [3] with the sum `total` and the mean shares of others' [N, 3]."""
    shares = lengths.sum(axis=0) / lengths.sum()
    found = np.floor(shares * total).astype(np.int64)
    found[0] += total - found.sum()
    return found


def make_examples(lengths: np.ndarray, vocabulary: int, seed: int) -> tokenise.Tokenised:
    """Examples of random tokens with these lengths [N, 3]."""
    tokens = np.random.default_rng(seed).integers(1, vocabulary, int(lengths.sum()), np.int32)
    return made_up.lay_out(NAMES, lengths, tokens, "drawn", {})


def make_timer(
    shape: model_config.DecoderConfig, settings: config.Model, mesh: jax.sharding.Mesh, sizes: Sizes
):
    """(data, examples a step, steps) -> a point: means over the steps of seconds, tokens, FLOPs."""
    model = initial.make_decoder(shape, settings, mesh)
    params = sharding.place(decoder.init(shape, jax.random.key(sizes.seed)), mesh)
    tx = optimizer.make(config.Optimizer())
    held = train_step.Held({}, jax.tree.map(jnp.copy, params))
    step, stepper = make_step(model, tx, held)
    state = train_step.TrainState(jnp.int32(0), params, tx.init(params))

    def time_steps(data: tokenise.Tokenised, count: int, steps: int) -> dict[str, float]:
        nonlocal state
        plan = pack.plan(
            data,
            count,
            sharding.batch_shards(mesh),
            sizes.seed,
            row_shards=sharding.row_shards(mesh),
        )
        seconds, placed, floor, tokens = [], [], 0.0, 0
        for number in range(steps):
            placed.append(sharding.put_batch(pack.batch(data, plan, number), mesh))
            taken = []
            for _ in range(WARM + sizes.rounds):
                start = time.perf_counter()
                state, values = step(state, placed[-1])
                jax.block_until_ready(values)
                taken.append(time.perf_counter() - start)
            seconds.append(float(np.median(taken[WARM:])))
            chosen = pack.examples(plan, number)
            floor += benchmark_flops.floor_flops(shape, data, chosen)
            tokens += int(rows.sizes(data, indices=chosen).tokens.sum())
        flops = benchmark_layouts.count_flops(stepper, state, placed)["flops"]
        point = {"seconds": sum(seconds), "tokens": tokens, "flops": flops, "floor": floor}
        point = {name: value / steps for name, value in point.items()}
        print(describe_point(point), flush=True)
        return point

    return time_steps


def make_step(model: decoder.Decoder, tx, held: train_step.Held):
    """The jitted step of DPO with a live reference, and what its FLOPs are counted from."""
    score = functools.partial(logps.score, model)
    scoring = train_step.Scoring(
        lambda params, _, batch: score(params, batch),
        lambda held, batch: jax.lax.stop_gradient(score(held.reference, batch)),
        contract.with_state(losses.dpo),
    )
    made = train_step.make_train_step(scoring, tx, lambda _: jnp.float32(1.0), train_step.whole)
    jitted: Any = jax.jit(made, donate_argnums=0)
    numbers = {"loss": {"beta": jnp.float32(0.1)}, "learning_rate": jnp.float32(1e-6)}

    def step(state, batch: dict):
        return jitted(state, held, batch, numbers)

    def compile(state, batch: dict):
        return jitted.lower(state, held, batch, numbers).compile()

    lengths = functools.partial(benchmark_layouts.loop_lengths, model)
    return step, benchmark_layouts.Stepper(step, compile, lengths, None, iter(()))


def slope(points: Sequence[Mapping[str, float]], by: str) -> float | None:
    """The slope of the straight line through the logarithms of seconds over those of `by`; None
    where there are not two points.
    """
    if len({point[by] for point in points}) < 2:
        return None
    across, seconds = (np.log([point[name] for point in points]) for name in (by, "seconds"))
    return float(np.polyfit(across, seconds, 1)[0])


def describe_point(point: Mapping[str, float]) -> str:
    """A point as a line of a Markdown table."""
    return (
        f"| {point['tokens']:,.0f} | {point['floor'] / 1e9:,.2f} | {point['flops'] / 1e9:,.2f} | "
        f"{point['seconds']:.3f} s | {point['tokens'] / point['seconds']:,.0f} | "
        f"{point['floor'] / point['seconds'] / 1e9:,.1f} |"
    )


def describe(record: Mapping[str, Any]) -> str:
    """Both series as Markdown tables, with the slopes."""
    titles = {
        "length": "One example a step, longer and longer",
        "examples": "More and more examples a step",
    }
    lines = []
    for name, points in record["series"].items():
        fitted = record["slopes"][name]
        by = ", ".join(
            f"{'useful tokens' if key == 'tokens' else key} {value:.2f}"
            for key, value in fitted.items()
            if value is not None
        )
        lines += [
            f"{titles[name]} (lengths from {record['lengths_from']}); slopes of log seconds: {by}",
            "",
            "| useful tokens | floor, GFLOP | compiled, GFLOP | seconds a step | useful tokens/s |"
            " floor's GFLOP/s |",
            "| ---: | ---: | ---: | ---: | ---: | ---: |",
            *(describe_point(point) for point in points),
            "",
        ]
    return "\n".join(lines)


def draw(record: Mapping[str, Any]) -> Any:
    """Figure of seconds a step over useful tokens and over the floor's FLOPs, both logarithmic."""
    from matplotlib import figure

    picture = figure.Figure(figsize=(10, 4.4), layout="constrained")
    labels = {"length": "one example, longer and longer", "examples": "more and more examples"}
    panels = {"tokens": "useful tokens a step", "floor": "FLOPs that a step needs at least"}
    for axis, (by, title) in zip(picture.subplots(1, 2), panels.items(), strict=True):
        for (name, points), colour in zip(
            record["series"].items(), figures.COLOURS.values(), strict=False
        ):
            fitted = record["slopes"][name][by]
            label = labels[name] + ("" if fitted is None else f": slope {fitted:.2f}")
            values = [[point[key] for point in points] for key in (by, "seconds")]
            axis.plot(*values, "o-", color=colour, label=label, linewidth=1.2, markersize=5)
        axis.set(xscale="log", yscale="log", xlabel=title, ylabel="seconds a step")
        axis.legend(frameon=False)
        figures.quiet(axis)
    picture.suptitle(f"Cost of a DPO step, {record['device']}")
    return picture

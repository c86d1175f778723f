"""What a benchmark times: training steps on the same examples in this project's layouts.

Dimensions: N examples, R = 2 N rows of the padded layout, L tokens, V vocabulary.
"""

import dataclasses
import functools
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import (
    assemble,
    config,
    contract,
    logps,
    optimizer,
    sharding,
    train,
    train_step,
    vocabulary,
)
from dpo_jax.data import tokenise
from dpo_jax.hlo import costs, text
from dpo_jax.model import attention, blocks, decoder

# rows of the padded layout have a multiple of so many tokens, so that few shapes compile
MULTIPLE = 64
# the file of the steps' examples in a race's folder
STEPS = "steps.npy"


class Stepper(NamedTuple):
    """Steps of one layout."""

    # (state, batch) -> state, metrics
    step: Callable
    # (state, batch) -> the compiled step
    compile: Callable
    # batch -> `loop_lengths`
    lengths: Callable[[dict], Mapping[str, float]]
    state: Any
    # of the steps from the first on: batch on the mesh, and how many tokens are computed
    batches: Iterator[tuple[dict, int]]


def make_packed(experiment: config.Experiment, mesh: jax.sharding.Mesh) -> Stepper:
    """Steps of a run as `scripts.train` makes them."""
    return of_run(*assemble.assemble(experiment, mesh))


def of_run(run: assemble.Run, state) -> Stepper:
    """Steps of a run that is assembled."""

    def step(state, batch: dict):
        return run.step(state, run.held, batch, run.numbers)

    def compile(state, batch: dict):
        return run.step.lower(state, run.held, batch, run.numbers).compile()

    found = ((batch, batch["tokens"].size) for _, batch, _ in train.batches(run, 0))
    lengths = functools.partial(
        loop_lengths, run.initial.model, microbatches=run.experiment.microbatches
    )
    return Stepper(step, compile, lengths, state, found)


def make_cached(experiment: config.Experiment, mesh: jax.sharding.Mesh) -> Stepper:
    """The same with the reference's log-probabilities computed before."""
    reference = dataclasses.replace(experiment.reference, cached=True)
    return make_packed(experiment.replace(reference=reference), mesh)


def make_plain(experiment: config.Experiment, mesh: jax.sharding.Mesh) -> Stepper:
    """The same with attention of all pairs of a row's tokens."""
    return make_packed(with_plain_attention(experiment), mesh)


def with_plain_attention(experiment: config.Experiment) -> config.Experiment:
    """The run with attention of all pairs of a row's tokens."""
    return experiment.replace(model=dataclasses.replace(experiment.model, attention="plain"))


def make_padded(
    experiment: config.Experiment, mesh: jax.sharding.Mesh, steps: Sequence[np.ndarray]
) -> Stepper:
    """A row for each completion, with the prompt again, padded to the longest, with all logits and
    attention of all pairs of tokens. `steps` has the examples of each step.
    """
    experiment = with_plain_attention(experiment)
    run, state = assemble.assemble(experiment, mesh)
    jitted: Any = jax.jit(padded_step(experiment, run.initial.model), donate_argnums=0)

    def step(state, batch: dict):
        return jitted(state, run.held, batch, run.numbers)

    def compile(state, batch: dict):
        return jitted.lower(state, run.held, batch, run.numbers).compile()

    def batches() -> Iterator[tuple[dict, int]]:
        for examples in steps:
            batch = pad(run.train.data, examples)
            yield sharding.put_batch(batch, mesh), batch["tokens"].size

    return Stepper(step, compile, lambda batch: {}, state, batches())


def write_steps(folder: str, steps: Sequence[np.ndarray]) -> None:
    """Leaves the examples of each step for the process that takes them padded."""
    np.save(os.path.join(folder, STEPS), np.stack(steps))


def make(name: str, experiment: config.Experiment, mesh: jax.sharding.Mesh, folder: str) -> Stepper:
    """A layout as a race takes it, whose folder has what `write_steps` left."""
    if name == PADDED:
        return make_padded(experiment, mesh, np.load(os.path.join(folder, STEPS)))
    return PACKED[name](experiment, mesh)


def padded_step(experiment: config.Experiment, model: decoder.Decoder) -> Callable:
    """(state, held, batch, numbers) -> (state, metrics) of that layout, all parameters trained
    and a live reference or none.
    """
    score_rows = functools.partial(score_padded, model)

    def score(params, held: train_step.Held, batch: dict):
        return score_rows(params, batch)

    def score_reference(held: train_step.Held, batch: dict):
        if held.reference is None:
            return None
        return jax.lax.stop_gradient(score_rows(held.reference, batch))

    loss, tx = experiment.loss, optimizer.make(experiment.optimizer)
    scoring = train_step.Scoring(score, score_reference, contract.with_state(loss.function))
    schedule = optimizer.make_schedule(experiment.optimizer, experiment.steps)
    return train_step.make_train_step(scoring, tx, schedule, train_step.whole)


PACKED: dict[str, Callable[[config.Experiment, jax.sharding.Mesh], Stepper]] = {
    "packed": make_packed,
    "cached": make_cached,
    "plain": make_plain,
}
PADDED = "padded"
LAYOUTS = (*PACKED, PADDED)


def possible(experiment: config.Experiment, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The layouts of these names that the run can have, and a line for each that it cannot;
    ValueError for a name that there is not.
    """
    found, left_out = [], []
    needs = contract.needs(experiment.loss.function)
    more = needs.prompt or needs.policy or needs.reference
    for name in names:
        if name not in LAYOUTS:
            raise ValueError(f"there is no layout {name!r}: --layouts takes {', '.join(LAYOUTS)}")
        if name == "cached" and experiment.reference.source is None:
            left_out.append("cached is left out: the run has no reference")
        elif name == PADDED and more:
            left_out.append("padded is left out: the loss needs more than sums over completions")
        elif name == PADDED and experiment.lora.rank is not None:
            left_out.append("padded is left out: it trains all parameters, and no adapter")
        else:
            found.append(name)
    return found, left_out


def pad(data: tokenise.Tokenised, chosen: np.ndarray) -> dict:
    """The examples as rows, all of the first completion and then all of the second."""
    rows, prompts = [], []
    for completion in range(len(data.names)):
        for example in chosen:
            prompt = data.tokens[slice(*data.prompts[example])]
            answer = data.tokens[slice(*data.completions[example, completion])]
            rows.append(np.concatenate([prompt, answer]))
            prompts.append(len(prompt))
    lengths = np.array([len(row) for row in rows])
    width = -(-lengths.max() // MULTIPLE) * MULTIPLE
    tokens = np.zeros((len(rows), width), np.int32)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = row
    answers = (lengths - prompts).reshape(len(data.names), -1)
    return {
        "tokens": tokens,
        "lengths": lengths.astype(np.int32),
        "prompts": np.array(prompts, np.int32),
        "length": dict(zip(data.names, answers.astype(np.int32), strict=True)),
        "weight": np.ones(len(chosen), np.float32),
        **{name: values[chosen] for name, values in data.columns.items()},
    }


def score_padded(model: decoder.Decoder, params, batch: dict) -> dict[str, logps.Logps]:
    """Log-probabilities of completions from logits of every position, [R, L, V]."""
    tokens = batch["tokens"]
    position = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    real = (position < batch["lengths"][:, None]).astype(jnp.int32)
    ids = attention.Ids(real, jnp.zeros_like(real), position)
    hidden: Any = model.apply({"params": params}, tokens, ids)
    logits = decoder.logits(hidden, decoder.head(params, model.config))
    scores = jax.nn.log_softmax(logits[:, :-1], axis=-1)
    values = jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1)[..., 0]
    scored = (position[:, 1:] >= batch["prompts"][:, None]) & (real[:, 1:] > 0)
    totals = jnp.where(scored, values, 0.0).sum(axis=1).reshape(len(batch["length"]), -1)
    lengths = batch["length"]
    return {name: logps.Logps(totals[c], lengths[name]) for c, name in enumerate(sorted(lengths))}


def count_flops(stepper: Stepper, state, batches: Sequence[dict]) -> dict[str, Any]:
    """FLOPs of the compiled steps over the batches on all devices together ("flops"), and what of
    the steps cannot be counted ("uncounted").

    Loops whose length depends on the batch are counted by what they compute on each.
    """
    programs: dict[str, text.Program] = {}
    total, uncounted = 0, set()
    for batch in batches:
        shape = str(jax.tree.map(jnp.shape, batch))
        if shape not in programs:
            programs[shape] = text.parse(stepper.compile(state, batch).as_text())
        program, lengths = programs[shape], stepper.lengths(batch)
        total += costs.flops(program, lengths) * program.devices
        uncounted |= set(costs.uncounted(program, lengths))
    return {"flops": total, "uncounted": sorted(uncounted)}


def loop_lengths(model: decoder.Decoder, batch: dict, microbatches: int = 1) -> Mapping[str, float]:
    """How often the loops run whose length depends on the batch, on average, by a part of their
    names: over a block of queries' blocks of keys, and over blocks of scored tokens.
    """
    slot, names = np.asarray(batch["slot"]), sorted(batch["length"])
    partly_trained = tokenise.MISMATCHED in names
    trained = (slot > 0) & (np.array(names)[(slot - 1) % len(names)] != tokenise.MISMATCHED)
    return {
        "/attention/": mean_pairs(model, batch),
        f"/{vocabulary.SCORED}/": mean_blocks(slot > 0, microbatches, partly_trained),
        f"/{vocabulary.TRAINED}/": mean_blocks(trained, microbatches, partly_trained),
    }


def mean_blocks(wanted: np.ndarray, microbatches: int, partly_trained: bool) -> float:
    """Blocks up to the last scored token [B, S] that is wanted, of a microbatch on one device."""
    rows, scored = wanted.shape
    platform = jax.default_backend()
    size = vocabulary.block_size(rows // microbatches, scored, platform, partly_trained)
    filled = np.where(wanted, np.arange(1, scored + 1), 0).max(axis=1)
    # as `train_step.split` has them
    fullest = filled.reshape(-1, microbatches).max(axis=0)
    return float(np.mean(-(-fullest // size)))


def mean_pairs(model: decoder.Decoder, batch: dict) -> float:
    """Pairs of blocks that attention in blocks computes for each block of queries of a batch, over
    the kinds of layers.
    """
    ids = attention.Ids(*(np.asarray(batch[name]) for name in attention.Ids._fields))
    counts = [
        np.mean(blocks.list_pairs_of_rows(ids, ids, kind.window).count)
        for kind in model.config.block
    ]
    return float(np.mean(counts))


def matmul_rate(dtype: Any, size: int | None = None, repeats: int = 9) -> float:
    """FLOPs per second of products of square matrices on one device, a median.

    Their numbers are random, since a GPU multiplies zeros or ones with less power, and faster. On
    accelerators several are timed at once, so that the start of one does not count.
    """
    on_cpu = jax.default_backend() == "cpu"
    size, count = size or (2048 if on_cpu else 8192), 1 if on_cpu else 10
    # products of as large numbers as their factors
    right = (jax.random.normal(jax.random.key(0), (size, size)) / np.sqrt(size)).astype(dtype)
    left = jax.random.normal(jax.random.key(1), (size, size), dtype)

    @jax.jit
    def multiply(left: jax.Array, right: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, count, lambda _, product: product @ right, left)

    multiply(left, right).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        multiply(left, right).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2.0 * size**3 * count / float(np.median(seconds))


def peak_memory() -> int:
    """Most bytes that this process has had: of the devices, or of the host where they are CPUs."""
    devices = [device.memory_stats() for device in jax.local_devices()]
    if all(stats and "peak_bytes_in_use" in stats for stats in devices):
        return sum(stats["peak_bytes_in_use"] for stats in devices if stats)
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kibibytes if sys.platform == "darwin" else kibibytes * 1024

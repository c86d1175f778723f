"""The train step and its arguments as shapes, types and shardings: what a run would compile,
without the arrays.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from dpo_jax import (
    assemble,
    benchmark_layouts,
    config,
    contract,
    initial,
    inputs,
    kept,
    logps,
    optimizer,
    origins,
    paths,
    programs,
    reference,
    sharding,
    train_step,
)
from dpo_jax.data import ladder, made_up, pack, rows, tokenise, tokenizer
from dpo_jax.model import config as model_config
from dpo_jax.model import decoder, frozen, hf_config, hf_files, lora, presets


class Examples(NamedTuple):
    """What a step is planned for."""

    data: tokenise.Tokenised
    # of an epoch
    count: int
    # where the lengths come from
    note: str


class Step(NamedTuple):
    """A train step that can be compiled; its arguments are ShapeDtypeStructs with shardings."""

    experiment: config.Experiment
    mesh: jax.sharding.Mesh
    model: decoder.Decoder
    # (state, held, batch, numbers) -> (state, metrics), jitted
    step: Callable
    state: train_step.TrainState
    held: train_step.Held
    batch: dict
    numbers: dict
    examples: Examples
    plan: pack.Plan


def make(experiment: config.Experiment, examples: Examples, mesh) -> Step:
    """The step of a run on a mesh, for batches of its dearest shape; ValueError for what a run
    refuses too.
    """
    inputs.check_switches(experiment)
    if experiment.batch_tokens is None:
        sharding.check_batch_size(experiment.batch_size, experiment.microbatches, mesh)
    data, shape = examples.data, read_shape(experiment)
    inputs.check_lengths(data, shape.max_positions, experiment)
    started = start(experiment, shape, mesh)
    declared = contract.needs(experiment.loss.function)
    parts = sharding.batch_shards(mesh) * experiment.microbatches
    over = sharding.row_shards(mesh)
    plan = pack.plan_run(data, experiment, parts, scores_prompt=declared.prompt, row_shards=over)
    compiled = programs.make(programs.form(experiment, started, mesh))
    floats, _ = contract.split(experiment.loss.hyperparameters)
    return Step(
        experiment,
        mesh,
        started.model,
        compiled.step,
        make_state(experiment, started.params, mesh),
        train_step.Held(started.base, hold_reference(experiment, shape, mesh)),
        make_batch(experiment, data, plan, mesh),
        {
            "loss": floats,
            "learning_rate": jnp.float32(experiment.optimizer.learning_rate),
        },
        examples,
        plan,
    )


def make_padded(experiment: config.Experiment, examples: Examples, mesh) -> Step:
    """The step of the layout that `benchmark_layouts.make_padded` times, for comparison: a row for
    each completion, with the prompt again, padded to the longest, with all logits.
    """
    packed = make(benchmark_layouts.with_plain_attention(experiment), examples, mesh)
    data, count = examples.data, experiment.batch_size
    longest = int((spans(data.prompts)[:, None] + spans(data.completions)).max())
    width = ladder.round_up(longest, benchmark_layouts.MULTIPLE)
    shape = rows.Shape(count * len(data.names), width, width, 1)
    scored = float(spans(data.completions).sum(axis=1).mean())
    useful = float(rows.sizes(data).tokens.mean()) * count
    positions = shape.rows * width
    fill = ladder.Fill(useful / positions, scored * count / positions)
    jitted = jax.jit(
        benchmark_layouts.padded_step(experiment, packed.model),
        out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, packed.state), None),
        donate_argnums=0,
    )

    def integers(*dims: int) -> Any:
        return jax.ShapeDtypeStruct(dims, jnp.int32, sharding=sharding.of_batch(dims, mesh))

    batch = {
        "tokens": integers(shape.rows, width),
        "lengths": integers(shape.rows),
        "prompts": integers(shape.rows),
        "length": {name: integers(count) for name in data.names},
        "weight": jax.ShapeDtypeStruct((count,), jnp.float32, sharding=sharding.rows(mesh)),
    }
    plan = dataclasses.replace(packed.plan, ladder=(shape,), curve=(fill,))
    return packed._replace(step=jitted, batch=batch, plan=plan)


def spans(places: np.ndarray) -> np.ndarray:
    """Tokens of spans [..., 2]."""
    return places[..., 1] - places[..., 0]


def read_shape(experiment: config.Experiment) -> model_config.DecoderConfig:
    """The shape of the model that a run starts from, of which no weights are read."""
    source = experiment.model.source
    if source == "builtin":
        source = experiment.task.model
    if source in presets.PRESETS:
        return presets.PRESETS[source]
    if paths.exists(paths.join(source, origins.MODEL)):
        return origins.read_shape(source)
    folder = hf_files.find_folder(source)
    return hf_config.from_hf(hf_files.read_json(folder / hf_files.CONFIG))


def read_examples(experiment: config.Experiment, lengths: made_up.Lengths | None) -> Examples:
    """Training examples, of which only the lengths matter: of the data, or planned ones. Those of
    the built-in task are planned always, since a model would have to write them.
    """
    loss, kind, longest = experiment.loss, experiment.data.examples, experiment.data.max_length
    if lengths is None and experiment.data.source == "builtin":
        lengths = made_up.BUILTIN
    if lengths is None:
        source = experiment.model.source
        words = tokenizer.load_tokenizer(experiment.data, origins.tokenizer_of(source))
        data = inputs.load_examples(experiment, words, kept.Kept())[0]
        return Examples(data, len(data.prompts), f"lengths of {experiment.data.source}")
    data = made_up.draw(lengths, longest, kind)
    columns, has_reference = tuple(data.columns), experiment.reference.source is not None
    contract.check(loss.function, loss.hyperparameters, data.names, columns, has_reference)
    read = contract.reads(loss.function, loss.hyperparameters, data.names, columns)
    note = (
        f"planned lengths: log-normal, medians {lengths.prompt} of a prompt and "
        f"{lengths.completion} of a completion, at most {longest} together"
    )
    return Examples(tokenise.select(data, read), lengths.examples, note)


def start(
    experiment: config.Experiment, shape: model_config.DecoderConfig, mesh
) -> initial.Initial:
    """The model with what is trained, as `initial.prepare` gives it, of shapes."""
    settings = experiment.lora
    model = initial.make_decoder(shape, experiment.model, mesh)
    whole = sharding.with_shardings(decoder.shapes(shape), mesh)
    if settings.rank is None:
        return initial.Initial(model, whole, None, "")
    targets = lora.find_targets(shape, settings.targets)
    held_as, others = initial.held_as(experiment.model), initial.others_as(experiment.model)
    adapter = origins.Adapter(settings, targets, "", experiment.seed, held_as, others, "")
    trained = sharding.with_shardings(lora.shapes(shape, targets, settings.rank), mesh)
    base = hold(whole, held_as, others, mesh)
    return initial.Initial(model, trained, None, "", None, base, adapter, True)


def hold(params, held_as: str, others: str, mesh) -> dict:
    """What `frozen.hold` makes of parameters: values lie where the parameter does, and scales of
    int8 too, along the axes that they have.
    """
    held = jax.eval_shape(functools.partial(frozen.hold, held_as=held_as, others_as=others), params)

    def place(leaf, kept):
        axes = (*leaf.sharding.spec, *[None] * leaf.ndim)

        def one(shape):
            spec = [
                axis if size == whole else None
                for axis, size, whole in zip(axes, shape.shape, leaf.shape, strict=False)
            ]
            where = jax.sharding.NamedSharding(mesh, P(*spec))
            return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)

        return jax.tree.map(one, kept)

    return jax.tree.map(place, params, held)


def hold_reference(experiment: config.Experiment, shape: model_config.DecoderConfig, mesh) -> Any:
    """`assemble.hold_reference` of shapes; every model that may be a reference has the policy's."""
    settings = experiment.reference
    if not assemble.has_live_reference(experiment):
        return None
    if experiment.lora.rank is not None:
        if settings.source == "base" or assemble.is_initial(experiment):
            return {}
    whole = sharding.with_shardings(decoder.shapes(shape), mesh)
    if settings.update_every is not None:
        return whole
    held_as = initial.others_as(experiment.model)
    return hold(whole, held_as, held_as, mesh)


def make_state(experiment: config.Experiment, params, mesh) -> train_step.TrainState:
    """`assemble.make_state` of shapes."""
    tx = optimizer.make(experiment.optimizer)
    placed = programs.shardings(params, tx, mesh)

    def one(shape, where) -> Any:
        return jax.ShapeDtypeStruct(jnp.shape(shape), jnp.result_type(shape), sharding=where)

    def whole(value) -> Any:
        return one(value, placed.step)

    moments = jax.tree.map(one, jax.eval_shape(tx.init, params), placed.opt_state)
    loss_state = contract.needs(experiment.loss.function).state()
    return train_step.TrainState(
        whole(jnp.int32(0)), params, moments, jax.tree.map(whole, loss_state)
    )


def make_batch(
    experiment: config.Experiment, data: tokenise.Tokenised, plan: pack.Plan, mesh
) -> dict:
    """The batch of the dearest shape, as `train.batches` puts it on the mesh, of shapes."""
    shape = plan.ladder[-1]
    batch = pack.empty(data, shape, scores_prompt=plan.scores_prompt)
    if experiment.lora.dropout:
        batch[logps.NOISE] = np.zeros(shape.rows, np.uint32)
    if experiment.reference.cached:
        batch = reference.with_table(batch, make_table(experiment, batch, len(data.prompts)))

    def one(leaf) -> Any:
        where = sharding.of_batch(leaf.shape, mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return {name: jax.tree.map(one, value) for name, value in batch.items() if name != "index"}


def make_table(experiment: config.Experiment, batch: dict, count: int) -> dict[str, np.ndarray]:
    """The columns that a cached reference has for the batch's completions."""
    statistics = contract.needs(experiment.loss.function).reference
    zeros = np.zeros(count, np.float32)
    names = [
        name
        for completion in batch["length"]
        for name in (completion, *(reference.column(completion, one) for one in statistics))
    ]
    return dict.fromkeys(names, zeros)


def fill(step: Step) -> ladder.Fill:
    """What the run's steps fill of their shapes on average."""
    return step.plan.curve[len(step.plan.ladder) - 1]


def useful_tokens(step: Step) -> float:
    """Distinct tokens of prompts and completions of a step of the compiled shape, where that is
    filled as the run's steps are on average.
    """
    shape = step.plan.ladder[-1]
    return shape.rows * shape.tokens * fill(step).tokens


def epoch_tokens(step: Step) -> float:
    """Distinct tokens of an epoch's examples."""
    tokens = rows.sizes(step.examples.data, step.plan.scores_prompt).tokens
    return float(tokens.mean()) * step.examples.count

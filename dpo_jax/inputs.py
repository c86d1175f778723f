"""What a run reads before its first step: the model, the tokenizer and the tokenised rows, checked
against each other.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax

from dpo_jax import config, contract, initial, kept, paths, processes, reference, sharding
from dpo_jax.data import rows, tokenise, tokenizer

# completions and columns that unpaired examples may have
UNPAIRED = ("completion", "mismatched"), ("desirable", "density_ratio")
# seconds of compiling from which a program is kept on disk
LEAST_COMPILING = 0.05


class Inputs(NamedTuple):
    """A run's model and data."""

    initial: initial.Initial
    tokenizer: tokenizer.Tokenizer
    train: tokenise.Tokenised
    held_out: tokenise.Tokenised | None
    # the held-out rows as pairs, where a run trains on unpaired halves of them
    held_out_pairs: tokenise.Tokenised | None


def load(
    experiment: config.Experiment, mesh: jax.sharding.Mesh, keeper: kept.Kept | None = None
) -> Inputs:
    """Reads and checks everything; every cause that can be seen before a step compiles is a
    ValueError here. Rows that the keeper has from an earlier run are not read again.
    """
    keeper = kept.Kept() if keeper is None else keeper
    check_switches(experiment)
    check_batch_size(experiment, mesh)
    source = initial.Source(experiment.model.source, experiment.model, experiment.seed)
    is_trained = experiment.lora.rank is None
    read_as = "float32" if is_trained else initial.others_as(experiment.model)
    start = initial.load(*source, mesh, read_as=read_as)
    start = initial.prepare(start, experiment.lora, source, mesh)
    words = keeper.last(tokenizer.load_tokenizer, experiment.data, start.tokenizer)
    vocabulary = start.model.config.vocabulary_size
    if words.vocabulary_size > vocabulary:
        raise ValueError(
            f"the tokenizer {experiment.data.tokenizer or start.tokenizer} has "
            f"{words.vocabulary_size} tokens and the model {experiment.model.source} a vocabulary "
            f"of {vocabulary}: give --data.tokenizer or --model.source so that they fit"
        )
    train, held_out = load_examples(experiment, words, keeper)
    check_lengths(train, start.model.config.max_positions, experiment)
    pairs = None
    # their rewards are log-ratios
    if experiment.data.examples == "unpaired" and experiment.reference.source is not None:
        make = functools.partial(
            keeper.last, tokenise.load_pairs_for_evaluation, experiment.data, words
        )
        pairs = processes.in_turn("the held-out pairs are tokenised", make)
    if experiment.samples.count and held_out is None:
        raise ValueError(
            f"samples.count is {experiment.samples.count}, and there are no held-out prompts to "
            "sample from: give --data.evaluation-source or --data.held-out"
        )
    return Inputs(start, words, train, held_out, pairs)


def check_batch_size(experiment: config.Experiment, mesh: jax.sharding.Mesh) -> None:
    """Raises ValueError where a number of examples a step does not divide over the mesh."""
    if experiment.batch_tokens is None:
        sharding.check_batch_size(experiment.batch_size, experiment.microbatches, mesh)


def load_examples(
    experiment: config.Experiment, words: tokenizer.Tokenizer, keeper: kept.Kept
) -> tuple[tokenise.Tokenised, tokenise.Tokenised | None]:
    """The training and held-out examples with the completions that the loss reads; ValueError where
    it breaks its contract on them.
    """
    loss, kind = experiment.loss, experiment.data.examples

    def reads(names: Sequence[str], columns: Iterable[str]) -> set[str]:
        return contract.reads(loss.function, loss.hyperparameters, names, tuple(columns))

    # what is not read is not made either
    mismatched = kind != "unpaired" or "mismatched" in reads(*UNPAIRED)
    make = functools.partial(
        keeper.last, tokenise.load, experiment.data, words, kind, mismatched=mismatched
    )
    train, held_out = processes.in_turn("the rows are tokenised", make)
    has_reference, columns = experiment.reference.source is not None, tuple(train.columns)
    if held_out is not None and (held_out.names, tuple(held_out.columns)) != (train.names, columns):
        raise ValueError(
            f"the held-out examples have {', '.join([*held_out.names, *held_out.columns])} and the "
            f"training ones {', '.join([*train.names, *columns])}: both must have the same"
        )
    contract.check(loss.function, loss.hyperparameters, train.names, columns, has_reference, keeper)
    shared = 1 if experiment.statistics == "global" else experiment.microbatches
    examples = experiment.batch_size
    if experiment.batch_tokens is not None:
        examples = round(experiment.batch_tokens / rows.sizes(train).tokens.mean())
    facts = contract.Facts(loss.hyperparameters, train.columns, examples // shared)
    contract.advise(loss.function, facts)
    read = reads(train.names, columns)
    return tokenise.select(train, read), held_out and tokenise.select(held_out, read)


def check_switches(experiment: config.Experiment) -> None:
    """Raises ValueError for a switch that would have no effect."""
    check_reference(experiment.reference, experiment.steps)
    check_lora(experiment)
    check_statistics(experiment)
    if experiment.batch_tokens is not None and not experiment.balance_steps:
        raise ValueError(
            f"balance_steps is False, and with batch_tokens, {experiment.batch_tokens}, steps take "
            "examples of a plain shuffle anyway: leave one out"
        )
    start = experiment.profile.start
    if start is not None and start >= experiment.steps:
        raise ValueError(
            f"profile.start is {start}, and the run has {experiment.steps} steps: it must be less"
        )


def check_lora(experiment: config.Experiment) -> None:
    """Raises ValueError for settings of an adapter where there is none, and for what excludes
    one.
    """
    settings = experiment.lora
    if settings.rank is None:
        for field in dataclasses.fields(settings):
            value = getattr(settings, field.name)
            if value != field.default:
                raise ValueError(
                    f"lora.{field.name} is {value}, and lora.rank is None, so that there is no "
                    "adapter: give --lora.rank, or leave it out"
                )
        check_frozen(experiment)
    elif experiment.reference.update_every is not None:
        raise ValueError(
            f"reference.update_every is {experiment.reference.update_every}, and lora.rank is "
            f"{settings.rank}: a reference can only follow a policy of which all parameters are "
            "trained; leave one out"
        )


def check_frozen(experiment: config.Experiment) -> None:
    """Raises ValueError for model.frozen where all parameters are trained, and nothing is held or
    the reference would be rounded and the policy not.
    """
    held, settings = experiment.model.frozen, experiment.reference
    if held is None:
        return
    if settings.source is None or settings.cached or settings.update_every is not None:
        raise ValueError(
            f"model.frozen is {held}, and this run holds nothing that is not trained: leave it out"
        )
    compute = initial.compute_type(experiment.model)
    if held == "int8" or (held, compute) == ("bfloat16", "float32"):
        raise ValueError(
            f"model.frozen is {held}, the compute type {compute} and lora.rank None: the reference "
            "would be rounded and the policy not; give --lora.rank, or leave it out"
        )


def check_statistics(experiment: config.Experiment) -> None:
    """Raises ValueError where statistics is microbatch to no effect."""
    loss, parts = experiment.loss.function, experiment.microbatches
    if experiment.statistics == "microbatch" and not (
        parts > 1 and contract.accumulates_apart(loss)
    ):
        cause = "microbatches is 1" if parts == 1 else f"loss {loss.__name__} has no statistics"
        raise ValueError(
            f"statistics is microbatch, which changes nothing where {cause}: leave it out"
        )


def check_reference(settings: config.Reference, steps: int) -> None:
    """Raises ValueError for settings of the reference that exclude each other or have no effect."""
    if settings.cached and settings.source is None:
        raise ValueError("reference.cached is set and reference.source is None: leave one out")
    if settings.update_every is not None and (settings.cached or settings.source is None):
        raise ValueError(
            f"reference.update_every is {settings.update_every}, and the reference is "
            f"{'cached' if settings.cached else 'None'}: one that follows the policy needs its own "
            "parameters; leave reference.cached out and give --reference.source"
        )
    if settings.update_every is not None and settings.update_every >= steps:
        raise ValueError(
            f"reference.update_every is {settings.update_every}, and the run has {steps} "
            "steps: no step would see an updated reference; it must be less"
        )
    if settings.update_every is None and settings.update_weight != config.Reference().update_weight:
        raise ValueError(
            f"reference.update_weight is {settings.update_weight}, and the reference stays: "
            "give --reference.update-every, or leave it out"
        )


def check_lengths(data: tokenise.Tokenised, positions: int, experiment: config.Experiment) -> None:
    """Raises ValueError where a prompt and completion are longer than the model's positions."""
    prompts = data.prompts[:, 1] - data.prompts[:, 0]
    longest = int(
        (prompts + (data.completions[:, :, 1] - data.completions[:, :, 0]).max(axis=1)).max()
    )
    if longest > positions:
        raise ValueError(
            f"an example has {longest} tokens and the model {experiment.model.source} {positions} "
            f"positions: lower --data.max-length, now {experiment.data.max_length}"
        )


def write_reports(folder: str, sides: Mapping[str, reference.LaidOut | None]) -> None:
    """Writes data.json: rows, examples, and what was dropped and cut for which reason, by side.

    A file that is there is kept: it is of the run's start, and a resumed run reads equal rows.
    """
    path = paths.join(folder, "data.json")
    if not paths.exists(path):
        reports = {name: side.data.report for name, side in sides.items() if side is not None}
        paths.write_text(path, json.dumps(reports, indent=1))


def enable_compile_cache(folder: str) -> None:
    """Keeps compiled programs in a local folder, for the next process with the same shapes."""
    if not paths.is_local(folder):
        return
    os.makedirs(folder, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_COMPILING)

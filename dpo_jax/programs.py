"""The compiled functions of a run, made from nothing but their form: runs of one form can share
them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import optax
from jax.sharding import Mesh

from dpo_jax import (
    config,
    contract,
    evaluate,
    initial,
    logps,
    optimizer,
    reference,
    sharding,
    train_step,
)
from dpo_jax.model import decoder, lora


class Form(NamedTuple):
    """All that a run's compiled functions depend on beside the shapes of batches, in values that
    can be compared.
    """

    model: decoder.Decoder
    mesh: Mesh
    # what is trained: the tree, and its arrays' shapes and types
    tree: Any
    shapes: tuple[jax.ShapeDtypeStruct, ...]
    # of the adapter
    scale: float
    dropout: float
    loss: Callable
    # the loss's hyperparameters that are not traced
    statics: tuple[tuple[str, Any], ...]
    reference: Literal["none", "cached", "live"]
    # the peak learning rate is traced, and None of it is here
    optimizer: config.Optimizer
    steps: int
    microbatches: int
    statistics: Literal["global", "microbatch"]


class Programs(NamedTuple):
    """Jitted functions, each compiled at its first call with a shape of batch."""

    # params -> optimizer state
    start: Callable
    # (state, held, batch, numbers) -> (state, metrics)
    step: Callable
    # (params, loss state, held, the loss's floats, batch) -> Sums: of the loss, and of the rewards
    # of pairs (for which the state is ())
    evaluate_loss: Callable
    evaluate_pairs: Callable
    # (params, batch) -> {name: Logps}: the decoder's alone, whole on every device
    score: Callable
    # (reference, policy, weight) -> the reference that has followed the policy
    follow: Callable


def form(experiment: config.Experiment, start: initial.Initial, mesh: Mesh) -> Form:
    """The form of a run that starts from this model."""
    leaves, tree = jax.tree.flatten(start.params)
    source, peak = experiment.reference.source, config.Optimizer().learning_rate
    _, statics = contract.split(experiment.loss.hyperparameters)
    kind = "live" if source is not None else "none"
    return Form(
        model=start.model,
        mesh=mesh,
        tree=tree,
        shapes=tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves),
        scale=initial.scale(start),
        dropout=experiment.lora.dropout,
        loss=experiment.loss.function,
        statics=tuple(sorted(statics.items())),
        reference="cached" if experiment.reference.cached else kind,
        optimizer=dataclasses.replace(experiment.optimizer, learning_rate=peak),
        steps=experiment.steps,
        microbatches=experiment.microbatches,
        statistics=experiment.statistics,
    )


def make(form: Form) -> Programs:
    """The functions of a form; ValueError for an optimizer that cannot be."""
    tx = optimizer.make(form.optimizer)
    schedule = optimizer.make_schedule(form.optimizer, form.steps)
    placed = shardings(jax.tree.unflatten(form.tree, form.shapes), tx, form.mesh)
    scoring = make_scoring(form)
    pairs = scoring._replace(loss=contract.with_state(evaluate.pair_rewards))
    step = train_step.make_train_step(scoring, tx, schedule, accumulation(form))
    everywhere = sharding.replicated(form.mesh)
    return Programs(
        start=make_start(tx, placed),
        step=jax.jit(step, out_shardings=(placed, everywhere), donate_argnums=0),
        evaluate_loss=jax.jit(
            functools.partial(train_step.evaluate, scoring), out_shardings=everywhere
        ),
        evaluate_pairs=jax.jit(
            functools.partial(train_step.evaluate, pairs), out_shardings=everywhere
        ),
        score=jax.jit(functools.partial(logps.score, form.model), out_shardings=everywhere),
        follow=jax.jit(reference.follow, out_shardings=placed.params, donate_argnums=0),
    )


def make_scoring(form: Form) -> train_step.Scoring:
    """Policy, reference and loss as functions of a batch."""
    declared = contract.needs(form.loss)

    def make_score(statistics, dropout: float) -> Callable:
        score = functools.partial(logps.score, form.model, statistics=statistics, dropout=dropout)

        def score_joined(params, held: train_step.Held, batch: dict):
            return score(lora.join(held.base, params, form.scale), batch)

        return score_joined

    score_reference = {
        "none": reference.none,
        "cached": reference.cached,
        "live": functools.partial(reference.live, make_score(declared.reference, 0.0)),
    }[form.reference]
    loss = contract.with_state(form.loss, **dict(form.statics))
    return train_step.Scoring(make_score(declared.policy, form.dropout), score_reference, loss)


def accumulation(form: Form) -> Callable:
    """How the gradient of a step comes about from its microbatches."""
    if form.microbatches == 1:
        return train_step.whole
    if form.statistics == "global" and contract.accumulates_apart(form.loss):
        return train_step.make_two_pass(form.microbatches)
    return train_step.make_microbatched(form.microbatches)


def shardings(params, tx: optax.GradientTransformation, mesh: Mesh) -> train_step.TrainState:
    """Where the state of such parameters (arrays or shapes) lies: moments where they do."""
    placed = sharding.parameters(params, mesh)
    moments = sharding.like_parameters(jax.eval_shape(tx.init, params), params, placed, mesh)
    everywhere: Any = sharding.replicated(mesh)
    return train_step.TrainState(everywhere, placed, moments, everywhere)


def make_start(tx: optax.GradientTransformation, placed: train_step.TrainState) -> Callable:
    """params -> the optimizer's state before the first update, jitted."""
    return jax.jit(tx.init, out_shardings=placed.opt_state)

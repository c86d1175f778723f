"""A config and its inputs to what the train loop needs: placed parameters, jitted functions,
laid-out data.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dpo_jax import (
    config,
    contract,
    evaluate,
    initial,
    inputs,
    logps,
    optimizer,
    reference,
    sharding,
    train_step,
)
from dpo_jax.data import pack, tokenise, tokenizer
from dpo_jax.model import decoder, presets


class Run(NamedTuple):
    """What the train loop needs."""

    experiment: config.Experiment
    mesh: jax.sharding.Mesh
    tokenizer: tokenizer.Tokenizer
    model: decoder.Decoder
    train: reference.LaidOut
    held_out: reference.LaidOut | None
    # the held-out rows as pairs, where the run trains on unpaired halves
    held_out_pairs: reference.LaidOut | None
    # (state, reference, batch, numbers) -> (state, metrics), jitted
    step: Callable
    # (params, loss state, reference, the loss's floats, batch) -> Sums, jitted: of the loss, and of
    # the rewards of pairs (for which the state is ())
    evaluate_loss: Callable
    evaluate_pairs: Callable
    sampler: evaluate.Sampler | None
    # parameters of a live reference; None where it is cached or absent
    reference: Any
    # (reference, policy) -> the reference that has followed the policy, jitted; None where it stays
    follow: Callable | None
    # on the host: what samples are compared with where that is not the live reference: the one that
    # is cached or moves, as it was, or else the initial policy; None where samples are drawn from
    # no model that was trained before
    compared: Any
    # the loss's floats and the learning rate, as the step takes them
    numbers: dict
    # content hashes of rows and weights, which a resumed run must find again
    identities: dict[str, str]


def assemble(
    experiment: config.Experiment, mesh: jax.sharding.Mesh
) -> tuple[Run, train_step.TrainState]:
    """Reads and checks the inputs, places model and reference; nothing but a cached reference is
    computed yet.
    """
    found = inputs.load(experiment, mesh)
    print(f"training: {tokenise.describe(found.train.report)}")
    if found.held_out is not None:
        print(f"held out: {tokenise.describe(found.held_out.report)}")
    params = found.initial.params
    tx = optimizer.make(experiment.optimizer)
    schedule = optimizer.make_schedule(experiment.optimizer, experiment.steps)
    anchor = load_reference(experiment, found, mesh)
    identities = identify(found, anchor)
    train, held_out, held_out_pairs = lay_out(experiment, found, mesh, anchor, identities)
    scoring = make_scoring(experiment, found.initial.model)
    sampler = make_sampler(experiment, found, mesh)
    compared = None if sampler is None else hold_compared(experiment, params, anchor)
    if not has_live_reference(experiment):
        anchor = None
    elif anchor is params:
        # the step donates the policy's buffers, and the reference outlives them
        anchor = jax.tree.map(jnp.copy, params)
    state, shardings = make_state(params, tx, contract.needs(experiment.loss.function), mesh)
    pair_scoring = scoring._replace(loss=contract.with_state(evaluate.pair_rewards))
    step = train_step.make_train_step(scoring, tx, schedule, accumulation(experiment))
    run = Run(
        identities=identities,
        experiment=experiment,
        mesh=mesh,
        tokenizer=found.tokenizer,
        model=found.initial.model,
        train=train,
        held_out=held_out,
        held_out_pairs=held_out_pairs,
        step=jax.jit(step, out_shardings=(shardings, sharding.replicated(mesh)), donate_argnums=0),
        evaluate_loss=jax.jit(functools.partial(train_step.evaluate, scoring)),
        evaluate_pairs=jax.jit(functools.partial(train_step.evaluate, pair_scoring)),
        sampler=sampler,
        reference=anchor,
        follow=make_follow(experiment.reference, shardings.params),
        compared=compared,
        numbers={
            "loss": contract.split(experiment.loss.hyperparameters)[0],
            "learning_rate": jnp.float32(experiment.optimizer.learning_rate),
        },
    )
    return run, state


def identify(found: inputs.Inputs, anchor) -> dict[str, str]:
    """Content hashes of what a run reads."""
    hashes = {"training rows": found.train.fingerprint}
    if found.held_out is not None:
        hashes["held-out rows"] = found.held_out.fingerprint
    hashes["initial policy"] = reference.fingerprint(found.initial.params)
    if anchor is found.initial.params:
        hashes["reference"] = hashes["initial policy"]
    elif anchor is not None:
        hashes["reference"] = reference.fingerprint(anchor)
    return hashes


def load_reference(experiment: config.Experiment, found: inputs.Inputs, mesh):
    """Parameters of the reference on the mesh, the policy's own where it is the initial policy;
    None without one.
    """
    source = experiment.reference.source
    if source is None:
        return None
    if is_initial(experiment):
        return found.initial.params
    loaded = initial.load(source, experiment.model, experiment.seed, mesh)
    if loaded.model.config.vocabulary_size != found.initial.model.config.vocabulary_size:
        raise ValueError(
            f"reference.source {source} has a vocabulary of {loaded.model.config.vocabulary_size} "
            f"and the policy {experiment.model.source} one of "
            f"{found.initial.model.config.vocabulary_size}: they must share a tokenizer"
        )
    if loaded.model.config != found.initial.model.config:
        raise ValueError(
            f"reference.source {source} has another shape than the policy "
            f"{experiment.model.source}; both are scored by one function, so they must agree"
        )
    return loaded.params


def has_live_reference(experiment: config.Experiment) -> bool:
    """Whether the reference's parameters are held while the run goes on."""
    return experiment.reference.source is not None and not experiment.reference.cached


def is_initial(experiment: config.Experiment) -> bool:
    """Whether the reference has the weights that the policy starts with."""
    return experiment.reference.source in ("initial", experiment.model.source)


def lay_out(
    experiment: config.Experiment,
    found: inputs.Inputs,
    mesh,
    anchor,
    identities: dict[str, str],
) -> tuple[reference.LaidOut, reference.LaidOut | None, reference.LaidOut | None]:
    """Training, held-out and held-out pairs' data, each with its plan and, where it is cached, its
    reference.
    """
    cached = experiment.reference.cached and anchor is not None
    params_hash = identities["reference"] if cached else ""
    shards, declared = sharding.batch_shards(mesh), contract.needs(experiment.loss.function)

    def one(data: tokenise.Tokenised, parts: int) -> reference.LaidOut:
        plan = pack.plan(
            data, experiment.batch_size, parts, experiment.seed, scores_prompt=declared.prompt
        )
        if not cached:
            return reference.LaidOut(data, plan, None)
        model = found.initial.model
        table = reference.load_table(
            model, anchor, params_hash, data, plan, mesh, declared.reference
        )
        return reference.LaidOut(data, plan, table)

    train = one(found.train, shards * experiment.microbatches)
    held_out = None if found.held_out is None else one(found.held_out, shards)
    pairs = None if found.held_out_pairs is None else one(found.held_out_pairs, shards)
    return train, held_out, pairs


def make_scoring(experiment: config.Experiment, model: decoder.Decoder) -> train_step.Scoring:
    """Policy, reference and loss as functions of a batch."""
    loss, declared = experiment.loss, contract.needs(experiment.loss.function)
    score = functools.partial(logps.score, model, statistics=declared.policy)
    _, statics = contract.split(loss.hyperparameters)
    if experiment.reference.source is None:
        score_reference = reference.none
    elif experiment.reference.cached:
        score_reference = reference.cached
    else:
        score_live = functools.partial(logps.score, model, statistics=declared.reference)
        score_reference = functools.partial(reference.live, score_live)
    return train_step.Scoring(score, score_reference, contract.with_state(loss.function, **statics))


def make_follow(settings: config.Reference, placed) -> Callable | None:
    """The jitted update of a moving reference, which takes the old one's place; None: it stays."""
    if settings.update_every is None:
        return None
    follow = jax.jit(reference.follow, out_shardings=placed, donate_argnums=0)
    return functools.partial(follow, weight=jnp.float32(settings.update_weight))


def hold_compared(experiment: config.Experiment, params, anchor) -> Any:
    """`Run.compared`."""
    stays = experiment.reference.update_every is None
    if has_live_reference(experiment) and stays:
        return None
    if anchor is None and experiment.model.source in presets.PRESETS:
        return None
    return jax.device_get(params if anchor is None else anchor)


def accumulation(experiment: config.Experiment) -> Callable:
    """How the gradient of a step comes about from its microbatches."""
    if experiment.microbatches == 1:
        return train_step.whole
    if experiment.statistics == "global" and contract.accumulates_apart(experiment.loss.function):
        return train_step.make_two_pass(experiment.microbatches)
    return train_step.make_microbatched(experiment.microbatches)


def make_state(
    params, tx: optax.GradientTransformation, declared: contract.Needs, mesh
) -> tuple[train_step.TrainState, Any]:
    """The state before the first update, and its shardings: moments lie where parameters do."""
    placed = sharding.parameters(params, mesh)
    abstract = jax.eval_shape(tx.init, params)
    moments = sharding.like_parameters(abstract, params, placed, mesh)
    opt_state = jax.jit(tx.init, out_shardings=moments)(params)
    everywhere: Any = sharding.replicated(mesh)
    step, loss_state = jax.device_put((jnp.int32(0), declared.state()), everywhere)
    shardings = train_step.TrainState(everywhere, placed, moments, everywhere)
    return train_step.TrainState(step, params, opt_state, loss_state), shardings


def make_sampler(
    experiment: config.Experiment, found: inputs.Inputs, mesh
) -> evaluate.Sampler | None:
    """What held-out sampling needs; None where samples.count is 0."""
    if not experiment.samples.count or found.held_out is None:
        return None
    prompts = evaluate.prompts(found.held_out, experiment.samples.count)
    return evaluate.Sampler(
        found.initial.model,
        found.tokenizer,
        prompts,
        experiment.samples,
        mesh,
        experiment.batch_size,
        jax.jit(functools.partial(logps.score, found.initial.model)),
    )

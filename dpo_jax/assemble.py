"""A config and its inputs to what the train loop needs: placed parameters, jitted functions,
laid-out data.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import (
    config,
    contract,
    evaluate,
    functions,
    initial,
    inputs,
    kept,
    processes,
    programs,
    reference,
    sharding,
    train_step,
)
from dpo_jax.data import epochs, pack, sides, tokenise, tokenizer
from dpo_jax.model import config as model_config
from dpo_jax.model import frozen, presets


class Run(NamedTuple):
    """What the train loop needs."""

    experiment: config.Experiment
    mesh: jax.sharding.Mesh
    tokenizer: tokenizer.Tokenizer
    # the model as it starts, without what is trained, which is the state's
    initial: initial.Initial
    train: reference.LaidOut
    held_out: reference.LaidOut | None
    # the held-out rows as pairs, where the run trains on unpaired halves
    held_out_pairs: reference.LaidOut | None
    # (state, held, batch, numbers) -> (state, metrics), jitted
    step: Callable
    # (params, loss state, held, the loss's floats, batch) -> Sums, jitted: of the loss, and of the
    # rewards of pairs (for which the state is ())
    evaluate_loss: Callable
    evaluate_pairs: Callable
    sampler: evaluate.Sampler | None
    # parameters that are not trained
    held: train_step.Held
    # (reference, policy) -> the reference that has followed the policy, jitted; None where it stays
    follow: Callable | None
    # on the host, in the form of held.reference: what samples are compared with where that is not
    # the live reference: the one that is cached or moves, as it was, or else the initial policy;
    # None where samples are drawn from no model that was trained before
    compared: Any
    # the loss's floats and the learning rate, as the step takes them
    numbers: dict
    # content hashes of rows and weights, which a resumed run must find again
    identities: dict[str, str]


def assemble(
    experiment: config.Experiment, mesh: jax.sharding.Mesh, keeper: kept.Kept | None = None
) -> tuple[Run, train_step.TrainState]:
    """Reads and checks the inputs, places model and reference; nothing but a cached reference is
    computed yet.

    What earlier runs have made and this one needs is taken from the keeper, which gets the rest.
    """
    keeper = kept.Kept() if keeper is None else keeper
    found = inputs.load(experiment, mesh, keeper)
    processes.check_same(described(experiment, found))
    print(f"training: {sides.describe(found.train.report)}")
    if found.held_out is not None:
        print(f"held out: {sides.describe(found.held_out.report)}")
    compiled: programs.Programs = keeper.all(
        programs.make, programs.form(experiment, found.initial, mesh)
    )
    params = found.initial.params
    started = found.initial._replace(params={})
    anchor, anchor_hash = load_reference(experiment, found, mesh)
    identities = identify(found, anchor_hash)
    train, held_out, held_out_pairs = lay_out(experiment, found, mesh, anchor, identities)
    if train.plan.starts is not None:
        identities["batch shards, by which batch_tokens are filled"] = pack.fingerprint(train.plan)
    else:
        identities["rules by which steps get their examples"] = epochs.rules()
    sampler = make_sampler(experiment, found, mesh, compiled.score)
    compared = None if sampler is None else hold_compared(experiment, params, anchor)
    held = train_step.Held(started.base, hold_reference(experiment, found, anchor))
    print(describe(experiment, found, held))
    run = Run(
        identities=identities,
        experiment=experiment,
        mesh=mesh,
        tokenizer=found.tokenizer,
        initial=started,
        train=train,
        held_out=held_out,
        held_out_pairs=held_out_pairs,
        step=compiled.step,
        evaluate_loss=compiled.evaluate_loss,
        evaluate_pairs=compiled.evaluate_pairs,
        sampler=sampler,
        held=held,
        follow=make_follow(experiment.reference, compiled.follow),
        compared=compared,
        numbers={
            "loss": contract.split(experiment.loss.hyperparameters)[0],
            "learning_rate": jnp.float32(experiment.optimizer.learning_rate),
        },
    )
    return run, make_state(params, compiled.start, contract.needs(experiment.loss.function), mesh)


def described(experiment: config.Experiment, found: inputs.Inputs) -> dict[str, str]:
    """What all processes of a run must have alike, by name, before they compute anything together
    that depends on it.
    """
    held_out = "" if found.held_out is None else found.held_out.fingerprint
    settings = {
        name: functions.described(value) if callable(value) else value
        for name, value in [
            *config.flatten(experiment).items(),
            ("loss", experiment.loss.function),
        ]
    }
    return {
        "settings": repr(settings),
        "training rows": found.train.fingerprint,
        "held-out rows": held_out,
    }


def identify(found: inputs.Inputs, anchor_hash: str | None) -> dict[str, str]:
    """Content hashes of what a run reads."""
    hashes = {"training rows": found.train.fingerprint}
    if found.held_out is not None:
        hashes["held-out rows"] = found.held_out.fingerprint
    hashes["initial policy"] = found.initial.identity
    if anchor_hash is not None:
        hashes["reference"] = anchor_hash
    return hashes


def joined(start: initial.Initial, params) -> dict:
    """The parameters that the decoder takes where these are trained."""
    return initial.policy(start._replace(params=params))


def compared(run: Run):
    """The parameters that samples are compared with; None: there are none."""
    if run.compared is None and run.held.reference is None:
        return None
    if run.compared is None:
        return joined(run.initial, run.held.reference)
    return joined(run.initial, jax.tree.map(sharding.from_host, run.compared))


def hold_reference(experiment: config.Experiment, found: inputs.Inputs, anchor):
    """The parameters of a live reference: its own, since the step donates the policy's."""
    if not has_live_reference(experiment):
        return None
    if anchor is not found.initial.params:
        return anchor
    if experiment.reference.update_every is not None:
        return jax.tree.map(jnp.copy, anchor)
    held_as = initial.others_as(experiment.model)
    return frozen.hold(anchor, held_as, held_as)


def load_reference(
    experiment: config.Experiment, found: inputs.Inputs, mesh
) -> tuple[Any, str | None]:
    """Parameters of the reference on the mesh, in the form of `Held.reference`, and their hash: the
    policy's own where it is the initial policy; None and None without one.
    """
    source, adapter = experiment.reference.source, found.initial.adapter
    if source is None:
        return None, None
    if source == "base" and adapter is None:
        raise ValueError(
            "reference.source is base, and there is no adapter that could be off: give "
            "--lora.rank, or --reference.source initial"
        )
    # a new adapter changes nothing yet, so that the initial policy is the base
    if adapter is not None and (
        source == "base" or (is_initial(experiment) and found.initial.is_new)
    ):
        return {}, reference.digest(adapter.base, adapter.held_as)
    if is_initial(experiment):
        return found.initial.params, found.initial.identity
    # one that follows the policy is a mean of what is trained
    follows = experiment.reference.update_every is not None
    held_as = "float32" if follows else initial.others_as(experiment.model)
    loaded = initial.load(source, experiment.model, experiment.seed, mesh, read_as=held_as)
    loaded = initial.merged(loaded, mesh)
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
    held = loaded.params if follows else frozen.hold(loaded.params, held_as, held_as, donated=True)
    return held, reference.digest(loaded.identity, held_as)


def describe(experiment: config.Experiment, found: inputs.Inputs, held: train_step.Held) -> str:
    """What is trained, and against what reference, for the terminal."""
    start, source = found.initial, experiment.reference.source
    trained = sum(leaf.size for leaf in jax.tree.leaves(start.params))
    total = model_config.parameter_count(start.model.config)
    mebibytes = {
        "base": frozen.bytes_of(held.base) / 2**20,
        "reference": frozen.bytes_of(held.reference) / 2**20,
    }
    sizes = ", ".join(f"{name} {size:.1f} MiB" for name, size in mebibytes.items() if size)
    if start.adapter is None:
        text = f"training all {total:,} parameters"
    else:
        kind = "a new adapter" if start.is_new else "the adapter"
        text = f"training {kind} of {trained:,} parameters on {start.adapter.source} ({total:,})"
        meaning = {
            None: "none",
            "base": "the base with the adapter off",
            "initial": "the base with the adapter off"
            if start.is_new
            else "the base with the adapter as it starts",
        }
        text += f"; reference: {meaning.get(source, source)}"
    return f"{text}; held beside the state: {sizes}" if sizes else text


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
    options = {"scores_prompt": declared.prompt, "row_shards": sharding.row_shards(mesh)}

    def one(data: tokenise.Tokenised, plan: pack.Plan) -> reference.LaidOut:
        if not cached:
            return reference.LaidOut(data, plan, None)
        params = joined(found.initial, anchor)
        table = reference.load_table(
            found.initial.model, params, params_hash, data, plan, mesh, declared.reference
        )
        return reference.LaidOut(data, plan, table)

    def one_held_out(data: tokenise.Tokenised | None) -> reference.LaidOut | None:
        if data is None:
            return None
        batches = math.ceil(len(data.prompts) / experiment.batch_size)
        evaluations = 2 + experiment.steps // (experiment.evaluate_every or experiment.steps)
        plan = pack.plan(
            data,
            experiment.batch_size,
            shards,
            experiment.seed,
            number=batches * evaluations,
            **options,
        )
        return one(data, plan)

    plan = pack.plan_run(found.train, experiment, shards * experiment.microbatches, **options)
    print(pack.describe(plan, len(found.train.prompts), experiment.steps))
    return one(found.train, plan), one_held_out(found.held_out), one_held_out(found.held_out_pairs)


def hold_compared(experiment: config.Experiment, params, anchor) -> Any:
    """`Run.compared`."""
    stays = experiment.reference.update_every is None
    if has_live_reference(experiment) and stays:
        return None
    if anchor is None and experiment.model.source in presets.PRESETS:
        return None
    return jax.tree.map(sharding.to_host, params if anchor is None else anchor)


def make_follow(settings: config.Reference, follow: Callable) -> Callable | None:
    """The update of a moving reference, which takes the old one's place; None: it stays."""
    if settings.update_every is None:
        return None
    return functools.partial(follow, weight=jnp.float32(settings.update_weight))


def make_state(params, start: Callable, declared: contract.Needs, mesh) -> train_step.TrainState:
    """The state before the first update."""
    step, loss_state = sharding.replicate((np.int32(0), declared.state()), mesh)
    return train_step.TrainState(step, params, start(params), loss_state)


def make_sampler(
    experiment: config.Experiment, found: inputs.Inputs, mesh, score: Callable
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
        score,
    )

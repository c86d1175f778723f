"""The train step: one function for every loss, kind of reference and accumulation.

Dimensions: B rows, N = B * E examples of a batch; m microbatches of B / m rows and N / m examples.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from dpo_jax import contract, logps

Completions = dict[str, logps.Logps]


@flax.struct.dataclass
class TrainState:
    """What the step changes. The reference is no part of it."""

    step: jax.Array  # int32 scalar, updates so far
    params: Any
    opt_state: Any


class Scoring(NamedTuple):
    """How a batch becomes losses."""

    # (params, batch) -> policy
    score: Callable[[Any, dict], Completions]
    # (reference parameters or None, batch) -> reference or None
    score_reference: Callable[[Any, dict], Completions | None]
    # (policy, reference, batch, **numbers) -> losses [N], metrics {name: [N]}
    loss: Callable


class Sums(NamedTuple):
    """What adds up over microbatches and batches."""

    # sum and weight [2] of the loss and of each metric
    metrics: dict[str, jax.Array]
    # largest absolute log-ratio per token, in nats; nan without a reference
    deviation: jax.Array


def make_train_step(
    scoring: Scoring,
    tx: optax.GradientTransformation,
    schedule: Callable[[jax.Array], jax.Array],
    accumulate: Callable,
) -> Callable:
    """step(state, reference, batch, numbers) -> (state, metrics {name: float32 scalar}).

    `numbers` is {"loss": the loss's floats, "learning_rate": peak}, traced, so that no value of
    them compiles anew. `accumulate` is `whole`, or what `make_microbatched` or `make_two_pass`
    returns. The metric `deviation` is the largest log-ratio per token before the update.
    """

    def step(state: TrainState, reference, batch: dict, numbers: dict) -> tuple[TrainState, dict]:
        gradient, sums = accumulate(scoring, state.params, reference, batch, numbers["loss"])
        updates, opt_state = tx.update(gradient, state.opt_state, state.params)
        rate = numbers["learning_rate"] * schedule(state.step)
        params = optax.apply_updates(
            state.params, jax.tree.map(lambda update: rate * update, updates)
        )
        metrics = {name: value[0] / value[1] for name, value in sums.metrics.items()}
        metrics |= {
            "grad_norm": optax.tree.norm(gradient),
            "learning_rate": rate,
            "deviation": sums.deviation,
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    return step


def evaluate(scoring: Scoring, params, reference, batch: dict, numbers: dict) -> Sums:
    """Sums of loss and metrics over a batch; `numbers` are the loss's floats."""
    policy, anchor = scoring.score(params, batch), scoring.score_reference(reference, batch)
    return apply_loss(scoring, policy, anchor, batch, numbers)


def apply_loss(
    scoring: Scoring, policy: Completions, anchor: Completions | None, batch: dict, numbers: dict
) -> Sums:
    """Sums of loss and metrics of scored completions."""
    losses, metrics = scoring.loss(policy, anchor, batch, **numbers)
    totals = {f"logps/{name}": scored.total for name, scored in policy.items()}
    sums = contract.weighted_sums(losses, {**totals, **metrics}, batch["weight"])
    if anchor is None:
        return Sums(sums, jnp.array(jnp.nan))
    ratios = [
        jnp.abs(policy[name].total - anchor[name].total) / jnp.maximum(anchor[name].length, 1)
        for name in policy
    ]
    filled = batch["weight"] > 0
    return Sums(
        sums, jnp.max(jnp.stack([jnp.max(jnp.where(filled, ratio, 0.0)) for ratio in ratios]))
    )


def whole(scoring: Scoring, params, reference, batch: dict, numbers: dict) -> tuple[Any, Sums]:
    """Gradient of the mean loss, and the sums, from all rows at once."""

    def objective(params):
        sums = evaluate(scoring, params, reference, batch, numbers)
        return sums.metrics["loss"][0] / jnp.maximum(sums.metrics["loss"][1], 1.0), sums

    return jax.grad(objective, has_aux=True)(params)


def make_microbatched(microbatches: int) -> Callable:
    """Accumulation for losses without batch statistics, or with statistics of each microbatch."""

    def accumulate(
        scoring: Scoring, params, reference, batch: dict, numbers: dict
    ) -> tuple[Any, Sums]:
        total_weight = jnp.maximum(jnp.sum(batch["weight"]), 1.0)

        def objective(params, part):
            sums = evaluate(scoring, params, reference, part, numbers)
            return sums.metrics["loss"][0] / total_weight, sums

        def one(carry, part):
            gradient, sums = jax.grad(objective, has_aux=True)(params, part)
            return jax.tree.map(jnp.add, carry, gradient), sums

        gradient, sums = jax.lax.scan(
            one, jax.tree.map(jnp.zeros_like, params), split(batch, microbatches)
        )
        return gradient, Sums(
            {k: v.sum(axis=0) for k, v in sums.metrics.items()}, sums.deviation.max()
        )

    return accumulate


def make_two_pass(microbatches: int) -> Callable:
    """Accumulation for statistics of the global batch: exact for any loss.

    Scores all microbatches without residuals, differentiates the loss once with respect to the
    log-probabilities, and backpropagates each microbatch with those cotangents.
    """

    def accumulate(
        scoring: Scoring, params, reference, batch: dict, numbers: dict
    ) -> tuple[Any, Sums]:
        parts = split(batch, microbatches)
        policy = jax.lax.map(lambda part: scoring.score(params, part), parts)  # leaves [m, N / m]
        anchor = jax.lax.map(lambda part: scoring.score_reference(reference, part), parts)
        policy, anchor, flat = jax.tree.map(join, (policy, anchor, per_example(parts)))

        def objective(totals):
            moved = {name: scored._replace(total=totals[name]) for name, scored in policy.items()}
            sums = apply_loss(scoring, moved, anchor, flat, numbers)
            return sums.metrics["loss"][0] / jnp.maximum(sums.metrics["loss"][1], 1.0), sums

        totals = {name: scored.total for name, scored in policy.items()}
        cotangents, sums = jax.grad(objective, has_aux=True)(totals)
        cotangents = jax.tree.map(lambda leaf: leaf.reshape(microbatches, -1), cotangents)

        def one(carry, part):
            rows, cotangent = part
            _, pull = jax.vjp(
                lambda p: {n: s.total for n, s in scoring.score(p, rows).items()}, params
            )
            return jax.tree.map(jnp.add, carry, pull(cotangent)[0]), None

        zeros = jax.tree.map(jnp.zeros_like, params)
        return jax.lax.scan(one, zeros, (parts, cotangents))[0], sums

    return accumulate


def split(batch: dict, microbatches: int) -> dict:
    """Every m-th row to one microbatch: leaves [B, ...] and [N] -> [m, B / m, ...] and [m, N / m].

    So each shard's rows are spread over all microbatches, and none has to move.
    """
    rows = len(batch["tokens"])

    def one(leaf: jax.Array) -> jax.Array:
        by_row = leaf.reshape(
            rows // microbatches, microbatches, len(leaf) // rows, *leaf.shape[1:]
        )
        return jnp.moveaxis(by_row, 1, 0).reshape(
            microbatches, len(leaf) // microbatches, *leaf.shape[1:]
        )

    return jax.tree.map(one, batch)


def join(leaf: jax.Array) -> jax.Array:
    """[m, N / m] -> [N], in the order of the microbatches."""
    return leaf.reshape(-1, *leaf.shape[2:])


def per_example(parts: dict) -> dict:
    """The leaves of a batch with one number an example, which is all that a loss reads."""
    by_token = ("tokens", "example", "branch", "position", "source", "target", "slot")
    return {name: leaf for name, leaf in parts.items() if name not in by_token}

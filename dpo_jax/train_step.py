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
    """What the step changes."""

    step: jax.Array  # int32 scalar, updates so far
    params: Any
    opt_state: Any
    # what the loss keeps from step to step; () for most
    loss_state: Any = ()


class Held(NamedTuple):
    """Parameters that the step reads and does not change. It is no part of the state."""

    # what lies under an adapter; {} where all parameters are trained
    base: dict
    # what the reference has in the place of the base's parameters or beside them: all of its own,
    # an adapter's, or {} for the base alone; None where no reference is live
    reference: Any = None


class Scoring(NamedTuple):
    """How a batch becomes losses."""

    # (params, held, batch) -> policy
    score: Callable[[Any, Held, dict], Completions]
    # (held, batch) -> reference or None
    score_reference: Callable[[Held, dict], Completions | None]
    # (policy, reference, batch, state, **numbers) -> losses [N], metrics {name: [N]}, next state
    loss: Callable


class Sums(NamedTuple):
    """What a batch or microbatch gives beside the gradient."""

    # sum and weight [2] of the loss and of each metric, which add up over batches
    metrics: dict[str, jax.Array]
    # largest absolute log-ratio over the root of its completion's tokens; nan without a reference
    deviation: jax.Array
    # the loss's next state
    loss_state: Any


def make_train_step(
    scoring: Scoring,
    tx: optax.GradientTransformation,
    schedule: Callable[[jax.Array], jax.Array],
    accumulate: Callable,
) -> Callable:
    """step(state, held, batch, numbers) -> (state, metrics {name: float32 scalar}).

    `numbers` is {"loss": the loss's floats, "learning_rate": peak}, traced, so that no value of
    them compiles anew. `accumulate` is `whole`, or what `make_microbatched` or `make_two_pass`
    returns. The metric `deviation` is `Sums.deviation` before the update.
    """

    def step(state: TrainState, held: Held, batch: dict, numbers: dict) -> tuple[TrainState, dict]:
        gradient, sums = accumulate(scoring, state, held, batch, numbers["loss"])
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
        return TrainState(state.step + 1, params, opt_state, sums.loss_state), metrics

    return step


def evaluate(scoring: Scoring, params, loss_state, held: Held, numbers: dict, batch: dict) -> Sums:
    """Sums of loss and metrics over a batch; `numbers` are the loss's floats."""
    policy, anchor = scoring.score(params, held, batch), scoring.score_reference(held, batch)
    return apply_loss(scoring, policy, anchor, batch, loss_state, numbers)


def apply_loss(
    scoring: Scoring,
    policy: Completions,
    anchor: Completions | None,
    batch: dict,
    loss_state,
    numbers: dict,
) -> Sums:
    """Sums of loss and metrics of scored completions."""
    losses, metrics, loss_state = scoring.loss(policy, anchor, batch, loss_state, **numbers)
    totals = {f"logps/{name}": scored.total for name, scored in policy.items()}
    sums = contract.weighted_sums(losses, {**totals, **metrics}, batch["weight"])
    loss_state = jax.lax.stop_gradient(loss_state)
    if anchor is None:
        return Sums(sums, jnp.array(jnp.nan), loss_state)
    ratios = [
        jnp.abs(policy[name].total - anchor[name].total)
        * jax.lax.rsqrt(jnp.maximum(anchor[name].length, 1).astype(jnp.float32))
        for name in policy
    ]
    filled = batch["weight"] > 0
    largest = jnp.max(jnp.stack([jnp.max(jnp.where(filled, ratio, 0.0)) for ratio in ratios]))
    return Sums(sums, largest, loss_state)


def whole(
    scoring: Scoring, state: TrainState, held: Held, batch: dict, numbers: dict
) -> tuple[Any, Sums]:
    """Gradient of the mean loss, and the sums, from all rows at once."""

    def objective(params):
        sums = evaluate(scoring, params, state.loss_state, held, numbers, batch)
        return sums.metrics["loss"][0] / jnp.maximum(sums.metrics["loss"][1], 1.0), sums

    return jax.grad(objective, has_aux=True)(state.params)


def make_microbatched(microbatches: int) -> Callable:
    """Accumulation for losses without batch statistics, or with statistics of each microbatch.

    A state of the loss goes from each microbatch to the next.
    """

    def accumulate(
        scoring: Scoring, state: TrainState, held: Held, batch: dict, numbers: dict
    ) -> tuple[Any, Sums]:
        total_weight = jnp.maximum(jnp.sum(batch["weight"]), 1.0)

        def objective(params, loss_state, part):
            sums = evaluate(scoring, params, loss_state, held, numbers, part)
            return sums.metrics["loss"][0] / total_weight, sums

        def one(carry, part):
            total, loss_state = carry
            gradient, sums = jax.grad(objective, has_aux=True)(state.params, loss_state, part)
            return (jax.tree.map(jnp.add, total, gradient), sums.loss_state), sums[:2]

        start = jax.tree.map(jnp.zeros_like, state.params), state.loss_state
        parts = split(batch, microbatches)
        (gradient, loss_state), (metrics, deviation) = jax.lax.scan(one, start, parts)
        totals = {name: value.sum(axis=0) for name, value in metrics.items()}
        return gradient, Sums(totals, deviation.max(), loss_state)

    return accumulate


def make_two_pass(microbatches: int) -> Callable:
    """Accumulation for statistics of the global batch: exact for any loss.

    Scores all microbatches without residuals, differentiates the loss once with respect to what was
    scored, and backpropagates each microbatch with those cotangents.
    """

    def accumulate(
        scoring: Scoring, state: TrainState, held: Held, batch: dict, numbers: dict
    ) -> tuple[Any, Sums]:
        parts = split(batch, microbatches)
        # [m, N / m] each
        policy = jax.lax.map(lambda part: scoring.score(state.params, held, part), parts)
        anchor = jax.lax.map(lambda part: scoring.score_reference(held, part), parts)
        policy, anchor, flat = jax.tree.map(join, (policy, anchor, per_example(parts)))

        def objective(scored):
            moved = {name: policy[name]._replace(**sums) for name, sums in scored.items()}
            sums = apply_loss(scoring, moved, anchor, flat, state.loss_state, numbers)
            return sums.metrics["loss"][0] / jnp.maximum(sums.metrics["loss"][1], 1.0), sums

        cotangents, sums = jax.grad(objective, has_aux=True)(logps.differentiable(policy))
        cotangents = jax.tree.map(lambda leaf: leaf.reshape(microbatches, -1), cotangents)

        def one(carry, part):
            rows, cotangent = part
            _, pull = jax.vjp(
                lambda params: logps.differentiable(scoring.score(params, held, rows)), state.params
            )
            return jax.tree.map(jnp.add, carry, pull(cotangent)[0]), None

        zeros = jax.tree.map(jnp.zeros_like, state.params)
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
    by_row = ("tokens", "example", "branch", "position", "source", "target", "slot", logps.NOISE)
    return {name: leaf for name, leaf in parts.items() if name not in by_row}

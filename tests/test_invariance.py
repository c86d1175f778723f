"""The same loss and gradient whatever the devices, mesh, microbatches, packing or reference's kind.

A tiny decoder in float32. Every way is compared with the plainest: one device, all rows at once,
packed, a live reference. Tolerance: 1e-4 of the largest element of each parameter's gradient.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import (
    config,
    contract,
    initial,
    logps,
    losses,
    reference,
    sharding,
    train_step,
    vocabulary,
)
from dpo_jax.data import fold, pack
from dpo_jax.model import decoder
from dpo_jax.model.presets import PRESETS

MODEL = decoder.Decoder(PRESETS["tiny"])
TOLERANCE = 1e-4
EXAMPLES = 24
NAMES = ("completion", "mismatched")
# of each kind of need one: none, token means, a reference-free one, the prompt's tokens, statistics
# of tokens under both, under the policy alone, and of the batch, and a state
LOSSES = ("dpo", "ipo", "orpo", "orpo_prompt", "ld_dpo", "wpo", "aot", "kto", "bco")
OF_THE_BATCH = ("aot", "kto", "bco")


@contract.declare(
    batch_statistics=True,
    policy={"head": losses.head, "excess": losses.excess},
    reference={"head": losses.head},
    prompt=True,
    state=contract.needs(losses.bco).state,
)
def all_losses(policy, anchor, batch, state, **weights):
    """A weighted sum of the losses, so that one compiled program serves each of them.

    The two completions of an example are a pair to those that read pairs.
    """
    pair, pair_anchor = (
        {"chosen": side["completion"], "rejected": side["mismatched"], **side}
        for side in (policy, anchor)
    )
    of_kto, metrics = losses.kto(policy, anchor, batch)
    of_bco, _, state = losses.bco(policy, anchor, batch, state)
    found = {"kto": of_kto, "bco": of_bco}
    for name in LOSSES:
        if name not in found:
            found[name] = getattr(losses, name)(pair, pair_anchor, batch)[0]
    values = sum(weights[name] * found[name] for name in LOSSES)
    return values, {"kl": metrics["kl"]}, state


NEEDS = contract.needs(all_losses)


def make_score(model: decoder.Decoder, statistics) -> Callable[..., dict[str, logps.Logps]]:
    def score(params, held: train_step.Held, batch: dict) -> dict[str, logps.Logps]:
        return logps.score(model, params, batch, statistics)

    return score


# BCO's running means after some steps: mean and count of the desirable, and of the undesirable
BASELINES = (
    losses.RunningMean(jnp.float32(0.2), jnp.float32(30)),
    losses.RunningMean(jnp.float32(-0.3), jnp.float32(50)),
)


class Way(NamedTuple):
    """How loss and gradient are computed."""

    mesh: config.Mesh = config.Mesh(fsdp=1)
    microbatches: int = 1
    accumulate: Callable = train_step.whole
    packed: bool = True
    cached: bool = False
    # whether rows' tokens stand in another order than the packer's
    folded: bool = False


class Result(NamedTuple):
    """Of one loss: its value, KTO's KL, BCO's next state, and the gradient."""

    loss: float
    kl: float
    state: list[float]
    gradient: dict


@pytest.fixture(scope="module")
def compute(draw_examples, draw_params) -> Callable[[Way], dict[str, Result]]:
    """All losses by a way; the plainest is computed once."""
    # seeds for which KTO's KL is positive
    policy, anchor = draw_params(MODEL.config, seed=0), draw_params(MODEL.config, seed=2)
    data = draw_examples(EXAMPLES, NAMES, seed=2, tokens=(1, 12))

    def load_table() -> reference.Table:
        mesh = sharding.make_mesh(config.Mesh(), jax.devices()[:1])
        plan = pack.plan(data, 8, 1, seed=0, scores_prompt=True)
        return reference.load_table(MODEL, anchor, "invariance", data, plan, mesh, NEEDS.reference)

    @functools.cache
    def compute(way: Way) -> dict[str, Result]:
        mesh = make_mesh(way)
        batch = make_batch(data, mesh, way)
        if way.cached:
            batch = reference.with_table(batch, load_table())
        model = initial.make_decoder(MODEL.config, config.Model(source="tiny"), mesh)
        live = functools.partial(reference.live, make_score(model, NEEDS.reference))
        scoring = train_step.Scoring(
            make_score(model, NEEDS.policy),
            reference.cached if way.cached else live,
            contract.with_state(all_losses),
        )
        run: Any = jax.jit(functools.partial(way.accumulate, scoring))
        where, placed = sharding.put_batch(batch, mesh), sharding.place(policy, mesh)
        other = None if way.cached else sharding.place(anchor, mesh)
        state = train_step.TrainState(jnp.int32(0), placed, None, BASELINES)
        found = {
            name: as_result(*run(state, train_step.Held({}, other), where, only(name)))
            for name in LOSSES
        }
        assert run._cache_size() == 1
        return found

    return compute


def only(loss: str) -> dict[str, jax.Array]:
    """Shares of the losses: 1 for one of them."""
    return {name: jnp.float32(name == loss) for name in LOSSES}


def make_mesh(way: Way) -> jax.sharding.Mesh:
    axes = way.mesh
    count = axes.data * (axes.fsdp or 1) * axes.sequence * axes.tensor
    return sharding.make_mesh(axes, jax.devices()[:count])


def make_batch(data, mesh: jax.sharding.Mesh, way: Way) -> dict:
    parts, over = sharding.batch_shards(mesh) * way.microbatches, sharding.row_shards(mesh)
    plan = pack.plan(data, EXAMPLES, parts, seed=0, scores_prompt=True, row_shards=over)
    if not way.packed:
        shape = plan.ladder[-1]._replace(rows=EXAMPLES, examples=1)
        plan = dataclasses.replace(plan, ladder=(shape,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fold, "CHUNK", 4 if way.folded else fold.CHUNK)
        batch = pack.batch(data, plan, 0)
    assert way.folded == bool((np.diff(batch["position"]) > 1).any())
    assert batch["weight"].sum() == EXAMPLES
    assert (batch["example"].max() > 1) == way.packed
    return batch


def as_result(gradient, sums: train_step.Sums) -> Result:
    found, kl = (jax.device_get(sums.metrics[name]) for name in ("loss", "kl"))
    state = [float(leaf) for leaf in jax.tree.leaves(sums.loss_state)]
    return Result(found[0] / found[1], kl[0] / kl[1], state, jax.device_get(gradient))


def deviation(found: Result, expected: Result) -> float:
    """The largest difference, of the loss relative to it, of a gradient to its largest element."""
    pairs = zip(jax.tree.leaves(found.gradient), jax.tree.leaves(expected.gradient), strict=True)
    differences = [np.abs(one - other).max() / np.abs(other).max() for one, other in pairs]
    return float(max([*differences, abs(found.loss / expected.loss - 1)]))


WAYS = {
    "data 8": Way(config.Mesh(data=8, fsdp=1)),
    "fsdp 8": Way(config.Mesh(fsdp=8)),
    "fsdp 4, tensor 2": Way(config.Mesh(fsdp=4, tensor=2)),
    "data 2, fsdp 2, tensor 2": Way(config.Mesh(data=2, fsdp=2, tensor=2)),
    "sequence 8": Way(config.Mesh(fsdp=1, sequence=8)),
    "sequence 4, data 2": Way(config.Mesh(data=2, fsdp=1, sequence=4)),
    "sequence 4, fsdp 2": Way(config.Mesh(fsdp=2, sequence=4)),
    "sequence 4, tensor 2": Way(config.Mesh(fsdp=1, sequence=4, tensor=2)),
    "data 2, fsdp 2, sequence 2": Way(config.Mesh(data=2, fsdp=2, sequence=2)),
    "fsdp 2, sequence 2, tensor 2": Way(config.Mesh(fsdp=2, sequence=2, tensor=2), folded=True),
    "sequence 2, 2 microbatches": Way(
        config.Mesh(fsdp=1, sequence=2), 2, train_step.make_microbatched(2)
    ),
    "2 microbatches": Way(microbatches=2, accumulate=train_step.make_microbatched(2)),
    "4 microbatches": Way(microbatches=4, accumulate=train_step.make_microbatched(4)),
    "2 microbatches in two passes": Way(microbatches=2, accumulate=train_step.make_two_pass(2)),
    "4 microbatches in two passes": Way(microbatches=4, accumulate=train_step.make_two_pass(4)),
    "all at once": Way(config.Mesh(2, 2, 2), 2, train_step.make_two_pass(2), cached=True),
    "one example a row": Way(packed=False),
    "cached reference": Way(cached=True),
}


def of_each_microbatch(way: Way) -> bool:
    """Whether batch statistics are of each microbatch, and so the loss another."""
    return way.microbatches > 1 and "microbatched" in way.accumulate.__qualname__


# one mesh with all axes, and one way of each other kind, run every time
FAST = (
    "data 2, fsdp 2, tensor 2",
    "fsdp 2, sequence 2, tensor 2",
    "2 microbatches",
    "4 microbatches in two passes",
)
FAST += ("one example a row", "cached reference")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in WAYS],
)
def test_loss_and_gradient_are_those_of_the_plainest_way(name, compute):
    expected, found = compute(Way()), compute(WAYS[name])
    left_out = OF_THE_BATCH if of_each_microbatch(WAYS[name]) else ()
    compared = [loss for loss in LOSSES if loss not in left_out]
    deviations = {loss: deviation(found[loss], expected[loss]) for loss in compared}
    print(f"{name}: {deviations}")
    assert max(deviations.values()) < TOLERANCE, deviations
    if "kto" in compared:
        assert found["kto"].kl == pytest.approx(expected["kto"].kl, rel=TOLERANCE)
    # the microbatches' states follow each other to where the whole batch's goes
    assert found["bco"].state == pytest.approx(expected["bco"].state, rel=TOLERANCE)


def test_the_losses_compared_have_gradients_that_differ_and_a_kl(compute):
    results = compute(Way())
    assert results["kto"].kl > 0.1
    for one in LOSSES:
        assert np.abs(results[one].gradient["embedding"]).max() > 1e-4
        for other in LOSSES:
            assert one == other or deviation(results[one], results[other]) > 0.1


def test_a_loss_without_statistics_has_the_same_gradient_from_stripes_of_the_vocabulary(
    draw_examples, draw_params, monkeypatch
):
    policy, anchor = draw_params(MODEL.config, seed=0), draw_params(MODEL.config, seed=2)
    data = draw_examples(EXAMPLES, seed=2, tokens=(1, 12))

    def score(params, held, batch: dict) -> dict[str, logps.Logps]:
        return logps.score(MODEL, params, batch)

    def compute(way: Way, stripe: int) -> Result:
        monkeypatch.setattr(vocabulary, "STRIPE", stripe)
        mesh = make_mesh(way)
        batch = make_batch(data, mesh, way)
        live = functools.partial(reference.live, score)
        scoring = train_step.Scoring(score, live, contract.with_state(losses.dpo))
        placed, other = (sharding.place(params, mesh) for params in (policy, anchor))
        state = train_step.TrainState(jnp.int32(0), placed, None)
        run: Any = jax.jit(functools.partial(way.accumulate, scoring))
        held = train_step.Held({}, other)
        gradient, sums = run(state, held, sharding.put_batch(batch, mesh), {"beta": 0.1})
        found = jax.device_get(sums.metrics["loss"])
        return Result(found[0] / found[1], 0.0, [], jax.device_get(gradient))

    spread = Way(config.Mesh(2, 2, 2), 2, train_step.make_two_pass(2))
    assert MODEL.config.vocabulary_size > 2 * 128
    assert deviation(compute(spread, 128), compute(Way(), 2048)) < TOLERANCE

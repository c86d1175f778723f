"""The train step on a bigram model, whose gradient can be written down.

Dimensions: V vocabulary, N examples.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax import contract, logps, losses, reference, train_step
from dpo_jax.data import pack

VOCABULARY = 11


def score(params: dict, held: train_step.Held, batch: dict) -> dict[str, logps.Logps]:
    """log p(target | the token before) from a table of logits [V, V]."""
    previous = jnp.take_along_axis(batch["tokens"], batch["source"], axis=1)
    table = jax.nn.log_softmax(params["table"], axis=-1)
    names = sorted(batch["length"])
    slots = len(batch["weight"]) // len(batch["tokens"]) * len(names)
    values = table[previous, batch["target"]]
    totals = logps.sum_slots(values, batch["slot"], slots).reshape(-1, len(names))
    return {name: logps.Logps(totals[:, c], batch["length"][name]) for c, name in enumerate(names)}


def scoring(loss: Any) -> train_step.Scoring:
    live = functools.partial(reference.live, score)
    return train_step.Scoring(score, live, contract.with_state(loss))


def state_of(params: dict, loss_state: Any = ()) -> train_step.TrainState:
    return train_step.TrainState(jnp.int32(0), params, None, loss_state)


def draw_table(seed: int) -> dict:
    drawn = np.random.default_rng(seed).normal(size=(VOCABULARY, VOCABULARY))
    return {"table": jnp.asarray(drawn, jnp.float32)}


# seeds for which KTO's KL is positive
POLICY, ANCHOR = draw_table(1), draw_table(0)
HELD = train_step.Held({}, ANCHOR)
BETA = {"beta": jnp.float32(0.3)}


def make_batch(draw_examples, names, *, parts=4, batch_size=23, seed=0) -> dict:
    data = draw_examples(60, names, seed=seed, vocabulary=VOCABULARY, tokens=(1, 12))
    batch = pack.batch(data, pack.plan(data, batch_size, parts, seed=seed), 0)
    batch.pop("index")
    return jax.tree.map(jnp.asarray, batch)


@pytest.fixture(scope="module")
def pairs(draw_examples) -> dict:
    return make_batch(draw_examples, ("chosen", "rejected"))


@pytest.fixture(scope="module")
def unpaired(draw_examples) -> dict:
    return make_batch(draw_examples, ("completion", "mismatched"))


ACCUMULATIONS = {
    "whole": train_step.whole,
    "microbatched 2": train_step.make_microbatched(2),
    "microbatched 4": train_step.make_microbatched(4),
    "two_pass 2": train_step.make_two_pass(2),
    "two_pass 4": train_step.make_two_pass(4),
}


@functools.cache
def jitted(accumulation: str, loss: Any):
    return jax.jit(functools.partial(ACCUMULATIONS[accumulation], scoring(loss)))


def gradient_of(accumulation: str, loss, batch) -> tuple[np.ndarray, train_step.Sums]:
    gradient, sums = jitted(accumulation, loss)(state_of(POLICY), HELD, batch, BETA)
    return np.asarray(gradient["table"]), jax.device_get(sums)


def dpo_by_numpy(batch: dict, beta: float) -> tuple[float, np.ndarray, float]:
    """Mean DPO loss, its gradient in the table, and the largest log-ratio over a root of tokens."""
    batch = jax.tree.map(np.asarray, batch)
    tables = [np.asarray(params["table"], np.float64) for params in (POLICY, ANCHOR)]
    policy, anchor = (t - np.log(np.exp(t).sum(-1, keepdims=True)) for t in tables)
    per_row = len(batch["weight"]) // len(batch["tokens"])
    loss, slope, deviation = 0.0, np.zeros_like(policy), 0.0
    for example in np.flatnonzero(batch["weight"]):
        row, local = divmod(example, per_row)
        counts = []
        for completion in (1, 2):
            places = np.flatnonzero(batch["slot"][row] == 2 * local + completion)
            count = np.zeros_like(policy)
            previous = batch["tokens"][row][batch["source"][row][places]]
            np.add.at(count, (previous, batch["target"][row][places]), 1)
            counts.append(count)
            ratio = (count * (policy - anchor)).sum()
            deviation = max(deviation, abs(ratio) / len(places) ** 0.5)
        difference = counts[0] - counts[1]
        margin = beta * (difference * (policy - anchor)).sum()
        loss += np.log1p(np.exp(-margin))
        # d log softmax: the counts less what each row's softmax expects of them
        expected = difference.sum(-1, keepdims=True) * np.exp(policy)
        slope += -beta / (1 + np.exp(margin)) * (difference - expected)
    total = batch["weight"].sum()
    return loss / total, slope / total, deviation


def assert_close(found, expected, relative=2e-6):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=relative, atol=relative * scale)


def test_the_microbatches_of_these_tests_are_unequal(pairs, unpaired):
    for batch in (pairs, unpaired):
        parts = train_step.split(batch, 4)
        assert len({int(x) for x in (parts["slot"] > 0).sum((1, 2))}) > 1
        assert len({int(x) for x in parts["weight"].sum(1)}) > 1


@pytest.mark.parametrize("name", ACCUMULATIONS)
def test_dpos_gradient_is_the_same_by_hand_and_however_it_accumulates(name, pairs):
    loss, slope, deviation = dpo_by_numpy(pairs, 0.3)
    gradient, sums = gradient_of(name, losses.dpo, pairs)
    assert_close(gradient, slope)
    assert sums.metrics["loss"][0] / sums.metrics["loss"][1] == pytest.approx(loss, rel=2e-6)
    assert sums.metrics["loss"][1] == 23
    assert sums.deviation == pytest.approx(deviation, rel=2e-6)


@pytest.mark.parametrize("name", ["microbatched 4", "two_pass 4"])
def test_all_metrics_are_the_same_however_they_accumulate(name, pairs):
    _, expected = gradient_of("whole", losses.dpo, pairs)
    _, sums = gradient_of(name, losses.dpo, pairs)
    assert set(sums.metrics) == set(expected.metrics) >= {"logps/chosen", "rewards/accuracies"}
    for metric, value in expected.metrics.items():
        assert_close(sums.metrics[metric], value)


def test_two_passes_give_ktos_gradient_of_the_whole_batch(unpaired):
    expected, sums = gradient_of("whole", losses.kto, unpaired)
    gradient, found = gradient_of("two_pass 4", losses.kto, unpaired)
    assert sums.metrics["kl"][0] > 0
    assert_close(gradient, expected)
    for metric, value in sums.metrics.items():
        assert_close(found.metrics[metric], value)


def rows_of(batch: dict, first: int, every: int) -> dict:
    """Every so many rows of a batch, with their examples, by hand."""
    rows, slots = len(batch["tokens"]), len(batch["weight"])
    per_row = slots // rows
    chosen = np.arange(first, rows, every)
    examples = np.concatenate([np.arange(r * per_row, (r + 1) * per_row) for r in chosen])
    return jax.tree.map(lambda leaf: leaf[chosen if leaf.ndim == 2 else examples], batch)


def test_microbatched_kto_has_the_kl_of_each_microbatch(unpaired):
    whole, _ = gradient_of("whole", losses.kto, unpaired)
    gradient, sums = gradient_of("microbatched 2", losses.kto, unpaired)
    halves = [rows_of(unpaired, first, 2) for first in (0, 1)]
    weights = [float(half["weight"].sum()) for half in halves]
    by_half = [gradient_of("whole", losses.kto, half) for half in halves]
    kls = [found.metrics["kl"][0] / found.metrics["kl"][1] for _, found in by_half]
    assert min(kls) > 0 and abs(kls[0] - kls[1]) > 0.1
    pieces = [w * slope for w, (slope, _) in zip(weights, by_half, strict=True)]
    assert_close(gradient, sum(pieces) / sum(weights))
    assert_close(sums.metrics["loss"], sum(found.metrics["loss"] for _, found in by_half))
    assert np.abs(gradient - whole).max() > 1e-3 * np.abs(whole).max()


def test_splitting_keeps_rows_and_their_examples_together():
    rows, per_row = np.arange(6), 2
    batch = {
        "tokens": jnp.asarray(np.stack([10 * rows, 10 * rows + 1, 10 * rows + 2], axis=1)),
        "weight": jnp.asarray(np.repeat(rows, per_row)),
        "length": {"chosen": jnp.asarray(np.repeat(rows, per_row) * 100 + np.tile([0, 1], 6))},
    }
    parts = train_step.split(batch, 3)
    assert parts["tokens"].shape == (3, 2, 3)
    assert parts["tokens"][:, :, 0].tolist() == [[0, 30], [10, 40], [20, 50]]
    assert parts["weight"].tolist() == [[0, 0, 3, 3], [1, 1, 4, 4], [2, 2, 5, 5]]
    assert parts["length"]["chosen"][1].tolist() == [100, 101, 400, 401]
    joined = train_step.join(parts["weight"])
    assert joined.tolist() == [0, 0, 3, 3, 1, 1, 4, 4, 2, 2, 5, 5]


def test_a_loss_reads_nothing_that_belongs_to_tokens(unpaired):
    assert set(train_step.per_example(unpaired)) == {"length", "weight", "desirable"}


def constant(step):
    return jnp.ones_like(jnp.asarray(step, jnp.float32))


def make_step(schedule=constant, clip=None) -> tuple[Any, train_step.TrainState]:
    parts = [] if clip is None else [optax.clip_by_global_norm(clip)]
    tx = optax.chain(*parts, optax.scale(-1.0))
    step = train_step.make_train_step(scoring(losses.dpo), tx, schedule, train_step.whole)
    return jax.jit(step), train_step.TrainState(jnp.int32(0), POLICY, tx.init(POLICY))


def numbers(beta: float, learning_rate: float) -> dict:
    return {"loss": {"beta": jnp.float32(beta)}, "learning_rate": jnp.float32(learning_rate)}


def test_a_step_moves_the_parameters_by_rate_times_schedule_times_gradient(pairs):
    step, state = make_step(schedule=lambda done: 0.5 + jnp.float32(done))
    loss, slope, deviation = dpo_by_numpy(pairs, 0.3)
    moved, metrics = step(state, HELD, pairs, numbers(0.3, 0.2))
    assert int(moved.step) == 1
    difference = np.asarray(moved.params["table"], np.float64) - np.asarray(
        POLICY["table"], np.float64
    )
    # a parameter near 1 is rounded to 6e-8
    np.testing.assert_allclose(difference, -0.2 * 0.5 * slope, atol=3e-7)
    assert metrics["learning_rate"] == pytest.approx(0.1)
    assert metrics["grad_norm"] == pytest.approx(np.sqrt((slope**2).sum()), rel=2e-6)
    assert metrics["loss"] == pytest.approx(loss, rel=2e-6)
    assert metrics["deviation"] == pytest.approx(deviation, rel=2e-6)
    _, second = step(moved, HELD, pairs, numbers(0.3, 0.2))
    assert second["learning_rate"] == pytest.approx(0.3)
    assert second["loss"] < metrics["loss"]


def test_the_logged_norm_is_that_before_clipping(pairs):
    _, slope, _ = dpo_by_numpy(pairs, 0.3)
    norm = np.sqrt((slope**2).sum())
    step, state = make_step(clip=norm / 2)
    moved, metrics = step(state, HELD, pairs, numbers(0.3, 1.0))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=2e-6)
    difference = np.asarray(moved.params["table"]) - np.asarray(POLICY["table"])
    assert np.sqrt((difference**2).sum()) == pytest.approx(norm / 2, rel=1e-5)


def test_without_a_reference_there_is_no_deviation_and_the_reference_is_none(pairs):
    given = train_step.Scoring(score, reference.none, contract.with_state(losses.orpo))
    for accumulation in ("microbatched 2", "two_pass 2"):
        run = jax.jit(functools.partial(ACCUMULATIONS[accumulation], given))
        _, sums = run(state_of(POLICY), train_step.Held({}), pairs, {"lam": jnp.float32(0.1)})
        assert np.isnan(sums.deviation)
        assert sums.metrics["loss"][1] == 23


def test_other_numbers_and_another_reference_compile_nothing_anew_and_change_the_step(pairs):
    step, state = make_step()
    results = [
        step(state, HELD, pairs, numbers(beta, rate))
        for beta, rate in ((0.1, 0.1), (0.9, 0.1), (0.1, 0.7))
    ]
    assert step._cache_size() == 1
    assert len({float(metrics["loss"]) for _, metrics in results}) == 2
    assert len({np.asarray(moved.params["table"]).tobytes() for moved, _ in results}) == 3
    _, metrics = step(state, train_step.Held({}, POLICY), pairs, numbers(0.3, 1.0))
    assert metrics["deviation"] == 0
    assert metrics["loss"] == pytest.approx(np.log(2), rel=1e-6)
    assert step._cache_size() == 1


def test_no_gradient_reaches_the_reference(pairs):
    def loss(anchor):
        held = train_step.Held({}, anchor)
        sums = train_step.evaluate(scoring(losses.dpo), POLICY, (), held, BETA, pairs)
        return sums.metrics["loss"][0]

    assert not np.asarray(jax.jit(jax.grad(loss))(ANCHOR)["table"]).any()

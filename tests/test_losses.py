"""The losses against oracles in NumPy's extended precision, written from the papers."""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import config, contract, losses
from dpo_jax.logps import Logps

Arrays = dict[str, np.ndarray]


def log_sigmoid(x):
    return -np.logaddexp(0 * x, -x)


def dpo_by_numpy(policy, reference, lengths, batch, *, beta=0.1, label_smoothing=0.0):
    """Eq. 7 of 2305.18290, with the smoothed labels of cDPO."""
    margin = beta * (policy["chosen"] - reference["chosen"])
    margin = margin - beta * (policy["rejected"] - reference["rejected"])
    return -(1 - label_smoothing) * log_sigmoid(margin) - label_smoothing * log_sigmoid(-margin)


def ipo_by_numpy(policy, reference, lengths, batch, *, beta=0.1):
    """Eq. 17 of 2310.12036 on means over tokens."""
    chosen = (policy["chosen"] - reference["chosen"]) / lengths["chosen"]
    rejected = (policy["rejected"] - reference["rejected"]) / lengths["rejected"]
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def ipo_sum_by_numpy(policy, reference, lengths, batch, *, beta=0.1):
    """Eq. 17 of 2310.12036 on sums over tokens."""
    ones = {name: np.ones_like(length) for name, length in lengths.items()}
    return ipo_by_numpy(policy, reference, ones, batch, beta=beta)


def kl_by_numpy(policy, reference, weight):
    """KTO's z, of the examples that are there."""
    ratio = (policy["mismatched"] - reference["mismatched"])[weight > 0]
    return max(ratio.mean(), np.longdouble(0))


def kto_by_numpy(
    policy,
    reference,
    lengths,
    batch,
    *,
    beta=0.1,
    lambda_desirable=1.0,
    lambda_undesirable=1.0,
):
    """Eq. 8 of 2402.01306; batch["z"] is the z, which has no gradient."""
    ratio = policy["completion"] - reference["completion"]
    desirable = lambda_desirable * (1 - np.exp(log_sigmoid(beta * (ratio - batch["z"]))))
    undesirable = lambda_undesirable * (1 - np.exp(log_sigmoid(beta * (batch["z"] - ratio))))
    return np.where(batch["desirable"] > 0, desirable, undesirable)


def orpo_by_numpy(policy, reference, lengths, batch, *, lam=0.1):
    """Eq. 6 and 7 of 2403.07691, odds p / (1 - p) of p = exp(mean log-probability)."""
    chosen, rejected = (policy[name] / lengths[name] for name in ("chosen", "rejected"))
    log_odds = [mean - np.log(-np.expm1(mean)) for mean in (chosen, rejected)]
    return -chosen - lam * log_sigmoid(log_odds[0] - log_odds[1])


def sft_by_numpy(policy, reference, lengths, batch):
    return -policy["completion"] / lengths["completion"]


CASES: dict[str, tuple[Callable, Callable, dict[str, float]]] = {
    "dpo": (losses.dpo, dpo_by_numpy, {}),
    "dpo, beta 2": (losses.dpo, dpo_by_numpy, {"beta": 2.0}),
    "cdpo": (losses.dpo, dpo_by_numpy, {"beta": 0.5, "label_smoothing": 0.1}),
    "ipo": (losses.ipo, ipo_by_numpy, {}),
    "ipo, beta 0.5": (losses.ipo, ipo_by_numpy, {"beta": 0.5}),
    "ipo_sum": (losses.ipo_sum, ipo_sum_by_numpy, {"beta": 0.2}),
    "kto": (losses.kto, kto_by_numpy, {}),
    "kto, weighted": (
        losses.kto,
        kto_by_numpy,
        {"beta": 0.3, "lambda_desirable": 1.5, "lambda_undesirable": 0.5},
    ),
    "orpo": (losses.orpo, orpo_by_numpy, {}),
    "orpo, lambda 1": (losses.orpo, orpo_by_numpy, {"lam": 1.0}),
    "sft": (losses.sft, sft_by_numpy, {}),
}
PAIR_NAMES = ("chosen", "rejected")
# examples of most tests, so that few shapes are compiled
COUNT = 36


def names_of(loss: Callable) -> tuple[str, ...]:
    return {
        losses.kto: ("completion", "mismatched"),
        losses.sft: ("completion",),
    }.get(loss, PAIR_NAMES)


def has_reference(loss: Callable) -> bool:
    return loss not in (losses.orpo, losses.sft)


class Found(NamedTuple):
    """Losses and metrics [N], their sums, and the gradient of the loss's sum in the totals."""

    losses: Any
    metrics: dict[str, Any]
    sums: dict[str, Any]
    gradient: dict[str, Any]


@functools.partial(jax.jit, static_argnums=0)
def evaluate(loss, policy, reference, lengths, batch, numbers) -> Found:
    def with_lengths(totals):
        return {name: Logps(total, lengths[name]) for name, total in totals.items()}

    def objective(policy):
        anchor = None if reference is None else with_lengths(reference)
        values, metrics = loss(with_lengths(policy), anchor, batch, **numbers)
        sums = contract.weighted_sums(values, metrics, batch["weight"])
        return sums["loss"][0], (values, metrics, sums)

    gradient, (values, metrics, sums) = jax.grad(objective, has_aux=True)(policy)
    return Found(values, metrics, sums, gradient)


class Inputs:
    """Totals, lengths and the rest of N examples, float32 and int32."""

    def __init__(self, policy: Arrays, reference: Arrays, lengths: Arrays, weight=None):
        count = len(next(iter(policy.values())))
        self.policy = {name: np.asarray(x, np.float32) for name, x in policy.items()}
        self.reference = {name: np.asarray(x, np.float32) for name, x in reference.items()}
        self.lengths = {name: np.asarray(x, np.int32) for name, x in lengths.items()}
        self.weight = np.ones(count, np.float32) if weight is None else np.float32(weight)
        self.batch = {
            "weight": jnp.asarray(self.weight),
            "desirable": jnp.asarray(np.arange(count) % 2 == 0, jnp.float32),
        }

    def apply(self, loss: Callable, **numbers: float) -> "Found":
        """What a loss makes of these examples, compiled as in the train step."""
        reference = self.reference if has_reference(loss) else None
        # the defaults too, so that what is compiled for a loss does not depend on what is given
        every = dict(config.Loss(loss, **numbers).hyperparameters)
        found = evaluate(loss, self.policy, reference, self.lengths, self.batch, every)
        return jax.tree.map(np.asarray, found)

    def by_numpy(self, oracle: Callable, **numbers: float) -> tuple[Any, dict[str, Any]]:
        """The same from an oracle: its gradient by central differences, example by example."""
        policy = {name: x.astype(np.longdouble) for name, x in self.policy.items()}
        reference = {name: x.astype(np.longdouble) for name, x in self.reference.items()}
        lengths = {name: x.astype(np.longdouble) for name, x in self.lengths.items()}
        batch: dict[str, Any] = {"desirable": np.asarray(self.batch["desirable"])}
        if "mismatched" in policy:
            batch["z"] = kl_by_numpy(policy, reference, self.weight)

        def at(name, step):
            moved = {**policy, name: policy[name] + step}
            return oracle(moved, reference, lengths, batch, **numbers)

        step = np.longdouble(2.0**-17)
        gradient = {name: (at(name, step) - at(name, -step)) / (2 * step) for name in policy}
        return oracle(policy, reference, lengths, batch, **numbers), gradient


def draw(names: tuple[str, ...], count: int = COUNT, seed: int = 0, weight=None) -> Inputs:
    generator = np.random.default_rng(seed)
    lengths = {name: generator.integers(1, 60, count) for name in names}
    policy = {n: -lengths[n] * generator.uniform(0.05, 3, count) for n in names}
    # KTO's mismatched completions must have a positive mean log-ratio for its z to be felt
    shift = {"mismatched": -3.0}
    reference = {n: policy[n] + generator.normal(shift.get(n, 0), 4, count) for n in names}
    return Inputs(policy, reference, lengths, weight)


def extreme(names: tuple[str, ...]) -> Inputs:
    """Every combination of log-ratios of 0 and +-1e4 and of lengths 1 and 4096."""
    ratios = np.array(np.meshgrid([0, 1e4, -1e4], [0, 1e4, -1e4], [1, 4096], [1, 4096]))
    first, second, *lengths = ratios.reshape(4, -1)
    ratio = dict(zip(names, (first, second), strict=False))
    return Inputs(
        {n: -5 + np.minimum(ratio[n], 0) for n in names},
        {n: -5 - np.maximum(ratio[n], 0) for n in names},
        dict(zip(names, lengths, strict=False)),
    )


def assert_close(found: np.ndarray, expected: np.ndarray, what: str):
    assert np.isfinite(found).all(), f"{what} is not finite"
    scale = 1e-6 * max(1.0, float(np.abs(expected).max()) if "gradient" in what else 1.0)
    np.testing.assert_allclose(found, expected.astype(float), rtol=2e-6, atol=scale, err_msg=what)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("inputs", ["random", "extreme"])
def test_value_and_gradient_agree_with_the_paper(name, inputs):
    loss, oracle, numbers = CASES[name]
    given = draw(names_of(loss)) if inputs == "random" else extreme(names_of(loss))
    found = given.apply(loss, **numbers)
    expected, expected_gradient = given.by_numpy(oracle, **numbers)
    assert_close(found.losses, expected, "loss")
    for completion, slope in found.gradient.items():
        assert_close(slope, expected_gradient[completion], f"gradient of {completion}")


def test_every_loss_has_an_oracle():
    public = {
        function
        for _, function in inspect.getmembers(losses, inspect.isfunction)
        if list(inspect.signature(function).parameters)[:3] == ["policy", "reference", "batch"]
    }
    assert public == {loss for loss, *_ in CASES.values()}


@pytest.mark.parametrize("inputs", ["random", "extreme"])
@pytest.mark.parametrize("loss", [losses.dpo, losses.ipo, losses.ipo_sum, losses.orpo])
def test_the_metrics_of_pairs_are_finite_and_one_an_example(loss, inputs):
    given = draw(PAIR_NAMES) if inputs == "random" else extreme(PAIR_NAMES)
    found = given.apply(loss)
    assert all(x.shape == found.losses.shape for x in found.metrics.values())
    assert all(np.isfinite(x).all() for x in found.metrics.values())


def one_pair(policy: tuple, reference: tuple = (0.0, 0.0), lengths: tuple = (1, 1)) -> Inputs:
    def by_name(numbers):
        return {n: np.full(COUNT, x) for n, x in zip(PAIR_NAMES, numbers, strict=True)}

    return Inputs(by_name(policy), by_name(reference), by_name(lengths))


def test_dpo_and_its_rewards_by_hand():
    given = one_pair((-1.0, -3.0), (-2.0, -2.5))
    values, metrics, *_ = given.apply(losses.dpo, beta=0.1)
    # log-ratios 1 and -0.5, so the margin is 0.1 x 1.5
    assert values[0] == pytest.approx(math.log(1 + math.exp(-0.15)), rel=1e-6)
    assert metrics["rewards/chosen"][0] == pytest.approx(0.1, rel=1e-6)
    assert metrics["rewards/rejected"][0] == pytest.approx(-0.05, rel=1e-6)
    assert metrics["rewards/margins"][0] == pytest.approx(0.15, rel=1e-6)
    assert metrics["rewards/accuracies"][0] == 1.0


def test_dpo_is_log2_when_policy_equals_reference():
    given = draw(PAIR_NAMES)
    given.reference = given.policy
    for numbers in ({}, {"beta": 3.0}, {"label_smoothing": 0.3}):
        values = given.apply(losses.dpo, **numbers).losses
        np.testing.assert_allclose(values, math.log(2), rtol=1e-6)


@pytest.mark.parametrize("loss", [losses.ipo, losses.ipo_sum])
def test_ipo_is_the_square_of_1_over_2_beta_when_policy_equals_reference_bit_for_bit(loss):
    given = draw(PAIR_NAMES)
    given.reference = given.policy
    found = given.apply(loss, beta=0.1)
    np.testing.assert_allclose(found.losses, 25.0, rtol=1e-6)
    assert all(np.isfinite(slope).all() and slope.all() for slope in found.gradient.values())


def test_ipo_takes_the_mean_and_ipo_sum_the_sum_over_tokens():
    given = one_pair((-4.0, -9.0), (-8.0, -3.0), (2, 3))
    # log-ratios 4 and -6: 2 and -2 per token
    assert given.apply(losses.ipo, beta=0.5).losses[0] == pytest.approx(9, rel=1e-6)
    assert given.apply(losses.ipo_sum, beta=0.5).losses[0] == pytest.approx(81, rel=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_a_truncated_away_completion_gives_no_nan(name):
    loss, _, numbers = CASES[name]
    zeros = {n: np.zeros(COUNT) for n in names_of(loss)}
    found = Inputs(zeros, zeros, zeros).apply(loss, **numbers)
    assert np.isfinite(found.losses).all()
    assert all(np.isfinite(slope).all() for slope in found.gradient.values())


def test_log1mexp_is_accurate_in_the_middle():
    # beyond -30 it is under 1e-13, and XLA's exp on CPU is coarse there
    x = -np.geomspace(2e-6, 30, 400).astype(np.float32)
    expected = np.log(-np.expm1(x.astype(np.longdouble))).astype(float)
    np.testing.assert_allclose(losses.log1mexp(jnp.asarray(x)), expected, rtol=1e-6)
    slope = jax.vmap(jax.grad(losses.log1mexp))(jnp.asarray(x))
    wide = x.astype(np.longdouble)
    expected = (np.exp(wide) / np.expm1(wide)).astype(float)
    np.testing.assert_allclose(slope, expected, rtol=2e-6)


@pytest.mark.parametrize("x", [0.0, -1e-30, -1e-8, -1e-6, -math.log(2), -100.0, -1e4, -1e30])
def test_log1mexp_is_finite_in_value_and_gradient(x):
    value, slope = jax.value_and_grad(losses.log1mexp)(jnp.float32(x))
    assert math.isfinite(value) and value <= 0
    assert math.isfinite(slope)


@pytest.mark.parametrize("mean", [0.0, -1e-8, -100.0, -1e4])
def test_orpo_is_finite_where_a_completion_is_certain_or_hopeless(mean):
    for policy in ((mean, -1.0), (-1.0, mean), (mean, mean)):
        given = one_pair(policy)
        found = given.apply(losses.orpo)
        assert np.isfinite(found.losses).all()
        assert all(np.isfinite(slope).all() for slope in found.gradient.values())
    hopeless = one_pair((-100.0, -1.0))
    # log sigmoid(x) is x itself here: the log odds are -100 and -1 - log(1 - 1/e)
    log_odds_ratio = -100 - (-1 - math.log(1 - math.exp(-1)))
    found = hopeless.apply(losses.orpo)
    assert found.losses[0] == pytest.approx(100 - 0.1 * log_odds_ratio, rel=1e-6)
    assert found.gradient["chosen"][0] == pytest.approx(-1.1, rel=1e-6)


def test_orpo_by_hand():
    # p = 1/2 and 1/3 a token: odds 1 and 1/2
    given = one_pair((-2 * math.log(2), -3 * math.log(3)), lengths=(2, 3))
    values, metrics, *_ = given.apply(losses.orpo, lam=0.5)
    # log sigmoid(log 2) = log(2/3)
    assert values[0] == pytest.approx(math.log(2) - 0.5 * math.log(2 / 3), rel=1e-6)
    assert metrics["nll"][0] == pytest.approx(math.log(2), rel=1e-6)
    assert metrics["log_odds_ratio"][0] == pytest.approx(math.log(2), rel=1e-6)
    assert metrics["rewards/chosen"][0] == pytest.approx(-0.5 * math.log(2), rel=1e-6)


KTO_NAMES = ("completion", "mismatched")


def kto_inputs(ratio, mismatched, weight=None) -> Inputs:
    """Examples with these log-ratios, the first, third, ... desirable."""
    reference = {name: np.full(len(ratio), -20.0) for name in KTO_NAMES}
    policy = {"completion": -20 + np.array(ratio), "mismatched": -20 + np.array(mismatched)}
    return Inputs(policy, reference, {n: np.full(len(ratio), 4) for n in KTO_NAMES}, weight)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_kto_by_hand():
    given = kto_inputs([3.0, -1.0], [1.0, 2.0])
    values, metrics, *_ = given.apply(losses.kto, beta=0.5, lambda_undesirable=2.0)
    assert values[0] == pytest.approx(1 - sigmoid(0.5 * (3 - 1.5)), rel=1e-6)
    assert values[1] == pytest.approx(2 * (1 - sigmoid(0.5 * (1.5 + 1))), rel=1e-6)
    assert metrics["kl"].tolist() == [1.5, 1.5]
    assert metrics["rewards/chosen"][0] == 1.5 and math.isnan(metrics["rewards/chosen"][1])
    assert metrics["rewards/rejected"][1] == -0.5 and math.isnan(metrics["rewards/rejected"][0])


def test_kto_is_a_half_at_the_reference_and_bounded_so_that_it_is_no_cdpo():
    at_reference = kto_inputs([0.0, 0.0], [0.0, 0.0])
    assert at_reference.apply(losses.kto).losses.tolist() == [0.5, 0.5]
    far = kto_inputs([-1e4, 1e4], [0.0, 0.0])
    assert far.apply(losses.kto).losses.tolist() == [1.0, 1.0]


def test_kto_holds_a_negative_kl_at_zero():
    given = kto_inputs([2.0, -2.0], [-5.0, 1.0])
    values, metrics, *_ = given.apply(losses.kto, beta=0.5)
    assert metrics["kl"].tolist() == [0.0, 0.0]
    assert values.tolist() == pytest.approx([1 - sigmoid(1.0)] * 2, rel=1e-6)


def test_no_gradient_passes_through_ktos_kl():
    given = kto_inputs([2.0, -2.0], [5.0, 1.0])
    gradient = given.apply(losses.kto).gradient
    assert gradient["mismatched"].tolist() == [0.0, 0.0]
    slope = sigmoid(0.1) * (1 - sigmoid(0.1))  # at beta (r - z) = 0.1 (2 - 3)
    assert gradient["completion"][0] == pytest.approx(-0.1 * slope, rel=1e-6)


def test_ktos_kl_is_the_mean_over_mismatched_completions_of_examples_that_are_there():
    given = kto_inputs([100.0, 7.0, 50.0], [4.0, 2.0, 1000.0], weight=[1, 1, 0])
    assert given.apply(losses.kto).metrics["kl"][0] == pytest.approx(3.0, rel=1e-6)
    alone = kto_inputs([0.0, 0.0], [0.0, 0.0], weight=[0, 0])
    assert alone.apply(losses.kto).metrics["kl"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("garbage", [1e30, -1e30])
@pytest.mark.parametrize("name", CASES)
def test_empty_slots_change_neither_losses_nor_statistics_nor_gradients(name, garbage):
    loss, _, numbers = CASES[name]
    names = names_of(loss)
    small = draw(names)
    weight = np.tile([1, 0, 1, 1, 0, 1], COUNT // 4)  # of every six slots four are filled
    large = draw(names, len(weight), weight=weight)
    for side, source in ((large.policy, small.policy), (large.reference, small.reference)):
        for completion in names:
            side[completion][weight > 0] = source[completion]
            side[completion][weight == 0] = garbage * (1 if completion in names[:1] else -1)
    for completion in names:
        large.reference[completion][weight == 0] *= -1
        large.lengths[completion][:] = 0
        large.lengths[completion][weight > 0] = small.lengths[completion]
    desirable = np.ones(len(weight), np.float32)
    desirable[weight > 0] = small.batch["desirable"]
    large.batch["desirable"] = jnp.asarray(desirable)
    expected, found = small.apply(loss, **numbers), large.apply(loss, **numbers)
    np.testing.assert_allclose(found.losses[weight > 0], expected.losses, rtol=1e-6)
    for completion in names:
        assert not found.gradient[completion][weight == 0].any()
        np.testing.assert_allclose(
            found.gradient[completion][weight > 0], expected.gradient[completion], rtol=1e-6
        )
    for metric in expected.sums:
        np.testing.assert_allclose(found.sums[metric], expected.sums[metric], rtol=2e-6)


def test_a_mean_over_the_batch_is_of_the_examples_that_are_there():
    values, weight = jnp.array([1.0, jnp.nan, 3.0]), jnp.array([1.0, 0.0, 1.0])
    assert losses.batch_mean(values, {"weight": weight}) == 2.0
    assert losses.batch_mean(values, {"weight": 0 * weight}) == 0.0


def test_a_tie_counts_as_half_right():
    chosen, rejected = jnp.array([1.0, 2.0, 3.0]), jnp.array([2.0, 2.0, 2.0])
    metrics = losses.pair_metrics(chosen, rejected)
    assert metrics["rewards/accuracies"].tolist() == [0.0, 0.5, 1.0]
    assert metrics["rewards/margins"].tolist() == [-1.0, 0.0, 1.0]


def test_sft_is_the_mean_over_tokens():
    given = Inputs({"completion": np.full(COUNT, -6.0)}, {}, {"completion": np.full(COUNT, 3)})
    assert given.apply(losses.sft).losses.tolist() == [2.0] * COUNT

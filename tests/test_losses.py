"""The losses against oracles in float64, by hand, against each other, and where floats end."""

import inspect
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import config, contract, logps, losses
from tests import oracles, trials


def assert_close(found: np.ndarray, expected: np.ndarray, what: str, relative: float = 1e-6):
    """Relative to each number, or to a tenth of the largest where it is smaller than that."""
    assert np.isfinite(found).all(), f"{what} is not finite"
    least = relative * 0.1 * float(np.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=relative, atol=least, err_msg=what)


def assert_slopes_close(found: dict, expected: dict, numbers: dict, relative: float = 1e-6):
    """Relative to the largest slope, or to a tenth of beta, which is what the terms that cancel
    have.
    """
    for leaf, slope in expected.items():
        assert np.isfinite(found[leaf]).all(), f"gradient of {leaf} is not finite"
        least = relative * max(float(np.abs(slope).max()), 0.1 * numbers.get("beta", 0.0))
        np.testing.assert_allclose(
            found[leaf], slope, rtol=relative, atol=least, err_msg=f"gradient of {leaf}"
        )


def in_order(name: str, values: np.ndarray) -> np.ndarray:
    """Losses of quantiles are of no example; they are compared by size."""
    return np.sort(values) if name.startswith("aot") else values


def test_every_loss_has_an_oracle_and_is_tried_here():
    public = {
        name
        for name, function in inspect.getmembers(losses, inspect.isfunction)
        if not name.startswith("_")
        and list(inspect.signature(function).parameters)[:3] == ["policy", "reference", "batch"]
    }
    assert public == set(trials.SPECS)
    assert all(callable(getattr(oracles, name)) for name in public)


@pytest.mark.parametrize("name", trials.SPECS)
def test_defaults_are_those_that_its_paper_gives(name):
    fields = config.loss_fields(getattr(losses, name))
    found = {k: getattr(v, "__name__", v) if k == "score" else v for k, (_, v) in fields.items()}
    assert found == trials.SPECS[name].defaults


@trials.every_case
def test_value_and_gradient_agree_with_the_paper(name, numbers):
    given, found = trials.draw(name), trials.draw(name).apply(name, numbers)
    oracle = getattr(oracles, name)
    expected = oracle(given.given(), **trials.rounded(numbers))
    assert_close(in_order(name, found.losses), in_order(name, expected), "loss")
    assert found.sums["loss"][0] == pytest.approx(expected.sum(), rel=1e-6)
    slopes = oracles.gradient(oracle, given.given(), **trials.rounded(numbers))
    assert_slopes_close(found.gradient, slopes, numbers)


@trials.every_case
def test_value_and_gradient_agree_with_the_paper_where_log_ratios_are_huge(name, numbers):
    given, found = trials.extreme(name), trials.extreme(name).apply(name, numbers)
    oracle = getattr(oracles, name)
    expected = oracle(given.given(), **trials.rounded(numbers))
    np.testing.assert_allclose(
        in_order(name, found.losses), in_order(name, expected), rtol=1e-5, atol=1e-6
    )
    # quantiles that are tied have no gradient of their own
    if not name.startswith("aot"):
        slopes = oracles.gradient(oracle, given.given(), **trials.rounded(numbers))
        assert_slopes_close(found.gradient, slopes, numbers, relative=1e-5)


@pytest.mark.parametrize("condition", trials.CONDITIONS)
@trials.every_case
def test_value_gradient_and_metrics_are_finite(name, numbers, condition):
    given = trials.CONDITIONS[condition](name)
    found = given.apply(name, numbers)
    there = given.batch["weight"] > 0
    assert found.losses.dtype == np.float32
    assert np.isfinite(found.losses[there]).all()
    assert all(np.isfinite(slope).all() for slope in found.gradient.values())
    assert all(x.shape == found.losses.shape for x in found.metrics.values())
    assert all(np.isfinite(x).all() for x in found.sums.values())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found.state))


def chosen_rows(given: trials.Inputs, rows: np.ndarray) -> oracles.Given:
    """An oracle's inputs from some of the examples alone."""
    wide = given.given()
    policy, reference, batch = jax.tree.map(
        lambda leaf: leaf[rows], (wide.policy, wide.reference, wide.batch)
    )
    return oracles.Given(policy, reference, batch, policy)


@pytest.mark.parametrize("garbage", [1e30, -1e30])
@trials.every_case
def test_empty_slots_change_neither_losses_nor_statistics_nor_gradients(name, numbers, garbage):
    oracle, given = getattr(oracles, name), trials.with_empty_slots(name, garbage)
    found, clean = given.apply(name, numbers), trials.with_empty_slots(name).apply(name, numbers)
    alone = chosen_rows(given, trials.FILLED)
    expected = oracle(alone, **trials.rounded(numbers))
    assert_close(in_order(name, found.losses[trials.FILLED]), in_order(name, expected), "loss")
    assert found.sums["loss"].tolist() == pytest.approx(
        [expected.sum(), trials.FILLED.sum()], rel=1e-6
    )
    slopes = oracles.gradient(oracle, alone, **trials.rounded(numbers))
    at_filled = {leaf: slope[trials.FILLED] for leaf, slope in found.gradient.items()}
    assert_slopes_close(at_filled, slopes, numbers)
    assert not any(slope[~trials.FILLED].any() for slope in found.gradient.values())
    for metric, sums in clean.sums.items():
        np.testing.assert_allclose(found.sums[metric], sums, rtol=1e-6)
    for after, clean_after in zip(*map(jax.tree.leaves, (found.state, clean.state)), strict=True):
        np.testing.assert_allclose(after, clean_after, rtol=1e-6)


@pytest.mark.parametrize("name", trials.STATEFUL)
@pytest.mark.parametrize("setting", [0, 1])
def test_a_state_carried_over_batches_is_the_mean_over_all_that_went_before(name, setting):
    numbers = [case.values[1] for case in trials.CASES if case.values[0] == name][setting]
    oracle, state, earlier = getattr(oracles, name), None, ()
    for seed in range(4):
        inputs = trials.draw(name, seed)
        # unequal batches, and unequal classes
        inputs.batch["weight"][: 7 * seed] = 0
        inputs.batch["desirable"][:] = np.arange(trials.COUNT) % (seed + 2) == 0
        found = inputs.apply(name, numbers, state)
        given = inputs.given(earlier)
        there = inputs.batch["weight"] > 0
        assert_close(found.losses[there], oracle(given, **trials.rounded(numbers))[there], "loss")
        slopes = oracles.gradient(oracle, given, **trials.rounded(numbers))
        assert_slopes_close(found.gradient, slopes, numbers)
        state, earlier = found.state, (*earlier, given)


def test_only_the_losses_of_these_tests_have_a_state():
    having = {name for name in trials.SPECS if contract.has_state(getattr(losses, name))}
    assert having == set(trials.STATEFUL)


@pytest.mark.parametrize("label", [0.0, 1.0])
@pytest.mark.parametrize("name", trials.STATEFUL)
def test_a_running_mean_of_one_class_alone_or_of_no_example_is_finite(name, label):
    given = trials.draw(name)
    given.batch["desirable"][:] = label
    found = given.apply(name, trials.SPECS[name].defaults)
    assert np.isfinite(found.losses).all()
    given.batch["weight"][:] = 0
    empty = given.apply(name, trials.SPECS[name].defaults)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(empty.state))
    after = given.apply(name, trials.SPECS[name].defaults, found.state)
    for was, now in zip(*map(jax.tree.leaves, (found.state, after.state)), strict=True):
        np.testing.assert_array_equal(was, now)


LN2 = math.log(2)
# with default hyperparameters
AT_REFERENCE = {
    "dpo": LN2,
    "alpha_dpo": LN2,
    "robust": LN2,
    "dpo_norm": LN2,
    "dpop": LN2,
    "ld_dpo": LN2,
    "aot": LN2,
    "aot_unpaired": LN2,
    "nca_pair": 2 * LN2,
    "bco_pair": 2 * LN2,
    "hinge": 1.0,
    "ipo": 25.0,
    "ipo_sum": 25.0,
    "sppo_hard": 50.0,
    # a fair coin against a label of 0.999
    "exo_pair": -LN2 - 0.5 * math.log(1e-3 * 0.999),
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "discopop": (LN2 + 1) / 2,
    "kto": 0.5,
    "apo_zero_unpaired": 0.5,
    "bco": LN2,
    "bco_joint": LN2,
    # four completions have 24 orders
    "plackett_luce": math.log(24),
}
SCORED_LOSSES = [name for name, spec in trials.SPECS.items() if "score" in spec.defaults]


@pytest.mark.parametrize("name", AT_REFERENCE)
def test_a_policy_that_equals_its_reference_has_the_known_loss(name):
    found = trials.at_reference(name).apply(name, trials.first_setting(name))
    np.testing.assert_allclose(found.losses, AT_REFERENCE[name], rtol=1e-6)


@pytest.mark.parametrize("score", ["forward_kl", "jensen_shannon", "alpha_divergence"])
@pytest.mark.parametrize("name", SCORED_LOSSES)
def test_every_score_is_0_at_the_reference(name, score):
    found = trials.at_reference(name).apply(name, trials.SPECS[name].defaults | {"score": score})
    np.testing.assert_allclose(found.losses, AT_REFERENCE[name], rtol=1e-6)


@pytest.mark.parametrize("beta", [0.1, 3.0])
def test_dpo_is_log2_when_policy_equals_reference_whatever_beta_and_smoothing(beta):
    numbers = {"beta": beta, "label_smoothing": 0.3, "score": "reverse_kl"}
    np.testing.assert_allclose(
        trials.at_reference("dpo").apply("dpo", numbers).losses, LN2, rtol=1e-6
    )


def pair(
    name: str,
    policy: tuple[float, ...],
    reference: tuple[float, ...] = (0.0, 0.0, 0.0),
    lengths: tuple[float, ...] = (1, 1, 1),
    **batch: float,
) -> trials.Inputs:
    """The same example in every slot: totals under both models, and lengths, by completion."""

    def by_name(numbers):
        return {
            n: np.full(trials.COUNT, x, float)
            for n, x in zip(trials.SPECS[name].names, numbers, strict=False)
        }

    total, anchor = by_name(policy), by_name(reference)
    columns = {n: np.full(trials.COUNT, x) for n, x in batch.items()}
    return trials.scored(
        name, total, {n: total[n] - anchor[n] for n in total}, by_name(lengths), columns
    )


def log(*numbers: float) -> tuple[float, ...]:
    return tuple(math.log(x) for x in numbers)


# beta 1 and log-ratios log 2 and -log 3: sig is 2/3 and 1/4 of them, and 6/7 of the difference
BY_HAND: list[tuple[str, dict[str, Any], float]] = [
    ("dpo", {}, math.log(7 / 6)),
    ("dpo", {"label_smoothing": 0.25}, 0.75 * math.log(7 / 6) + 0.25 * math.log(7)),
    ("robust", {"label_smoothing": 0.25}, 1.5 * math.log(7 / 6) - 0.5 * math.log(7)),
    ("ipo", {}, (math.log(2) / 2 + math.log(3) / 3 - 0.5) ** 2),
    ("ipo_sum", {}, (math.log(6) - 0.5) ** 2),
    ("hinge", {}, 0.0),
    ("hinge", {"beta": 0.5}, 1 - math.log(6) / 2),
    (
        "exo_pair",
        {"label_smoothing": 0.25},
        6 / 7 * math.log(6 / 7 / 0.75) + 1 / 7 * math.log(1 / 7 / 0.25),
    ),
    ("nca_pair", {}, math.log(3 / 2) + 0.5 * math.log(3) + 0.5 * math.log(4 / 3)),
    ("bco_pair", {}, math.log(3 / 2) + math.log(4 / 3)),
    # sig(log 2 - log 2) and sig(log 3 + log 2)
    ("bco_pair", {"delta": math.log(2)}, math.log(2) + math.log(7 / 6)),
    ("sppo_hard", {}, (math.log(2) - 0.5) ** 2 + (math.log(3) - 0.5) ** 2),
    ("apo_zero", {}, 1 / 3 + 1 / 4),
    ("apo_down", {}, 2 / 3 + 1 / 7),
    ("discopop", {"tau": 1.0}, 1 / 7 * math.log(7 / 6) + 6 / 7 * 1 / 6),
    ("dpo_norm", {"beta": 6.0}, math.log(1 + 2**-3 * 3**-2)),
    ("dpop", {}, math.log(7 / 6)),
    ("r_dpo", {"alpha": math.log(3)}, math.log(3 / 2)),
    ("rpo", {"alpha": 0.5}, math.log(7 / 6) - 0.25 * math.log(2 / 16)),
    # 1 - 1/2 and 1 - 3
    ("dpo", {"score": "forward_kl"}, math.log(1 + math.exp(-2.5))),
    # log(4/3) and log(1/2)
    ("dpo", {"score": "jensen_shannon"}, math.log(1 + 3 / 8)),
    ("alpha_dpo", {"alpha": 2.0}, math.log(1 + math.exp(-1 - 2 / 3))),
    ("alpha_dpo", {"alpha": 0.0}, math.log(1 + math.exp(-2.5))),
    (
        "mpo",
        {"preference": 1.0, "quality": 2.0, "generation": 0.5},
        math.log(7 / 6) + 2 * math.log(2) - 0.25 * math.log(2 / 16),
    ),
]


@pytest.mark.parametrize(("name", "setting", "expected"), BY_HAND)
def test_a_loss_with_a_reference_by_hand(name, setting, expected):
    given = pair(name, log(2 / 16, 1 / 6), log(1 / 16, 1 / 2), (2, 3))
    found = given.apply(name, trials.SPECS[name].defaults | {"beta": 1.0} | setting)
    np.testing.assert_allclose(found.losses, expected, rtol=1e-6, atol=1e-7)


# totals of -2 log 2 in 2 tokens and -3 log 3 in 3: p is 1/2 and 1/3 a token, odds 1 and 1/2
WITHOUT_REFERENCE: list[tuple[str, dict[str, Any], float]] = [
    ("orpo", {"lam": 0.5}, LN2 - 0.5 * math.log(2 / 3)),
    ("orpo_prompt", {"lam": 0.5}, (2 * LN2 + 5) / 6 - 0.5 * math.log(2 / 3)),
    ("simpo", {"beta": 1.0, "gamma": 0.0}, math.log(5 / 3)),
    ("simpo", {"beta": 2.0, "gamma": math.log(9 / 4)}, LN2),
    # 1 - 2 and 1 - 3
    ("alphapo", {"beta": 1.0, "gamma": 0.5, "alpha": 1.0}, math.log(1 + math.exp(-0.5))),
    ("alphapo", {"beta": 1.0, "gamma": 0.0, "alpha": 0.0}, math.log(5 / 3)),
    ("cpo", {"beta": 1.0, "alpha": 0.5}, math.log(1 + 4 / 27) + 0.5 * LN2),
    (
        "cpo",
        {"beta": 1.0, "alpha": 0.0, "label_smoothing": 0.25},
        0.75 * math.log(1 + 4 / 27) + 0.25 * math.log(1 + 27 / 4),
    ),
    ("tpo", {"beta": 1.0, "alpha": 0.5}, math.log(1 + 4 / 27) + 0.5 * 5 / 4),
    ("unlikelihood", {"alpha": 0.5}, 2 * LN2 - 1.5 * math.log(3)),
    ("preferred_ft", {}, LN2),
    ("sft", {}, LN2),
]


@pytest.mark.parametrize(("name", "setting", "expected"), WITHOUT_REFERENCE)
def test_a_loss_without_a_reference_by_hand(name, setting, expected):
    given = pair(name, (-2 * LN2, -3 * math.log(3), -5.0), lengths=(2, 3, 4))
    found = given.apply(name, trials.SPECS[name].defaults | setting)
    np.testing.assert_allclose(found.losses, expected, rtol=1e-6)


def test_dpo_and_its_rewards_by_hand():
    found = pair("dpo", (-1.0, -3.0), (-2.0, -2.5)).apply("dpo", trials.SPECS["dpo"].defaults)
    # log-ratios 1 and -0.5, so the margin is 0.1 x 1.5
    assert found.losses[0] == pytest.approx(math.log(1 + math.exp(-0.15)), rel=1e-6)
    assert found.metrics["rewards/chosen"][0] == pytest.approx(0.1, rel=1e-6)
    assert found.metrics["rewards/rejected"][0] == pytest.approx(-0.05, rel=1e-6)
    assert found.metrics["rewards/margins"][0] == pytest.approx(0.15, rel=1e-6)
    assert found.metrics["rewards/accuracies"][0] == 1.0


SUMMED_REWARDS = [
    name
    for name, spec in trials.SPECS.items()
    if spec.has_reference
    and spec.names == trials.PAIR
    and name not in ("ipo", "dpo_norm", "ld_dpo", "ld_dpo_policy")
]


@pytest.mark.parametrize("name", SUMMED_REWARDS)
def test_the_rewards_of_a_pair_are_beta_times_its_log_ratios_whatever_the_score(name):
    numbers = trials.first_setting(name) | {"beta": 0.5}
    if "score" in numbers:
        numbers["score"] = "forward_kl"
    given, found = trials.draw(name), trials.draw(name).apply(name, numbers)
    for completion in trials.PAIR:
        ratio = given.policy[completion].total - given.reference[completion].total
        np.testing.assert_allclose(found.metrics[f"rewards/{completion}"], 0.5 * ratio, rtol=1e-6)
    margins = found.metrics["rewards/chosen"] - found.metrics["rewards/rejected"]
    np.testing.assert_allclose(found.metrics["rewards/margins"], margins, rtol=1e-6, atol=1e-6)


def test_dpop_penalises_a_chosen_completion_that_became_less_likely():
    # log-ratios -1 and -2: margin 1, penalty 3 x 1
    given = pair("dpop", (-3.0, -4.0), (-2.0, -2.0))
    found = given.apply("dpop", {"beta": 1.0, "lam": 3.0})
    np.testing.assert_allclose(found.losses, math.log(1 + math.exp(2)), rtol=1e-6)
    np.testing.assert_allclose(found.gradient["chosen", "total"], -4 * sigmoid(2), rtol=1e-6)


def test_r_dpo_asks_for_less_of_a_margin_where_the_chosen_completion_is_the_longer_one():
    numbers = {"beta": 1.0, "alpha": 0.25}
    longer = pair("r_dpo", (-1.0, -1.0), lengths=(8, 4)).apply("r_dpo", numbers)
    shorter = pair("r_dpo", (-1.0, -1.0), lengths=(4, 8)).apply("r_dpo", numbers)
    np.testing.assert_allclose(longer.losses, math.log(1 + math.exp(-1)), rtol=1e-6)
    np.testing.assert_allclose(shorter.losses, math.log(1 + math.exp(1)), rtol=1e-6)


def test_ld_dpo_counts_what_is_beyond_the_shorter_completion_alpha():
    given = pair("ld_dpo", (-8.0, -3.0), (-4.0, -2.0), (6, 2))
    # of the chosen one half lies within: -4 + (-4)/4 against -2 + (-2)/4; the rejected is whole
    margin = (-5 + 2.5) - (-3 + 2)
    found = given.apply("ld_dpo", {"beta": 1.0, "alpha": 0.25})
    np.testing.assert_allclose(found.losses, math.log(1 + math.exp(-margin)), rtol=1e-6)
    margin = (-5 + 4) - (-3 + 2)
    given = pair("ld_dpo_policy", (-8.0, -3.0), (-4.0, -2.0), (6, 2))
    found = given.apply("ld_dpo_policy", {"beta": 1.0, "alpha": 0.25})
    np.testing.assert_allclose(found.losses, math.log(1 + math.exp(-margin)), rtol=1e-6)


def test_wpo_weighs_a_pair_by_its_probability_per_token_and_at_most_by_1():
    given = pair("wpo", (-1.0, -1.0), (-1.0, -1.0), (4, 2))
    for one, excess in ((given.policy["chosen"], -4.0), (given.policy["rejected"], -1.0)):
        one.statistics["excess"][:] = excess
    given.policy["chosen"].statistics["excess"][0] = 40.0
    found = given.apply("wpo", trials.SPECS["wpo"].defaults)
    np.testing.assert_allclose(found.losses[1:], math.exp(-1.5) * LN2, rtol=1e-6)
    assert found.losses[0] == pytest.approx(LN2, rel=1e-6)
    assert not found.gradient["chosen", "excess"].any()


def test_aot_compares_quantiles_and_not_examples():
    # margins 3 and 1 under the policy, 0 and 2 under the reference: sorted, each differs by 1
    policy, reference = (
        np.tile([3.0, 1.0], trials.COUNT // 2),
        np.tile([0.0, 2.0], trials.COUNT // 2),
    )
    names = {n: np.zeros(trials.COUNT) for n in trials.PAIR}
    given = trials.scored(
        "aot", {**names, "chosen": policy}, {**names, "chosen": policy - reference}, names
    )
    found = given.apply("aot", {"beta": 1.0, "label_smoothing": 0.0})
    np.testing.assert_allclose(found.losses, math.log(1 + math.exp(-1)), rtol=1e-6)
    # log-ratios of the chosen 3 and 1, of the rejected 0 and 2, of other examples
    policy = {"chosen": policy, "rejected": reference}
    given = trials.scored("aot_unpaired", policy, policy, names)
    found = given.apply("aot_unpaired", {"beta": 1.0, "label_smoothing": 0.0})
    np.testing.assert_allclose(found.losses, math.log(1 + math.exp(-1)), rtol=1e-6)


def labelled(name: str, ratio: np.ndarray, **batch: Any) -> trials.Inputs:
    zeros = np.zeros(trials.COUNT)
    names = trials.SPECS[name].names
    total = {n: zeros - 20 for n in names}
    ratios = {n: ratio if n == "completion" else zeros for n in names}
    return trials.scored(name, total, ratios, {n: zeros + 4 for n in names}, batch)


def test_bco_by_hand():
    # a quarter desirable with reward 3 log 2, the others with -log 2
    good = np.arange(trials.COUNT) % 4 == 0
    ratio = np.where(good, 3 * LN2, -LN2)
    # half the sum of the means is log 2: sig(2 log 2) = 4/5, both
    found = labelled("bco", ratio, desirable=good).apply("bco", {"beta": 1.0})
    np.testing.assert_allclose(found.losses, math.log(5 / 4), rtol=1e-6)
    # the joint mean is 0: sig(3 log 2) = 8/9 and sig(log 2) = 2/3
    joint = labelled("bco_joint", ratio, desirable=good).apply("bco_joint", {"beta": 1.0})
    expected = np.where(good, math.log(9 / 8), math.log(3 / 2))
    np.testing.assert_allclose(joint.losses, expected, rtol=1e-6)
    for density, weight in ((0.1, 0.5), (3.0, 3.0), (99.0, 10.0)):
        given = labelled(
            "bco_weighted", ratio, desirable=good, density_ratio=np.full(trials.COUNT, density)
        )
        found = given.apply("bco_weighted", trials.SPECS["bco_weighted"].defaults | {"beta": 1.0})
        np.testing.assert_allclose(found.losses, np.where(good, 1, weight) * expected, rtol=1e-6)


def test_no_gradient_passes_through_bcos_shift():
    good = np.arange(trials.COUNT) % 2 == 0
    found = labelled("bco", np.zeros(trials.COUNT), desirable=good).apply("bco", {"beta": 0.5})
    expected = np.where(good, -0.25, 0.25)
    np.testing.assert_allclose(found.gradient["completion", "total"], expected, rtol=1e-6)


def test_plackett_luce_is_the_probability_of_a_ranking_by_hand():
    # rewards log 1, log 2, log 3 from best to worst: 1/6 x 2/5 x 1
    numbers = {
        n: np.full(trials.COUNT, x) for n, x in zip(trials.RANKING, log(1, 2, 3), strict=False)
    }
    ones = {n: np.ones(trials.COUNT) for n in numbers}
    found = trials.scored("plackett_luce", numbers, numbers, ones).apply(
        "plackett_luce", {"beta": 1.0}
    )
    np.testing.assert_allclose(found.losses, math.log(15), rtol=1e-6)


def test_plackett_luce_of_more_than_ten_completions_is_in_the_order_of_their_numbers():
    rewards = {f"completion_{place}": np.full(trials.COUNT, -1.0 * place) for place in range(12)}
    ones = {n: np.ones(trials.COUNT) for n in rewards}
    given = trials.scored("plackett_luce", rewards, rewards, ones)
    found = given.apply("plackett_luce", {"beta": 1.0})
    expected = oracles.plackett_luce(given.given(), beta=1.0)
    np.testing.assert_allclose(found.losses, expected, rtol=1e-6)
    # in that order no ranking is likelier
    assert expected[0] < 5 < math.log(math.factorial(12))


def test_plackett_luce_of_two_is_dpo():
    given = trials.draw("dpo")
    two = trials.scored(
        "plackett_luce",
        *(
            {f"completion_{place}": by[n] for place, n in enumerate(trials.PAIR)}
            for by in (
                {n: given.policy[n].total for n in trials.PAIR},
                {n: given.policy[n].total - given.reference[n].total for n in trials.PAIR},
                {n: given.policy[n].length for n in trials.PAIR},
            )
        ),
    )
    found, expected = (
        two.apply("plackett_luce", {"beta": 0.5}),
        given.apply("dpo", trials.SPECS["dpo"].defaults | {"beta": 0.5}),
    )
    assert_close(found.losses, expected.losses, "loss")
    for place, n in enumerate(trials.PAIR):
        slope = found.gradient[f"completion_{place}", "total"]
        assert_close(slope, expected.gradient[n, "total"], f"gradient of {n}")


def kto_inputs(ratio, mismatched, weight=(1, 1, 1)) -> trials.Inputs:
    """Three examples with these log-ratios, over and over, the first of them desirable."""
    ratios = {
        n: np.tile(x, trials.COUNT // 3)
        for n, x in zip(trials.UNPAIRED, (ratio, mismatched), strict=True)
    }
    total = {n: x - 20 for n, x in ratios.items()}
    batch = {
        "weight": np.tile(weight, trials.COUNT // 3),
        "desirable": np.arange(trials.COUNT) % 3 == 0,
    }
    return trials.scored(
        "kto", total, ratios, {n: np.full(trials.COUNT, 4.0) for n in trials.UNPAIRED}, batch
    )


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_kto_by_hand():
    given = kto_inputs([3.0, -1.0, 0.0], [1.0, 2.0, 1.5])
    found = given.apply("kto", trials.LABELLED | {"beta": 0.5, "lambda_undesirable": 2.0})
    assert found.losses[0] == pytest.approx(1 - sigmoid(0.5 * (3 - 1.5)), rel=1e-6)
    assert found.losses[1] == pytest.approx(2 * (1 - sigmoid(0.5 * (1.5 + 1))), rel=1e-6)
    assert found.metrics["kl"][:2].tolist() == [1.5, 1.5]
    chosen, rejected = found.metrics["rewards/chosen"], found.metrics["rewards/rejected"]
    assert chosen[0] == 1.5 and math.isnan(chosen[1])
    assert rejected[1] == -0.5 and math.isnan(rejected[0])


def test_kto_is_bounded_and_so_no_cdpo():
    far = kto_inputs([-1e4, 1e4, 1e4], [0.0, 0.0, 0.0])
    assert far.apply("kto", trials.LABELLED).losses.tolist() == [1.0] * trials.COUNT


def test_kto_holds_a_negative_kl_at_zero():
    found = kto_inputs([2.0, -2.0, -2.0], [-5.0, 1.0, 1.0]).apply(
        "kto", trials.LABELLED | {"beta": 0.5}
    )
    assert not found.metrics["kl"].any()
    np.testing.assert_allclose(found.losses, 1 - sigmoid(1.0), rtol=1e-6)


def test_no_gradient_passes_through_ktos_kl():
    found = kto_inputs([2.0, -2.0, 0.0], [5.0, 1.0, 3.0]).apply("kto", trials.LABELLED)
    assert not found.gradient["mismatched", "total"].any()
    slope = sigmoid(0.1) * (1 - sigmoid(0.1))  # at beta (r - z) = 0.1 (2 - 3)
    assert found.gradient["completion", "total"][0] == pytest.approx(-0.1 * slope, rel=1e-6)


def test_ktos_kl_is_the_mean_over_mismatched_completions_of_examples_that_are_there():
    given = kto_inputs([100.0, 7.0, 50.0], [4.0, 2.0, 1000.0], weight=[1, 1, 0])
    assert given.apply("kto", trials.LABELLED).metrics["kl"][0] == pytest.approx(3.0, rel=1e-6)
    alone = kto_inputs([0.0, 0.0, 0.0], [0.0, 0.0, 0.0], weight=[0, 0, 0])
    assert not alone.apply("kto", trials.LABELLED).metrics["kl"].any()


@pytest.mark.parametrize("mean", [0.0, -1e-8, -100.0, -1e4])
def test_orpo_is_finite_where_a_completion_is_certain_or_hopeless(mean):
    for policy in ((mean, -1.0), (-1.0, mean), (mean, mean)):
        found = pair("orpo", policy).apply("orpo", {"lam": 0.1})
        assert np.isfinite(found.losses).all()
        assert all(np.isfinite(slope).all() for slope in found.gradient.values())
    # log sigmoid(x) is x itself here: the log odds are -100 and -1 - log(1 - 1/e)
    log_odds_ratio = -100 - (-1 - math.log(1 - math.exp(-1)))
    found = pair("orpo", (-100.0, -1.0)).apply("orpo", {"lam": 0.1})
    assert found.losses[0] == pytest.approx(100 - 0.1 * log_odds_ratio, rel=1e-6)
    assert found.gradient["chosen", "total"][0] == pytest.approx(-1.1, rel=1e-6)


def test_the_metrics_of_orpo_by_hand():
    # p = 1/2 and 1/3 a token: odds 1 and 1/2
    found = pair("orpo", (-2 * LN2, -3 * math.log(3)), lengths=(2, 3)).apply("orpo", {"lam": 0.5})
    assert found.metrics["nll"][0] == pytest.approx(LN2, rel=1e-6)
    assert found.metrics["log_odds_ratio"][0] == pytest.approx(LN2, rel=1e-6)
    assert found.metrics["rewards/chosen"][0] == pytest.approx(-0.5 * LN2, rel=1e-6)


# two losses that are one at these settings, and what the inputs must have for it
EQUAL = {
    "robust without smoothing is dpo": ("robust", {"label_smoothing": 0.0}, "dpo", {}, ""),
    "r_dpo without alpha is dpo": ("r_dpo", {"alpha": 0.0}, "dpo", {}, ""),
    "dpop without lambda is dpo": ("dpop", {"lam": 0.0}, "dpo", {}, ""),
    "ld_dpo at alpha 1 is dpo": ("ld_dpo", {"alpha": 1.0}, "dpo", {}, ""),
    "ld_dpo_policy at alpha 1 is dpo": ("ld_dpo_policy", {"alpha": 1.0}, "dpo", {}, ""),
    "alpha_dpo at alpha 1 is dpo": ("alpha_dpo", {"alpha": 1.0}, "dpo", {}, ""),
    "alpha_dpo at alpha 0 is forward KL": (
        "alpha_dpo",
        {"alpha": 0.0},
        "dpo",
        {"score": "forward_kl"},
        "",
    ),
    "rpo without alpha is dpo": ("rpo", {"alpha": 0.0}, "dpo", {}, ""),
    "mpo of preferences alone is dpo": (
        "mpo",
        {"preference": 1.0, "quality": 0.0, "generation": 0.0},
        "dpo",
        {},
        "",
    ),
    "mpo of qualities alone is bco_pair": (
        "mpo",
        {"preference": 0.0, "quality": 1.0, "generation": 0.0},
        "bco_pair",
        {},
        "",
    ),
    "ipo is ipo_sum where lengths are 1": ("ipo", {}, "ipo_sum", {}, "lengths of 1"),
    "dpo_norm is dpo where lengths are 1": ("dpo_norm", {"beta": 0.1}, "dpo", {}, "lengths of 1"),
    "wpo is dpo where all is likely": ("wpo", {}, "dpo", {}, "likely"),
    "cpo is dpo where the reference is 0": ("cpo", {"alpha": 0.0}, "dpo", {}, "no reference"),
    "simpo without gamma is dpo_norm where the reference is 0": (
        "simpo",
        {"beta": 5.0, "gamma": 0.0},
        "dpo_norm",
        {},
        "no reference",
    ),
    "alphapo at alpha 0 is simpo": (
        "alphapo",
        {"beta": 2.0, "gamma": 1.6, "alpha": 0.0},
        "simpo",
        {},
        "",
    ),
    "orpo without lambda is preferred_ft": ("orpo", {"lam": 0.0}, "preferred_ft", {}, ""),
    "aot is dpo where all examples are one": ("aot", {}, "dpo", {}, "one example"),
    "aot_unpaired is dpo where all examples are one": (
        "aot_unpaired",
        {},
        "dpo",
        {},
        "one example",
    ),
}


@pytest.mark.parametrize("case", EQUAL)
def test_two_losses_are_one_at_some_settings(case):
    first, first_numbers, second, second_numbers, condition = EQUAL[case]
    one, other = trials.draw(first), trials.draw(second)
    for given in (one, other):
        for scored_by in (*given.policy.values(), *given.reference.values()):
            if condition == "lengths of 1":
                scored_by.length[:] = 1
            if condition == "one example":
                scored_by.total[:] = scored_by.total[0]
            for statistic in scored_by.statistics.values() if condition == "likely" else ():
                statistic[:] = 1
        for scored_by in given.reference.values() if condition == "no reference" else ():
            scored_by.total[:] = 0
    found = one.apply(first, trials.SPECS[first].defaults | first_numbers)
    expected = other.apply(second, trials.SPECS[second].defaults | second_numbers)
    assert_close(found.losses, expected.losses, "loss")
    slopes = {leaf: x for leaf, x in found.gradient.items() if leaf[1] == "total"}
    if condition != "one example" and "ld_dpo" not in first:
        for leaf, slope in slopes.items():
            assert_close(slope, expected.gradient[leaf], f"gradient of {leaf}")


def test_combine_adds_weighted_losses_and_keeps_the_metrics_of_the_first():
    first = (jnp.array([1.0, 2.0]), {"a": jnp.array([5.0, 6.0])})
    second = (jnp.array([10.0, 20.0]), {"b": jnp.array([7.0, 8.0])})
    values, metrics = losses.combine((0.5, first), (2.0, second))
    assert values.tolist() == [20.5, 41.0]
    assert set(metrics) == {"a"} and metrics["a"].tolist() == [5.0, 6.0]


def test_a_mean_over_the_batch_is_of_the_examples_that_are_there():
    values, weight = jnp.array([1.0, jnp.nan, 3.0]), jnp.array([1.0, 0.0, 1.0])
    assert losses.batch_mean(values, {"weight": weight}) == 2.0
    assert losses.batch_mean(values, {"weight": 0 * weight}) == 0.0


def test_a_tie_counts_as_half_right():
    chosen, rejected = jnp.array([1.0, 2.0, 3.0]), jnp.array([2.0, 2.0, 2.0])
    metrics = losses.pair_metrics(chosen, rejected)
    assert metrics["rewards/accuracies"].tolist() == [0.0, 0.5, 1.0]
    assert metrics["rewards/margins"].tolist() == [-1.0, 0.0, 1.0]


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


RATIOS = np.concatenate([-np.geomspace(1e-3, 1e4, 40), [0.0], np.geomspace(1e-3, 1e4, 40)])


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jensen_shannon", "alpha_divergence"])
def test_a_score_is_its_formula_finite_with_its_gradient_and_never_falls(name):
    ours, oracle = trials.score_of(losses, name), trials.score_of(oracles, name)
    ratios = jnp.asarray(RATIOS, jnp.float32)
    expected = oracle(np.asarray(ratios, float))
    np.testing.assert_allclose(ours(ratios), expected, rtol=2e-6, atol=1e-7)
    slopes = np.asarray(jax.vmap(jax.grad(ours))(ratios))
    assert np.isfinite(slopes).all() and (slopes >= 0).all()
    # every one is the reverse KL near the reference, but for a factor
    factor = 0.5 if name == "jensen_shannon" else 1.0
    assert slopes[40] == pytest.approx(factor, rel=1e-6)


def test_exponents_are_held_at_the_stated_bound_and_have_no_slope_beyond():
    assert losses.LARGEST_EXPONENT == oracles.LARGEST_EXPONENT
    ours, bound = losses.forward_kl, losses.LARGEST_EXPONENT
    assert (
        ours(jnp.float32(-2 * bound))
        == ours(jnp.float32(-1.001 * bound))
        == pytest.approx(1 - math.exp(bound), rel=1e-6)
    )
    assert jax.grad(ours)(-1.001 * bound) == 0.0
    assert jax.grad(ours)(-0.999 * bound) > 1e8


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.999, 1.0, 1.001, 1.5])
def test_the_alpha_divergence_passes_through_the_reverse_kl_at_1(alpha):
    ratios = jnp.linspace(-4.0, 4.0, 33)
    score = jax.jit(lambda ratio, alpha: losses.alpha_divergence(ratio, alpha=alpha))
    wide = np.asarray(ratios, float)
    expected = oracles.alpha_divergence(wide, float(np.float32(alpha)))
    np.testing.assert_allclose(score(ratios, alpha), expected, rtol=2e-6)
    slope = jax.vmap(jax.grad(score), in_axes=(0, None))(ratios, alpha)
    np.testing.assert_allclose(slope, np.exp((np.float32(alpha) - 1) * wide), rtol=2e-6)


def tokens_of(length: int, shortest: int, seed: int = 0) -> tuple[logps.Tokens, np.ndarray, Any]:
    """One row of trials.scored tokens [1, T], the logits [T, V] in float64, and the targets."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(length, 7)).astype(np.float32)
    target = generator.integers(0, 7, length)
    wide = logits.astype(float)
    logp = oracles.log_softmax(wide)[np.arange(length), target]
    tokens = logps.Tokens(
        jnp.asarray(logits)[None],
        jnp.asarray(logp, jnp.float32)[None],
        jnp.arange(length, dtype=jnp.int32)[None],
        jnp.full((1, length), shortest, jnp.int32),
    )
    return tokens, wide, target


@pytest.mark.parametrize("shortest", [1, 4, 9])
def test_head_is_the_log_probability_of_as_many_tokens_as_the_shortest_has(shortest):
    tokens, logits, target = tokens_of(9, shortest)
    assert losses.head(tokens).shape == (1, 9)
    expected = oracles.head(logits, target, shortest)
    np.testing.assert_allclose(losses.head(tokens).sum(), expected, rtol=1e-6)


def test_excess_is_a_tokens_log_probability_above_that_of_the_mean_probability():
    tokens, logits, target = tokens_of(9, 4)
    assert losses.excess(tokens).shape == (1, 9)
    np.testing.assert_allclose(
        losses.excess(tokens).sum(), oracles.excess(logits, target), rtol=1e-6
    )
    # of equally likely tokens it is 0
    even = tokens._replace(logits=jnp.zeros((1, 9, 7)), logp=jnp.full((1, 9), -math.log(7)))
    np.testing.assert_allclose(losses.excess(even), 0.0, atol=1e-6)


def test_excess_is_finite_where_the_model_is_certain():
    tokens, *_ = tokens_of(2, 2)
    logits = jnp.asarray([[[1e4, 0.0, -1e4], [0.0, 1e4, -1e4]]])
    sure = tokens._replace(logits=logits, logp=jnp.asarray([[0.0, -1e4]]))
    np.testing.assert_allclose(losses.excess(sure), [[0.0, -1e4]], rtol=1e-6)


OUT_OF_RANGE: list[tuple[str, str, float, str]] = [
    *(
        (name, "beta", value, "> 0")
        for name, spec in trials.SPECS.items()
        if "beta" in spec.defaults
        for value in (0.0, -0.1)
    ),
    *(
        (name, "label_smoothing", value, bound)
        for name, spec in trials.SPECS.items()
        if "label_smoothing" in spec.defaults
        for value, bound in ((-0.1, ">= 0"), (0.5, "< 0.5"), (1.0, "< 0.5"))
        if name != "exo_pair"
    ),
    ("exo_pair", "label_smoothing", 0.0, "> 0"),
    ("exo_pair", "label_smoothing", -0.1, "> 0"),
    ("exo_pair", "label_smoothing", 0.5, "< 0.5"),
    *(
        (name, hyperparameter, 0.0, "> 0")
        for name in ("kto", "apo_zero_unpaired")
        for hyperparameter in ("lambda_desirable", "lambda_undesirable")
    ),
    ("unlikelihood", "alpha", -0.1, ">= 0"),
    ("unlikelihood", "alpha", 1.1, "<= 1"),
    ("ld_dpo", "alpha", -0.1, ">= 0"),
    ("ld_dpo", "alpha", 1.1, "<= 1"),
    ("ld_dpo_policy", "alpha", -0.1, ">= 0"),
    ("ld_dpo_policy", "alpha", 1.1, "<= 1"),
    ("discopop", "tau", 0.0, "> 0"),
    ("dpop", "lam", -1.0, ">= 0"),
    ("r_dpo", "alpha", -0.1, ">= 0"),
    ("rpo", "alpha", -0.1, ">= 0"),
    ("cpo", "alpha", -0.1, ">= 0"),
    ("tpo", "alpha", -0.1, ">= 0"),
    ("orpo", "lam", -0.1, ">= 0"),
    ("orpo_prompt", "lam", -0.1, ">= 0"),
    ("simpo", "gamma", -0.1, ">= 0"),
    ("alphapo", "gamma", -0.1, ">= 0"),
    ("bco_weighted", "smallest", 0.0, "> 0"),
    ("bco_weighted", "largest", 0.0, "> 0"),
    *(("mpo", weight, -0.1, ">= 0") for weight in ("preference", "quality", "generation")),
    ("dpo", "beta", math.nan, "finite"),
    ("alphapo", "alpha", math.inf, "finite"),
]


def test_a_range_is_named_with_both_ends():
    with pytest.raises(ValueError, match=r"is 0\.5; it must be >= 0 and < 0\.5$"):
        config.Loss(losses.dpo, label_smoothing=0.5)


@pytest.mark.parametrize(("name", "hyperparameter", "value", "allowed"), OUT_OF_RANGE)
def test_a_hyperparameter_out_of_range_is_refused_with_the_range(
    name, hyperparameter, value, allowed
):
    loss = getattr(losses, name)
    required = {k: 0.5 for k, v in trials.SPECS[name].defaults.items() if v is trials.REQUIRED}
    assert config.Loss(loss, **required).function is loss
    message = f"loss.{hyperparameter} is {value!r}; it must be "
    # the bound that is broken, among the others
    bounds = rf"(.* and )?{re.escape(allowed)}( and .*)?"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}{bounds}$"):
        config.Loss(loss, **{**required, hyperparameter: value})


@pytest.mark.parametrize("name", ["r_dpo", "unlikelihood"])
def test_a_hyperparameter_that_no_paper_settles_has_to_be_given(name):
    with pytest.raises(ValueError, match=r"needs a value for 'alpha'"):
        config.Loss(getattr(losses, name))

import functools
import math
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import contract, logps, losses

PAIRS = ("chosen", "rejected")
UNPAIRED = ("completion", "mismatched")


def check(loss, names=PAIRS, columns=(), *, has_reference=True, **hyperparameters):
    contract.check(loss, hyperparameters, names, columns, has_reference)


def margin(policy, reference):
    chosen = losses.log_ratio(policy, reference, "chosen")
    return chosen - losses.log_ratio(policy, reference, "rejected")


@pytest.mark.parametrize(
    ("loss", "names", "columns", "has_reference"),
    [
        (losses.dpo, PAIRS, (), True),
        (losses.ipo, PAIRS, (), True),
        (losses.ipo_sum, PAIRS, (), True),
        (losses.kto, UNPAIRED, ("desirable",), True),
        (losses.orpo, PAIRS, (), False),
        (losses.orpo_prompt, PAIRS, (), False),
        (losses.ld_dpo, PAIRS, (), True),
        (losses.wpo, PAIRS, (), True),
        (losses.aot, PAIRS, (), True),
        (losses.bco, UNPAIRED, ("desirable",), True),
        (losses.bco_weighted, UNPAIRED, ("desirable", "density_ratio"), True),
        (losses.tpo, ("chosen", "gold", "rejected"), (), False),
        (losses.plackett_luce, ("completion_0", "completion_1", "completion_2"), (), True),
        (losses.sft, ("completion",), (), False),
    ],
)
def test_every_loss_passes_with_its_own_inputs(loss, names, columns, has_reference):
    check(loss, names, columns, has_reference=has_reference)


def test_every_loss_passes_with_more_completions_than_it_reads():
    check(losses.sft, UNPAIRED, ("desirable",), has_reference=False)


def test_hyperparameters_reach_the_loss():
    seen = []

    def loss(policy, reference, batch, *, beta, power):
        seen.append(power)
        return beta * margin(policy, reference) ** power, {}

    check(loss, beta=0.25, power=2)
    assert set(seen) == {2}


def test_a_loss_that_needs_the_value_of_a_float_is_refused_since_it_is_traced():
    def loss(policy, reference, batch, *, beta):
        return math.log(beta) * margin(policy, reference), {}

    with pytest.raises(TypeError, match="concrete|float"):
        check(loss, beta=0.25)


def test_a_mean_that_counts_empty_slots_is_refused():
    @contract.declare(batch_statistics=True)
    def loss(policy, reference, batch):
        found = margin(policy, reference)
        return found - jnp.mean(found), {}

    with pytest.raises(ValueError, match="an empty slot .weight 0. changes the loss"):
        check(loss)

    @contract.declare(batch_statistics=True)
    def right(policy, reference, batch):
        found = margin(policy, reference)
        return found - losses.batch_mean(found, batch), {}

    check(right)


@pytest.mark.parametrize(
    "mixed",
    [
        lambda found, batch: found - jnp.cumsum(found),
        lambda found, batch: found - jnp.roll(found, 1),
        lambda found, batch: found * 64 / jnp.sum(batch["weight"]),
    ],
    ids=["all before", "the one before", "their number"],
)
def test_examples_that_meet_in_whatever_way_have_to_be_declared(mixed):
    def loss(policy, reference, batch):
        return mixed(margin(policy, reference), batch), {}

    with pytest.raises(ValueError, match="changes with other examples"):
        check(loss)


def test_a_gradient_that_is_not_finite_is_refused():
    def loss(policy, reference, batch):
        found = margin(policy, reference)
        return jnp.where(found > -1e9, found, jnp.sqrt(-1e9 - found)), {}

    with pytest.raises(ValueError, match="they must be finite"):
        check(loss)


def test_the_loss_itself_is_looked_at_where_its_own_rule_for_gradients_gives_another():
    @jax.custom_vjp
    def odd(values):
        return jnp.full_like(values, jnp.nan)

    odd.defvjp(lambda values: (values, None), lambda kept, cotangent: (cotangent,))

    def loss(policy, reference, batch):
        return odd(margin(policy, reference)), {}

    with pytest.raises(ValueError, match=r"loss loss is \[nan nan nan nan\]"):
        check(loss)


def test_what_a_loss_lacks_is_told_before_what_fails_when_it_is_differentiated():
    def loss(policy, reference, batch):
        return jnp.sign(margin(policy, reference)).astype(jnp.int32), {}

    with pytest.raises(ValueError, match="loss loss returned losses of int32: they must be float"):
        check(loss)
    with pytest.raises(ValueError, match="reads the reference, and reference.source is None"):
        check(loss, has_reference=False)


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.at[0].set(values[0]),
        lambda values: values[jnp.argsort(values)],
    ],
    ids=["at", "index"],
)
def test_a_loss_gets_arrays_of_jax_when_it_is_asked_what_it_reads(change):
    def loss(policy, reference, batch):
        return change(policy["chosen"].total) - reference["chosen"].total, {}

    assert contract.reads(loss, {}, PAIRS, ()) == {"chosen"}


def test_a_gradient_is_looked_at_where_policy_equals_reference():
    def loss(policy, reference, batch):
        return jnp.abs(margin(policy, reference)) ** 0.5, {}

    with pytest.raises(ValueError, match="they must be finite"):
        check(loss)


def test_a_reference_that_is_read_by_get_or_values_counts_as_read():
    def by_get(policy, reference, batch):
        return policy["chosen"].total - reference.get("chosen").total, {}

    def by_values(policy, reference, batch):
        return policy["chosen"].total - sum(one.total for one in reference.values()), {}

    check(by_get)
    check(by_values)


def test_a_state_of_another_shape_is_refused():
    @contract.declare(batch_statistics=True, state=lambda: jnp.zeros(()))
    def loss(policy, reference, batch, state):
        found = margin(policy, reference)
        return found, {}, state + found

    with pytest.raises(ValueError, match="was given a state of .* they must be alike"):
        check(loss)


def test_a_state_that_is_returned_and_not_declared_is_refused():
    def loss(policy, reference, batch):
        return margin(policy, reference), {}, 3

    with pytest.raises(ValueError, match="must return losses and metrics"):
        check(loss)


def test_a_statistic_without_a_name_is_refused():
    @contract.declare(policy={"head": functools.partial(losses.head)})
    def loss(policy, reference, batch):
        return margin(policy, reference), {}

    with pytest.raises(ValueError, match="define a function with a name"):
        check(loss)


@pytest.mark.parametrize(
    ("loss", "names", "read"),
    [
        (losses.dpo, (*PAIRS, "gold"), set(PAIRS)),
        (losses.kto, UNPAIRED, set(UNPAIRED)),
        (losses.bco, UNPAIRED, {"completion"}),
        (losses.orpo_prompt, PAIRS, set(PAIRS)),
    ],
)
def test_the_completions_that_a_loss_reads_are_found(loss, names, read):
    assert contract.reads(loss, {}, names, ("desirable",)) == read


@pytest.mark.parametrize(
    ("loss", "names", "missing", "cure"),
    [
        (losses.dpo, UNPAIRED, "'chosen'", "pairs (chosen, rejected)"),
        (losses.kto, PAIRS, "'completion'", "unpaired (completion, mismatched)"),
        (losses.kto, ("completion",), "'mismatched'", "unpaired (completion, mismatched)"),
    ],
)
def test_a_completion_that_the_data_lack_is_named_with_the_cure(loss, names, missing, cure):
    with pytest.raises(ValueError) as error:
        check(loss, names, ("desirable",))
    assert f"loss {loss.__name__} reads the completion {missing}" in str(error.value)
    assert f"the data give {', '.join(names)}" in str(error.value)
    assert "--data.examples" in str(error.value) and cure in str(error.value)


def test_a_missing_label_is_named_with_the_cure():
    with pytest.raises(ValueError, match=r"kto reads batch\['desirable'\].*examples unpaired"):
        check(losses.kto, UNPAIRED)


def test_a_missing_column_of_another_name_is_named_without_that_cure():
    def weighted(policy, reference, batch):
        return batch["gap"] * margin(policy, reference), {}

    with pytest.raises(ValueError) as error:
        check(weighted)
    assert str(error.value) == "loss weighted reads batch['gap'], and the batch has weight"


def test_a_loss_that_reads_a_reference_needs_one():
    with pytest.raises(ValueError, match="dpo reads the reference, and reference.source is None"):
        check(losses.dpo, has_reference=False)


def test_a_reference_that_no_one_reads_is_refused():
    with pytest.raises(ValueError, match="orpo reads no reference: set --reference.source None"):
        check(losses.orpo, has_reference=True)


def test_losses_must_be_one_number_an_example():
    def mean(policy, reference, batch):
        return jnp.mean(margin(policy, reference)), {}

    with pytest.raises(ValueError, match=re.escape("loss mean returned losses of shape ()")):
        check(mean)


def test_metrics_must_be_one_number_an_example():
    def loss(policy, reference, batch):
        return margin(policy, reference), {"gap": jnp.zeros((4, 2))}

    with pytest.raises(ValueError, match=re.escape("returned metric gap of shape (4, 2)")):
        check(loss)


def test_losses_must_be_finite():
    def loss(policy, reference, batch):
        return jnp.log(margin(policy, reference) * 0.0), {}

    with pytest.raises(ValueError, match="loss loss is .*must be finite"):
        check(loss)


def centred(policy, reference, batch):
    values = margin(policy, reference)
    return values - losses.batch_mean(values, batch), {}


def centred_without_gradient(policy, reference, batch):
    values = margin(policy, reference)
    return values - jax.lax.stop_gradient(losses.batch_mean(values, batch)), {}


def clamped_from_below(policy, reference, batch):
    values = margin(policy, reference)
    return values - jnp.maximum(losses.batch_mean(values, batch), 0.0), {}


def clamped_from_above(policy, reference, batch):
    values = margin(policy, reference)
    return values - jnp.minimum(losses.batch_mean(values, batch), 0.0), {}


def mean_of_the_rejected(policy, reference, batch):
    ratio = losses.log_ratio(policy, reference, "rejected")
    return margin(policy, reference) - losses.batch_mean(ratio, batch), {}


def ranked(policy, reference, batch):
    return jnp.sort(margin(policy, reference)), {}


def token_mean_over_the_batch(policy, reference, batch):
    lengths = policy["chosen"].length
    chosen = policy["chosen"].total * 4 / jnp.sum(lengths)
    return chosen - reference["chosen"].total, {}


def mean_of_the_reference(policy, reference, batch):
    mean = losses.batch_mean(reference["chosen"].total, batch)
    return margin(policy, reference) - mean, {}


MEETING = [
    centred,
    centred_without_gradient,
    clamped_from_below,
    clamped_from_above,
    mean_of_the_rejected,
    ranked,
    token_mean_over_the_batch,
    mean_of_the_reference,
]


@pytest.mark.parametrize("loss", MEETING)
def test_undeclared_batch_statistics_are_found(loss):
    with pytest.raises(ValueError, match=r"declare\(batch_statistics=True\)"):
        check(loss)


@pytest.mark.parametrize("loss", MEETING[:3])
def test_declared_batch_statistics_pass(loss):
    def declared(policy, reference, batch):
        return loss(policy, reference, batch)

    check(contract.declare(batch_statistics=True)(declared))


def test_a_weight_that_counts_the_labels_of_the_batch_is_found():
    def balanced(policy, reference, batch):
        share = losses.batch_mean(batch["desirable"], batch)
        return margin(policy, reference) / share, {}

    with pytest.raises(ValueError, match="in loss balanced"):
        check(balanced, columns=("desirable",))


def test_kto_without_its_declaration_would_be_found():
    def undeclared(policy, reference, batch):
        return losses.kto(policy, reference, batch)

    with pytest.raises(ValueError, match="undeclared"):
        check(undeclared, UNPAIRED, ("desirable",))


def test_only_kto_declares_batch_statistics():
    everyone = [losses.dpo, losses.ipo, losses.ipo_sum, losses.kto, losses.orpo, losses.sft]
    assert [loss for loss in everyone if contract.needs(loss).batch_statistics] == [losses.kto]


def test_weighted_sums_leave_out_nan_metrics_and_empty_slots():
    nan = jnp.nan
    sums = contract.weighted_sums(
        jnp.array([1.0, 2.0, 4.0, nan]),
        {"some": jnp.array([nan, 3.0, 5.0, 7.0]), "none": jnp.full(4, nan)},
        jnp.array([1.0, 0.5, 1.0, 0.0]),
    )
    assert {name: np.asarray(value).tolist() for name, value in sums.items()} == {
        "loss": [1 + 1 + 4, 2.5],
        "some": [1.5 + 5, 1.5],
        "none": [0, 0],
    }


def test_a_nan_loss_of_an_example_that_is_there_is_not_hidden():
    sums = contract.weighted_sums(jnp.array([1.0, jnp.nan]), {}, jnp.ones(2))
    assert np.isnan(sums["loss"][0])


def test_a_declared_statistic_and_the_prompt_reach_the_loss():
    @contract.declare(policy={"head": losses.head}, prompt=True)
    def loss(policy, reference, batch):
        assert set(policy["chosen"].statistics) == {"head"} and not reference["chosen"].statistics
        return policy["prompt"].total + policy["chosen"].statistics["head"] - margin(
            policy, reference
        ), {}

    check(loss)


def test_a_statistic_that_is_not_declared_is_not_there():
    def loss(policy, reference, batch):
        return policy["chosen"].statistics["head"] - margin(policy, reference), {}

    with pytest.raises(KeyError, match="head"):
        check(loss)


def test_examples_that_meet_through_a_statistic_are_found():
    @contract.declare(policy={"head": losses.head})
    def loss(policy, reference, batch):
        return margin(policy, reference) - policy["chosen"].statistics["head"].mean(), {}

    with pytest.raises(ValueError, match="changes with other examples"):
        check(loss)


def test_a_loss_with_a_state_is_called_with_it_and_one_without_passes_it_on():
    @contract.declare(state=lambda: jnp.zeros(()))
    def counting(policy, reference, batch, state, *, beta):
        return beta * margin(policy, reference), {}, state + 1

    check(counting, beta=2.0)
    policy = {name: logps.Logps(jnp.arange(2.0), jnp.ones(2, int)) for name in PAIRS}
    *_, state = contract.with_state(counting, beta=2.0)(policy, policy, {}, jnp.ones(()))
    assert state == 2
    found, metrics, state = contract.with_state(losses.dpo, beta=0.5)(policy, policy, {}, ())
    assert state == () and set(metrics) and found.shape == (2,)


def test_a_statistic_by_the_name_of_the_total_is_refused():
    @contract.declare(policy={"total": losses.head})
    def loss(policy, reference, batch):
        return margin(policy, reference), {}

    with pytest.raises(ValueError, match="statistic 'total', which is the name"):
        check(loss)


def test_a_completion_by_the_name_of_the_prompt_is_refused():
    with pytest.raises(ValueError, match="the data give a completion of that name"):
        check(losses.orpo_prompt, (*PAIRS, "prompt"), has_reference=False)


def advice(desirable: int, undesirable: int, examples: int = 8, **weights) -> list[str]:
    columns = {"desirable": np.repeat(np.array([1, 0], np.float32), [desirable, undesirable])}
    numbers = {"lambda_desirable": 1.0, "lambda_undesirable": 1.0, **weights}
    facts = contract.Facts(numbers, columns, examples)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        contract.advise(losses.kto, facts)
    return [str(one.message) for one in caught]


def test_kto_warns_of_weights_that_do_not_suit_the_data():
    assert advice(100, 100) == advice(130, 100) == advice(49, 51) == []
    assert advice(100, 300, lambda_desirable=3.0) == []
    for found in (advice(50, 100), advice(160, 100), advice(100, 100, lambda_undesirable=2.0)):
        assert len(found) == 1 and "it should be 1 to 4/3" in found[0]
    assert "is 50 / 100" in advice(50, 100)[0]


def test_kto_warns_of_a_batch_too_small_for_its_kl():
    (found,) = advice(100, 100, examples=4)
    assert "the mean over 4 examples" in found and "--batch-size" in found


def test_a_loss_without_advice_warns_of_nothing():
    contract.advise(losses.dpo, contract.Facts({}, {}, 1))

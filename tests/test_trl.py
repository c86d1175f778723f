"""Our losses against those of TRL's trainers: the code that is installed, never a copy of it.

`tests/parity.py` says what is real and what is played.

Dimensions: N examples, R rows (chosen, then rejected, then gold), L tokens, V vocabulary.
"""

import ast
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import logps, losses
from tests import parity
from tests.parity import Completions, Drawn, Found, Loss, Objective, Rows

pytestmark = [
    pytest.mark.parity,
    # TRL 1.16 reads what transformers 5.24 has renamed
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def make_trainer(tmp_path_factory) -> Callable[..., Any]:
    """`parity.make_trainer` without its first argument."""
    parity.load("torch").set_num_threads(1)  # tensors are tiny
    return functools.partial(parity.make_trainer, tmp_path_factory.mktemp("trl"))


# DPOTrainer, one by one

PAIR_LOSSES: dict[str, tuple[dict[str, Any], Loss]] = {
    "sigmoid": ({}, losses.dpo),
    "robust": ({"label_smoothing": 0.1}, losses.robust),
    "hinge": ({}, losses.hinge),
    "ipo": ({}, losses.ipo),
    "exo_pair": ({"label_smoothing": 1e-3}, losses.exo_pair),
    "nca_pair": ({}, losses.nca_pair),
    "bco_pair": ({}, losses.bco_pair),
    "sppo_hard": ({}, losses.sppo_hard),
    "aot": ({"label_smoothing": 0.2}, losses.aot),
    "aot_unpaired": ({"label_smoothing": 0.2}, losses.aot_unpaired),
    "apo_zero": ({}, losses.apo_zero),
    "apo_down": ({}, losses.apo_down),
    "discopop": ({"discopop_tau": 0.05}, losses.discopop),
    "sigmoid_norm": ({}, losses.dpo_norm),
}
SORTING = ("aot", "aot_unpaired")
# their rewards are of the mean log-ratio, TRL's of the sum
MEAN_REWARDS = ("ipo", "sigmoid_norm")
OURS_OF = {"discopop_tau": "tau", "f_alpha_divergence_coef": "alpha"}
EXTREME = (-500.0, -50.0, -3.0, 3.0, 50.0, 500.0)


def with_options(loss: Loss, beta: float, options: Mapping[str, Any]) -> Loss:
    named = {OURS_OF.get(name, name): value for name, value in options.items()}
    return functools.partial(loss, beta=beta, **named)


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_a_pair_loss_its_gradient_and_its_metrics_are_trls(make_trainer, name, seed, beta):
    options, loss = PAIR_LOSSES[name]
    examples = parity.draw_examples(5 + seed, parity.PAIR, seed=seed)
    trainer = make_trainer("DPO", examples, loss_type=[name], beta=beta, **options)
    batch = parity.collate(trainer)
    rows = parity.rows_of(batch)
    ratios = np.random.default_rng(seed).normal(size=len(rows.tokens), scale=8)
    drawn = parity.draw_tables(rows, ratios, seed)
    loss = with_options(loss, beta, options)
    parity.assert_pairs_equal(loss, trainer, batch, drawn)

    policy, reference = (parity.gather_tables(parity.PAIR, rows, table) for table in drawn)
    _, metrics = loss(policy, reference, parity.batch_of(len(examples)))
    of_trl = trainer._metrics["train"]
    for key in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        found = np.asarray(metrics[key]).mean()
        if name not in MEAN_REWARDS:
            np.testing.assert_allclose(found, of_trl[key][-1], rtol=parity.RELATIVE)
        elif key in ("rewards/chosen", "rewards/rejected"):
            summed = metrics[key] * policy[key.removeprefix("rewards/")].length
            assert abs(found - of_trl[key][-1]) > 0.01
            np.testing.assert_allclose(summed.mean(), of_trl[key][-1], rtol=parity.RELATIVE)


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_a_pair_loss_is_trls_at_extreme_log_ratios(make_trainer, name, beta):
    options, loss = PAIR_LOSSES[name]
    chosen, rejected = (side.ravel() for side in np.meshgrid(EXTREME, EXTREME))
    examples = parity.draw_examples(len(chosen), parity.PAIR, seed=1)
    trainer = make_trainer("DPO", examples, loss_type=[name], beta=beta, **options)
    batch = parity.collate(trainer)
    rows = parity.rows_of(batch)
    drawn = parity.draw_tables(rows, np.concatenate([chosen, rejected]), 1)
    loss = with_options(loss, beta, options)
    parity.assert_pairs_equal(loss, trainer, batch, drawn)
    if name in SORTING:
        return

    given = (parity.gather_tables(parity.PAIR, rows, table) for table in drawn)
    ours, _ = loss(*given, parity.batch_of(len(examples)))
    for example, value in enumerate(ours):
        alone = parity.collate(trainer, slice(example, example + 1))
        at = [example, example + len(examples)]
        width = alone["input_ids"].shape[1] - 1
        found = parity.compute_pairs(trainer, alone, Drawn(*(table[at, :width] for table in drawn)))
        np.testing.assert_allclose(value, found.loss, rtol=parity.RELATIVE, atol=parity.SMALLEST)


def test_discopop_is_finite_where_trls_float32_is_not(make_trainer):
    examples = parity.draw_examples(2, parity.PAIR)
    trainer = make_trainer("DPO", examples, loss_type=["discopop"])
    batch = parity.collate(trainer)
    rows = parity.rows_of(batch)
    drawn = parity.draw_tables(rows, np.array([-600.0, -700.0, 600.0, 700.0]), 0)  # z near -130
    assert np.isnan(parity.compute_pairs(trainer, batch, drawn, "float32").loss)
    parity.assert_pairs_equal(losses.discopop, trainer, batch, drawn)


def test_dpo_smooths_labels_where_trls_sigmoid_ignores_it(make_trainer):
    examples = parity.draw_examples(6, parity.PAIR)
    trainer = make_trainer("DPO", examples, loss_type=["sigmoid"], label_smoothing=0.2)
    batch = parity.collate(trainer)
    rows = parity.rows_of(batch)
    drawn = parity.draw_tables(rows, np.arange(-6.0, 6.0), 0)
    parity.assert_pairs_equal(losses.dpo, trainer, batch, drawn)
    conservative = functools.partial(losses.dpo, label_smoothing=0.2)
    parity.assert_differ(
        parity.find_tables(parity.mean_of(conservative), rows, drawn),
        parity.compute_pairs(trainer, batch, drawn),
    )
    # TRL smooths in aot, which sorts nothing in a batch of one
    trainer = make_trainer("DPO", examples[:1], loss_type=["aot"], label_smoothing=0.2)
    batch = parity.collate(trainer)
    drawn = parity.draw_tables(parity.rows_of(batch), np.array([-5.0, 9.0]), 0)
    parity.assert_pairs_equal(conservative, trainer, batch, drawn)


# F-divergences

# TRL's name, its coefficient, our score, the lowest log-ratio that ours does not hold
DIVERGENCES: dict[str, tuple[dict[str, Any], losses.Score, float]] = {
    "forward_kl": ({"f_divergence_type": "forward_kl"}, losses.forward_kl, -40.0),
    "js_divergence": ({"f_divergence_type": "js_divergence"}, losses.jensen_shannon, -np.inf),
    **{
        f"alpha_divergence {alpha}": (
            {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": alpha},
            functools.partial(losses.alpha_divergence, alpha=alpha),
            losses.LARGEST_EXPONENT / (alpha - 1) if alpha < 1 else -np.inf,
        )
        for alpha in (0.5, 1.0, 1.5)
    },
}
STANDING_ALONE = ("nca_pair", "bco_pair", "sppo_hard")


def dtype_of(divergence: str) -> str:
    """TRL's alpha-divergence has no float64."""
    return "float32" if divergence.startswith("alpha") else "float64"


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust"])
def test_a_pair_loss_under_a_divergence_is_trls(make_trainer, name, divergence):
    options, loss = PAIR_LOSSES[name]
    chosen_options, score, _ = DIVERGENCES[divergence]
    examples = parity.draw_examples(8, parity.PAIR)
    trainer = make_trainer("DPO", examples, loss_type=[name], **options, **chosen_options)
    batch = parity.collate(trainer)
    drawn = parity.draw_tables(
        parity.rows_of(batch), np.random.default_rng(0).uniform(-9, 9, 16), 0
    )
    ours = with_options(functools.partial(loss, score=score), 0.1, options)
    parity.assert_pairs_equal(ours, trainer, batch, drawn, dtype_of(divergence))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_score_is_held_where_its_exponent_is_40_and_trls_later_or_never(make_trainer, divergence):
    options, score, lowest = DIVERGENCES[divergence]
    examples = parity.draw_examples(2, parity.PAIR)
    trainer = make_trainer("DPO", examples, loss_type=["sigmoid"], **options)
    batch = parity.collate(trainer)
    rows = parity.rows_of(batch)
    ours = functools.partial(losses.dpo, score=score)
    drawn = parity.draw_tables(rows, np.array([-86.0, 2.0, 4.0, -86.0]), 0)
    if np.isinf(lowest):
        parity.assert_pairs_equal(ours, trainer, batch, drawn, dtype_of(divergence))
        return
    found = parity.find_tables(parity.mean_of(ours), rows, drawn)
    parity.assert_differ(found, parity.compute_pairs(trainer, batch, drawn, dtype_of(divergence)))
    # ours is TRL's at the lowest log-ratio, and no gradient passes there
    ratio = (drawn.policy - drawn.reference).sum(1)
    first = np.argmax(rows.completion, axis=1)
    held = drawn.policy.copy()
    held[np.arange(len(held)), first] += np.maximum(ratio, lowest) - ratio
    at_lowest = parity.compute_pairs(
        trainer, batch, drawn._replace(policy=held), dtype_of(divergence)
    )
    np.testing.assert_allclose(found.loss, at_lowest.loss, rtol=parity.RELATIVE)
    assert not np.any(found.gradient[ratio < lowest])


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", STANDING_ALONE)
def test_trl_refuses_a_divergence_where_a_score_stands_alone_and_ours_is_centred(
    make_trainer, name, divergence
):
    _, loss = PAIR_LOSSES[name]
    options, score, _ = DIVERGENCES[divergence]
    examples = parity.draw_examples(6, parity.PAIR)
    with pytest.raises(ValueError, match="only supported for the following loss types"):
        make_trainer("DPO", examples, loss_type=[name], **options)
    # ours is TRL's of log-ratios that are the scores
    trainer = make_trainer("DPO", examples, loss_type=[name])
    batch = parity.collate(trainer)
    rows = parity.rows_of(batch)
    drawn = parity.draw_tables(rows, np.linspace(-9.0, 9.0, len(rows.tokens)), 0)
    ratio = (drawn.policy - drawn.reference).sum(1)
    first = np.argmax(rows.completion, axis=1)
    scored = drawn.policy.copy()
    scored[np.arange(len(scored)), first] += np.asarray(score(jnp.asarray(ratio))) - ratio
    trls = parity.compute_pairs(trainer, batch, drawn._replace(policy=scored))
    ours = parity.find_tables(parity.mean_of(functools.partial(loss, score=score)), rows, drawn)
    np.testing.assert_allclose(ours.loss, trls.loss, rtol=parity.RELATIVE)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.5])
def test_alpha_dpo_is_trls(make_trainer, alpha):
    options = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": alpha}
    trainer = make_trainer(
        "DPO", parity.draw_examples(6, parity.PAIR), loss_type=["sigmoid"], **options
    )
    batch = parity.collate(trainer)
    drawn = parity.draw_tables(parity.rows_of(batch), np.linspace(-9.0, 9.0, 12), 0)
    loss = functools.partial(losses.alpha_dpo, alpha=alpha)
    parity.assert_pairs_equal(loss, trainer, batch, drawn, "float32")


# DPOTrainer, weights within and without


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_ld_dpo_is_trls(make_trainer, alpha, seed):
    trainer = make_trainer("DPO", parity.draw_examples(6, parity.PAIR, seed=seed), ld_alpha=alpha)
    batch = parity.collate(trainer)
    rows = parity.rows_of(batch)
    drawn = parity.draw_tables(rows, np.random.default_rng(seed).normal(size=12, scale=8), seed)
    parity.assert_pairs_equal(functools.partial(losses.ld_dpo, alpha=alpha), trainer, batch, drawn)
    policy_only = functools.partial(losses.ld_dpo_policy, alpha=alpha)
    if alpha == 1:
        parity.assert_pairs_equal(policy_only, trainer, batch, drawn)
    else:
        trls = parity.compute_pairs(trainer, batch, drawn)
        parity.assert_differ(parity.find_tables(parity.mean_of(policy_only), rows, drawn), trls)


def compute_logits(
    trainer, batch, logits: np.ndarray, reference: np.ndarray | None = None
) -> Found:
    """What a trainer finds where these are the logits, and its gradient in the policy's."""
    # TRL's fused head accumulates in float32 whatever it is given
    dtype = "float64" if reference is None else "float32"
    policy = parity.leaf(logits, dtype)
    parity.play_backbone(trainer.model, policy)
    if reference is not None:
        parity.play_backbone(trainer.ref_model, parity.leaf(reference, dtype).detach())
    return parity.compute(trainer, trainer.model, batch, policy)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("likely", [-2.0, 4.0], ids=["unlikely", "likely"])
def test_wpo_is_trls_but_for_holding_the_weight_of_a_pair_at_1(make_trainer, likely, seed):
    trainer = make_trainer(
        "DPO", parity.draw_examples(6, parity.PAIR, seed=seed), use_weighting=True
    )
    batch = parity.collate(trainer)
    rows = parity.rows_of(batch)
    logits = parity.draw_logits(rows, seed, scale=1.0, likely=likely)
    reference = parity.draw_logits(rows, seed + 10, scale=1.0, likely=likely)
    trls = compute_logits(trainer, batch, logits, reference)

    def weights(policy: Completions) -> jax.Array:
        chosen, rejected = (policy[k].statistics["excess"] / policy[k].length for k in parity.PAIR)
        return jnp.exp(chosen + rejected)

    def unheld(policy, reference, batch) -> jax.Array:
        weight = jax.lax.stop_gradient(weights(policy))
        return jnp.mean(weight * losses.dpo(policy, reference, batch)[0])

    ours = parity.find_logits(parity.mean_of(losses.wpo), rows, logits, reference=reference)
    parity.assert_equal_in_logits(
        parity.find_logits(unheld, rows, logits, reference=reference), trls
    )
    weight = weights(parity.gather_logits(parity.PAIR, rows, jnp.asarray(logits, jnp.float32)))
    assert np.any(weight > 1) == (likely > 0)
    if likely > 0:
        parity.assert_differ(ours, trls)
    else:
        parity.assert_equal_in_logits(ours, trls)


# The normaliser of an added NLL


class WithNll(NamedTuple):
    """A loss that adds an NLL, in TRL and here."""

    kind: str
    options: dict[str, Any]
    loss: Loss
    weight: float
    nll: Loss  # the NLL of each example
    over: tuple[str, ...] = ("chosen",)  # the completions whose tokens it is over


def of_gold(policy, reference, batch) -> losses.Losses:
    return losses.sft({"completion": policy["gold"]}, None, batch)


def added(loss: Loss, weight: float, nll: Loss) -> Loss:
    """A loss and a weighted NLL."""
    return lambda *given: losses.combine((1.0, loss(*given)), (weight, nll(*given)))


orpo_nll = functools.partial(losses.orpo_prompt, lam=0.0)
simpo = functools.partial(losses.simpo, beta=2.0, gamma=0.5)
WITH_NLL = {
    "sft": WithNll("DPO", {"loss_type": ["sft"]}, losses.preferred_ft, 1.0, losses.preferred_ft),
    "rpo": WithNll(
        "DPO",
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.005]},
        losses.rpo,
        0.005,
        losses.preferred_ft,
    ),
    "mpo": WithNll(
        "DPO",
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        losses.mpo,
        1.0,
        losses.preferred_ft,
    ),
    "cpo": WithNll(
        "CPO",
        {"loss_type": "sigmoid", "label_smoothing": 0.1, "cpo_alpha": 0.7},
        functools.partial(losses.cpo, label_smoothing=0.1, alpha=0.7),
        0.7,
        losses.preferred_ft,
    ),
    "simpo and NLL": WithNll(
        "CPO",
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5, "cpo_alpha": 0.7},
        added(simpo, 0.7, losses.preferred_ft),
        0.7,
        losses.preferred_ft,
    ),
    "orpo_prompt": WithNll(
        "ORPO",
        {"beta": 0.3},
        functools.partial(losses.orpo_prompt, lam=0.3),
        1.0,
        orpo_nll,
        ("prompt", "chosen"),
    ),
    "tpo": WithNll("TPO", {"loss_type": "sigmoid"}, losses.tpo, 1.0, of_gold, ("gold",)),
    "tpo-l": WithNll(
        "TPO",
        {"loss_type": "tpo-l", "beta": 2.0, "tpo_l_gamma": 0.5, "tpo_alpha": 0.7},
        added(simpo, 0.7, of_gold),
        0.7,
        of_gold,
        ("gold",),
    ),
    "tpo hinge": WithNll(
        "TPO",
        {"loss_type": "hinge", "beta": 0.1},
        added(losses.hinge, 1.0, of_gold),
        1.0,
        of_gold,
        ("gold",),
    ),
    "tpo ipo": WithNll(
        "TPO",
        {"loss_type": "ipo", "beta": 0.5, "tpo_alpha": 3.0},
        added(functools.partial(losses.ipo, beta=0.5), 3.0, of_gold),
        3.0,
        of_gold,
        ("gold",),
    ),
}


def setting(
    make_trainer, case: WithNll, count: int, tokens: tuple[int, int], seed: int
) -> tuple[Callable[[Objective], Found], Found]:
    """How to find our objective on the same logits, and what TRL finds."""
    names = parity.TRIPLE if case.kind == "TPO" else parity.PAIR
    of_trl = [name.replace("gold", "reference") for name in names]
    examples = parity.draw_examples(count, of_trl, seed=seed, tokens=tokens)
    trainer = make_trainer(case.kind, examples, **case.options)
    batch = parity.collate(trainer)
    rows = (
        parity.rows_of(batch)
        if case.kind in ("DPO", "TPO")
        else parity.labelled_rows(trainer, batch)
    )
    logits, reference = parity.draw_logits(rows, seed, 2.0), None
    if case.kind == "DPO":
        reference = parity.draw_logits(rows, seed + 10, 2.0)
    trls = compute_logits(trainer, batch, logits, reference)

    def find(objective: Objective) -> Found:
        return parity.find_logits(objective, rows, logits, names, reference)

    return find, trls


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("case", WITH_NLL.values(), ids=WITH_NLL)
def test_a_loss_with_an_nll_is_trls_for_one_example_and_for_equal_lengths(make_trainer, case, seed):
    for count, tokens in ((1, (1, 7)), (5, (4, 4))):
        find, trls = setting(make_trainer, case, count, tokens, seed)
        parity.assert_equal_in_logits(find(parity.mean_of(case.loss)), trls)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("case", WITH_NLL.values(), ids=WITH_NLL)
def test_trls_nll_is_a_mean_over_the_batchs_tokens_and_ours_over_its_examples(
    make_trainer, case, seed
):
    def pooled(policy, reference, batch) -> jax.Array:
        nll, _ = case.nll(policy, reference, batch)
        tokens = jnp.sum(jnp.stack([policy[name].length for name in case.over]), axis=0)
        instead = jnp.sum(nll * tokens) / jnp.sum(tokens) - jnp.mean(nll)
        return parity.mean_of(case.loss)(policy, reference, batch) + case.weight * instead

    find, trls = setting(make_trainer, case, 6, (1, 12), seed)
    parity.assert_differ(find(parity.mean_of(case.loss)), trls)
    parity.assert_equal_in_logits(find(pooled), trls)


def test_orpos_nll_leaves_out_the_prompt_that_trl_takes_in(make_trainer):
    find, trls = setting(make_trainer, WITH_NLL["orpo_prompt"], 1, (5, 5), 0)
    orpo = functools.partial(losses.orpo, lam=0.3)
    parity.assert_differ(find(parity.mean_of(orpo)), trls)

    def replaced(policy, reference, batch) -> jax.Array:
        of_completion = losses.orpo(policy, None, batch, lam=0.0)[0]
        return jnp.mean(
            orpo(policy, None, batch)[0] - of_completion + orpo_nll(policy, None, batch)[0]
        )

    parity.assert_equal_in_logits(find(replaced), trls)


# CPOTrainer and ORPOTrainer

CPO_LOSSES: dict[str, tuple[dict[str, Any], Loss]] = {
    "cpo": (
        {"loss_type": "sigmoid", "label_smoothing": 0.1},
        functools.partial(losses.cpo, label_smoothing=0.1, alpha=0.0),
    ),
    "hinge without a reference": ({"loss_type": "hinge"}, losses.hinge),
    "ipo without a reference": ({"loss_type": "ipo"}, losses.ipo),
    "simpo": ({"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5}, simpo),
    "alphapo": (
        {"loss_type": "alphapo", "beta": 2.5, "simpo_gamma": 0.25, "alpha": 0.25},
        losses.alphapo,
    ),
    "alphapo at 0": (
        {"loss_type": "alphapo", "beta": 2.5, "simpo_gamma": 0.25},
        functools.partial(losses.alphapo, alpha=0.0),
    ),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", CPO_LOSSES)
def test_a_loss_without_reference_is_trls(make_trainer, name, seed):
    options, loss = CPO_LOSSES[name]
    case = WithNll("CPO", {"cpo_alpha": 0.0, **options}, loss, 0.0, losses.preferred_ft)
    find, trls = setting(make_trainer, case, 6, (1, 9), seed)
    parity.assert_equal_in_logits(find(parity.mean_of(loss)), trls)


def odds_ratio(policy, reference, batch) -> losses.Losses:
    return losses.odds_ratio(policy, 0.3)


# what CPOTrainer.cpo_loss and ORPOTrainer.odds_ratio_loss make of two numbers an example
OF_NUMBERS: dict[str, tuple[str, dict[str, Any], Loss]] = {
    "dpo, smoothed": (
        "CPO",
        {"loss_type": "sigmoid", "label_smoothing": 0.1},
        functools.partial(losses.dpo, label_smoothing=0.1),
    ),
    "ipo_sum": ("CPO", {"loss_type": "ipo"}, losses.ipo_sum),
    "hinge": ("CPO", {"loss_type": "hinge"}, losses.hinge),
    "simpo": ("CPO", {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5}, simpo),
    "alphapo": ("CPO", *CPO_LOSSES["alphapo"]),
    "orpo": ("ORPO", {"beta": 0.3}, odds_ratio),
}
EXTREME_MEANS = {
    "alphapo": (-79.0, -30.0, -5.0, -1.0, -1e-3),
    "orpo": (-90.0, -20.0, -1.0, -0.1, -1e-4),
}


@pytest.mark.parametrize("name", OF_NUMBERS)
def test_the_losses_that_trl_has_as_methods_agree_at_extreme_numbers(make_trainer, name):
    kind, options, loss = OF_NUMBERS[name]
    trainer = make_trainer(kind, parity.draw_examples(1, parity.PAIR), **options)
    values = np.asarray(EXTREME_MEANS.get(name, EXTREME), np.float32)
    chosen, rejected = (np.stack(np.meshgrid(values, values)).reshape(2, -1)).astype(np.float64)
    at = parity.leaf(np.stack([chosen, rejected]))
    if kind == "CPO":
        of_trl = trainer.cpo_loss(*at)[0]
    else:
        of_trl = -trainer.odds_ratio_loss(*at)[0]
    of_trl.sum().backward()

    def per_example(pair: jax.Array) -> jax.Array:
        policy = {
            name: parity.single(values) for name, values in zip(parity.PAIR, pair, strict=True)
        }
        reference = {name: parity.single(np.zeros(len(chosen))) for name in parity.PAIR}
        return loss(policy, reference, parity.batch_of(len(chosen)))[0]

    pair = jnp.asarray(np.stack([chosen, rejected]), jnp.float32)
    ours, back = jax.vjp(per_example, pair)
    (gradient,) = back(jnp.ones(len(chosen)))
    np.testing.assert_allclose(
        ours, of_trl.detach().numpy(), rtol=parity.RELATIVE, atol=parity.SMALLEST
    )
    np.testing.assert_allclose(
        gradient, at.grad.numpy(), rtol=parity.RELATIVE, atol=parity.SMALLEST
    )


def test_alphapo_is_held_where_trls_probability_underflows(make_trainer):
    options, loss = CPO_LOSSES["alphapo"]
    trainer = make_trainer("CPO", parity.draw_examples(1, parity.PAIR), **options)
    low, high = np.array([-170.0]), np.array([-70.0])
    reference = None

    def ours(chosen, rejected) -> np.ndarray:
        policy = {"chosen": parity.single(chosen), "rejected": parity.single(rejected)}
        return np.asarray(loss(policy, reference, parity.batch_of(1))[0])

    assert not np.isfinite(
        trainer.cpo_loss(parity.leaf(low, "float32"), parity.leaf(low, "float32"))[0].item()
    )
    held = trainer.cpo_loss(parity.leaf(np.array([-160.0])), parity.leaf(high))[0].item()
    exact = trainer.cpo_loss(parity.leaf(low), parity.leaf(high))[0].item()
    np.testing.assert_allclose(ours(low, high), held, rtol=parity.RELATIVE)
    assert abs(exact - held) > 0.1 * held


def test_orpo_is_finite_at_probability_1_where_trls_is_not(make_trainer):
    trainer = make_trainer("ORPO", parity.draw_examples(1, parity.PAIR))
    certain, at = np.zeros(1), parity.leaf(np.zeros(1), "float32")
    loss = -trainer.odds_ratio_loss(at, parity.leaf(certain, "float32"))[0].sum()
    loss.backward()
    assert not np.isfinite(loss.item()) and np.isnan(at.grad.item())

    def ours(chosen: jax.Array) -> jax.Array:
        policy = {
            "chosen": parity.single(chosen),
            "rejected": parity.single(certain),
            "prompt": parity.single(-chosen),
        }
        return losses.orpo_prompt(policy, None, parity.batch_of(1))[0][0]

    value, gradient = jax.value_and_grad(ours)(jnp.zeros(1))
    assert np.isfinite(value) and np.all(np.isfinite(gradient))


# KTOTrainer

KTO_LOSSES: dict[str, Loss] = {
    "kto": losses.kto,
    "apo_zero_unpaired": losses.apo_zero_unpaired,
}


class Unpaired(NamedTuple):
    """A KTO trainer's batch, its tables, and those of the mismatched completions."""

    trainer: Any
    batch: dict[str, Any]
    drawn: Drawn
    mismatched: Drawn | None

    def compute(self) -> Found:
        """What TRL finds, and its gradient in the policy's table."""
        policy = parity.leaf(self.drawn.policy)
        tables = [
            (self.batch["input_ids"].numpy(), policy, parity.leaf(self.drawn.reference).detach()),
        ]
        if self.mismatched is not None:
            tables.append((self.batch["KL_input_ids"].numpy(), *map(parity.leaf, self.mismatched)))
        self.trainer.ref_model = parity.play_tables(*((ids, held) for ids, _, held in tables))
        model = parity.play_tables(*((ids, values) for ids, values, _ in tables))
        return parity.compute(self.trainer, model, self.batch, policy)

    def find(self, loss: Loss) -> Found:
        """Our loss, and its gradient in the policy's table."""
        rows = parity.rows_of(self.batch)
        desirable = self.batch["label"].numpy()

        def completions(table, side: int) -> dict[str, logps.Logps]:
            given = parity.gather_tables(("completion",), rows, table)
            if self.mismatched is not None:
                of_others = parity.rows_of(self.batch, "KL_")
                given |= parity.gather_tables(("mismatched",), of_others, self.mismatched[side])
            return given

        def of(table: jax.Array) -> jax.Array:
            reference = completions(self.drawn.reference, 1)
            batch = parity.batch_of(len(desirable), desirable=jnp.asarray(desirable, float))
            return parity.mean_of(loss)(completions(table, 0), reference, batch)

        return parity.differentiate(of, self.drawn.policy)

    def check(self, loss: Loss) -> None:
        parity.assert_equal(lambda: self.find(loss), self.compute())


def make_unpaired(
    make_trainer, name: str, labels: Sequence[bool], ratios, kl: float, seed: int, **options
) -> Unpaired:
    examples = parity.draw_examples(len(labels), ("completion",), seed=seed)
    labelled = [{**e, "label": bool(label)} for e, label in zip(examples, labels, strict=True)]
    trainer = make_trainer("KTO", labelled, loss_type=name, **options)
    batch = parity.collate(trainer)
    mismatched = None
    if name == "kto":
        others = kl + np.random.default_rng(seed + 5).normal(size=len(labels), scale=3)
        mismatched = parity.draw_tables(parity.rows_of(batch, "KL_"), others, seed + 5)
    return Unpaired(
        trainer,
        batch,
        parity.draw_tables(parity.rows_of(batch), np.asarray(ratios), seed),
        mismatched,
    )


@pytest.mark.parametrize("kl", [-6.0, 6.0])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", KTO_LOSSES)
def test_an_unpaired_loss_its_gradient_and_its_metrics_are_trls(make_trainer, name, seed, kl):
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.arange(7) % 3 > 0).tolist()
    ratios = generator.normal(size=7, scale=8)
    options = {"beta": 0.3, "desirable_weight": 1.0, "undesirable_weight": 1.4}
    given = make_unpaired(make_trainer, name, labels, ratios, kl, seed, **options)
    loss = functools.partial(
        KTO_LOSSES[name], beta=0.3, lambda_desirable=1.0, lambda_undesirable=1.4
    )
    given.check(loss)
    if name == "kto":
        assert (given.trainer._metrics["train"]["kl"][-1] > 0) == (kl > 0)


@pytest.mark.parametrize("labels", [[True] * 6, [False] * 6, [True, False] * 3])
@pytest.mark.parametrize("name", KTO_LOSSES)
def test_an_unpaired_loss_is_trls_at_extreme_log_ratios_and_with_one_class(
    make_trainer, name, labels
):
    given = make_unpaired(make_trainer, name, labels, EXTREME, 60.0, 0)
    given.check(KTO_LOSSES[name])


# Scope, and OnlineDPOTrainer


@pytest.mark.parametrize("name", SORTING)
def test_trl_sorts_each_microbatch_and_ours_the_batch_that_it_is_given(make_trainer, name):
    _, loss = PAIR_LOSSES[name]
    trainer = make_trainer(
        "DPO", parity.draw_examples(6, parity.PAIR, tokens=(4, 4)), loss_type=[name]
    )
    halves = [parity.collate(trainer, slice(0, 3)), parity.collate(trainer, slice(3, 6))]
    rows = parity.rows_of(parity.collate(trainer))
    drawn = parity.draw_tables(rows, np.random.default_rng(0).normal(size=12, scale=8), 0)
    parts = [Drawn(*(table[np.r_[i : i + 3, i + 6 : i + 9]] for table in drawn)) for i in (0, 3)]
    found = [parity.compute_pairs(trainer, *given) for given in zip(halves, parts, strict=True)]
    whole = parity.find_tables(parity.mean_of(loss), rows, drawn)
    parity.assert_differ(whole, Found(sum(trls.loss for trls in found) / 2, whole.gradient))
    for half, part in zip(halves, parts, strict=True):
        parity.assert_pairs_equal(loss, trainer, half, part)


def test_trls_kto_takes_its_kl_over_each_microbatch_and_ours_over_the_batch_that_it_is_given(
    make_trainer,
):
    labels, ratios = [True, False] * 2, [3.0, -4.0, 5.0, 1.0]
    whole = make_unpaired(make_trainer, "kto", labels, ratios, 4.0, 0)
    assert whole.mismatched is not None
    parts = []
    for half in (slice(0, 2), slice(2, 4)):
        batch = {key: value[half] for key, value in whole.batch.items()}
        cut = [
            Drawn(*(table[half] for table in drawn)) for drawn in (whole.drawn, whole.mismatched)
        ]
        parts.append(Unpaired(whole.trainer, batch, *cut))
    found = [part.compute() for part in parts]
    ours = whole.find(losses.kto)
    parity.assert_differ(ours, Found(sum(trls.loss for trls in found) / 2, ours.gradient))
    for part in parts:
        part.check(losses.kto)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("name", "loss"), [("sigmoid", losses.dpo), ("ipo", losses.ipo_sum)])
def test_the_online_trainers_ipo_sums_over_tokens(make_trainer, name, loss, seed):
    torch = parity.load("torch")
    generator = np.random.default_rng(seed)
    rewards = generator.permutation(8).astype(float)
    trainer = make_trainer(
        "OnlineDPO",
        [{"prompt": "w1 w2"}] * 4,
        reward=lambda prompts, **_: rewards.tolist(),
        loss_type=name,
    )
    # rows: both completions of four prompts of 3 tokens
    lengths = generator.integers(2, 7, 8)
    there = np.arange(6)[None] < lengths[:, None]
    prompts = generator.integers(0, parity.PAD, (4, 3)).repeat(2, 0).reshape(4, 2, 3).swapaxes(0, 1)
    prompts = prompts.reshape(8, 3)
    completions = np.where(there, generator.integers(0, parity.PAD, (8, 6)), parity.PAD)
    drawn = (prompts, np.ones_like(prompts), completions, there.astype(int))
    trainer._generate = lambda *_: (*map(torch.tensor, drawn), None)
    masked = np.concatenate([np.zeros((8, 2), bool), there], axis=1)
    rows = Rows(np.concatenate([prompts, completions], axis=1), masked, np.zeros_like(masked))
    logits, reference = parity.draw_logits(rows, seed), parity.draw_logits(rows, seed + 10)
    at = parity.leaf(logits)
    parity.play_backbone(trainer.model, at)
    parity.play_backbone(trainer.ref_model, parity.leaf(reference).detach())
    found = trainer.training_step(trainer.model, {"prompt": ["w1 w2"] * 4}).item()
    trls = Found(found, at.grad.numpy())

    first = np.arange(4)
    chosen = np.where(rewards[:4] >= rewards[4:], first, first + 4)
    order = np.concatenate([chosen, (chosen + 4) % 8])
    ours = parity.find_logits(
        parity.mean_of(loss),
        Rows(*(part[order] for part in rows)),
        logits[order],
        parity.PAIR,
        reference[order],
    )
    parity.assert_equal_in_logits(ours, Found(trls.loss, trls.gradient[order]))
    if name == "ipo":
        averaged = parity.find_logits(
            parity.mean_of(losses.ipo),
            Rows(*(part[order] for part in rows)),
            logits[order],
            parity.PAIR,
            reference[order],
        )
        parity.assert_differ(averaged, trls)


# Nothing is missed

COMPARED = {
    "DPO": {*PAIR_LOSSES, "sft"},
    "KTO": {*KTO_LOSSES},
    "CPO": {"sigmoid", "hinge", "ipo", "simpo", "alphapo"},
    "TPO": {"sigmoid", "hinge", "ipo", "tpo-l"},
    "OnlineDPO": {"sigmoid", "ipo"},
    "ORPO": set(),  # it has but one
}
NOT_OF_PREFERENCES = {
    "policy gradients from rewards": "GRPO RLOO GMPO AsyncGRPO",
    "distillation from a teacher": "Distillation GKD GOLD SDFT SDPO IWOPD ServerDistillation "
    "AsyncDistillation",
    "regression on rewards": "A2PO",
    "a reward model": "Reward",
    "supervised: its loss is that of transformers": "SFT",
}
# ours, not in TRL 1.16
NOT_IN_TRL = {
    "bco": "its trainer is gone, bco_pair is what is left",
    "bco_joint": "its trainer is gone",
    "bco_weighted": "its trainer is gone",
    "dpop": "none",
    "r_dpo": "none",
    "unlikelihood": "none",
    "plackett_luce": "none",
}


def compared_to(trainer: type, name: str) -> set[str]:
    """The texts that a variable or attribute is compared with in a trainer's module."""
    source = Path(inspect.getfile(trainer)).read_text()
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Compare)]
    return {
        operand.value
        for node in nodes
        if getattr(node.left, "attr", getattr(node.left, "id", None)) == name
        for comparator in node.comparators
        for operand in ast.walk(comparator)
        if isinstance(operand, ast.Constant) and isinstance(operand.value, str)
    }


@pytest.mark.parametrize("kind", parity.MODULES)
def test_every_loss_type_of_trl_is_compared(kind):
    trainer = getattr(parity.load(parity.MODULES[kind]), f"{kind}Trainer")
    found = compared_to(trainer, "loss_type")
    config = getattr(parity.load(parity.MODULES[kind]), f"{kind}Config")
    field = config.__dataclass_fields__.get("loss_type")
    found |= set(field.metadata.get("choices", ())) if field else set()
    # refused by name
    assert found - {"kto_pair"} == COMPARED[kind]


def test_every_divergence_of_trl_is_compared():
    found = compared_to(parity.load("trl").DPOTrainer, "f_divergence_type")
    assert found == {"reverse_kl", *(name.split()[0] for name in DIVERGENCES)}


def test_every_trainer_of_trl_is_compared_or_has_a_reason():
    trl = parity.load("trl")
    names = {name for name in trl.__all__ if name.endswith("Trainer")}
    for start in Path(trl.__file__).parent.glob("experimental/*/__init__.py"):
        # read, since importing them all would need packages that few have
        for node in ast.walk(ast.parse(start.read_text())):
            if isinstance(node, ast.ImportFrom):
                names |= {alias.name for alias in node.names}
    found = {name.removesuffix("Trainer") for name in names if name.endswith("Trainer")}
    reasoned = {name for listed in NOT_OF_PREFERENCES.values() for name in listed.split()}
    assert found == {*COMPARED, *reasoned}


def test_every_loss_of_ours_is_compared_or_not_in_trl():
    def is_loss(function: Any) -> bool:
        return list(inspect.signature(function).parameters)[:3] == ["policy", "reference", "batch"]

    ours = {name for name, f in inspect.getmembers(losses, inspect.isfunction) if is_loss(f)}
    named = {
        node.attr
        for node in ast.walk(ast.parse(Path(__file__).read_text()))
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) == "losses"
    }
    assert ours == {name for name in ours if name in named} | set(NOT_IN_TRL)

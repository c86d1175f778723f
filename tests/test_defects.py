"""Defects found in published code: what holds here, and does not hold of the defective form."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import config, losses, train_step
from dpo_jax.data import pack, tokenise, tokenizer
from dpo_jax.logps import Logps
from dpo_jax.model import attention


def scored(length: int = 4, **totals: Any) -> dict[str, Logps]:
    """Completions of so many tokens each, with these summed log-probabilities [N]."""
    arrays = {name: jnp.asarray(total, jnp.float32) for name, total in totals.items()}
    return {name: Logps(x, jnp.full(x.shape, length, jnp.int32)) for name, x in arrays.items()}


def batch_of(count: int, **columns: Any) -> dict[str, jax.Array]:
    return {"weight": jnp.ones(count), **{k: jnp.asarray(v) for k, v in columns.items()}}


def test_kto_takes_one_completion_at_a_time_and_no_pair():
    def kto_that_is_cdpo(policy, reference, batch, *, beta=0.1, label_smoothing=0.1):
        ratio = losses.log_ratio(policy, reference, "completion")
        desirable = batch["desirable"] > 0
        margin = beta * jnp.repeat(ratio[desirable] - ratio[~desirable], 2)
        wrong = -label_smoothing * jax.nn.log_sigmoid(-margin)
        return -(1 - label_smoothing) * jax.nn.log_sigmoid(margin) + wrong, {}

    def an_example_costs_at_most_its_weight_whatever_the_others_are(loss: Callable) -> bool:
        policy = scored(completion=[-1e4, 0.0], mismatched=[0.0, 0.0])
        reference = scored(completion=[0.0, 0.0], mismatched=[0.0, 0.0])
        found, _ = loss(policy, reference, batch_of(2, desirable=[1.0, 0.0]))
        return found.tolist() == pytest.approx([1.0, 0.5])

    assert an_example_costs_at_most_its_weight_whatever_the_others_are(losses.kto)
    assert not an_example_costs_at_most_its_weight_whatever_the_others_are(kto_that_is_cdpo)


def test_exo_takes_a_smoothing_that_is_traced():
    def exo_by_math(policy, reference, batch, *, beta=0.1, label_smoothing=1e-3):
        margin = beta * jnp.subtract(*losses.log_ratios(policy, reference))
        right = jax.nn.log_sigmoid(margin) - math.log1p(-label_smoothing)
        wrong = jax.nn.log_sigmoid(-margin) - math.log(label_smoothing)
        return jax.nn.sigmoid(margin) * right + jax.nn.sigmoid(-margin) * wrong, {}

    policy, reference = (
        scored(chosen=[-1.0], rejected=[-3.0]),
        scored(chosen=[-2.0], rejected=[-2.0]),
    )

    def value(loss: Callable, label_smoothing: Any):
        return loss(policy, reference, batch_of(1), label_smoothing=label_smoothing)[0]

    plain = value(exo_by_math, 0.25)
    traced = jax.jit(lambda e: value(losses.exo_pair, e))(0.25)
    np.testing.assert_allclose(traced, plain, rtol=1e-6)
    with pytest.raises(jax.errors.ConcretizationTypeError):
        jax.jit(lambda e: value(exo_by_math, e))(0.25)


def test_discopop_switches_within_a_tenth_of_a_nat():
    def discopop_of_temperature_1(policy, reference, batch, *, beta):
        return losses.discopop(policy, reference, batch, beta=beta, tau=1.0)

    def each_side_has_its_own_loss(loss: Callable) -> bool:
        nothing = scored(chosen=[0.0, 0.0], rejected=[0.0, 0.0])
        policy = scored(chosen=[1.0, -1.0], rejected=[0.0, 0.0])
        found, _ = loss(policy, nothing, batch_of(2), beta=1.0)
        return found.tolist() == pytest.approx([math.exp(-1), math.log(1 + math.e)], rel=1e-6)

    assert each_side_has_its_own_loss(losses.discopop)
    assert not each_side_has_its_own_loss(discopop_of_temperature_1)


def test_ktos_kl_compares_the_same_completions_under_both_models_in_every_microbatch():
    totals = np.arange(16.0) ** 2
    batch = {
        "tokens": jnp.zeros((8, 1), jnp.int32),
        **batch_of(16, desirable=np.arange(16) % 2, policy=totals + 3, reference=totals),
    }

    def kl_of_each_part(reference_part: Callable[[int], int]) -> list[float]:
        parts = train_step.split(batch, 2)
        found = []
        for part in range(2):
            policy, reference = parts["policy"][part], parts["reference"][reference_part(part)]
            _, metrics = losses.kto(
                scored(completion=policy, mismatched=policy),
                scored(completion=reference, mismatched=reference),
                {name: parts[name][part] for name in ("weight", "desirable")},
            )
            found.append(float(metrics["kl"][0]))
        return found

    # every log-ratio is 3
    assert kl_of_each_part(lambda part: part) == [3.0, 3.0]
    assert kl_of_each_part(lambda part: 1 - part) != [3.0, 3.0]


def finite(form: Callable, *at: float) -> bool:
    """Whether value and slope are finite at these places."""
    found = [jax.value_and_grad(form)(jnp.float32(x)) for x in at]
    return bool(np.isfinite(np.asarray(found)).all())


def orpo_of(chosen: jax.Array, rejected: jax.Array) -> jax.Array:
    return losses.orpo(scored(1, chosen=chosen, rejected=rejected), None, batch_of(1))[0]


def test_orpo_is_finite_where_the_odds_ratio_is_hopeless():
    def log_of_sigmoid(x):
        return -0.1 * jnp.log(jax.nn.sigmoid(x))

    assert finite(lambda m: orpo_of(m, jnp.float32(-0.01)), -100.0, -200.0, -1e4)
    assert finite(log_of_sigmoid, -10.0) and not finite(log_of_sigmoid, -200.0)


def test_orpo_is_finite_where_a_completion_is_certain():
    def log1p_of_exp(m):
        return m - jnp.log1p(-jnp.exp(m))

    certain = (0.0, -1e-30, -1e-8)
    assert finite(lambda m: orpo_of(m, jnp.float32(-1.0)), *certain)
    assert finite(lambda m: orpo_of(jnp.float32(-1.0), m), *certain)
    assert finite(lambda m: m - losses.log1mexp(m), *certain)
    assert finite(log1p_of_exp, -0.1) and not finite(log1p_of_exp, -1e-8)


def test_bos_stands_in_no_completion_and_eos_ends_each(folder: Path):
    words = tokenizer.load_tokenizer(config.Data(tokenizer=str(folder / "tokenizer")), None)

    def encoded_alone(text: str) -> list[int]:
        return words.begin(words.encode(text))

    def continues_a_prompt_and_ends(ids: list[int]) -> bool:
        return words.bos_id not in ids and ids.count(words.eos_id) == 1 and ids[-1] == words.eos_id

    assert words.bos_id is not None
    assert continues_a_prompt_and_ends(words.finish(words.encode(" a good film .")))
    assert not continues_a_prompt_and_ends(encoded_alone(" a good film ."))


def test_an_eos_that_is_the_padding_token_is_scored():
    padding = 0
    tokens = np.array(
        [5, 6, 7, padding, 5, 8, padding, 5, 9, padding, 5, 6, 9, 4, padding], np.int32
    )
    data = tokenise.Tokenised(
        names=("chosen", "rejected"),
        tokens=tokens,
        prompts=np.array([[0, 1], [7, 8]]),
        completions=np.array([[[1, 4], [5, 7]], [[8, 10], [11, 15]]]),
        columns={},
        fingerprint="two pairs whose completions end with 0",
        report={},
    )
    batch = pack.batch(data, pack.plan(data, 2, 1, seed=0), 0)

    def ends(scored_tokens: np.ndarray) -> int:
        return int((batch["target"][scored_tokens] == padding).sum())

    assert ends(batch["slot"] > 0) == 4
    assert ends((batch["slot"] > 0) & (batch["target"] != padding)) == 0
    lengths = {name: batch["length"][name][batch["weight"] > 0] for name in data.names}
    assert sum(lengths["chosen"]) == 5 and sum(lengths["rejected"]) == 6


def test_ipo_divides_by_tokens_and_not_by_log_ratios_that_are_not_zero():
    def ipo_over_nonzero_log_ratios(policy, reference, batch, *, beta=0.1):
        means = []
        for name in ("chosen", "rejected"):
            by_token = jnp.broadcast_to(losses.log_ratio(policy, reference, name) / 4, (4, 1))
            means.append(by_token.sum(axis=0) / (by_token != 0).sum(axis=0))
        return jnp.square(means[0] - means[1] - 1 / (2 * beta)), {}

    def holds_at_the_reference(loss: Callable) -> bool:
        same = scored(chosen=[-3.0], rejected=[-7.0])
        return loss(same, same, batch_of(1))[0].tolist() == [25.0]

    moved, still = scored(chosen=[-3.0], rejected=[-7.0]), scored(chosen=[-4.0], rejected=[-6.0])
    expected = losses.ipo(moved, still, batch_of(1))[0]
    np.testing.assert_allclose(ipo_over_nonzero_log_ratios(moved, still, None)[0], expected)
    assert holds_at_the_reference(losses.ipo)
    assert not holds_at_the_reference(ipo_over_nonzero_log_ratios)


def with_excess(completions: dict[str, Logps]) -> dict[str, Logps]:
    """The same with as much excess a token as a sampled completion has on average: none."""
    return {
        n: one._replace(statistics={"excess": jnp.zeros_like(one.total)})
        for n, one in completions.items()
    }


def test_wpo_weighs_by_probability_per_token_so_that_a_sampled_pair_keeps_its_weight():
    def weight_of_summed_logps(policy):
        return jnp.minimum(jnp.exp(policy["chosen"].total + policy["rejected"].total), 1.0)

    def a_pair_alone_counts(weight: Callable) -> bool:
        pair = scored(60, chosen=[-90.0], rejected=[-80.0])
        return weight(with_excess(pair)).tolist() == [1.0]

    assert a_pair_alone_counts(losses.on_policy_weight)
    assert not a_pair_alone_counts(weight_of_summed_logps)


def test_a_truncated_away_completion_gives_no_nan():
    def mean_over_its_tokens(completions, name):
        return completions[name].total / completions[name].length

    def is_finite(mean: Callable) -> bool:
        return finite(lambda total: mean(scored(0, chosen=total), "chosen"), 0.0)

    assert is_finite(losses.mean_logp)
    assert not is_finite(mean_over_its_tokens)


def test_first_tokens_that_responses_share_stay_theirs(folder: Path, tmp_path: Path):
    source = tmp_path / "rows.jsonl"
    row = {"prompt": "the film", "chosen": " is a joy .", "rejected": " is a bore ."}
    source.write_text(json.dumps(row) + "\n")
    data = config.Data(source=str(source), tokenizer=str(folder / "tokenizer"))
    words = tokenizer.load_tokenizer(data, None)
    examples, _ = tokenise.load(data, words, "pairs")
    prompt = examples.tokens[slice(*examples.prompts[0])]
    responses = [examples.tokens[slice(*span)] for span in examples.completions[0]]

    def parted_at_the_first_difference() -> list[np.ndarray]:
        whole = [np.concatenate([prompt, response]) for response in responses]
        shortest = min(map(len, whole))
        first = int(np.argmax(whole[0][:shortest] != whole[1][:shortest]))
        return [ids[first:] for ids in whole]

    def texts(parts: list[np.ndarray]) -> list[str]:
        return [words.decode_plain(ids.tolist()) for ids in parts]

    assert texts(responses) == [row["chosen"], row["rejected"]]
    parted = parted_at_the_first_difference()
    assert not any(text.startswith(" is a ") for text in texts(parted))
    assert all(len(short) < len(full) for short, full in zip(parted, responses, strict=True))


def test_packed_examples_do_not_attend_to_each_other():
    generator = np.random.default_rng(0)
    query, key, value = generator.normal(size=(3, 1, 6, 1, 4)).astype(np.float32)
    of_two = attention.Ids(
        np.array([[1, 1, 1, 2, 2, 2]]), np.zeros((1, 6), int), np.array([[0, 1, 2, 0, 1, 2]])
    )
    as_one = attention.Ids(np.ones((1, 6), int), np.zeros((1, 6), int), np.arange(6)[None])
    moved = value.copy()
    moved[:, :3] += 1

    def second_ignores_the_first(ids: attention.Ids) -> bool:
        before, after = (
            np.asarray(attention.attend(query, key, v, ids, ids, scale=0.5)) for v in (value, moved)
        )
        return bool((before[:, 3:] == after[:, 3:]).all())

    assert second_ignores_the_first(of_two)
    assert not second_ignores_the_first(as_one)

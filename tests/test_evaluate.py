import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import (
    assemble,
    config,
    contract,
    evaluate,
    generate,
    logps,
    losses,
    reference,
    sharding,
    train,
    train_step,
)
from dpo_jax.data import pack, tokenise
from dpo_jax.model import decoder, weights
from dpo_jax.model.presets import PRESETS
from tests import tiny

MODEL = decoder.Decoder(PRESETS["tiny"])
EOS = 3


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return sharding.make_mesh(config.Mesh(), jax.devices()[:1])


def length_score(params, held: train_step.Held, batch: dict) -> dict[str, logps.Logps]:
    """Completions whose log-probability is params a token: what a mean must be is known."""
    return {name: logps.Logps(params * length, length) for name, length in batch["length"].items()}


def scoring(loss: Any) -> train_step.Scoring:
    live = functools.partial(reference.live, length_score)
    return train_step.Scoring(length_score, live, contract.with_state(loss))


def evaluate_losses(given: train_step.Scoring, params: float, anchor, held_out, mesh, **numbers):
    run = jax.jit(functools.partial(train_step.evaluate, given))
    loss_of = functools.partial(run, jnp.float32(params), (), train_step.Held({}, anchor), numbers)
    return evaluate.preferences(loss_of, held_out, mesh)


@pytest.mark.parametrize(("batch_size", "parts"), [(3, 1), (8, 2), (23, 1), (64, 4)])
def test_held_out_metrics_are_means_over_examples_whatever_the_batch(
    draw_examples, mesh, batch_size, parts
):
    data = draw_examples(23)
    held_out = reference.LaidOut(data, pack.plan(data, batch_size, parts, seed=0), None)
    anchor, beta = jnp.float32(-2), jnp.float32(0.5)
    found = evaluate_losses(scoring(losses.dpo), -3, anchor, held_out, mesh, beta=beta)
    lengths = (data.completions[:, :, 1] - data.completions[:, :, 0]).astype(float)
    margin = 0.5 * (-lengths[:, 0] + lengths[:, 1])  # the log-ratio is -1 a token
    assert found["loss"] == pytest.approx(np.log1p(np.exp(-margin)).mean(), rel=1e-6)
    assert found["rewards/margins"] == pytest.approx(margin.mean(), rel=1e-6)
    right = np.where(margin == 0, 0.5, margin > 0)
    assert 0 < right.mean() < 1 and (margin == 0).any()
    assert found["rewards/accuracies"] == pytest.approx(right.mean(), rel=1e-6)
    assert found["logps/rejected"] == pytest.approx(-3 * lengths[:, 1].mean(), rel=1e-6)


def test_a_metric_of_some_examples_is_the_mean_over_those(draw_examples, mesh):
    data = draw_examples(9, ("completion", "mismatched"))
    held_out = reference.LaidOut(data, pack.plan(data, 4, 1, seed=0), None)
    found = evaluate_losses(scoring(losses.kto), -3, jnp.float32(-2), held_out, mesh)
    lengths = data.completions[:, 0, 1] - data.completions[:, 0, 0]
    desirable = data.columns["desirable"] > 0
    assert found["rewards/chosen"] == pytest.approx(-0.1 * lengths[desirable].mean(), rel=1e-6)
    assert found["rewards/rejected"] == pytest.approx(-0.1 * lengths[~desirable].mean(), rel=1e-6)


def test_a_cached_reference_is_read_from_the_table(draw_examples, mesh):
    data = draw_examples(11)
    totals = {name: np.arange(11, dtype=np.float32) * -k for k, name in enumerate(data.names, 1)}
    held_out = reference.LaidOut(data, pack.plan(data, 4, 1, seed=0), totals)
    rewards = contract.with_state(evaluate.pair_rewards)
    given = train_step.Scoring(length_score, reference.cached, rewards)
    found = evaluate_losses(given, -3, None, held_out, mesh)
    lengths = data.completions[:, :, 1] - data.completions[:, :, 0]
    assert found["rewards/chosen"] == pytest.approx((-3 * lengths[:, 0] + range(11)).mean())
    assert found["rewards/rejected"] == pytest.approx(
        (-3 * lengths[:, 1] + 2 * np.arange(11)).mean()
    )


def test_the_rewards_of_pairs_are_beta_times_the_log_ratios():
    def completions(chosen, rejected):
        ones = jnp.ones(2, jnp.int32)
        return {
            "chosen": logps.Logps(jnp.asarray(chosen), ones),
            "rejected": logps.Logps(jnp.asarray(rejected), ones),
        }

    policy, anchor = completions([-1.0, -2.0], [-4.0, -2.0]), completions([-2.0, 0], [-3.0, 0])
    values, metrics = evaluate.pair_rewards(policy, anchor, {}, beta=0.5)
    assert values.tolist() == [0, 0]
    assert metrics["rewards/chosen"].tolist() == [0.5, -1]
    assert metrics["rewards/rejected"].tolist() == [-0.5, -1]
    assert metrics["rewards/accuracies"].tolist() == [1, 0.5]


def test_prompts_are_distinct_and_in_order_and_come_again_where_there_are_fewer():
    tokens = np.array([5, 6, 9, 7, 9, 5, 6, 9, 8, 9], np.int32)
    spans = np.array([[0, 2], [3, 4], [5, 7], [8, 9]])
    completions = np.array([[[2, 3]], [[4, 5]], [[7, 8]], [[9, 10]]])
    data = tokenise.Tokenised(("completion",), tokens, spans, completions, {}, "", {})
    assert evaluate.prompts(data, 2) == [[5, 6], [7]]
    assert evaluate.prompts(data, 3) == [[5, 6], [7], [8]]
    assert evaluate.prompts(data, 5) == [[5, 6], [7], [8], [5, 6], [7]]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([], 0),
        ([1, 1], 0),
        ([1, 2, 3, 4], 0),
        ([1, 1, 1, 1], 1 / 2),
        # 123 231 312 123 231: two of five stood before
        ([1, 2, 3, 1, 2, 3, 1], 2 / 5),
    ],
)
def test_repetition_is_the_share_of_3_grams_that_stood_before(tokens, expected):
    assert evaluate.repetition(tokens) == pytest.approx(expected)


PROMPTS = [[4, 5, 6], [7], [4, 9, 9, 9], [30, 31]]


@pytest.fixture(scope="module")
def params(draw_params) -> dict:
    return draw_params(MODEL.config)


@pytest.fixture(scope="module")
def sampler(mesh) -> evaluate.Sampler:
    words: Any = SimpleNamespace(eos_id=EOS, decode_plain=lambda ids: " ".join(map(str, ids)))
    settings = config.Samples(
        count=4, max_tokens=6, reward=lambda prompt, completion: float(len(completion.split()))
    )
    score = jax.jit(functools.partial(logps.score, MODEL))
    return evaluate.Sampler(MODEL, words, PROMPTS, settings, mesh, 3, score)


@pytest.fixture(scope="module")
def sampled(sampler, params, draw_params):
    """Metrics and rows against another model, and against the policy itself."""
    key = jax.random.key(0)
    other = draw_params(MODEL.config, seed=1)
    return evaluate.sample(sampler, params, other, key), evaluate.sample(
        sampler, params, params, key
    )


def test_samples_of_the_reference_itself_have_no_kl(sampled):
    (metrics, _), (same, rows) = sampled
    assert metrics["kl"] > 1
    assert same["kl"] == 0
    assert [row["kl"] for row in rows] == [0] * 4


def test_the_metrics_of_samples_are_means_of_their_rows(sampled):
    (metrics, rows), _ = sampled
    assert set(metrics) == {"kl", "length", "ended", "repetition", "reward"}
    for name, value in metrics.items():
        assert value == pytest.approx(np.mean([row[name] for row in rows]))


def test_the_rows_are_the_prompts_with_what_was_sampled(sampled):
    (_, rows), _ = sampled
    assert [row["prompt"] for row in rows] == ["4 5 6", "7", "4 9 9 9", "30 31"]
    for row in rows:
        body = row["completion"].split()
        assert row["length"] == len(body) + row["ended"] <= 6
        assert row["reward"] == len(body)


def log_probability(params: dict, prompt: list[int], completion: list[int]) -> float:
    """log p(completion | prompt) in nats, from all logits of one sequence in float64."""
    ids = np.array([prompt + completion], np.int32)
    where = np.arange(ids.shape[1], dtype=np.int32)[None]
    marks = decoder.attention.Ids(np.ones_like(where), np.zeros_like(where), where)
    hidden: Any = jax.jit(MODEL.apply)({"params": params}, ids, marks)
    logits = np.asarray(hidden[0], np.float64) @ np.asarray(params["embedding"], np.float64).T
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    first = len(prompt) - 1
    return float(sum(logits[first + i, token] for i, token in enumerate(completion)))


def test_a_samples_kl_is_the_log_ratio_of_the_sampled_tokens(sampled, params, draw_params):
    (_, rows), _ = sampled
    row = rows[0]
    ended = [EOS] if row["ended"] else []
    tokens = [int(word) for word in row["completion"].split()] + ended
    policy, anchor = (
        log_probability(one, PROMPTS[0], tokens)
        for one in (params, draw_params(MODEL.config, seed=1))
    )
    assert row["kl"] == pytest.approx(policy - anchor, rel=1e-4)


@pytest.mark.parametrize("cached", [False, True], ids=["live", "cached"])
def test_the_kl_is_to_the_reference_where_that_is_not_the_initial_policy(
    cached: bool, folder: Path, tmp_path: Path, draw_params, monkeypatch: pytest.MonkeyPatch
):
    drawn = {name: draw_params(MODEL.config, seed) for seed, name in enumerate(("policy", "other"))}
    for name, params in drawn.items():
        weights.save(tmp_path / name, MODEL.config, params)
    changes = {
        "model.source": str(tmp_path / "policy"),
        "reference.source": str(tmp_path / "other"),
        "reference.cached": cached,
        "samples.count": 3,
        "samples.max_tokens": 5,
    }
    experiment = tiny.experiment(folder, tmp_path / "run", **changes)
    mesh = sharding.make_mesh(experiment.mesh, jax.devices())
    run, state = assemble.assemble(experiment, mesh)
    assert run.sampler is not None
    given: list[list[int]] = [[5, 6, 7, 8, 9], [200], [11, 300, 12]]
    monkeypatch.setattr(generate, "complete", lambda *_, **__: given)
    found = train.evaluation(run._replace(held_out=None), str(tmp_path / "run"), state, 0)
    expected = [
        log_probability(drawn["policy"], prompt, tokens)
        - log_probability(drawn["other"], prompt, tokens)
        for prompt, tokens in zip(run.sampler.prompts, given, strict=True)
    ]
    lines = (tmp_path / "run" / "samples" / "00000000.jsonl").read_text().splitlines()
    np.testing.assert_allclose([json.loads(line)["kl"] for line in lines], expected, rtol=1e-4)
    assert found["samples/kl"] == pytest.approx(np.mean(expected), rel=1e-4)


def test_samples_of_other_lengths_are_scored_in_the_same_shapes(
    sampler, monkeypatch: pytest.MonkeyPatch
):
    shapes = []

    def score(params, batch):
        shapes.append((batch["tokens"].shape, batch["target"].shape))
        return length_score(params, train_step.Held({}), batch)

    settings = config.Samples(count=4, max_tokens=200)
    counted = sampler._replace(score=jax.jit(score), settings=settings)
    for length in (2, 90):
        given = [[8] * length] * 4
        monkeypatch.setattr(generate, "complete", lambda *_, given=given, **__: given)
        metrics, _ = evaluate.sample(counted, jnp.float32(-3), jnp.float32(-2), jax.random.key(0))
        assert metrics["kl"] == -length
    assert len(shapes) == 1


def test_a_described_sample_by_hand(sampler):
    row = evaluate.describe(sampler, [4], [8, 8, 8, 8, EOS])
    assert row == {
        "prompt": "4",
        "completion": "8 8 8 8",
        "length": 5,
        "ended": 1.0,
        "repetition": pytest.approx(1 / 3),
        "reward": 4.0,
    }
    assert evaluate.describe(sampler, [4], [8])["ended"] == 0.0


def test_rows_of_samples_are_written_by_step(tmp_path):
    rows = [{"prompt": "é", "kl": 1.0}, {"prompt": "b", "kl": 2.0}]
    evaluate.write_rows(str(tmp_path), 20, rows)
    lines = (tmp_path / "samples" / "00000020.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == rows

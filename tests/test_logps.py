"""Dimensions: B rows, L tokens, S scored tokens, N examples, V vocabulary, D width."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import config, logps, sharding
from dpo_jax.data import pack
from dpo_jax.hlo import collectives, costs, text
from dpo_jax.model import decoder, presets
from dpo_jax.model.attention import Ids

MODEL = decoder.Decoder(dataclasses.replace(presets.PRESETS["tiny"], vocabulary_size=48))


@pytest.fixture(scope="module")
def params(draw_params) -> dict:
    return draw_params(MODEL.config)


@functools.cache
def jitted_hidden():
    return jax.jit(lambda params, tokens, ids: MODEL.apply({"params": params}, tokens, ids))


@functools.cache
def jitted_score():
    return jax.jit(functools.partial(logps.score, MODEL))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def score_alone(params: dict, prompt: np.ndarray, completion: np.ndarray) -> float:
    """log p(completion | prompt) in float64 from the full logits of a row of its own."""
    row = np.zeros((1, 32), np.int32)
    length = len(prompt) + len(completion)
    row[0, :length] = np.concatenate([prompt, completion])
    example = (np.arange(32) < length).astype(np.int32)[None]
    ids = Ids(example, np.zeros_like(row), np.arange(32, dtype=np.int32)[None])
    hidden: Any = jitted_hidden()(params, row, ids)
    logits = np.asarray(hidden[0], np.float64) @ np.asarray(params["embedding"], np.float64).T
    predicted = log_softmax(logits)[len(prompt) - 1 : length - 1]
    return float(predicted[np.arange(len(completion)), completion].sum())


def random_scored(rows=2, scored=12, vocabulary=20, width=6):
    generator = np.random.default_rng(0)
    return (
        generator.normal(size=(rows, scored, width)).astype(np.float32),
        generator.normal(size=(width, vocabulary)).astype(np.float32),
        generator.integers(0, vocabulary, (rows, scored), np.int32),
    )


def oracle(hidden, head, target, cotangent):
    """log p(target) and the gradients of its sum with the cotangent, in float64."""
    hidden, head = np.asarray(hidden, np.float64), np.asarray(head, np.float64)
    table = log_softmax(hidden @ head)
    picked = np.take_along_axis(table, target[..., None], -1)[..., 0]
    slope = (np.eye(head.shape[1])[target] - np.exp(table)) * cotangent[..., None]
    return picked, slope @ head.T, np.einsum("bsd,bsv->dv", hidden, slope)


def chunked(hidden, head: decoder.Head, target) -> jax.Array:
    """log p(target) where there are statistics, which read whole rows of logits."""
    places = (jnp.zeros_like(target), jnp.ones_like(target))
    statistics = {"largest": lambda tokens: jnp.max(tokens.logits, axis=-1)}
    return logps.token_values(hidden, head, target, places, statistics)[logps.TOTAL]


@pytest.mark.parametrize("chunks", [1, 3, 12])
def test_chunked_log_probabilities_equal_those_of_the_full_logits(monkeypatch, chunks):
    hidden, head, target = random_scored()
    monkeypatch.setattr(logps, "CHUNK_ELEMENTS", 2 * (12 // chunks) * 20)
    assert logps.chunk_count(2, 12, 20) == chunks
    cotangent = np.random.default_rng(1).normal(size=target.shape).astype(np.float32)

    def total(hidden, head):
        found = chunked(hidden, decoder.Head(head), jnp.asarray(target))
        return (found * cotangent).sum(), found

    gradient = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
    (_, found), slopes = gradient(hidden, head)
    expected, *expected_slopes = oracle(hidden, head, target, cotangent)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=2e-6)
    for slope, expected_slope in zip(slopes, expected_slopes, strict=True):
        np.testing.assert_allclose(slope, expected_slope, rtol=1e-5, atol=2e-6)


def test_log_probabilities_are_of_biased_and_capped_logits():
    hidden, matrix, target = random_scored()
    bias = np.linspace(-1, 1, matrix.shape[1])
    head = decoder.Head(jnp.asarray(matrix), jnp.float32(bias), 1.5)
    logits = np.asarray(hidden, np.float64) @ np.asarray(matrix, np.float64) + bias
    table = log_softmax(1.5 * np.tanh(logits / 1.5))
    expected = np.take_along_axis(table, target[..., None], -1)[..., 0]
    found = chunked(jnp.asarray(hidden), head, jnp.asarray(target))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_of_bfloat16_hidden_states_the_logits_are_float32():
    hidden, head, target = random_scored()
    hidden, head = jnp.bfloat16(hidden), jnp.bfloat16(head)
    expected, *_ = oracle(np.float32(hidden), np.float32(head), target, np.ones(target.shape))
    found = chunked(hidden, decoder.Head(jnp.float32(head)), jnp.asarray(target))
    assert found.dtype == jnp.float32
    # the inputs are rounded to bfloat16 in both, and nothing after them
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_chunks_of_rows_on_several_devices_take_tokens_of_each(monkeypatch):
    hidden, head, target = random_scored()
    hidden, target = (jnp.concatenate([jnp.asarray(one)] * 2, axis=0) for one in (hidden, target))
    rows, scored, width = hidden.shape
    # 3 tokens a device, one in a chunk
    monkeypatch.setattr(logps, "CHUNK_ELEMENTS", rows * 4 * head.shape[1])
    mesh = sharding.make_mesh(config.Mesh(fsdp=2, sequence=4), jax.devices())
    places = jnp.zeros_like(target), jnp.ones_like(target)
    statistics = {"largest": lambda tokens: jnp.max(tokens.logits, axis=-1)}

    def run(hidden, target, places):
        made = decoder.Head(jnp.asarray(head))
        return logps.token_values(hidden, made, target, places, statistics, shards=4)

    where = sharding.tokens(mesh)
    placed = jax.device_put((hidden, target, places), where)
    compiled = jax.jit(run, out_shardings=where).lower(*placed).compile()
    found = compiled(*placed)
    expected = oracle(hidden, head, target, np.ones(target.shape))[0]
    np.testing.assert_allclose(found[logps.TOTAL], expected, rtol=1e-5)
    logits = np.asarray(hidden) @ np.asarray(head)
    np.testing.assert_allclose(found["largest"], logits.max(axis=-1), rtol=1e-5)
    program = text.parse(str(compiled.as_text()))
    assert collectives.collectives(program) == []
    # no device has logits of another's tokens, nor of more than a chunk's
    largest = costs.largest_arrays(program, 1)[0].bytes
    assert largest < 4 * (rows // 2) * (scored // 4) * head.shape[1]


@pytest.mark.parametrize("scored", [1, 7, 12, 96, 100])
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_the_number_of_chunks_bounds_the_logits_and_is_the_smallest(monkeypatch, rows, scored):
    monkeypatch.setattr(logps, "CHUNK_ELEMENTS", 4000)
    vocabulary = 50
    count = logps.chunk_count(rows, scored, vocabulary)
    assert scored % count == 0
    assert rows * scored // count * vocabulary <= 4000
    smaller = [n for n in range(1, count) if scored % n == 0]
    assert all(rows * scored // n * vocabulary > 4000 for n in smaller)


def test_rows_too_many_for_any_chunk_take_a_scored_token_at_a_time(monkeypatch):
    monkeypatch.setattr(logps, "CHUNK_ELEMENTS", 10)
    assert logps.chunk_count(4, 6, 50) == 6


def sizes_of(jaxpr, vocabulary: int) -> list[int]:
    """Elements of every intermediate array, of all nested programs, that ends in V."""
    found = []
    for equation in jaxpr.eqns:
        shapes = [variable.aval.shape for variable in equation.outvars]
        found += [int(np.prod(shape)) for shape in shapes if shape[-1:] == (vocabulary,)]
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            found += sizes_of(inner, vocabulary) if hasattr(inner, "eqns") else []
    return found


def test_neither_pass_holds_the_logits_of_all_scored_tokens(monkeypatch):
    rows, scored, vocabulary, width = 2, 12, 20, 6
    hidden, head, target = random_scored(rows, scored, vocabulary, width)
    chunk = rows * (scored // 4) * vocabulary
    monkeypatch.setattr(logps, "CHUNK_ELEMENTS", chunk)

    def total(hidden, head):
        return chunked(hidden, decoder.Head(head), jnp.asarray(target)).sum()

    program = jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(hidden, head)
    assert max(sizes_of(program.jaxpr, vocabulary)) == chunk


@pytest.mark.parametrize("tied", [False, True])
def test_log_probabilities_are_the_same_with_statistics_and_without(monkeypatch, tied):
    monkeypatch.setattr(logps, "CHUNK_ELEMENTS", 2 * 3 * 20)
    hidden, matrix, target = random_scored()
    bias = jnp.linspace(-1, 1, matrix.shape[1])

    def total(ways, hidden, matrix):
        head = decoder.Head(matrix.T if tied else matrix, bias, 5.0, tied)
        found = ways(hidden, head, jnp.asarray(target))
        return found.sum(), found

    def plain(hidden, head, target):
        return logps.token_values(hidden, head, target, None, {})[logps.TOTAL]

    (_, one), slopes = jax.value_and_grad(total, (1, 2), has_aux=True)(chunked, hidden, matrix)
    (_, other), others = jax.value_and_grad(total, (1, 2), has_aux=True)(plain, hidden, matrix)
    np.testing.assert_allclose(one, other, rtol=1e-6)
    for slope, other_slope in zip(slopes, others, strict=True):
        np.testing.assert_allclose(slope, other_slope, rtol=1e-5, atol=2e-6)


def test_packed_rows_score_each_completion_as_if_it_were_alone(draw_examples, params):
    data = draw_examples(24, seed=3, vocabulary=48)
    batch = pack.batch(data, pack.plan(data, 12, 1, seed=0), 0)
    scores = jitted_score()(params, {k: v for k, v in batch.items() if k != "index"})
    slots = np.flatnonzero(batch["weight"])
    assert len(slots) == 12 and len(batch["tokens"]) < 12
    for c, name in enumerate(data.names):
        expected = [
            score_alone(
                params,
                data.tokens[slice(*data.prompts[i])],
                data.tokens[slice(*data.completions[i, c])],
            )
            for i in batch["index"][slots]
        ]
        np.testing.assert_allclose(scores[name].total[slots], expected, rtol=1e-5)
        spans = data.completions[batch["index"][slots], c]
        assert scores[name].length[slots].tolist() == (spans[:, 1] - spans[:, 0]).tolist()
        empty = batch["weight"] == 0
        assert not np.asarray(scores[name].total)[empty].any()


def test_neither_padding_nor_other_examples_change_an_examples_scores(draw_examples, params):
    data = draw_examples(24, seed=3, vocabulary=48)
    batch = pack.batch(data, pack.plan(data, 12, 1, seed=0), 0)
    batch.pop("index")
    before = jitted_score()(params, batch)
    first = batch["example"] == 1
    assert (batch["example"] > 1).any() and (batch["example"] == 0).any()
    other = np.random.default_rng(5).integers(1, 48, batch["tokens"].shape, np.int32)
    mixed = {**batch, "tokens": np.where(first, batch["tokens"], other)}
    after = jitted_score()(params, mixed)
    slots = np.arange(len(batch["weight"])) % (len(batch["weight"]) // len(first)) == 0
    slots &= batch["weight"] > 0
    for name in data.names:
        was, now = np.asarray(before[name].total), np.asarray(after[name].total)
        np.testing.assert_allclose(now[slots], was[slots], rtol=1e-6)
        assert (np.abs(now - was)[~slots & (batch["weight"] > 0)] > 1e-3).any()


def test_sums_go_by_slot_within_each_row():
    values = jnp.array([[1.0, 2.0, 4.0, 8.0], [16.0, 32.0, 64.0, 128.0]])
    slot = jnp.array([[1, 2, 1, 0], [3, 0, 3, 1]])
    assert logps.sum_slots(values, slot, 3).tolist() == [[5.0, 2.0, 0.0], [128.0, 0.0, 80.0]]


def test_statistics_are_sums_over_each_completions_tokens_whatever_the_chunks(
    draw_examples, params, monkeypatch
):
    data = draw_examples(24, seed=3, vocabulary=48)
    batch = pack.batch(data, pack.plan(data, 12, 1, seed=0), 0)
    batch.pop("index")
    statistics = {
        "early": lambda tokens: jnp.where(tokens.index < tokens.shortest, tokens.logp, 0.0),
        "place": lambda tokens: tokens.index.astype(jnp.float32),
        "largest": lambda tokens: jnp.max(tokens.logits, axis=-1),
    }
    plain = logps.score(MODEL, params, batch)
    whole = jax.jit(functools.partial(logps.score, MODEL, statistics=statistics))(params, batch)
    monkeypatch.setattr(logps, "CHUNK_ELEMENTS", 48 * len(batch["tokens"]) * 8)
    parts = jax.jit(functools.partial(logps.score, MODEL, statistics=statistics))(params, batch)
    shortest = np.minimum(batch["length"]["chosen"], batch["length"]["rejected"])
    assert (batch["length"]["chosen"] != batch["length"]["rejected"]).any()
    for name, length in batch["length"].items():
        for found in (whole, parts):
            np.testing.assert_allclose(found[name].total, plain[name].total, rtol=1e-5)
            sums = found[name].statistics
            np.testing.assert_allclose(sums["place"], length * (length - 1) / 2)
            same = length == shortest
            np.testing.assert_allclose(
                np.asarray(sums["early"])[same], np.asarray(found[name].total)[same], rtol=1e-6
            )
            longer = (length > shortest) & (batch["weight"] > 0)
            assert (np.asarray(sums["early"])[longer] > np.asarray(found[name].total)[longer]).all()
            np.testing.assert_allclose(
                sums["largest"], whole[name].statistics["largest"], rtol=1e-5
            )
    assert not plain["chosen"].statistics


def test_the_prompts_own_tokens_are_scored_where_that_is_asked_for(draw_examples, params):
    data = draw_examples(24, seed=3, vocabulary=48)
    batch = pack.batch(data, pack.plan(data, 12, 1, seed=0, scores_prompt=True), 0)
    scores = jitted_score()(params, {k: v for k, v in batch.items() if k != "index"})
    without = pack.batch(data, pack.plan(data, 12, 1, seed=0), 0)
    assert batch["slot"].astype(bool).sum() > without["slot"].astype(bool).sum()
    slots = np.flatnonzero(batch["weight"])
    for slot in slots:
        example = batch["index"][slot]
        prompt = data.tokens[slice(*data.prompts[example])]
        expected = score_alone(params, prompt[:1], prompt[1:]) if len(prompt) > 1 else 0.0
        assert scores["prompt"].total[slot] == pytest.approx(expected, rel=1e-5)
        assert scores["prompt"].length[slot] == len(prompt) - 1
        chosen = data.tokens[slice(*data.completions[example, 0])]
        assert scores["chosen"].total[slot] == pytest.approx(
            score_alone(params, prompt, chosen), rel=1e-5
        )

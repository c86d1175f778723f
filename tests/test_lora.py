"""Adapters: what they add, what their gradient is, and where they cannot be."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import contract, logps, losses, reference, train_step
from dpo_jax.data import pack
from dpo_jax.model import decoder, families, layers, lora
from dpo_jax.model.attention import Ids
from dpo_jax.model.config import DecoderConfig, Experts, Kind
from tests import tiny

ALL = ("query", "key", "value", "output", "gate", "up", "down")
LLAMA = tiny.DECODER
GPT_2 = dataclasses.replace(
    LLAMA,
    **families.FAMILIES["gpt2"].fixed,
    family="gpt2",
    key_value_heads=4,
    block=(Kind(rope=None),),
    tied_head=True,
)
# a block of two kinds, and one layer more
GEMMA_3 = dataclasses.replace(
    LLAMA, **families.FAMILIES["gemma3"].fixed, layers=5, block=(Kind(window=4), Kind())
)
MIXTURE = dataclasses.replace(LLAMA, family="mixtral", experts=Experts(3, 2))
MODELS = {"llama": LLAMA, "gpt2": GPT_2, "gemma3": GEMMA_3, "mixture": MIXTURE}
TOKENS = np.random.default_rng(1).integers(1, 40, (2, 9), np.int32)
IDS = Ids(
    np.ones_like(TOKENS), np.zeros_like(TOKENS), np.tile(np.arange(9, dtype=np.int32), (2, 1))
)


def draw_adapter(model: DecoderConfig, targets=None, rank: int = 3, seed: int = 5) -> dict:
    """An adapter of which neither matrix is 0."""
    generator = np.random.default_rng(seed)
    shapes = lora.shapes(model, lora.find_targets(model, targets), rank)
    return jax.tree.map(
        lambda leaf: generator.normal(size=leaf.shape, scale=0.3).astype(np.float32), shapes
    )


@functools.partial(jax.jit, static_argnums=0)
def hidden_of(model: DecoderConfig, params: dict) -> Any:
    return decoder.Decoder(model).apply({"params": params}, TOKENS, IDS)


@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_adds_what_its_product_in_the_kernels_would(name):
    model, base = MODELS[name], tiny.draw_params(MODELS[name])
    joined = lora.join(base, draw_adapter(model), 0.7)
    plain, adapted = hidden_of(model, base), hidden_of(model, joined)
    merged = lora.merge(joined)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    assert np.abs(adapted - plain).max() > 0.1
    expected = hidden_of(model, merged)
    assert np.abs(adapted - expected).max() < 1e-4 * np.abs(expected).max()


def test_the_product_in_a_kernel_is_the_scaled_sum_over_the_rank():
    base, adapter = tiny.draw_params(LLAMA), draw_adapter(LLAMA)
    merged = lora.merge(lora.join(base, adapter, 0.5))
    for layer, d, h, i in ((0, 3, 1, 2), (1, 23, 3, 5)):
        a, b = (adapter["layers"]["attention"]["query"][leaf] for leaf in lora.LEAVES)
        added = 0.5 * sum(a[layer, d, r] * b[layer, r, h, i] for r in range(3))
        kernel = base["layers"]["attention"]["query"]["kernel"][layer, d, h, i]
        found = merged["layers"]["attention"]["query"]["kernel"][layer, d, h, i]
        assert found == pytest.approx(kernel + added, rel=1e-5)
        a, b = (adapter["layers"]["attention"]["output"][leaf] for leaf in lora.LEAVES)
        added = 0.5 * sum(a[layer, h, i, r] * b[layer, r, d] for r in range(3))
        kernel = base["layers"]["attention"]["output"]["kernel"][layer, h, i, d]
        found = merged["layers"]["attention"]["output"]["kernel"][layer, h, i, d]
        assert found == pytest.approx(kernel + added, rel=1e-5)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_gradient_of_an_adapter_is_that_by_way_of_the_kernels(remat):
    model, base, adapter = GEMMA_3, tiny.draw_params(GEMMA_3), draw_adapter(GEMMA_3)
    module = decoder.Decoder(model, remat=remat)

    def loss(params) -> jax.Array:
        hidden: Any = module.apply({"params": params}, TOKENS, IDS)
        return jnp.sum(jnp.sin(hidden))

    found = jax.jit(jax.grad(lambda a: loss(lora.join(base, a, 0.7))))(adapter)
    expected = jax.jit(jax.grad(lambda a: loss(lora.merge(lora.join(base, a, 0.7)))))(adapter)
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        other = found
        for entry in path:
            other = other[entry.key]
        assert np.abs(leaf).max() > 1e-3
        np.testing.assert_allclose(other, leaf, atol=2e-4 * np.abs(leaf).max())


def test_a_new_adapter_changes_nothing_and_can_learn():
    adapter = lora.init(LLAMA, ALL, 4, jax.random.key(0))
    base = tiny.draw_params(LLAMA)
    np.testing.assert_array_equal(
        hidden_of(LLAMA, lora.join(base, adapter, 2.0)), hidden_of(LLAMA, base)
    )
    down = adapter["layers"]["mlp"]["down"]["lora_a"]
    assert down.shape == (2, 32, 4)
    bound = 1 / np.sqrt(32)
    assert 0.9 * bound < np.abs(down).max() <= bound
    output = adapter["layers"]["attention"]["output"]["lora_a"]
    assert output.shape == (2, 4, 6, 4)
    assert 0.9 / np.sqrt(24) < np.abs(output).max() <= 1 / np.sqrt(24)
    leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(adapter) if leaf.any()]
    assert len(set(leaves)) == len(leaves) == 7


def test_only_the_targets_are_adapted():
    base = tiny.draw_params(LLAMA)
    adapter = draw_adapter(LLAMA, ("query", "down"))
    assert {k: set(v) for k, v in adapter["layers"].items()} == {
        "attention": {"query"},
        "mlp": {"down"},
    }
    joined = lora.join(base, adapter, 1.0)
    assert "lora_a" not in joined["layers"]["attention"]["key"]
    assert "lora_a" not in base["layers"]["attention"]["query"]


def test_targets_are_all_that_a_model_has_and_a_wrong_one_is_named():
    assert lora.find_targets(LLAMA, None) == ALL
    assert lora.find_targets(GPT_2, None) == tuple(name for name in ALL if name != "gate")
    assert lora.find_targets(MIXTURE, None) == ALL[:4]
    assert lora.find_targets(LLAMA, ("down", "query")) == ("query", "down")
    with pytest.raises(ValueError, match="'up', and of this mixtral .*: query, key, value, output"):
        lora.find_targets(MIXTURE, ("query", "up"))


def test_the_scale_is_alpha_over_the_rank_or_over_its_root():
    assert lora.scale(32.0, 16, rank_stabilised=False) == 2
    assert lora.scale(32.0, 16, rank_stabilised=True) == 8


def test_what_is_trained_takes_the_place_of_the_base():
    base = {"a": {"kernel": 1}, "b": 2}
    assert lora.join(base, {"a": {"kernel": 3}}, 9.0) == {"a": {"kernel": 3}, "b": 2}
    assert lora.join({}, base, 9.0) == base
    assert base == {"a": {"kernel": 1}, "b": 2}


@pytest.fixture(scope="module")
def batch(draw_examples) -> dict:
    data = draw_examples(24, vocabulary=40)
    batch = pack.batch(data, pack.plan(data, 24, 4, seed=0), 0)
    batch.pop("index")
    return batch


def with_noise(batch: dict, seed: int) -> dict:
    draws = np.random.default_rng(seed).integers(2**32, size=len(batch["tokens"]))
    return {**batch, logps.NOISE: draws.astype(np.uint32)}


score = jax.jit(functools.partial(logps.score, decoder.Decoder(LLAMA)), static_argnames="dropout")


def totals(params: dict, batch: dict, dropout: float) -> np.ndarray:
    scored = score(params, batch, dropout=dropout)
    filled = batch["weight"] > 0
    return np.concatenate([np.asarray(scored[name].total)[filled] for name in sorted(scored)])


def test_dropout_is_of_the_adapter_alone_and_drawn_by_row_and_seed(batch):
    base, adapter = tiny.draw_params(LLAMA), draw_adapter(LLAMA)
    joined = lora.join(base, adapter, 1.0)
    plain = totals(joined, batch, 0.0)
    one, other = (totals(joined, with_noise(batch, seed), 0.4) for seed in (0, 1))
    assert np.abs(one - plain).mean() > 0.1 and np.abs(one - other).mean() > 0.1
    np.testing.assert_array_equal(totals(joined, with_noise(batch, 0), 0.4), one)
    # an evaluation has no noise, and a base no adapter
    np.testing.assert_array_equal(totals(joined, batch, 0.4), plain)
    np.testing.assert_array_equal(totals(base, with_noise(batch, 0), 0.4), totals(base, batch, 0))


def test_dropout_is_the_same_in_every_way_to_accumulate(batch):
    base, adapter = tiny.draw_params(LLAMA), draw_adapter(LLAMA)

    def score_joined(params, held: train_step.Held, rows: dict):
        joined = lora.join(held.base, params, 1.0)
        return logps.score(decoder.Decoder(LLAMA), joined, rows, dropout=0.4)

    scoring = train_step.Scoring(score_joined, reference.none, contract.with_state(losses.orpo))
    state = train_step.TrainState(jnp.int32(0), adapter, None)
    ways = train_step.whole, train_step.make_microbatched(2), train_step.make_two_pass(2)
    gradients = []
    for way in ways:
        run: Any = jax.jit(functools.partial(way, scoring))
        noisy = with_noise(batch, 3)
        gradient, _ = run(state, train_step.Held(base), noisy, {"lam": jnp.float32(0.1)})
        gradients.append(gradient)
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(gradients[0]))
    for other in gradients[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest), gradients[0], other
        )
    plain: Any = jax.jit(functools.partial(train_step.whole, scoring))
    without, _ = plain(state, train_step.Held(base), batch, {"lam": jnp.float32(0.1)})
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), gradients[0], without)
    assert max(jax.tree.leaves(moved)) > 0.01 * largest


def test_dropout_keeps_the_share_and_the_mean_of_an_adapters_inputs():
    ones = jnp.ones((4, 200, 50))
    noise = layers.Dropout(jax.vmap(jax.random.key)(jnp.arange(4, dtype=jnp.uint32)), 0.25)
    dropped = np.asarray(layers.drop(ones, noise, "query"))
    assert set(np.unique(dropped)) == {0, np.float32(1 / 0.75)}
    assert dropped.mean() == pytest.approx(1, abs=0.02)
    # rows and linear maps differ
    assert (dropped[0] != dropped[1]).mean() > 0.3
    assert (dropped != np.asarray(layers.drop(ones, noise, "key"))).mean() > 0.3


def test_layers_draw_dropout_apart(batch):
    """With all layers alike, their adapters' noise would otherwise be alike too."""
    params, adapter = tiny.draw_params(LLAMA), draw_adapter(LLAMA, ("up",))
    seen = []
    for layer in (0, 1):
        only = jax.tree.map(np.copy, adapter)
        only["layers"]["mlp"]["up"]["lora_b"][1 - layer] = 0
        joined = lora.join(params, only, 1.0)
        seen.append(totals(joined, with_noise(batch, 0), 0.5) - totals(joined, batch, 0.0))
    assert np.abs(np.corrcoef(*seen)[0, 1]) < 0.9

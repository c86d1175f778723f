"""Attention in blocks against attention at once, in value and gradient."""

import collections
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import config, initial, sharding
from dpo_jax.hlo import collectives, costs, text
from dpo_jax.model import attention, blocks, decoder
from dpo_jax.model.attention import Ids
from tests import test_lora, tiny

SCALE = 0.3


@pytest.fixture(scope="module")
def ids() -> Ids:
    """Rows of examples with two completions, with padding at their ends: int32 [8, 256] each."""
    generator = np.random.default_rng(0)
    found = np.zeros((3, 8, 256), np.int32)
    for row in range(8):
        start = 0
        for example in range(1, 9):
            prompt, *completions = generator.integers(4, 30, 3).tolist()
            whole = prompt + sum(completions)
            if start + whole > 256:
                break
            branch = np.repeat([0, 1, 2], [prompt, *completions])
            position = [np.arange(prompt), *(prompt + np.arange(one) for one in completions)]
            found[:, row, start : start + whole] = (
                np.full(whole, example),
                branch,
                np.concatenate(position),
            )
            start += whole
    return Ids(*found)


def draw(
    ids: Ids, heads: int = 4, key_heads: int = 2, seed: int = 0, head_dim: int = 8
) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(seed), 4)
    counts = heads, key_heads, key_heads, heads
    shapes = [(*ids.example.shape, count, head_dim) for count in counts]
    return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))


def both(attend, arrays: tuple[jax.Array, ...], ids: Ids, **choices) -> tuple[Any, ...]:
    """What attention gives, and the gradients of its product with the last array."""

    @jax.jit
    def run(arrays: tuple[jax.Array, ...], ids: Ids):
        mixed, pull = jax.vjp(
            lambda *parts: attend(*parts, ids, ids, scale=SCALE, **choices), *arrays[:3]
        )
        return mixed, *pull(arrays[3].astype(mixed.dtype))

    return jax.device_get(run(arrays, Ids(*map(jnp.asarray, ids))))


def assert_close(found: tuple, expected: tuple, tolerance: float = 2e-6) -> None:
    for mine, its in zip(found, expected, strict=True):
        mine, its = np.asarray(mine, np.float64), np.asarray(its, np.float64)
        assert np.abs(its).max() > 0.1
        assert np.abs(mine - its).max() < tolerance * np.abs(its).max()


def compare_on_shards_of_rows(attend, ids: Ids) -> None:
    """Asserts that devices which each have a part of every row's queries compute what one does."""
    mesh = sharding.make_mesh(config.Mesh(fsdp=1, sequence=2), jax.devices()[:2])
    arrays, choices = draw(ids, 2, 1), {"window": 30, "cap": 0.7}
    found = both(functools.partial(attend, rows=sharding.tokens(mesh)), arrays, ids, **choices)
    assert_close(found, both(attention.attend, arrays, ids, **choices))


@pytest.mark.parametrize(
    "choices",
    [{}, {"window": 5}, {"cap": 0.7}, {"window": 20, "cap": 2.0}],
    ids=["plain", "window", "cap", "window and cap"],
)
@pytest.mark.parametrize("size", [32, 128])
def test_blocks_give_what_all_pairs_at_once_give(ids, monkeypatch, choices, size):
    monkeypatch.setattr(blocks, "BLOCK", size)
    arrays = draw(ids)
    assert_close(
        both(blocks.attend, arrays, ids, **choices), both(attention.attend, arrays, ids, **choices)
    )


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 1), (6, 3)])
def test_heads_may_share_keys(ids, monkeypatch, heads, key_heads):
    monkeypatch.setattr(blocks, "BLOCK", 32)
    arrays = draw(ids, heads, key_heads)
    assert_close(both(blocks.attend, arrays, ids), both(attention.attend, arrays, ids))


def test_tokens_may_stand_in_any_order(ids, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 16)
    order = np.random.default_rng(0).permutation(ids.example.shape[1])
    mixed = Ids(*(array[:, order] for array in ids))
    arrays = draw(mixed)
    assert_close(both(blocks.attend, arrays, mixed), both(attention.attend, arrays, mixed))


def test_queries_and_keys_may_be_of_different_tokens(ids, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 32)
    query, key, value, _ = draw(ids)
    some = Ids(*(array[:, 20:75] for array in ids))
    of = query[:, 20:75], key, value, some, ids
    found, expected = (
        jax.jit(functools.partial(attend, scale=SCALE))(*of)
        for attend in (blocks.attend, attention.attend)
    )
    assert_close((found,), (expected,))


def test_bfloat16_is_as_near_to_float32_as_at_once(ids, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 32)
    small = tuple(array.astype(jnp.bfloat16) for array in draw(ids))
    exact = both(attention.attend, tuple(array.astype(jnp.float32) for array in small), ids)
    found = both(blocks.attend, small, ids)
    assert all(array.dtype == jnp.bfloat16 for array in found)
    assert_close(found, exact, 2e-2)


def test_what_sees_nothing_gives_zero_and_no_gradient_and_nothing_is_nan(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 8)
    example = np.array([[1] * 5 + [0] * 19, [0] * 24], np.int32)
    ids = Ids(example, np.zeros_like(example), np.arange(24, dtype=np.int32)[None] * example)
    arrays = draw(ids)
    with jax.debug_nans(True):
        found = both(blocks.attend, arrays, ids)
    for array in found:
        np.testing.assert_array_equal(array[:, 5:], 0)
        np.testing.assert_array_equal(array[1], 0)
        assert np.abs(array[0, :5]).max() > 0


def test_large_logits_do_not_overflow(ids, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 32)
    query, *rest = draw(ids)
    arrays = (query * 1e3, *rest)
    found = both(blocks.attend, arrays, ids)
    assert all(np.isfinite(array).all() for array in found)
    expected = both(attention.attend, arrays, ids)
    np.testing.assert_allclose(found[0], expected[0], atol=1e-3)


@pytest.mark.parametrize("window", [None, 12])
def test_no_pair_is_left_out_and_few_are_computed_in_vain(ids, window):
    size, (batch, length) = 16, ids.example.shape
    assert length % size == 0
    cut = blocks.cut_ids(ids, size)
    found = np.asarray(blocks.find_needed(cut, cut, batch, window))
    seen = np.asarray(attention.visible(ids, ids, window))
    count = length // size
    needed = seen.reshape(batch, count, size, count, size).any(axis=(2, 4))
    assert not (needed & (found == 0)).any()
    assert needed.sum() < 0.5 * needed.size
    assert found.sum() < 1.1 * needed.sum()
    # of the queries of a shard of each row too, wherever its tokens stand
    for taken in (np.arange(128, 256), np.r_[32:64, 192:224]):
        part = blocks.cut_ids(Ids(*(array[:, taken] for array in ids)), size)
        listed = np.asarray(blocks.find_needed(part, cut, batch, window))
        np.testing.assert_array_equal(listed, found[:, taken[::size] // size])
    pairs = blocks.list_pairs(cut, cut, batch, window)
    np.testing.assert_array_equal(pairs.count, found.sum(axis=-1).reshape(-1))


def test_each_device_computes_its_own_rows_and_heads(ids, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 32)
    mesh = sharding.make_mesh(config.Mesh(data=2, fsdp=2, tensor=2), jax.devices())
    rows = sharding.rows(mesh)
    arrays = draw(ids)
    heads = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*rows.spec, None, "tensor"))
    placed = tuple(jax.device_put(array, heads) for array in arrays)
    attend = functools.partial(blocks.attend, rows=rows)
    assert_close(both(attend, placed, ids), both(attention.attend, arrays, ids))

    @jax.jit
    def run(query, key, value, ids):
        return jnp.sum(attend(query, key, value, ids, ids, scale=SCALE))

    text = run.lower(*placed[:3], jax.device_put(ids, rows)).compile().as_text()
    assert text is not None
    assert not any(f" {kind}(" in text for kind in ("all-gather", "all-to-all"))


@pytest.mark.parametrize(
    ("attend", "choices"),
    [
        pytest.param(blocks.attend, {}, marks=pytest.mark.slow),
        (blocks.attend, {"window": 20, "cap": 2.0}),
        (blocks.attend_at_once, {"window": 20, "cap": 2.0}),
    ],
    ids=["blocks", "blocks, window and cap", "at once"],
)
def test_each_device_computes_its_own_queries_and_keys_are_collected(
    ids, monkeypatch, attend, choices
):
    monkeypatch.setattr(blocks, "BLOCK", 32)
    mesh = sharding.make_mesh(config.Mesh(fsdp=2, sequence=2, tensor=2), jax.devices())
    rows, arrays = sharding.tokens(mesh), draw(ids)
    heads = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*rows.spec, "tensor"))
    placed = tuple(jax.device_put(array, heads) for array in arrays)
    own = functools.partial(attend, rows=rows)
    found = both(own, placed, ids, **choices)
    assert_close(found, both(attention.attend, arrays, ids, **choices))

    def run(query, key, value, ids):
        return jnp.sum(own(query, key, value, ids, ids, scale=SCALE, **choices))

    gradient = jax.jit(jax.grad(run, argnums=(0, 1, 2)))
    lowered = gradient.lower(*placed[:3], jax.device_put(ids, sharding.rows(mesh)))
    program = text.parse(str(lowered.compile().as_text()))
    # of 4 rows, 256 tokens and one head of keys: keys and values, and their gradients
    each = 4 * 4 * 256 * 8
    sent = collections.Counter(
        (one.kind, one.axes, one.bytes) for one in collectives.collectives(program, mesh.shape)
    )
    assert sent == {
        ("all-gather", ("sequence",), each): 2,
        ("reduce-scatter", ("sequence",), each): 2,
    }


def test_rows_that_do_not_divide_are_computed_too(ids, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 32)
    mesh = sharding.make_mesh(config.Mesh(fsdp=8), jax.devices())
    few = Ids(*(array[:3] for array in ids))
    arrays = draw(few)
    attend = functools.partial(blocks.attend, rows=sharding.rows(mesh))
    assert_close(both(attend, arrays, few), both(attention.attend, arrays, few))


@pytest.mark.parametrize(
    ("name", "remat"),
    [
        ("llama", "none"),
        ("llama", "full"),
        # of two windows
        ("gemma3", "none"),
        # they attend as llama does
        pytest.param("gpt2", "none", marks=pytest.mark.slow),
        pytest.param("mixture", "none", marks=pytest.mark.slow),
    ],
)
def test_a_decoder_with_blocks_gives_what_it_gives_without(monkeypatch, name, remat):
    monkeypatch.setattr(blocks, "BLOCK", 8)
    model = test_lora.MODELS[name]
    params = jax.tree.map(jnp.asarray, tiny.draw_params(model))

    def run(attend) -> tuple[jax.Array, dict]:
        module = decoder.Decoder(model, remat=remat, attend=attend)

        def loss(params):
            hidden: Any = module.apply({"params": params}, test_lora.TOKENS, test_lora.IDS)
            return jnp.sum(jnp.sin(hidden))

        return jax.jit(jax.value_and_grad(loss))(params)

    (found, gradient), (expected, wanted) = run(blocks.attend), run(attention.attend)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(wanted))
    jax.tree.map(
        lambda mine, its: np.testing.assert_allclose(mine, its, atol=1e-4 * largest),
        gradient,
        wanted,
    )


def test_a_run_computes_in_blocks_on_cpu_unless_it_says_otherwise():
    mesh = sharding.make_mesh(config.Mesh(), jax.devices()[:1])

    def make(attention: Any) -> decoder.Decoder:
        return initial.make_decoder(tiny.DECODER, config.Model(attention=attention), mesh)

    assert make("plain").attend is attention.attend
    cut = sharding.make_mesh(config.Mesh(fsdp=1, sequence=2), jax.devices()[:2])
    plain: Any = initial.make_decoder(tiny.DECODER, config.Model(attention="plain"), cut).attend
    assert plain.func is blocks.attend_at_once
    for choice in (None, "blocks"):
        chosen: Any = make(choice).attend
        assert chosen.func is blocks.attend


@pytest.mark.parametrize(("length", "size"), [(20, 24), (100, 64), (2047, 64), (2048, 128)])
def test_blocks_are_no_longer_than_rows_and_larger_in_long_ones(length, size):
    ids = Ids(*np.ones((3, 1, length), np.int32))
    pairs = blocks.list_pairs_of_rows(ids, ids, None)
    assert pairs.query_ids.example.shape == (-(-length // size), size)


def test_flops_of_a_gradient_are_those_of_the_pairs_of_blocks(ids, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 32)
    arrays = draw(ids)

    def loss(query, key, value, ids):
        return jnp.sum(blocks.attend(query, key, value, ids, ids, scale=SCALE))

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    own = Ids(*map(jnp.asarray, ids))
    program = text.parse(str(gradient.lower(*arrays[:3], own).compile().as_text()))
    count = np.asarray(blocks.list_pairs_of_rows(ids, ids, None).count)
    # two products forward, five backward, of 4 heads of 8 dimensions
    expected = count.sum() * 7 * 2 * 32 * 32 * 4 * 8
    # both loops are this function's
    assert costs.flops(program, {"": float(count.mean())}) == expected

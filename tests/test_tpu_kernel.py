"""Kernels for TPUs against attention at once, in value and gradient, and compiled for TPUs.

Those marked tpu need no TPU: libtpu compiles for one (pip install --no-deps "libtpu==0.0.42.*").
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import config, initial, sharding, targets
from dpo_jax.hlo import collectives, costs, text
from dpo_jax.model import attention, blocks, tpu_kernel
from dpo_jax.model.attention import Ids
from tests import test_blocks, tiny

interpreted = functools.partial(tpu_kernel.attend, interpret=True)


def pack(*examples: tuple[int, int, int]) -> Ids:
    """A row of examples, each of so many tokens of prompt and two completions."""
    parts = [np.zeros((3, 0), np.int32)]
    for number, (prompt, *completions) in enumerate(examples, 1):
        branch = np.repeat([0, 1, 2], [prompt, *completions])
        position = [np.arange(prompt), *(prompt + np.arange(one) for one in completions)]
        parts.append(np.stack([np.full_like(branch, number), branch, np.concatenate(position)]))
    return Ids(*np.concatenate(parts, axis=1, dtype=np.int32)[:, None])


@pytest.fixture
def ids(monkeypatch) -> Ids:
    """Two rows of 90 tokens, no multiple of a block's 32; the first is of one example from 12 to
    71, so that its branches' blocks are apart, and the second has a block of padding.
    """
    monkeypatch.setattr(tpu_kernel, "BLOCK", 32)
    rows = pack((3, 4, 5), (20, 15, 25), (6, 6, 6)), pack((9, 17, 8), (5, 2, 1))
    padded = [
        np.pad(np.stack(row), ((0, 0), (0, 0), (0, 90 - row.example.shape[1]))) for row in rows
    ]
    return Ids(*np.concatenate(padded, axis=1))


@pytest.mark.parametrize(
    ("heads", "key_heads", "held", "choices"),
    # logits of a key's head with two query heads fit in a step, or those of a head of each
    [(4, 2, 2 * 32 * 32, {}), (3, 3, 2**18, {"window": 7, "cap": 0.7})],
    ids=["two heads to a key", "window and cap"],
)
def test_kernels_give_what_all_pairs_at_once_give(
    ids, monkeypatch, heads, key_heads, held, choices
):
    monkeypatch.setattr(tpu_kernel, "HELD", held)
    arrays = test_blocks.draw(ids, heads, key_heads)
    with jax.debug_nans(True):
        found = test_blocks.both(interpreted, arrays, ids, **choices)
    test_blocks.assert_close(found, test_blocks.both(attention.attend, arrays, ids, **choices))
    for array in found:
        np.testing.assert_array_equal(array[ids.example == 0], 0)


def test_kernels_compute_the_queries_of_a_shard_of_each_row(ids):
    test_blocks.compare_on_shards_of_rows(interpreted, ids)


def test_queries_and_keys_may_be_of_different_tokens_in_any_order(ids):
    order = np.random.default_rng(0).permutation(90)
    query, key, value, given = test_blocks.draw(ids)
    mixed = Ids(*(array[:, order] for array in ids))

    def run(attend) -> tuple[Any, ...]:
        def of(query, key, value):
            return attend(query, key, value, ids_of_queries, mixed, scale=test_blocks.SCALE)

        ids_of_queries = Ids(*(array[:, 20:65] for array in ids))
        inputs = query[:, 20:65], key[:, order], value[:, order]
        found, pull = jax.vjp(jax.jit(of), *inputs)
        return found, *pull(given[:, 20:65])

    test_blocks.assert_close(run(interpreted), run(attention.attend))


def test_bfloat16_is_as_near_to_float32_as_at_once(ids):
    small = tuple(array.astype(jnp.bfloat16) for array in test_blocks.draw(ids))
    exact = tuple(array.astype(jnp.float32) for array in small)
    found = test_blocks.both(interpreted, small, ids)
    assert all(array.dtype == jnp.bfloat16 for array in found)
    test_blocks.assert_close(found, test_blocks.both(attention.attend, exact, ids), 2e-2)


@pytest.mark.parametrize("window", [None, 9])
def test_what_is_listed_follows_the_pairs_of_tokens_that_see_each_other(ids, window):
    lists = tpu_kernel.list_pairs(ids, ids, 32, window)
    padding = ((0, 0), (0, 6))
    whole = Ids(*(np.pad(array, padding) for array in ids))
    seen = np.asarray(attention.visible(whole, whole, window))
    needed: np.ndarray = seen.reshape(2, 3, 32, 3, 32).max(axis=(2, 4))
    # the last blocks of the second row are padding, which is listed once to be written
    needed[1, 2, 0] = True
    listed = np.asarray(lists.by_query.order)[: int(lists.by_query.count[0])]
    np.testing.assert_array_equal(listed, np.flatnonzero(needed))
    needed[1, 2, 0], needed[1, 0, 2] = False, True
    listed = np.asarray(lists.by_key.order)[: int(lists.by_key.count[0])]
    np.testing.assert_array_equal(listed, np.flatnonzero(needed.transpose(0, 2, 1)))


def test_pairs_of_a_fixed_kind_of_example_grow_with_the_row_and_not_its_square():
    count = jax.jit(lambda ids: tpu_kernel.list_pairs(ids, ids, 128, None).by_query.count[0])
    few, many = (int(count(pack(*[(100, 60, 60)] * examples))) for examples in (8, 32))
    assert 3.5 < many / few < 4.5


def test_blocks_are_larger_where_all_pairs_would_be_too_many_to_list():
    assert tpu_kernel.block_size(16, 8192, 8192) == 128
    assert tpu_kernel.block_size(17, 8192, 8192) == 256
    assert tpu_kernel.block_size(8, 32768, 32768) == 512


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("name", "head_dim", "dtype", "choices"),
    [
        ("v5e:2x2", 128, "bfloat16", {}),
        ("v5p:2x2x1", 64, "bfloat16", {"window": 500, "cap": 30.0}),
        ("v5e:2x2", 80, "float32", {}),
        ("v5p:2x2x1", 256, "bfloat16", {"cap": 50.0}),
    ],
)
def test_gradients_are_compiled_for_tpus(libtpu, name, head_dim, dtype, choices):
    mesh = sharding.make_mesh(config.Mesh(fsdp=2, tensor=2), targets.find(name).devices)
    rows, heads = sharding.rows(mesh), 16
    spec = jax.sharding.PartitionSpec(*rows.spec[:1], None, "tensor")
    place = jax.sharding.NamedSharding(mesh, spec)

    def shape(count: int) -> Any:
        return jax.ShapeDtypeStruct((4, 2000, count, head_dim), dtype, sharding=place)

    integers: Any = jax.ShapeDtypeStruct((4, 2000), jnp.int32, sharding=rows)
    attend: Any = initial.make_decoder(tiny.DECODER, config.Model(), mesh).attend
    assert attend.func is tpu_kernel.attend

    def loss(query, key, value, ids):
        mixed = attend(query, key, value, ids, ids, scale=0.1, **choices)
        return jnp.sum(jnp.square(mixed.astype(jnp.float32)))

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    ids = Ids(integers, integers, integers)
    compiled = gradient.lower(shape(heads), shape(4), shape(4), ids).compile()
    program = text.parse(str(compiled.as_text()))
    assert costs.uncounted(program) == []
    # nine products of the 136 pairs of 16 blocks, in 2 rows and 8 heads a device
    assert costs.flops(program) == 9 * 2 * 2 * 8 * 136 * 128**2 * head_dim
    assert collectives.collectives(program) == []
    # logits of one row and head in float32 are larger
    held: Any = compiled.memory_analysis()
    assert held.temp_size_in_bytes < 2 * 8 * 2000**2 * 4


@pytest.mark.tpu
def test_the_queries_of_a_shard_of_each_row_are_compiled_for_tpus(libtpu):
    devices = targets.find("v5e:2x2").devices
    mesh = sharding.make_mesh(config.Mesh(fsdp=1, sequence=2, tensor=2), devices)
    rows = sharding.tokens(mesh)
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*rows.spec, "tensor"))

    def shape(heads: int) -> Any:
        return jax.ShapeDtypeStruct((1, 4096, heads, 128), jnp.bfloat16, sharding=place)

    integers: Any = jax.ShapeDtypeStruct((1, 4096), jnp.int32, sharding=sharding.rows(mesh))
    attend: Any = initial.make_decoder(tiny.DECODER, config.Model(), mesh).attend

    def loss(query, key, value, ids):
        mixed = attend(query, key, value, ids, ids, scale=0.1)
        return jnp.sum(jnp.square(mixed.astype(jnp.float32)))

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    ids = Ids(integers, integers, integers)
    compiled = gradient.lower(shape(16), shape(4), shape(4), ids).compile()
    program = text.parse(str(compiled.as_text()))
    assert costs.uncounted(program) == []
    # 512 pairs of 16 blocks of queries and 32 of keys, taken for (512 + 16) / 2 by query and
    # (512 + 32) / 2 by key; five and four products
    assert costs.flops(program) == (5 * 264 + 4 * 272) * 2 * 8 * 128**2 * 128
    sent = {(one.kind, one.axes) for one in collectives.collectives(program, mesh.shape)}
    assert sent == {("all-gather", ("sequence",)), ("reduce-scatter", ("sequence",))}


def test_a_kernel_is_chosen_where_there_is_one():
    mesh = sharding.make_mesh(config.Mesh(), jax.devices()[:1])
    with pytest.raises(ValueError, match="there is none for the mesh's platform, cpu"):
        initial.make_decoder(tiny.DECODER, config.Model(attention="kernel"), mesh)
    chosen: Any = initial.make_decoder(tiny.DECODER, config.Model(), mesh).attend
    assert chosen.func is blocks.attend

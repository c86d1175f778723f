"""Kernels for GPUs against attention at once, in value and gradient, and lowered for CUDA."""

import dataclasses
import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import config, initial, sharding
from dpo_jax.model import attention, gpu_kernel
from dpo_jax.model.attention import Ids
from tests import test_blocks, test_tpu_kernel, tiny

interpreted = functools.partial(gpu_kernel.attend, interpret=True)


@pytest.fixture
def ids(monkeypatch) -> Ids:
    """A row of 90 tokens, no multiple of a block's 32, whose last block is padding."""
    monkeypatch.setattr(gpu_kernel, "BLOCK", 32)
    row = test_tpu_kernel.pack((3, 4, 5), (20, 11, 19))
    return Ids(*(np.pad(array, ((0, 0), (0, 90 - array.shape[1]))) for array in row))


@pytest.mark.parametrize(
    ("heads", "key_heads", "choices"),
    [(4, 2, {}), (2, 2, {"window": 7, "cap": 0.7})],
    ids=["two heads to a key", "window and cap"],
)
def test_kernels_give_what_all_pairs_at_once_give(ids, heads, key_heads, choices):
    arrays = test_blocks.draw(ids, heads, key_heads)
    with jax.debug_nans(True):
        found = test_blocks.both(interpreted, arrays, ids, **choices)
    test_blocks.assert_close(found, test_blocks.both(attention.attend, arrays, ids, **choices))
    for array in found:
        np.testing.assert_array_equal(array[ids.example == 0], 0)


def test_kernels_compute_the_queries_of_a_shard_of_each_row(ids):
    test_blocks.compare_on_shards_of_rows(interpreted, ids)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_lowered_for_cuda(dtype):
    def loss(query, key, value, ids):
        mixed = gpu_kernel.attend(query, key, value, ids, ids, scale=0.1, window=40, cap=3.0)
        return jnp.sum(mixed.astype(jnp.float32))

    query, key = (jax.ShapeDtypeStruct((2, 200, count, 80), dtype) for count in (4, 2))
    integers: Any = jax.ShapeDtypeStruct((2, 200), jnp.int32)
    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(query, key, key, Ids(*[integers] * 3))
    text = str(traced.lower(lowering_platforms=("cuda",)).as_text())
    assert text.count("@__gpu$xla.gpu.triton(") == 3


@pytest.mark.parametrize(
    ("kind", "head_dim", "dtype", "expected"),
    [
        ("NVIDIA H200", 64, "bfloat16", gpu_kernel.attend),
        ("NVIDIA H200", 128, None, attention.attend),
        ("NVIDIA H200", 128, "bfloat16", gpu_kernel.attend),
        ("NVIDIA H200", 256, "bfloat16", attention.attend),
        ("AMD Instinct MI300X", 64, "bfloat16", attention.attend),
    ],
)
def test_kernels_are_the_default_for_what_a_gpu_has_run(
    kind, head_dim, dtype, expected, monkeypatch
):
    monkeypatch.setattr(sharding, "row_shards", lambda mesh: 1)
    devices = np.array([types.SimpleNamespace(platform="gpu", device_kind=kind)])
    mesh = types.SimpleNamespace(devices=devices)
    shape = dataclasses.replace(tiny.DECODER, head_dim=head_dim)

    def choose(**settings: Any) -> Any:
        found: Any = initial.choose_attention(shape, config.Model(**settings), mesh, None)
        return getattr(found, "func", found)

    assert choose(dtype=dtype) is expected
    assert choose(dtype=dtype, attention="kernel") is gpu_kernel.attend


def test_longer_rows_of_heads_have_smaller_blocks():
    sizes = [gpu_kernel.block_size(count, jnp.dtype("bfloat16")) for count in (16, 128, 256)]
    assert sizes == [64, 64, 32]
    assert [gpu_kernel.block_size(count, jnp.dtype("float32")) for count in (64, 128)] == [64, 32]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("choices", [{}, {"window": 40, "cap": 2.0}], ids=["plain", "window, cap"])
def test_a_gpu_gives_what_all_pairs_at_once_give(head_dim, choices):
    """Of what `is_proven` names. With 256 dimensions the compiler came to no end in half a minute;
    nothing is known of float32.
    """
    if jax.default_backend() != "gpu":
        pytest.skip("no GPU: JAX_PLATFORMS=cuda has one used")
    ids = test_tpu_kernel.pack((100, 60, 90), (20, 11, 19), (300, 200, 150))
    drawn = test_blocks.draw(ids, head_dim=head_dim)
    arrays = tuple(array.astype("bfloat16") for array in drawn)
    exact = tuple(array.astype(jnp.float32) for array in arrays)
    with jax.default_matmul_precision("highest"):
        expected = test_blocks.both(attention.attend, exact, ids, **choices)
    found = test_blocks.both(gpu_kernel.attend, arrays, ids, **choices)
    test_blocks.assert_close(found, expected, 2e-2)

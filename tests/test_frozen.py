"""Parameters that are held for forward passes only, in bfloat16 and in int8."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.model import decoder, frozen, lora, products
from tests import test_lora, tiny

MODELS = test_lora.MODELS


@pytest.mark.parametrize("name", MODELS)
def test_a_forward_pass_in_bfloat16_is_the_same_with_matrices_held_in_it(name):
    model = MODELS[name]
    params = jax.tree.map(jnp.asarray, tiny.draw_params(model))
    held = frozen.hold(params, "bfloat16", "bfloat16")
    module = decoder.Decoder(model, dtype=jnp.bfloat16)

    @jax.jit
    def logits(params) -> jax.Array:
        hidden: Any = module.apply({"params": params}, test_lora.TOKENS, test_lora.IDS)
        return decoder.logits(hidden, decoder.head(params, model))

    np.testing.assert_array_equal(logits(held), logits(params))
    small = [leaf for leaf in jax.tree.leaves(held) if leaf.dtype == jnp.bfloat16]
    assert sum(leaf.size for leaf in small) > 0.9 * sum(leaf.size for leaf in jax.tree.leaves(held))


def test_what_is_held_is_a_copy():
    params = jax.tree.map(jnp.asarray, tiny.draw_params(tiny.DECODER))
    held = frozen.hold(params, "float32", "float32")
    for mine, its in zip(jax.tree.leaves(held), jax.tree.leaves(params), strict=True):
        assert mine.unsafe_buffer_pointer() != its.unsafe_buffer_pointer()
        np.testing.assert_array_equal(mine, its)


@pytest.mark.parametrize("name", MODELS)
def test_int8_has_a_scale_for_each_output_and_is_off_by_half_a_step_at_most(name):
    params = jax.tree.map(jnp.asarray, tiny.draw_params(MODELS[name]))
    held = frozen.hold(params, "int8", "float32")
    linear_maps = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        weights: Any = held
        for entry in path:
            weights = weights[entry.key]
        if not products.is_quantised(weights):
            np.testing.assert_array_equal(weights, leaf)
            continue
        linear_maps += 1
        inputs = frozen.input_axes(tuple(entry.key for entry in path))
        step = np.abs(leaf).max(axis=inputs, keepdims=True) / 127
        assert weights.qvalue.dtype == jnp.int8 and weights.scale.shape == step.shape
        off = np.abs(np.asarray(products.dequantise(weights)) - leaf)
        assert (off <= 0.501 * step).all() and off.max() > 0
    stacks = 2 if "remainder" in params else 1
    assert linear_maps == stacks * {"llama": 7, "gpt2": 6, "gemma3": 7, "mixture": 7}[name]


# in bfloat16, tokens near a border between experts would change sides
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama", jnp.float32),
        ("llama", jnp.bfloat16),
        ("gpt2", jnp.float32),
        ("mixture", jnp.float32),
        # its linear maps are those of llama
        pytest.param("gemma3", jnp.float32, marks=pytest.mark.slow),
    ],
)
def test_a_decoder_computes_with_int8_what_it_computes_with_the_values_it_stands_for(name, dtype):
    model = MODELS[name]
    params = jax.tree.map(jnp.asarray, tiny.draw_params(model))
    held = frozen.hold(params, "int8", "float32")
    module, adapter = decoder.Decoder(model, dtype=dtype), test_lora.draw_adapter(model)

    def loss(adapter, base) -> tuple[jax.Array, jax.Array]:
        joined = lora.join(base, adapter, 0.5)
        hidden: Any = module.apply({"params": joined}, test_lora.TOKENS, test_lora.IDS)
        return jnp.sum(jnp.sin(hidden.astype(jnp.float32))), hidden

    run = jax.jit(jax.grad(loss, has_aux=True))
    gradient, hidden = run(adapter, held)
    exact, expected = run(adapter, lora.merge(held))
    tolerance = 1e-4 if dtype == jnp.float32 else 0.06
    scale = np.abs(np.asarray(expected, np.float32)).max()
    off = np.asarray(hidden, np.float32) - np.asarray(expected, np.float32)
    assert np.abs(off).max() < tolerance * scale
    for found, wanted in zip(jax.tree.leaves(gradient), jax.tree.leaves(exact), strict=True):
        assert np.abs(found - wanted).max() < 3 * tolerance * np.abs(wanted).max()


def test_backpropagation_keeps_int8_values_and_no_multiplied_out_ones():
    model = dataclasses.replace(tiny.DECODER, width=256, hidden=1024, layers=24)
    params = jax.tree.map(jnp.asarray, tiny.draw_params(model))
    adapter, module = test_lora.draw_adapter(model), decoder.Decoder(model)

    def loss(adapter, base) -> jax.Array:
        joined = lora.join(base, adapter, 0.5)
        hidden: Any = module.apply({"params": joined}, test_lora.TOKENS, test_lora.IDS)
        return jnp.sum(hidden)

    def temporaries(held_as: str) -> int:
        base = frozen.hold(params, held_as, "float32")
        compiled = jax.jit(jax.grad(loss)).lower(adapter, base).compile()
        analysis: Any = compiled.memory_analysis()
        return analysis.temp_size_in_bytes

    # multiplied out, all layers would take 74 MiB; the activations take 17
    assert temporaries("int8") < 1.1 * temporaries("float32")


def test_sizes_are_of_all_arrays():
    tree = {"a": jnp.zeros((3, 4), jnp.bfloat16), "b": [jnp.zeros(5, jnp.int8)]}
    assert frozen.bytes_of(tree) == 29

"""What a layer keeps for its backward pass, in numbers a token."""

import dataclasses
import functools
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import plan_search
from dpo_jax.model import attention, blocks, decoder, gpu_kernel, lora, tpu_kernel
from dpo_jax.model.attention import Ids
from dpo_jax.model.config import DecoderConfig, Experts
from tests import tiny

ROWS, LENGTH = 3, 128
SMALL = tiny.DECODER
EXPERTS, CHOSEN = 5, 2
MIXTURE = dataclasses.replace(SMALL, experts=Experts(count=EXPERTS, chosen=CHOSEN))
KEYS = SMALL.key_value_heads * SMALL.head_dim
QUERIES = SMALL.heads * SMALL.head_dim
# the layer's input, queries, keys, values, what attention gives, what is added to the stream
ALWAYS = [SMALL.width, QUERIES, KEYS, KEYS, QUERIES, SMALL.width]
OF_BLOCKS = [*ALWAYS, SMALL.heads, *[SMALL.hidden] * 2]  # one log of a sum a head


def kept(model: DecoderConfig, attend: Any, adapter: Any = None, **options: Any) -> Counter[float]:
    """How many arrays of so many numbers a token the layers keep for a gradient of their
    parameters, or of an adapter's.
    """
    module = decoder.Decoder(model, attend=attend, **options)
    params = decoder.shapes(model)
    position = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    ids = Ids(np.ones_like(position), np.zeros_like(position), position)
    trained = params if adapter is None else adapter

    def hidden(trained: Any) -> Any:
        weights = trained if adapter is None else lora.join(zeros(params), trained, 1.0)
        return module.apply({"params": weights}, position % model.vocabulary_size, ids)

    def zeros(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)

    pulled = jax.make_jaxpr(lambda trained: jax.vjp(hidden, trained)[1])(trained)
    shapes = [variable.aval.shape for variable in pulled.jaxpr.outvars]
    weights = {leaf.shape for leaf in jax.tree.leaves((params, trained))}
    return Counter(
        np.prod(shape[1:]) / (ROWS * LENGTH)
        for shape in shapes
        if len(shape) > 1 and shape[0] == model.layers and shape not in weights
    )


@pytest.mark.parametrize("name", ["blocks", "tpu", "gpu"])
def test_a_layer_keeps_its_input_what_its_products_give_and_what_attention_gives(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(gpu_kernel, "BLOCK", LENGTH)
    attend = {
        "blocks": blocks.attend,
        "tpu": functools.partial(tpu_kernel.attend, interpret=True),
        "gpu": functools.partial(gpu_kernel.attend, interpret=True),
    }[name]
    expected = Counter(OF_BLOCKS)
    if name == "gpu":
        # heads as wide as the kernel's products
        expected.subtract([QUERIES])
        expected.update([16 * SMALL.heads])
    assert kept(SMALL, attend) == expected


def test_all_pairs_at_once_keep_their_logits_and_no_softmax():
    expected = Counter([*ALWAYS, *[SMALL.hidden] * 2, SMALL.heads * LENGTH])
    assert kept(SMALL, attention.attend) == expected


def test_experts_keep_their_products_and_the_order_of_tokens():
    products = [CHOSEN * SMALL.hidden, CHOSEN * SMALL.hidden, CHOSEN * SMALL.width]
    numbers = [EXPERTS, CHOSEN, CHOSEN]
    assert kept(MIXTURE, blocks.attend) == Counter([*ALWAYS, SMALL.heads, *products, *numbers])


def test_a_search_reckons_with_what_is_kept():
    assert plan_search.kept(SMALL, "none") == sum(OF_BLOCKS) - SMALL.heads
    assert plan_search.kept(SMALL, "full") == SMALL.width
    dots = kept(SMALL, blocks.attend, remat="dots")
    assert plan_search.kept(SMALL, "dots") == sum(value * count for value, count in dots.items())


def test_dots_keep_what_products_give_and_full_the_input_alone():
    products = Counter(OF_BLOCKS) - Counter([QUERIES, SMALL.heads])
    for attend in (blocks.attend, attention.attend):
        assert kept(SMALL, attend, remat="dots") == products
    assert kept(SMALL, blocks.attend, remat="full") == Counter([SMALL.width])


def test_an_adapter_adds_numbers_of_its_rank_alone():
    adapter = lora.init(SMALL, ("query", "down"), 3, jax.random.key(0))
    found = kept(SMALL, blocks.attend, adapter)
    assert found == Counter([*OF_BLOCKS, 3, 3])

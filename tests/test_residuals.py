"""What a layer keeps for its backward pass, in numbers a token."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from dpo_jax import config, initial, plan_search, sharding, targets
from dpo_jax.model import attention, blocks, decoder, gpu_kernel, layers, lora, tpu_kernel
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


def forward_of(
    model: DecoderConfig, attend: Any, *, dropout: bool = False, **options: Any
) -> Callable[..., jax.Array]:
    """Parameters to the hidden states of rows of one example each."""
    module = decoder.Decoder(model, attend=attend, **options)
    position = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    ids = Ids(np.ones_like(position), np.zeros_like(position), position)
    drawn = layers.Dropout(jax.random.split(jax.random.key(0), ROWS), 0.5) if dropout else None

    def forward(params: Any) -> Any:
        tokens = position % model.vocabulary_size
        return module.apply({"params": params}, tokens, ids, dropout=drawn)

    return forward


def join(model: DecoderConfig, adapter: Any) -> Any:
    """A decoder's parameters, all 0, with an adapter."""
    base = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), decoder.shapes(model))
    return lora.join(base, adapter, 1.0)


def kept(forward: Callable[..., jax.Array], trained: Any) -> Counter[float]:
    """How many arrays of so many numbers a token the layers keep for a gradient of what is
    trained.
    """
    pulled = jax.make_jaxpr(lambda trained: jax.vjp(forward, trained)[1])(trained)
    shapes = [variable.aval.shape for variable in pulled.jaxpr.outvars]
    weights = {leaf.shape for leaf in jax.tree.leaves((trained, decoder.shapes(SMALL)))}
    return Counter(
        np.prod(shape[1:]) / (ROWS * LENGTH)
        for shape in shapes
        if len(shape) > 1 and shape[0] == SMALL.layers and shape not in weights
    )


def kept_of(model: DecoderConfig, attend: Any, **options: Any) -> Counter[float]:
    """The same, for all of a decoder's parameters."""
    return kept(forward_of(model, attend, **options), decoder.shapes(model))


def count(forward: Callable[..., jax.Array], trained: Any) -> Counter[str]:
    """How often a gradient of what is trained computes each primitive."""

    def count_in(jaxpr: Any) -> Counter[str]:
        found = Counter(equation.primitive.name for equation in jaxpr.eqns)
        for equation in jaxpr.eqns:
            for inside in core.jaxprs_in_params(equation.params):
                found += count_in(inside)
        return found

    def loss(trained: Any) -> jax.Array:
        return jnp.sum(jnp.sin(forward(trained)))

    return count_in(jax.make_jaxpr(jax.grad(loss))(trained).jaxpr)


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
    assert kept_of(SMALL, attend) == expected


def test_all_pairs_at_once_keep_their_logits_and_no_softmax():
    expected = Counter([*ALWAYS, *[SMALL.hidden] * 2, SMALL.heads * LENGTH])
    assert kept_of(SMALL, attention.attend) == expected


def test_experts_keep_their_products_and_the_order_of_tokens():
    products = [CHOSEN * SMALL.hidden, CHOSEN * SMALL.hidden, CHOSEN * SMALL.width]
    # logits of experts, who is chosen, and the order of tokens there and back
    numbers = [EXPERTS, CHOSEN, CHOSEN, CHOSEN, EXPERTS / (ROWS * LENGTH)]
    assert kept_of(MIXTURE, blocks.attend) == Counter([*ALWAYS, SMALL.heads, *products, *numbers])


def test_experts_are_chosen_and_their_tokens_sorted_once():
    mixture, plain = (
        count(forward_of(model, blocks.attend), decoder.shapes(model)) for model in (MIXTURE, SMALL)
    )
    assert mixture["top_k"] == 1 and mixture["sort"] == plain["sort"] + 2


@pytest.mark.parametrize("model", [SMALL, MIXTURE])
def test_a_search_reckons_with_what_is_kept(model: DecoderConfig):
    for remat in ("none", "dots"):
        found = kept_of(model, blocks.attend, remat=remat)
        # beside what attention adds, and experts' numbers
        reckoned = sum(number * count for number, count in found.items() if number > 6)
        assert plan_search.kept(model, remat) == reckoned
    assert plan_search.kept(model, "full") == model.width
    apart = plan_search.kept(SMALL, "none", 2), plan_search.kept(SMALL, "none")
    assert 2 * apart[0] - apart[1] == 2 * SMALL.width


def test_dots_keep_what_products_give_and_full_the_input_alone():
    products = Counter(OF_BLOCKS) - Counter([QUERIES, SMALL.heads])
    for attend in (blocks.attend, attention.attend):
        assert kept_of(SMALL, attend, remat="dots") == products
    assert kept_of(SMALL, blocks.attend, remat="full") == Counter([SMALL.width])


def test_an_adapter_adds_numbers_of_its_rank_and_what_is_dropped():
    adapter = lora.init(SMALL, ("query", "down"), 3, jax.random.key(0))

    def forward(adapter: Any) -> jax.Array:
        return forward_of(SMALL, blocks.attend)(join(SMALL, adapter))

    def dropping(adapter: Any) -> jax.Array:
        return forward_of(SMALL, blocks.attend, dropout=True)(join(SMALL, adapter))

    assert kept(forward, adapter) == Counter([*OF_BLOCKS, 3, 3])
    # of the width of each map's inputs
    assert kept(dropping, adapter) == Counter([*OF_BLOCKS, 3, 3, SMALL.width, SMALL.hidden])
    assert count(dropping, adapter)["random_bits"] == 2


@pytest.mark.tpu
def test_tpus_run_the_forward_kernel_of_a_layer_once(libtpu):
    mesh = sharding.make_mesh(config.Mesh(fsdp=4), targets.find("v5e:2x2").devices)
    model = initial.make_decoder(SMALL, config.Model(), mesh)
    params = sharding.with_shardings(decoder.shapes(SMALL), mesh)
    integers: Any = jax.ShapeDtypeStruct((4, 256), jnp.int32, sharding=sharding.rows(mesh))

    def loss(params: Any, tokens: jax.Array, ids: Ids) -> jax.Array:
        hidden: Any = model.apply({"params": params}, tokens, ids)
        return jnp.sum(jnp.sin(hidden.astype(jnp.float32)))

    gradient: Any = jax.jit(jax.grad(loss))
    compiled = gradient.lower(params, integers, Ids(*[integers] * 3)).compile()
    # one of it, and two of its gradient
    assert str(compiled.as_text()).count('custom_call_target="tpu_custom_call"') == 3

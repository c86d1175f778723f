import dataclasses
import functools
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.model import config as model_config
from dpo_jax.model import decoder, residuals
from dpo_jax.model.attention import Ids
from dpo_jax.model.config import DecoderConfig, Experts, Kind, Llama3Scaling, Rope, YarnScaling
from dpo_jax.model.presets import PRESETS
from tests import tiny

SMALL = tiny.DECODER
SCALING = Llama3Scaling(
    factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_max_positions=16
)
VARIANTS = {
    "plain": SMALL,
    "tied": dataclasses.replace(SMALL, tied_head=True),
    "window": dataclasses.replace(SMALL, block=(Kind(window=3),)),
    "llama3 rope": dataclasses.replace(SMALL, block=(Kind(rope=Rope(scaling=SCALING)),)),
}

BIASES: dict[str, Any] = {"attention_bias": True, "output_bias": True, "mlp_bias": True}
# one for each part of the decoder that the float64 decoder below lacks
FEATURES = {
    "plain": SMALL,
    "window": VARIANTS["window"],
    "blocks and a remainder": dataclasses.replace(
        SMALL, layers=5, block=(Kind(window=3), Kind(rope=Rope(500.0)))
    ),
    "one block": dataclasses.replace(
        SMALL, layers=3, block=(Kind(), Kind(rope=None), Kind(window=2))
    ),
    "learned positions, layer norm, plain MLP": dataclasses.replace(
        SMALL,
        **BIASES,
        norm="layer",
        gated=False,
        activation="relu",
        position_offset=2,
        block=(Kind(rope=None),),
    ),
    "parallel, part of a head turned": dataclasses.replace(
        SMALL, residual="parallel", activation="gelu", block=(Kind(rope=Rope(fraction=0.34)),)
    ),
    "parallel with one norm, head bias": dataclasses.replace(
        SMALL, **BIASES, residual="parallel_one_norm", norm="layer", head_bias=True
    ),
    "sandwich, caps": dataclasses.replace(
        SMALL,
        norm="rms_plus_one",
        norm_placement="sandwich",
        query_key_norm="head",
        query_scalar=5,
        attention_cap=2.0,
        logit_cap=3.0,
        scaled_embedding=True,
        tied_head=True,
        activation="gelu_tanh",
    ),
    "norms after, over all heads": dataclasses.replace(
        SMALL, norm_placement="post", query_key_norm="width"
    ),
    "experts": dataclasses.replace(SMALL, experts=Experts(count=5, chosen=2)),
    "yarn": dataclasses.replace(SMALL, block=(Kind(rope=Rope(100.0, YarnScaling(4.0, 16, 1.1))),)),
}

draw_params = functools.partial(tiny.draw_params, scale=0.3)


def draw_tokens(shape: tuple[int, int], seed: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, SMALL.vocabulary_size, shape, np.int32)


def plain_ids(rows: int, length: int) -> Ids:
    position = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    return Ids(np.ones_like(position), np.zeros_like(position), position)


def apply(model: decoder.Decoder, params: dict, *arguments: Any) -> Any:
    return model.apply({"params": params}, *arguments)


jitted = jax.jit(apply, static_argnums=0)
# traced once for all tests
shapes = functools.cache(decoder.shapes)


def run(config: DecoderConfig, params: dict, tokens, ids: Ids, **options: Any) -> np.ndarray:
    return np.asarray(jitted(decoder.Decoder(config, **options), params, tokens, ids))


def decode_by_numpy(config: DecoderConfig, params: dict, tokens: np.ndarray) -> np.ndarray:
    """Final hidden states [L, D] of one sequence in float64, as the Llama papers write them."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    (kind,) = config.block
    window = kind.window or len(tokens)
    rope = kind.rope or Rope()

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon) * scale

    def turn(x, position):  # [Dh]: the pairs (i, i + Dh / 2) as complex numbers
        half = config.head_dim // 2
        inverse = rope.theta ** (-np.arange(half) / half)
        if isinstance(rope.scaling, Llama3Scaling):
            inverse = np.array([stretch(f, rope.scaling) for f in inverse])
        turned = (x[:half] + 1j * x[half:]) * np.exp(1j * position * inverse)
        return np.concatenate([turned.real, turned.imag])

    x = params["embedding"][tokens]
    for n in range(config.layers):
        layer = jax.tree.map(lambda leaf, n=n: leaf[n], params["layers"])
        q, k, v = (
            np.einsum(
                "ld,dhk->lhk",
                norm(x, layer["attention_norm"]["scale"]),
                layer["attention"][m]["kernel"],
            )
            for m in ("query", "key", "value")
        )
        mixed = np.zeros_like(q)
        for i in range(len(tokens)):
            seen = range(max(0, i - window + 1), i + 1)
            for h in range(config.heads):
                g = h * config.key_value_heads // config.heads
                logits = [turn(q[i, h], i) @ turn(k[j, g], j) / config.head_dim**0.5 for j in seen]
                weights = np.exp(logits) / np.exp(logits).sum()
                mixed[i, h] = weights @ v[list(seen), g]
        x = x + np.einsum("lhk,hkd->ld", mixed, layer["attention"]["output"]["kernel"])
        y, mlp = norm(x, layer["mlp_norm"]["scale"]), layer["mlp"]
        gate = y @ mlp["gate"]["kernel"]
        up = y @ mlp["up"]["kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * up) @ mlp["down"]["kernel"]
    return norm(x, params["norm"]["scale"])


def stretch(frequency: float, scaling: Llama3Scaling) -> float:
    """The rule of Llama 3.1's release, one frequency at a time."""
    wavelength = 2 * np.pi / frequency
    context = scaling.original_max_positions
    if wavelength < context / scaling.high_frequency_factor:
        return frequency
    if wavelength > context / scaling.low_frequency_factor:
        return frequency / scaling.factor
    smooth = (context / wavelength - scaling.low_frequency_factor) / (
        scaling.high_frequency_factor - scaling.low_frequency_factor
    )
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_hidden_states_equal_a_float64_decoder_in_numpy(config):
    params, tokens = draw_params(config), draw_tokens((2, 9))
    hidden = run(config, params, tokens, plain_ids(2, 9))
    for row in range(2):
        expected = decode_by_numpy(config, params, tokens[row])
        np.testing.assert_allclose(hidden[row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", FEATURES.values(), ids=FEATURES)
def test_a_packed_prefix_shared_row_gives_the_hidden_states_of_separate_rows(config):
    # [P P P a a | b b b | Q c c | pad pad]
    example = np.array([[1] * 8 + [2] * 3 + [0] * 2], np.int32)
    branch = np.array([[0, 0, 0, 1, 1, 2, 2, 2, 0, 1, 1, 0, 0]], np.int32)
    position = np.array([[0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 2, 0, 0]], np.int32)
    params, tokens = draw_params(config), draw_tokens(example.shape)
    # each sequence in a row of its own, below the packed row: one program for all
    rows = [(tokens[0], Ids(example[0], branch[0], position[0]))]
    sequences = ([0, 1, 2, 3, 4], [0, 1, 2, 5, 6, 7], [8, 9, 10])
    for indices in sequences:
        padding = (0, example.shape[1] - len(indices))
        ids = (array[0] for array in plain_ids(1, len(indices)))
        rows.append((np.pad(tokens[0, indices], padding), Ids(*(np.pad(x, padding) for x in ids))))
    stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *rows)
    packed, *apart = run(config, params, *stacked)
    for indices, alone in zip(sequences, apart, strict=True):
        expected = alone[: len(indices)]
        np.testing.assert_allclose(packed[indices], expected, rtol=1e-5, atol=1e-5)
    assert np.isfinite(packed).all()


def test_padding_changes_no_hidden_state_and_gets_no_gradient():
    params, tokens, ids = draw_params(SMALL), draw_tokens((2, 6)) % 30, plain_ids(2, 6)
    padded = np.pad(tokens, ((0, 0), (0, 5)), constant_values=35)
    padded_ids = Ids(*(np.pad(array, ((0, 0), (0, 5))) for array in ids))

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient(params):
        hidden = apply(decoder.Decoder(SMALL), params, padded, padded_ids)[:, :6]
        return jnp.sum(jnp.square(hidden)), hidden

    gradients, hidden = gradient(params)
    np.testing.assert_allclose(hidden, run(SMALL, params, tokens, ids), rtol=1e-5, atol=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    np.testing.assert_array_equal(gradients["embedding"][35], 0)
    assert np.abs(gradients["embedding"][tokens[0, 0]]).min() > 0


def test_a_branch_sees_changes_of_the_prompt_and_none_of_another_branch():
    ids = Ids(
        np.ones((1, 6), np.int32),
        np.array([[0, 0, 1, 1, 2, 2]], np.int32),
        np.array([[0, 1, 2, 3, 2, 3]], np.int32),
    )
    params, tokens = draw_params(SMALL), draw_tokens((1, 6))
    before = run(SMALL, params, tokens, ids)
    other_branch, other_prompt = tokens.copy(), tokens.copy()
    other_branch[0, 2:4] = (tokens[0, 2:4] + 1) % SMALL.vocabulary_size
    other_prompt[0, 0] = (tokens[0, 0] + 1) % SMALL.vocabulary_size
    np.testing.assert_array_equal(run(SMALL, params, other_branch, ids)[0, 4:], before[0, 4:])
    assert (
        np.abs(run(SMALL, params, other_prompt, ids)[0, 4:] - before[0, 4:]).min(axis=-1).max() > 0
    )


@pytest.mark.parametrize("config", FEATURES.values(), ids=FEATURES)
def test_token_by_token_with_the_cache_equals_the_full_forward(config):
    params, tokens = draw_params(config), draw_tokens((2, 8))
    ids = plain_ids(2, 8)
    full = run(config, params, tokens, ids)
    model = decoder.Decoder(config)

    def step(cache, inputs):
        at, token, step_ids = inputs
        hidden, cache = apply(model, params, token, step_ids, cache, at)
        return cache, hidden[:, 0]

    columns = jax.tree.map(lambda array: jnp.asarray(array.T[:, :, None]), (tokens, ids))
    empty = decoder.init_cache(config, 2, 10, jnp.float32)
    _, hidden = jax.jit(lambda: jax.lax.scan(step, empty, (jnp.arange(8), *columns)))()
    np.testing.assert_allclose(hidden.swapaxes(0, 1), full, rtol=1e-5, atol=1e-5)


def test_a_prefilled_cache_is_where_the_next_tokens_look():
    params, tokens, ids = draw_params(SMALL), draw_tokens((2, 8)), plain_ids(2, 8)
    model = decoder.Decoder(SMALL)
    cache = decoder.init_cache(SMALL, 2, 9, jnp.float32)
    pieces = []
    for start, stop, at in ((0, 5, 0), (5, 8, 6)):  # slot 5 stays padding
        part = Ids(*(array[:, start:stop] for array in ids))
        hidden, cache = jitted(model, params, tokens[:, start:stop], part, cache, at)
        pieces.append(hidden)
    full = run(SMALL, params, tokens, ids)
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), full, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(cache.ids.example[0], [1, 1, 1, 1, 1, 0, 1, 1, 1])


@pytest.mark.parametrize(
    "name",
    [
        "one block",
        pytest.param("plain", marks=pytest.mark.slow),
        pytest.param("blocks and a remainder", marks=pytest.mark.slow),
        pytest.param("experts", marks=pytest.mark.slow),
    ],
)
def test_remat_changes_no_gradient(name, monkeypatch):
    config = FEATURES[name]
    params, tokens, ids = draw_params(config), draw_tokens((2, 6)), plain_ids(2, 6)

    def make_loss(remat):
        model = decoder.Decoder(config, remat=remat)
        return lambda p: jnp.sum(jnp.sin(apply(model, p, tokens, ids)))

    with monkeypatch.context() as patch:
        patch.setattr(residuals, "rematerialise", lambda run, *_, **options: run)
        assert "remat" not in str(jax.make_jaxpr(make_loss("none"))(params))
        plain = jax.tree.leaves(jax.jit(jax.grad(make_loss("none")))(params))
    for remat in ("none", "dots", "full"):
        assert "remat" in str(jax.make_jaxpr(make_loss(remat))(params))
        again = jax.tree.leaves(jax.jit(jax.grad(make_loss(remat)))(params))
        for expected, leaf in zip(plain, again, strict=True):
            np.testing.assert_allclose(
                leaf, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max()
            )


def test_an_unknown_remat_is_an_error():
    options: Any = {"remat": "some"}
    with pytest.raises(ValueError, match="remat is 'some'"):
        run(SMALL, draw_params(SMALL), draw_tokens((1, 2)), plain_ids(1, 2), **options)


def test_bfloat16_computes_near_float32_and_its_gradients_are_float32():
    params, tokens, ids = draw_params(SMALL), draw_tokens((2, 6)), plain_ids(2, 6)
    exact = run(SMALL, params, tokens, ids)
    rounded = run(SMALL, params, tokens, ids, dtype=jnp.bfloat16)
    assert rounded.dtype == jnp.bfloat16
    assert np.abs(rounded.astype(np.float32) - exact).mean() < 0.02 * np.abs(exact).mean()
    model = decoder.Decoder(SMALL, dtype=jnp.bfloat16)
    gradient = jax.eval_shape(
        jax.grad(lambda p: jnp.sum(apply(model, p, tokens, ids)[:, :, 0])), params
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}


def test_the_gradients_of_bfloat16_embeddings_are_summed_in_float32():
    model = decoder.Decoder(SMALL, dtype=jnp.bfloat16)
    tokens, ids = draw_tokens((2, 6)), plain_ids(2, 6)
    total = jax.grad(lambda p: jnp.sum(apply(model, p, tokens, ids)[:, :, 0]))
    text = str(jax.make_jaxpr(total)(draw_params(SMALL)))
    assert re.findall(r"(\w+)\[40,24\] = scatter-add", text) == ["f32"]


def test_an_id_outside_the_vocabulary_gives_nan():
    tokens = np.full((1, 2), SMALL.vocabulary_size, np.int32)
    assert np.isnan(run(SMALL, draw_params(SMALL), tokens, plain_ids(1, 2))).all()


# As their model cards or papers count them, a tied head once.
PUBLISHED_COUNTS = {
    "llama-2-7b": 6_738_415_616,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-3-1b": 999_885_952,
    "phi-3-mini": 3_821_079_552,
    "olmo-2-7b": 7_298_617_344,
    "smollm3-3b": 3_075_098_624,
    "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016,
    "pythia-1.4b": 1_414_647_808,
    "pythia-2.8b": 2_775_208_960,
    "pythia-6.9b": 6_857_302_016,
    "gpt2": 124_439_808,
    "gpt2-large": 774_030_080,
    "opt-125m": 125_239_296,
    "opt-1.3b": 1_315_758_080,
    "phi-2": 2_779_683_840,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-30b-a3b": 30_532_122_624,
}


def test_published_models_have_their_published_parameter_counts():
    for name, count in PUBLISHED_COUNTS.items():
        leaves = jax.tree.leaves(shapes(PRESETS[name]))
        assert sum(leaf.size for leaf in leaves) == count, name


CONFIGS = {**PRESETS, **FEATURES}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_count_their_parameters_and_every_one_has_logical_axes(name):
    config = CONFIGS[name]
    params = dict(shapes(config))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == model_config.parameter_count(
        config
    )
    sizes = {
        "layers": config.scanned,
        "experts": config.experts and config.experts.count,
        "positions": config.max_positions + (config.position_offset or 0),
        "width": config.width,
        "heads": config.heads,
        "key_value_heads": config.key_value_heads,
        "head_dim": config.head_dim,
        "hidden": config.hidden,
        "vocabulary": config.vocabulary_size,
    }

    def check(leaf, axes):
        assert leaf.shape == tuple(sizes[axis] for axis in axes)

    axes = decoder.logical_axes(params)
    rest, rest_axes = params.pop("remainder", {}), axes.pop("remainder", {})
    jax.tree.map(check, params, axes)
    if rest:
        sizes["layers"] = config.layers - config.scanned
        jax.tree.map(check, rest, rest_axes)
        assert rest_axes == axes["layers"]


def test_layers_differ_only_in_kind_and_repeat_in_the_smallest_block():
    one, two = Kind(), Kind(window=4)
    assert model_config.smallest_block([one] * 6) == (one,)
    assert model_config.smallest_block([two, two, one] * 2 + [two]) == (two, two, one)
    assert model_config.smallest_block([one, two, two]) == (one, two, two)


def test_logits_are_biased_and_then_capped():
    hidden = np.array([[[1.0, 2.0]]], np.float32)
    head = decoder.Head(jnp.float32([[1, 0, 2], [0, 1, 2]]), jnp.float32([0.5, 0, 0]), 3.0)
    expected = 3 * np.tanh(np.array([1.5, 2, 6]) / 3)
    np.testing.assert_allclose(decoder.logits(jnp.asarray(hidden), head)[0, 0], expected, rtol=1e-6)
    np.testing.assert_allclose(decoder.logits(jnp.asarray(hidden[0, 0]), head), expected, rtol=1e-6)


@pytest.mark.parametrize("name", FEATURES)
def test_a_config_comes_back_from_json(name):
    text = json.dumps(dataclasses.asdict(FEATURES[name]))
    assert model_config.from_json(json.loads(text)) == FEATURES[name]


def test_files_from_before_layers_could_differ_are_read():
    sizes = ("vocabulary_size", "width", "layers", "heads", "key_value_heads", "head_dim", "hidden")
    old = {name: getattr(SMALL, name) for name in (*sizes, "max_positions", "norm_epsilon")}
    old |= {"rope_theta": 10_000.0, "sliding_window": None, "tied_head": False}
    old["rope_scaling"] = dataclasses.asdict(SCALING)
    assert model_config.from_json(old) == VARIANTS["llama3 rope"]
    old |= {"rope_scaling": None, "sliding_window": 7}
    expected = dataclasses.replace(SMALL, family="mistral", block=(Kind(window=7),))
    assert model_config.from_json(old) == expected


def test_a_parameter_without_logical_axes_is_named():
    params = {"layers": {"attention": {"sink": np.zeros((2, 3))}}}
    with pytest.raises(ValueError, match=r"layers/attention/sink of shape \(2, 3\): not listed"):
        decoder.logical_axes(params)
    with pytest.raises(ValueError, match=r"embedding of shape \(3,\): its rule is"):
        decoder.logical_axes({"embedding": np.zeros(3)})


def test_init_is_plain_float32_with_the_stated_deviations():
    config = dataclasses.replace(SMALL, width=64, heads=8, head_dim=32, hidden=256, layers=8)
    params = jax.jit(decoder.init, static_argnums=0)(config, jax.random.key(0))
    assert type(params) is dict and type(params["layers"]["mlp"]["gate"]) is dict
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    layers = params["layers"]
    for kernel in (layers["attention"]["query"], layers["mlp"]["gate"]):
        np.testing.assert_allclose(np.std(kernel["kernel"]), 0.02, rtol=0.02)
    for kernel in (layers["attention"]["output"], layers["mlp"]["down"]):
        np.testing.assert_allclose(np.std(kernel["kernel"]), 0.02 / 4, rtol=0.02)
    first, second = layers["mlp"]["gate"]["kernel"][:2]
    assert not np.array_equal(first, second)


def test_head_is_the_embedding_only_where_tied():
    tied, untied = draw_params(VARIANTS["tied"]), draw_params(SMALL)
    assert "head" not in tied
    of_tied, of_untied = decoder.head(tied, VARIANTS["tied"]), decoder.head(untied, SMALL)
    assert (of_tied.is_embedding, of_untied.is_embedding) == (True, False)
    np.testing.assert_array_equal(of_tied.matrix, tied["embedding"])
    np.testing.assert_array_equal(of_untied.matrix, untied["head"])
    assert decoder.vocabulary_size(of_tied) == decoder.vocabulary_size(of_untied) == 40
    hidden = np.random.default_rng(0).normal(size=(3, SMALL.width)).astype(np.float32)
    for head, matrix in ((of_tied, tied["embedding"].T), (of_untied, untied["head"])):
        found = decoder.logits(jnp.asarray(hidden), head)
        np.testing.assert_allclose(found, hidden @ matrix, rtol=0, atol=1e-5)


def test_impossible_shapes_are_errors():
    with pytest.raises(ValueError, match="heads is 4; it must be a multiple of key_value_heads, 3"):
        dataclasses.replace(SMALL, key_value_heads=3)
    with pytest.raises(ValueError, match="head_dim is 5"):
        dataclasses.replace(SMALL, head_dim=5)
    with pytest.raises(ValueError, match="norm is 'batch'; it must be one of 'rms'"):
        dataclasses.replace(SMALL, norm="batch")
    with pytest.raises(ValueError, match="norm_placement is 'post'; with residual 'parallel'"):
        dataclasses.replace(SMALL, norm_placement="post", residual="parallel")
    with pytest.raises(ValueError, match="block has 3 kinds for 2 layers"):
        dataclasses.replace(SMALL, block=(Kind(),) * 3)
    with pytest.raises(ValueError, match="experts.chosen is 4; it must be 1 to 3"):
        dataclasses.replace(SMALL, experts=Experts(count=3, chosen=4))

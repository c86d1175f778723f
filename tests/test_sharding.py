import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from dpo_jax import config, initial, optimizer, sharding
from dpo_jax.model import decoder
from dpo_jax.model.attention import Ids
from dpo_jax.model.config import Experts, Kind
from dpo_jax.model.presets import PRESETS
from tests import tiny

TINY = PRESETS["tiny"]
WIDTH = ("fsdp", "sequence")


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return sharding.make_mesh(config.Mesh(data=2, fsdp=2, tensor=2), jax.devices())


@pytest.fixture(scope="module")
def shapes() -> dict:
    return decoder.shapes(TINY)


def test_fsdp_takes_the_devices_that_the_other_axes_leave():
    def sizes(axes: config.Mesh, devices: int) -> tuple[int, ...]:
        found = sharding.make_mesh(axes, jax.devices()[:devices]).shape
        assert tuple(found) == ("data", "fsdp", "sequence", "tensor")
        return tuple(found.values())

    assert sizes(config.Mesh(), 8) == (1, 8, 1, 1)
    assert sizes(config.Mesh(data=2, tensor=2), 8) == (2, 2, 1, 2)
    assert sizes(config.Mesh(sequence=4, tensor=2), 8) == (1, 1, 4, 2)
    assert sizes(config.Mesh(sequence=2), 8) == (1, 4, 2, 1)
    assert sizes(config.Mesh(fsdp=1), 1) == (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("axes", "product"),
    [
        (config.Mesh(data=2, fsdp=2), "data 2 x mesh.fsdp 2 x mesh.sequence 1 x mesh.tensor 1 = 4"),
        (config.Mesh(sequence=3), "data 1 x mesh.fsdp 2 x mesh.sequence 3 x mesh.tensor 1 = 6"),
        (config.Mesh(data=16), "data 16 x mesh.fsdp 0 x mesh.sequence 1 x mesh.tensor 1 = 0"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused_with_the_cure(axes, product):
    with pytest.raises(ValueError) as error:
        sharding.make_mesh(axes, jax.devices())
    assert product in str(error.value)
    assert "there are 8" in str(error.value) and "--mesh.data" in str(error.value)


def test_rows_lie_over_data_and_fsdp(mesh):
    assert sharding.batch_shards(mesh) == 4
    assert sharding.rows(mesh).spec == P(("data", "fsdp"))


def test_tokens_of_a_row_lie_over_sequence_and_rows_that_it_does_not_divide_are_refused():
    mesh = sharding.make_mesh(config.Mesh(fsdp=2, sequence=4), jax.devices())
    assert (sharding.batch_shards(mesh), sharding.row_shards(mesh)) == (2, 4)
    assert sharding.of_batch((6, 8), mesh).spec == P(("data", "fsdp"), "sequence")
    assert sharding.of_batch((6,), mesh).spec == P(("data", "fsdp"))
    batch = {"tokens": np.arange(48, dtype=np.int32).reshape(6, 8), "weight": np.ones(12)}
    placed = sharding.put_batch(batch, mesh)
    np.testing.assert_array_equal(placed["tokens"], batch["tokens"])
    assert {shard.data.shape for shard in placed["tokens"].addressable_shards} == {(3, 2)}
    assert {shard.data.shape for shard in placed["weight"].addressable_shards} == {(6,)}
    with pytest.raises(ValueError, match="rows of 9 tokens do not divide over 4 shards"):
        sharding.put_batch({"tokens": np.zeros((6, 9))}, mesh)


@pytest.mark.parametrize(
    ("batch_size", "microbatches", "suggestion"),
    [
        (18, 1, "= 4 parts: take 16 or 20, or more sequence or tensor shards"),
        (12, 2, "= 8 parts: take 8 or 16,"),
        (2, 1, "= 4 parts: take 4,"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_with_sizes_that_do(
    mesh, batch_size, microbatches, suggestion
):
    with pytest.raises(ValueError) as error:
        sharding.check_batch_size(batch_size, microbatches, mesh)
    assert f"batch_size {batch_size} does not divide" in str(error.value)
    assert suggestion in str(error.value)
    for size in re.findall(r"\d+", suggestion.partition("take")[2]):
        sharding.check_batch_size(int(size), microbatches, mesh)


def test_parameters_lie_by_the_rules(mesh, shapes):
    specs = jax.tree.map(lambda placed: placed.spec, sharding.parameters(shapes, mesh))
    attention = specs["layers"]["attention"]
    assert specs["embedding"] == P("tensor", WIDTH)
    assert attention["query"]["kernel"] == P(None, WIDTH, "tensor", None)
    assert attention["key"]["kernel"] == P(None, WIDTH, "tensor", None)
    assert attention["output"]["kernel"] == P(None, "tensor", None, WIDTH)
    assert specs["layers"]["mlp"]["up"]["kernel"] == P(None, WIDTH, "tensor")
    assert specs["layers"]["mlp"]["down"]["kernel"] == P(None, "tensor", WIDTH)
    assert specs["layers"]["mlp_norm"]["scale"] == P(None, WIDTH)
    assert specs["norm"]["scale"] == P(WIDTH)


def test_placed_parameters_keep_their_numbers_and_are_split(mesh, draw_params):
    params = draw_params(TINY)
    placed = sharding.place(params, mesh)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(placed), params)
    kernel = placed["layers"]["mlp"]["up"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 32, 64)}


def test_an_axis_that_its_mesh_axis_does_not_divide_stays_whole(shapes):
    # two heads of keys over eight devices; 64 x 4 x 16 and 512 x 64 do divide
    mesh = sharding.make_mesh(config.Mesh(fsdp=1, tensor=8), jax.devices())
    attention = sharding.parameters(shapes, mesh)["layers"]["attention"]
    assert attention["key"]["kernel"].spec == P(None, WIDTH, None, None)
    assert sharding.parameters(shapes, mesh)["embedding"].spec == P("tensor", WIDTH)


def test_parameters_lie_over_sequence_too_where_both_axes_divide_their_width():
    mesh = sharding.make_mesh(config.Mesh(fsdp=2, sequence=4), jax.devices())

    def shards(width: int) -> dict[str, tuple[int, ...]]:
        shapes = decoder.shapes(dataclasses.replace(tiny.DECODER, width=width))
        placed = sharding.parameters(shapes, mesh)
        return {
            name: placed[name].shard_shape(shapes[name].shape) for name in ("embedding", "head")
        }

    assert shards(24) == {"embedding": (40, 3), "head": (3, 40)}
    # 20 over both is no whole number
    assert shards(20) == {"embedding": (40, 10), "head": (10, 40)}


def test_a_mesh_axis_used_twice_is_refused(mesh, shapes, monkeypatch):
    monkeypatch.setitem(sharding.RULES, "width", "tensor")
    with pytest.raises(ValueError, match=r"parameter \['embedding'\].*mesh axis twice"):
        sharding.parameters(shapes, mesh)


def test_a_parameter_without_a_rule_is_refused(mesh, shapes):
    with pytest.raises(ValueError, match="no rule in LOGICAL_AXES for parameter router"):
        sharding.parameters({**shapes, "router": shapes["norm"]["scale"]}, mesh)


def test_shapes_with_shardings_keep_shape_and_type(mesh, shapes):
    found = sharding.with_shardings(shapes, mesh)["embedding"]
    assert (found.shape, found.dtype) == ((512, 64), np.float32)
    assert found.sharding == sharding.parameters(shapes, mesh)["embedding"]


def moments(kind, mesh, shapes, moments_dtype: Any = "float32"):
    """Optimizer state's shapes, and where each would lie."""
    tx = optimizer.make(config.Optimizer(kind=kind, moments_dtype=moments_dtype))
    state = jax.eval_shape(tx.init, shapes)
    placed = sharding.parameters(shapes, mesh)
    return state, placed, sharding.like_parameters(state, shapes, placed, mesh)


@pytest.mark.parametrize("moments_dtype", ["float32", "bfloat16"])
def test_moments_lie_where_their_parameters_do_and_counts_everywhere(mesh, shapes, moments_dtype):
    state, placed, found = moments("adamw", mesh, shapes, moments_dtype)
    adam = [part for part in found if isinstance(part, optax.ScaleByAdamState)][0]
    for moment in (adam.mu, adam.nu):
        jax.tree.map(lambda one, other: _same(one, other), moment, placed)
    assert adam.count == sharding.replicated(mesh)
    assert jax.tree.structure(found) == jax.tree.structure(state)


def _same(one, other):
    assert one == other


def test_factors_of_moments_lie_everywhere_and_whole_moments_with_their_parameters(mesh):
    config_of_large = PRESETS["reviews-1m"]
    shapes = decoder.shapes(config_of_large)
    state, placed, found = moments("adafactor", mesh, shapes)
    flat = dict(jax.tree_util.tree_leaves_with_path(found))
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in flat.items()}
    whole = [leaf for path, leaf in leaves.items() if path.endswith(".v['norm']['scale']")]
    factors = [
        leaf
        for path, leaf in leaves.items()
        if ".v_row" in path and path.endswith("['mlp']['up']['kernel']")
    ]
    assert whole == [placed["norm"]["scale"]]
    assert factors == [sharding.replicated(mesh)]


def test_a_batch_lies_by_rows_and_its_index_stays_on_the_host(mesh):
    batch = {
        "tokens": np.arange(24, dtype=np.int32).reshape(8, 3),
        "length": {"chosen": np.arange(16, dtype=np.int32)},
        "index": np.arange(16),
    }
    placed = sharding.put_batch(batch, mesh)
    assert set(placed) == {"tokens", "length"}
    np.testing.assert_array_equal(placed["tokens"], batch["tokens"])
    assert {shard.data.shape for shard in placed["tokens"].addressable_shards} == {(2, 3)}
    assert {shard.data.shape for shard in placed["length"]["chosen"].addressable_shards} == {(4,)}


@pytest.mark.slow
def test_a_decoder_made_on_a_mesh_equals_the_one_made_on_one_device(mesh):
    settings = config.Model(source="tiny")
    found = initial.load("tiny", settings, 3, mesh)
    alone = jax.jit(decoder.init, static_argnums=0)(TINY, jax.random.key(3))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found.params), alone)
    assert found.params["embedding"].sharding.spec == P("tensor", WIDTH)


@pytest.mark.slow
def test_experts_and_layers_of_several_kinds_compute_on_a_mesh_what_they_do_on_one_device(mesh):
    model = dataclasses.replace(
        tiny.DECODER, experts=Experts(4, 2), layers=5, block=(Kind(window=3), Kind())
    )
    params = tiny.draw_params(model, scale=0.3)
    tokens = np.random.default_rng(0).integers(0, 40, (8, 12), np.int32)
    position = np.tile(np.arange(12, dtype=np.int32), (8, 1))
    ids = Ids(np.ones_like(position), np.zeros_like(position), position)

    @jax.jit
    @jax.value_and_grad
    def total(params, tokens, ids):
        hidden = decoder.Decoder(model).apply({"params": params}, tokens, ids)
        return jnp.mean(jnp.square(jnp.sin(jnp.asarray(hidden))))

    placed = jax.device_put((tokens, ids), sharding.rows(mesh))
    found, gradients = total(sharding.place(params, mesh), *placed)
    expected, expected_gradients = total(params, tokens, ids)
    np.testing.assert_allclose(found, expected, rtol=1e-5)

    def check(one, other):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * np.abs(other).max())

    jax.tree.map(check, jax.device_get(gradients), jax.device_get(expected_gradients))

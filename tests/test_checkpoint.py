import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dpo_jax import checkpoint, config, optimizer, programs, sharding
from dpo_jax.model.presets import PRESETS


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("absl").setLevel(logging.ERROR)


def one_device() -> Mesh:
    return sharding.make_mesh(config.Mesh(), jax.devices()[:1])


def eight_devices() -> Mesh:
    return sharding.make_mesh(config.Mesh(fsdp=2, sequence=2, tensor=2), jax.devices())


def items_on(mesh: Mesh, params: dict) -> dict:
    """Parameters and optimizer state as a run saves them, with moments that are not 0, the first
    in bfloat16.
    """
    tx = optimizer.make(config.Optimizer(moments_dtype="bfloat16"))
    placed = sharding.place(params, mesh)
    moments = programs.make_start(tx, programs.shardings(placed, tx, mesh))(placed)
    generator = np.random.default_rng(1)

    def fill(leaf):
        drawn = 100 * generator.random(leaf.shape)
        return jax.device_put(drawn.astype(leaf.dtype), leaf.sharding)

    return {"params": placed, "opt_state": jax.tree.map(fill, moments)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory, draw_params):
    """A run folder with checkpoint 7, and what was saved on one device."""
    folder = str(tmp_path_factory.mktemp("run"))
    items = items_on(one_device(), draw_params(PRESETS["tiny"]))
    with checkpoint.make_checkpointer(folder, config.Checkpoint()) as checkpointer:
        checkpoint.save(checkpointer, 7, items, {})
    return folder, items


def assert_bits_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize("make_mesh", [one_device, eight_devices])
def test_parameters_and_moments_come_back_bit_for_bit_on_any_mesh(saved, draw_params, make_mesh):
    folder, items = saved
    here = items_on(make_mesh(), draw_params(PRESETS["tiny"], seed=5))
    with checkpoint.make_checkpointer(folder, config.Checkpoint()) as checkpointer:
        assert checkpoint.latest_step(checkpointer) == 7
        restored = checkpoint.restore(checkpointer, 7, checkpoint.abstract(here))
    assert_bits_equal(restored, items)
    for found, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(here), strict=True):
        assert found.sharding == wanted.sharding


def test_parameters_load_alone(saved):
    folder, items = saved
    mesh = eight_devices()
    shapes = sharding.with_shardings(items["params"], mesh)
    step, params = checkpoint.load_params(folder, shapes)
    assert step == 7
    assert_bits_equal(params, items["params"])
    assert params["embedding"].sharding.spec == P("tensor", ("fsdp", "sequence"))


def test_a_model_of_another_shape_is_refused_with_what_does_not_fit(saved):
    folder, items = saved
    wanted = checkpoint.abstract(items)
    wanted["params"]["embedding"] = jax.ShapeDtypeStruct((600, 64), jnp.float32)
    with checkpoint.make_checkpointer(folder, config.Checkpoint()) as checkpointer:
        with pytest.raises(ValueError) as error:
            checkpoint.restore(checkpointer, 7, wanted)
    assert str(error.value) == (
        f"checkpoint 7 of {folder}/checkpoints does not fit this run, in 1 arrays:\n"
        "  params/embedding is (512, 64), and the run has (600, 64)"
    )


def test_other_arrays_are_refused_with_their_names(saved):
    folder, items = saved
    wanted = checkpoint.abstract(items)["params"]
    wanted["head"] = wanted.pop("embedding")
    with pytest.raises(ValueError) as error:
        checkpoint.load_params(folder, wanted)
    assert "params/head is not in it, and the run has (512, 64)" in str(error.value)
    assert "params/embedding is (512, 64), and the run has none" in str(error.value)


def test_the_moments_of_another_optimizer_are_refused(saved):
    folder, items = saved
    mesh = one_device()
    tx = optimizer.make(config.Optimizer(kind="adafactor"))
    other = programs.make_start(tx, programs.shardings(items["params"], tx, mesh))(items["params"])
    wanted = checkpoint.abstract({**items, "opt_state": other})
    with checkpoint.make_checkpointer(folder, config.Checkpoint()) as checkpointer:
        with pytest.raises(ValueError, match="opt_state/1/0/v/embedding is not in it"):
            checkpoint.restore(checkpointer, 7, wanted)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no finished checkpoint"):
        checkpoint.load_params(str(tmp_path), {})


def small(value: float) -> dict:
    everywhere = NamedSharding(one_device(), P())
    return {"params": {"w": jax.device_put(jnp.full(3, value), everywhere)}}


def save_all(folder: str, settings: config.Checkpoint, metrics: list[dict]) -> list[int]:
    """Saves step 1, 2, ... with these metrics; the steps that are left."""
    with checkpoint.make_checkpointer(folder, settings) as checkpointer:
        for step, values in enumerate(metrics, 1):
            checkpoint.save(checkpointer, step, small(step), values)
        assert checkpoint.latest_step(checkpointer) == len(metrics)
    # as a new process finds them
    with checkpoint.make_checkpointer(folder, settings) as checkpointer:
        return sorted(found.step for found in checkpointer.checkpoints)


LOSSES = [{"eval/loss": loss} for loss in (3.0, 1.0, 2.0, 4.0)]


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        (config.Checkpoint(), [4]),
        (config.Checkpoint(keep=2), [3, 4]),
        # the newest is the worst, and stays
        (config.Checkpoint(keep_best=1), [2, 4]),
        (config.Checkpoint(keep_best=2), [2, 3, 4]),
        (config.Checkpoint(keep=2, keep_best=1), [2, 3, 4]),
        (config.Checkpoint(keep_best=1, best="largest"), [4]),
        (config.Checkpoint(keep_best=2, best="largest"), [1, 4]),
    ],
)
def test_the_newest_and_the_best_checkpoints_are_kept(tmp_path, settings, left):
    assert save_all(str(tmp_path), settings, LOSSES) == left


def test_a_checkpoint_without_the_metric_is_never_among_the_best(tmp_path):
    metrics = [{}, {"eval/loss": 2.0}, {}, {}]
    assert save_all(str(tmp_path), config.Checkpoint(keep_best=1), metrics) == [2, 4]


def test_the_newest_of_several_checkpoints_is_loaded(tmp_path):
    save_all(str(tmp_path), config.Checkpoint(keep=3), [{}, {}, {}])
    step, params = checkpoint.load_params(str(tmp_path), checkpoint.abstract(small(0)["params"]))
    assert step == 3 and params["w"].tolist() == [3.0] * 3


def test_a_step_that_is_saved_again_has_the_later_values(tmp_path):
    with checkpoint.make_checkpointer(str(tmp_path), config.Checkpoint()) as checkpointer:
        for value in (1.0, 2.0):
            checkpoint.save(checkpointer, 5, small(value), {})
        restored = checkpoint.restore(checkpointer, 5, checkpoint.abstract(small(0)))
    assert restored["params"]["w"].tolist() == [2.0] * 3


@pytest.mark.parametrize("folder", ["run", "file://{}/run"])
def test_a_run_folder_may_be_a_relative_path_or_a_local_url(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    folder = folder.format(tmp_path)
    save_all(folder, config.Checkpoint(), [{}])
    assert (tmp_path / "run" / "checkpoints" / "1").is_dir()
    step, _ = checkpoint.load_params(folder, checkpoint.abstract(small(0)["params"]))
    assert step == 1

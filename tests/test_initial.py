"""Where a run starts: adapters on a base, new ones and trained ones, through whole runs."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import (
    assemble,
    checkpoint,
    config,
    initial,
    inputs,
    losses,
    origins,
    reference,
    sample,
    sharding,
    train,
    train_step,
)
from dpo_jax.model import frozen, lora, weights
from dpo_jax.model.presets import PRESETS
from tests import tiny

# of few parts and without evaluations, so that runs have few programs, and share them
RANK = {
    "lora.rank": 4,
    "lora.alpha": 8.0,
    "lora.targets": ("query", "value", "down"),
    "optimizer.learning_rate": 1e-2,
    "evaluate_every": None,
    "data.evaluation_source": None,
}


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return sharding.make_mesh(config.Mesh(fsdp=8), jax.devices())


@pytest.fixture(scope="module")
def sft(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an SFT run of an adapter on the random model `tiny`."""
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    texts = tmp_path_factory.mktemp("texts") / "train.jsonl"
    texts.write_text("".join(json.dumps({"text": row["chosen"]}) + "\n" for row in rows))
    run = tiny.experiment(
        folder,
        tmp_path_factory.mktemp("sft") / "run",
        loss=config.Loss(losses.sft),
        **{
            **RANK,
            "data.source": str(texts),
            "data.examples": "sft",
            "reference.source": None,
        },
    )
    train.train(run, tiny.FILE)
    return Path(str(run.workdir))


def params_of(run: Path, mesh) -> dict:
    return jax.device_get(initial.policy(initial.load(str(run), config.Model(), 0, mesh)))


def load_checkpoint(run: Path) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shapes of all arrays in a run's newest checkpoint, by item."""
    with checkpoint.ocp.training.Checkpointer(checkpoint.checkpoints(str(run))) as checkpointer:
        step = checkpoint.latest_step(checkpointer)
        items = checkpointer.checkpointables_metadata(step).metadata
        return {name: checkpoint.shapes(tree) for name, tree in items.items() if tree is not None}


@pytest.mark.parametrize(
    "axes",
    [
        {"data": 2, "fsdp": 2, "tensor": 2},
        pytest.param({"fsdp": 8}, marks=pytest.mark.slow),
        pytest.param({"fsdp": 1, "data": 8}, marks=pytest.mark.slow),
    ],
)
def test_the_first_loss_of_an_adapter_is_log_2_on_every_mesh(folder, tmp_path, axes, capsys):
    mesh_fields = {f"mesh.{name}": size for name, size in axes.items()}
    fields = {**RANK, "lora.targets": None, **mesh_fields, "steps": 8}
    train.train(tiny.experiment(folder, tmp_path / "run", **fields), tiny.FILE)
    found = tiny.metrics(tmp_path / "run")
    assert found[1]["loss"] == pytest.approx(np.log(2), rel=1e-6)
    assert found[8]["loss"] < np.log(2) - 0.05
    printed = capsys.readouterr().out
    assert "training a new adapter of 8,192 parameters on tiny (" in printed
    assert "reference: the base with the adapter off; held beside the state: base" in printed


@pytest.mark.slow
def test_an_adapters_losses_and_parameters_do_not_depend_on_the_mesh(folder, tmp_path):
    found = []
    for axes in ({"fsdp": 8}, {"fsdp": 1, "tensor": 2, "data": 4}):
        mesh_fields = {f"mesh.{name}": size for name, size in axes.items()}
        workdir = tmp_path / "-".join(axes)
        train.train(tiny.experiment(folder, workdir, **RANK, **mesh_fields, steps=3), tiny.FILE)
        found.append([line["loss"] for line in tiny.metrics(workdir)[1:]])
    np.testing.assert_allclose(*found, rtol=1e-4)


def test_checkpoint_and_optimizer_hold_the_adapter_alone(sft):
    items = load_checkpoint(sft)
    assert items["params"] and all(path.endswith(lora.LEAVES) for path in items["params"])
    moments = [path for path, shape in items["opt_state"].items() if shape]
    assert moments and all(path.endswith(lora.LEAVES) for path in moments)
    assert {path.split("/")[2] for path in items["params"]} == {"query", "value", "down"}


def test_no_second_copy_of_the_base_is_held_for_the_reference(folder, tmp_path, mesh):
    run, state = assemble.assemble(tiny.experiment(folder, tmp_path / "run", **RANK), mesh)
    assert run.held.reference == {}
    assert frozen.bytes_of(run.held.base) == 4 * sum(
        leaf.size for leaf in jax.tree.leaves(initial.policy(run.initial))
    )
    assert frozen.bytes_of(state.params) < 0.2 * frozen.bytes_of(run.held.base)


def test_a_run_with_an_adapter_loads_again_as_what_it_has_become(folder, tmp_path, mesh):
    run = tiny.experiment(folder, tmp_path / "run", **RANK)
    train.train(run, tiny.FILE)
    again = initial.load(str(tmp_path / "run"), config.Model(), 7, mesh)
    start = initial.load("tiny", config.Model(), 0, mesh).params
    same = jax.tree.map(lambda a, b: bool((a == b).all()), again.base, start)
    assert all(jax.tree.leaves(same))
    assert initial.scale(again) == 2
    kernel = again.params["layers"]["mlp"]["down"]
    assert np.abs(kernel["lora_b"]).max() > 1e-3
    texts = sample.sample(str(tmp_path / "run"), "the plot", sample.Options(1, 5, 0.0))
    assert texts and texts == sample.sample(
        str(tmp_path / "run"), "the plot", sample.Options(1, 5, 0.0)
    )


def test_a_run_with_an_adapter_resumes_bit_for_bit(folder, tmp_path, sft, mesh):
    fields = {**RANK, "model.source": str(sft), "lora.dropout": 0.3, "steps": 4}
    train.train(tiny.experiment(folder, tmp_path / "whole", **fields), tiny.FILE)
    run = tiny.experiment(folder, tmp_path / "parts", **fields)
    train.train(run.replace(steps=2), tiny.FILE)
    # as a run that was stopped after two steps leaves its folder
    (tmp_path / "parts" / "DONE").unlink()
    record = json.loads((tmp_path / "parts" / "config.json").read_text())
    record["experiment"]["steps"] = 4
    (tmp_path / "parts" / "config.json").write_text(json.dumps(record))
    train.train(run, tiny.FILE)
    whole, parts = (params_of(tmp_path / name, mesh) for name in ("whole", "parts"))
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    losses_of = [
        [line["loss"] for line in tiny.metrics(tmp_path / name) if "loss" in line]
        for name in ("whole", "parts")
    ]
    assert losses_of[0] == losses_of[1]


def start_of(folder, workdir, mesh, source: Path, **changes) -> tuple[assemble.Run, float]:
    """A run from an SFT adapter, assembled, and its loss at the first batch."""
    fields = {**RANK, "model.source": str(source), "lora.targets": None, **changes}
    run, state = assemble.assemble(tiny.experiment(folder, workdir, **fields), mesh)
    return run, float(np.divide(*first_sums(run, state).metrics["loss"]))


def first_sums(run: assemble.Run, state: train_step.TrainState) -> train_step.Sums:
    """What a run computes at its first batch, without gradients, which take long to compile."""
    _, batch, _ = next(train.batches(run, 0))
    numbers = run.numbers["loss"]
    return run.evaluate_loss(state.params, state.loss_state, run.held, numbers, batch)


def test_training_goes_on_from_an_sft_adapter_against_what_the_reference_says(
    folder, tmp_path, sft, mesh, capsys
):
    run, loss = start_of(folder, tmp_path / "run", mesh, sft)
    assert loss == pytest.approx(np.log(2), rel=1e-6)
    printed = capsys.readouterr().out
    assert f"training the adapter of 3,328 parameters on {sft}" in printed
    assert "reference: the base with the adapter as it starts" in printed
    anchor = run.held.reference
    assert set(checkpoint.shapes(anchor)) == set(load_checkpoint(sft)["params"])

    off, loss = start_of(folder, tmp_path / "run", mesh, sft, **{"reference.source": "base"})
    assert abs(loss - np.log(2)) > 1e-3
    assert off.held.reference == {}
    assert "reference: the base with the adapter off" in capsys.readouterr().out


def test_a_new_adapter_or_all_parameters_start_from_the_merged_weights(folder, tmp_path, sft, mesh):
    merged = jax.device_get(lora.merge(params_of(sft, mesh)))
    new, loss = start_of(
        folder, tmp_path / "run", mesh, sft, **{"lora.start": "new", "lora.targets": ("up",)}
    )
    assert loss == pytest.approx(np.log(2), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), new.held.base, merged)
    none = {"lora.rank": None, "lora.alpha": config.Lora().alpha}
    whole, loss = start_of(folder, tmp_path / "run", mesh, sft, **none)
    assert loss == pytest.approx(np.log(2), rel=1e-6)
    assert whole.held.base == {}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole.held.reference, merged
    )


def test_a_run_that_went_on_loads_again_through_the_run_that_it_came_from(
    folder, tmp_path, sft, mesh
):
    fields = {**RANK, "model.source": str(sft), "lora.targets": None, "steps": 2}
    train.train(tiny.experiment(folder, tmp_path / "dpo", **fields), tiny.FILE)
    again = initial.load(str(tmp_path / "dpo"), config.Model(), 0, mesh)
    assert set(checkpoint.shapes(again.params)) == set(load_checkpoint(sft)["params"])
    before = initial.load(str(sft), config.Model(), 0, mesh).params
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), again.params, before)
    assert 0 < max(jax.tree.leaves(moved)) < 0.1


def test_a_base_that_has_changed_is_refused(folder, tmp_path, mesh):
    model = tmp_path / "model"
    shape = PRESETS["tiny"]
    weights.save(model, shape, tiny.draw_params(shape, seed=1))
    fields = {**RANK, "model.source": str(model), "steps": 1}
    train.train(tiny.experiment(folder, tmp_path / "run", **fields), tiny.FILE)
    initial.load(str(tmp_path / "run"), config.Model(), 0, mesh)
    weights.save(model, shape, tiny.draw_params(shape, seed=2))
    with pytest.raises(ValueError, match="an adapter of .*model, whose weights have changed"):
        initial.load(str(tmp_path / "run"), config.Model(), 0, mesh)
    shutil.rmtree(model)
    with pytest.raises(ValueError, match="run is an adapter of .*model, as .*: there is no folder"):
        initial.load(str(tmp_path / "run"), config.Model(), 0, mesh)


@pytest.mark.slow
def test_a_run_loads_on_another_mesh_than_it_was_trained_on(folder, tmp_path, sft):
    fields = {**RANK, "model.source": str(sft), "lora.start": "new", "steps": 1}
    train.train(tiny.experiment(folder, tmp_path / "new", **fields), tiny.FILE)
    fields = {**RANK, "model.source": str(tmp_path / "new"), "steps": 1}
    train.train(tiny.experiment(folder, tmp_path / "dpo", **fields), tiny.FILE)
    wide = sharding.make_mesh(config.Mesh(fsdp=1, tensor=2, data=4), jax.devices())
    one = sharding.make_mesh(config.Mesh(), jax.devices()[:1])
    for name in ("new", "dpo"):
        first, second = (
            jax.device_get(initial.load(str(tmp_path / name), config.Model(), 0, mesh).params)
            for mesh in (wide, one)
        )
        jax.tree.map(np.testing.assert_array_equal, first, second)


def test_a_base_keeps_its_types_whatever_the_compute_type_of_who_reads_it(folder, tmp_path, mesh):
    model = tmp_path / "model"
    weights.save(model, PRESETS["tiny"], tiny.draw_params(PRESETS["tiny"]))
    fields = {**RANK, "model.source": str(model), "model.frozen": "int8", "steps": 1}
    fields |= {"model.dtype": "bfloat16"}
    train.train(tiny.experiment(folder, tmp_path / "run", **fields), tiny.FILE)
    again = initial.load(str(tmp_path / "run"), config.Model(dtype="float32"), 0, mesh)
    assert again.base["embedding"].dtype == jnp.bfloat16
    assert again.base["norm"]["scale"].dtype == jnp.float32
    # no --model.frozen: the adapter goes on over the base that it was trained on
    fields = {**RANK, "model.source": str(tmp_path / "run")}
    on = inputs.load(tiny.experiment(folder, tmp_path / "on", **fields), mesh).initial
    jax.tree.map(np.testing.assert_array_equal, again.base, on.base)
    assert on.adapter is not None and on.adapter.held_as == "int8"


def test_a_source_is_found_from_another_folder(folder, tmp_path, mesh, monkeypatch):
    weights.save(tmp_path / "model", PRESETS["tiny"], tiny.draw_params(PRESETS["tiny"]))
    monkeypatch.chdir(tmp_path)
    fields = {**RANK, "model.source": "model", "steps": 1}
    train.train(tiny.experiment(folder, tmp_path / "run", **fields), tiny.FILE)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = initial.load("../run", config.Model(), 0, mesh)
    assert found.adapter is not None and found.adapter.source == str(tmp_path / "model")
    assert origins.origin("../run") == str(tmp_path / "model")


def test_a_folder_is_a_models_only_when_all_its_files_are_there(tmp_path, monkeypatch):
    adapter = origins.Adapter(config.Lora(rank=2), ("up",), "tiny", 0, "float32", "float32", "")
    written = []
    monkeypatch.setattr(
        "dpo_jax.paths.write_text", lambda name, text: written.append(Path(name).name)
    )
    origins.write(str(tmp_path), PRESETS["tiny"], adapter)
    assert written == ["adapter.json", "model.json"]


def test_a_base_in_int8_starts_at_log_2_learns_and_takes_a_quarter(folder, tmp_path, mesh):
    every = {"lora.targets": None, "lora.alpha": config.Lora().alpha}
    fields = {**RANK, **every, "model.frozen": "int8"}
    train.train(tiny.experiment(folder, tmp_path / "run", **fields), tiny.FILE)
    found = [line["loss"] for line in tiny.metrics(tmp_path / "run") if "loss" in line]
    assert found[0] == pytest.approx(np.log(2), rel=1e-6)
    assert min(found) < np.log(2) - 0.01
    again = initial.load(str(tmp_path / "run"), config.Model(), 0, mesh)
    exact = initial.load("tiny", config.Model(), 0, mesh).params
    share = frozen.bytes_of(again.base["layers"]) / frozen.bytes_of(exact["layers"])
    assert share < 0.3


@pytest.mark.slow
def test_a_cached_reference_is_that_of_the_base(folder, tmp_path, mesh):
    live, cached = (
        train_losses(folder, tmp_path / str(kind), **{"reference.cached": kind})
        for kind in (False, True)
    )
    np.testing.assert_allclose(live, cached, rtol=1e-5)


def train_losses(folder, workdir, **changes) -> list[float]:
    train.train(tiny.experiment(folder, workdir, **{**RANK, "steps": 3, **changes}), tiny.FILE)
    return [line["loss"] for line in tiny.metrics(workdir) if "loss" in line]


@pytest.mark.slow
def test_dropout_is_drawn_anew_at_each_step_and_seed(folder, tmp_path):
    one = train_losses(folder, tmp_path / "one", **{"lora.dropout": 0.5})
    plain = train_losses(folder, tmp_path / "plain")
    assert one[0] == plain[0] and abs(one[1] - plain[1]) > 1e-4
    other = train_losses(folder, tmp_path / "other", **{"lora.dropout": 0.5, "seed": 1})
    assert abs(one[1] - other[1]) > 1e-5


def test_an_adapter_that_goes_on_may_drop_its_inputs(folder, tmp_path, sft):
    found = train_losses(
        folder, tmp_path / "run", **{"model.source": str(sft), "lora.dropout": 0.3}
    )
    # the policy drops and the reference does not, so that they differ before any step
    assert 1e-5 < abs(found[0] - np.log(2)) < 0.1


def test_evaluation_drops_nothing(folder, tmp_path, mesh):
    evaluated = {**RANK, "data.evaluation_source": str(folder / "held_out.jsonl")}
    run, state = assemble.assemble(
        tiny.experiment(folder, tmp_path / "run", **evaluated, **{"lora.dropout": 0.9}), mesh
    )
    moved = jax.tree.map(lambda leaf: leaf + 0.01, state.params)
    state = dataclasses.replace(state, params=moved)
    twice = [train.evaluation(run, str(tmp_path), state, 0)["eval/loss"] for _ in range(2)]
    assert twice[0] == twice[1]
    plain, _ = assemble.assemble(tiny.experiment(folder, tmp_path / "run", **evaluated), mesh)
    found = train.evaluation(plain, str(tmp_path), state, 0)["eval/loss"]
    assert found == pytest.approx(twice[0], rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora.alpha": 32.0}, r"lora\.alpha is 32\.0, and lora\.rank is None"),
        ({"lora.targets": ("up",)}, r"lora\.targets is \('up',\), and lora\.rank is None"),
        ({"model.frozen": "int8"}, r"model\.frozen is int8, .* and lora\.rank None: the reference"),
        (
            {"model.frozen": "bfloat16"},
            r"model\.frozen is bfloat16, the compute type float32 and lora\.rank None",
        ),
        (
            {"model.frozen": "float32", "reference.cached": True},
            r"model\.frozen is float32, and this run holds nothing that is not trained",
        ),
        ({"lora.rank": 4, "lora.start": "new"}, r"lora\.start is new, and tiny has no adapter"),
        ({"reference.source": "base"}, r"reference\.source is base, and there is no adapter"),
        (
            {"lora.rank": 4, "reference.update_every": 2},
            r"reference\.update_every is 2, and lora\.rank is 4",
        ),
    ],
)
def test_what_cannot_be_with_or_without_an_adapter_is_refused(
    folder, tmp_path, mesh, changes, message
):
    run = tiny.experiment(folder, tmp_path / "run", **changes)
    with pytest.raises(ValueError, match=message):
        assemble.assemble(run, mesh)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora.rank": 8}, r"lora\.rank is 8, and the adapter of .* has 4: .*--lora\.start new"),
        ({"lora.alpha": 1.0}, r"lora\.alpha is 1\.0, and .* has 8\.0"),
        ({"lora.targets": ("up",)}, r"lora\.targets is \('up',\), and .* has \('down', 'query'"),
        ({"model.frozen": "int8"}, r"model\.frozen is int8, and the base of .* in float32"),
    ],
)
def test_an_adapter_of_another_form_is_not_trained_on(
    folder, tmp_path, sft, mesh, changes, message
):
    fields = {**RANK, "model.source": str(sft), **changes}
    with pytest.raises(ValueError, match=message):
        inputs.load(tiny.experiment(folder, tmp_path / "run", **fields), mesh)


def test_matrices_of_a_reference_are_held_in_the_compute_type_and_score_the_same(
    folder, tmp_path, mesh
):
    fields = {"model.dtype": "bfloat16", "optimizer.learning_rate": 1e-5}
    run, state = assemble.assemble(tiny.experiment(folder, tmp_path / "run", **fields), mesh)
    kernel = run.held.reference["layers"]["mlp"]["up"]["kernel"]
    assert (
        kernel.dtype == jnp.bfloat16
        and kernel.sharding == state.params["layers"]["mlp"]["up"]["kernel"].sharding
    )
    assert float(first_sums(run, state).deviation) == 0


def test_the_fingerprint_of_an_int8_base_sees_values_and_scales(mesh):
    params = initial.load("tiny", config.Model(), 0, mesh).params
    held = frozen.hold(params, "int8", "float32")
    other = jax.tree.map(lambda leaf: leaf, held)
    kernel = other["layers"]["mlp"]["up"]["kernel"]
    other["layers"]["mlp"]["up"]["kernel"] = kernel.astype(jnp.float32)
    assert reference.fingerprint(held) == reference.fingerprint(other)
    changed = jax.tree.map(lambda leaf: leaf * 2, kernel)
    other["layers"]["mlp"]["up"]["kernel"] = changed
    assert reference.fingerprint(held) != reference.fingerprint(other)

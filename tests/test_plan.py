"""Plans of a run's step: on this machine's CPU, and for TPUs that are not there.

Those marked tpu need libtpu and no TPU.
"""

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from dpo_jax import (
    abstract_step,
    config,
    plan,
    plan_search,
    plan_text,
    roofline,
    sharding,
    targets,
)
from dpo_jax.data import made_up
from dpo_jax.hlo import collectives
from dpo_jax.model import decoder, presets
from tests import tiny

LENGTHS = made_up.Lengths(20, 30, 1000)


def make_experiment(folder: Path, **changes) -> config.Experiment:
    return tiny.experiment(folder, folder, batch_size=16, **changes)


@pytest.fixture(scope="module")
def cpus() -> targets.Target:
    return targets.find("cpu:8")


@pytest.fixture(scope="module")
def planned(cpus, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("plan")
    experiment = make_experiment(folder, **{"model.attention": "plain"})
    examples = abstract_step.read_examples(experiment, LENGTHS)
    return plan.plan(experiment, examples, cpus, price=3.0)


def bytes_of_first_device(tree) -> int:
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def test_memory_by_kind_is_what_one_device_holds(planned):
    mesh = sharding.make_mesh(config.Mesh(fsdp=8), jax.devices())
    shape = presets.PRESETS["tiny"]
    params = sharding.place(tiny.draw_params(shape), mesh)
    held, memory = bytes_of_first_device(params), planned["memory_bytes_per_device"]
    assert memory["parameters"] == held
    # two moments in float32, and the number of updates
    assert memory["moments"] == 2 * held + 4
    assert memory["reference"] == held
    rows, tokens, scored, examples = planned["batch_shape"].values()
    slots = rows * examples
    assert memory["batch"] == 4 * (4 * rows * tokens + 3 * rows * scored + 3 * slots) / 8
    assert memory["base of the adapter"] == 0
    assert memory["temporaries"] > 0
    assert planned["fits"]


def test_a_plans_times_and_costs_follow_from_each_other(planned, cpus):
    seconds = planned["seconds"]
    assert seconds["none hidden"] == seconds["chip"] + seconds["interconnect"]
    assert seconds["all communication hidden"] == max(seconds["chip"], seconds["interconnect"])
    step = seconds["none hidden"]
    peak = 8 * cpus.flops
    assert planned["mfu"]["exposed"] == pytest.approx(planned["model_flops_per_step"] / step / peak)
    rows, tokens, *_ = planned["batch_shape"].values()
    useful = rows * tokens * planned["fill"]["tokens"]
    assert planned["tokens_per_second"]["exposed"] == pytest.approx(useful / step)
    # the planned examples at their mean length
    data = made_up.draw(LENGTHS, 128, "pairs")
    epoch = 1000 * len(data.tokens) / len(data.prompts)
    hours = epoch / (useful / step) / 3600
    assert planned["hours_per_epoch"]["exposed"] == pytest.approx(hours)
    # the machine is one chip
    assert planned["cost_per_epoch"]["exposed"] == pytest.approx(3.0 * hours)


def test_flops_of_a_plan_are_near_what_the_model_needs(planned):
    assert planned["uncounted"] == []
    # padding, and blocks of attention that are half empty
    assert 1.0 < planned["flops_per_step"] / planned["model_flops_per_step"] < 3.0


def test_parameters_are_gathered_over_fsdp(planned):
    shape = presets.PRESETS["tiny"]
    whole = sum(4 * leaf.size for leaf in jax.tree.leaves(decoder.shapes(shape)))
    sent = {(one["kind"], one["axes"]): one["bytes"] for one in planned["collectives"]}
    # to the policy, its gradient and the reference
    assert sent["all-gather", ("fsdp",)] == pytest.approx(3 * whole, rel=0.2)
    assert {axes for _, axes in sent} == {("fsdp",)}


def test_a_plan_is_text_and_json(planned):
    text = plan_text.describe(planned)
    assert "mesh data 1 x fsdp 8 x sequence 1 x tensor 1, 8 devices" in text
    assert "It fits: " in text
    assert "not measured" in text
    assert json.loads(json.dumps(planned))["chips"] == 1


def test_a_plan_in_which_slices_exchange_parameters_says_how_they_would_not(planned):
    far = roofline.Sent("all-gather", ("fsdp",), 1e9, 1, 2.0, True)._asdict()
    record = {**planned, "slices": 4, "collectives": [*planned["collectives"], far]}
    text = plan_text.describe(record)
    assert "| all-gather | fsdp, between slices (DCN) | 1 | 1.000 | 2.0000 |" in text
    assert "with --mesh.data 4 they would exchange gradients alone" in text
    assert "| data-centre network | 0.0000 |" in text
    assert "slices" not in plan_text.describe(planned)


def test_what_does_not_fit_comes_with_numbers_and_advice(planned, cpus, tmp_path):
    experiment = plan.resolve(make_experiment(tmp_path, **{"mesh.data": 2, "mesh.fsdp": 4}), cpus)
    mesh = sharding.make_mesh(experiment.mesh, jax.devices())
    step = abstract_step.make(experiment, abstract_step.read_examples(experiment, LENGTHS), mesh)
    memory = {**plan.argument_memory(step), "temporaries": 1.0}
    advice = plan.advise(step, memory)
    # two copies of 16 bytes a parameter less one of them
    held = memory["parameters"] + memory["moments"] + memory["reference"]
    assert advice[0].startswith("--lora.rank 16")
    assert any(
        line.startswith("--mesh.data 1 --mesh.fsdp 8") and plan.gib(held / 2) in line
        for line in advice
    )
    assert any(line.startswith("--reference.cached") for line in advice)
    assert any(
        line.startswith("--mesh.fsdp 2 --mesh.sequence 2 --microbatches 2:") for line in advice
    )
    large = plan.advise(step, memory | {"temporaries": 1e12})
    assert large[0].startswith("--model.remat full")
    record = {**planned, "fits": False, "error": "out of memory", "advice": advice}
    text = plan_text.describe(record)
    assert "It does not fit: " in text
    assert f"  {advice[0]}" in text


def test_sizes_are_read_from_the_compilers_error():
    error = "RESOURCE_EXHAUSTED: ... HLO temporaries (39.28G) exceeds available HBM (15.75G)."
    assert plan.temporaries_in(error) == 39.28 * 2**30
    assert plan.temporaries_in("RESOURCE_EXHAUSTED") is None


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("cpu:x", "take cpu, or cpu:8"),
        ("cpu:3", "running with 8 CPU devices already"),
        ("gpu", "finds no GPU here"),
        ("v5p:3x3", "no slice of v5p"),
    ],
)
def test_a_target_that_is_not_there_is_an_error(topology, message):
    if topology == "gpu" and any(device.platform == "gpu" for device in jax.devices()):
        pytest.skip("this machine has a GPU")
    with pytest.raises(ValueError, match=message):
        targets.find(topology)


def test_gpus_may_use_what_jax_has_taken_of_their_memory(monkeypatch):
    def stand_in(kind: str) -> Any:
        stats = {"bytes_limit": 60_000_000_000}
        return SimpleNamespace(device_kind=kind, memory_stats=lambda: stats)

    gpus = [stand_in("NVIDIA H100 80GB HBM3")] * 8
    monkeypatch.setattr(jax, "devices", lambda platform: gpus)
    found = targets.find("gpu")
    assert (found.name, found.chip_count) == ("8 x NVIDIA H100 80GB HBM3", 8)
    assert (found.capacity, found.published) == (60e9, 80e9)
    # of NVLink's 900 GB/s one way
    assert roofline.group_rate(gpus, found) == 450e9
    monkeypatch.setattr(jax, "devices", lambda platform: [stand_in("NVIDIA L40S")])
    with pytest.raises(ValueError, match="what NVIDIA L40S can do is not in dpo_jax/chips.py"):
        targets.find("gpu")


@pytest.mark.parametrize(("topology", "slices"), [("cpu", 2), ("gpu", 2), ("v5p-128", 0)])
def test_only_tpus_have_several_slices(topology, slices):
    with pytest.raises(ValueError, match=f"--slices is {slices}"):
        targets.find(topology, slices)


def run_script(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-m", "scripts.plan", *arguments]
    return subprocess.run(
        command, cwd=tiny.ROOT, capture_output=True, text=True, env=environment, check=False
    )


def test_without_libtpu_the_script_says_what_to_install():
    if importlib.util.find_spec("libtpu") is not None and "PYTHONPATH" not in os.environ:
        pytest.skip("libtpu is installed")
    done = run_script("experiments/dpo.py", "--topology", "v5p-128")
    assert done.returncode == 2
    assert done.stderr.startswith("error: v5p:4x4x4 (64 chips, accelerator type v5p-128)")
    assert 'pip install "jax[tpu]"' in done.stderr


def test_the_script_asks_for_a_topology_and_for_all_lengths():
    done = run_script("experiments/dpo.py")
    assert done.returncode == 2
    assert "give --topology" in done.stderr


@pytest.mark.slow
def test_the_script_plans_for_the_cpu(tmp_path):
    file = tmp_path / "plan.json"
    flags = ["--model.source", "tiny", "--batch-size", "8", "--json", str(file)]
    flags += ["--prompt-tokens", "10", "--completion-tokens", "20"]
    done = run_script("experiments/dpo.py", "--topology", "cpu:2", *flags)
    assert done.returncode == 2
    assert "--examples not given: give all three" in done.stderr
    done = run_script("experiments/dpo.py", "--topology", "cpu:2", *flags, "--examples", "100")
    assert done.returncode == 0, done.stderr
    assert "reference cached" in done.stdout
    assert json.loads(file.read_text())["devices"] == 2


def test_meshes_have_all_devices_and_divide_the_heads():
    found = list(plan_search.meshes(8, presets.PRESETS["llama-3.1-8b"], 2000))
    assert len(found) == len(set(found)) == 10
    assert all(mesh.data * (mesh.fsdp or 1) * mesh.tensor == 8 for mesh in found)
    long = list(plan_search.meshes(8, presets.PRESETS["llama-3.1-8b"], 4096))
    assert len(long) == len(set(long)) == 10 + 6 + 3
    assert {mesh.sequence for mesh in long} == {1, 2, 4}
    assert all(mesh.data * (mesh.fsdp or 1) * mesh.sequence * mesh.tensor == 8 for mesh in long)
    narrow = dataclasses.replace(presets.PRESETS["llama-3.1-8b"], key_value_heads=2)
    assert {mesh.tensor for mesh in plan_search.meshes(8, narrow, 100)} == {1, 2}


def test_meshes_of_several_slices_have_tensor_and_sequence_inside_of_each():
    found = list(plan_search.meshes(8, presets.PRESETS["llama-3.1-8b"], 4096, slices=4))
    assert {(mesh.tensor, mesh.sequence) for mesh in found} == {(1, 1), (1, 2), (2, 1)}


def test_a_search_of_several_slices_would_rather_exchange_gradients_than_parameters(cpus):
    target = cpus._replace(slices=2, network=1e9)

    def seconds(mesh: config.Mesh) -> float:
        return plan_search.seconds_between(mesh, 8e9, 10.0, 1.0, target)

    # of 8e9 parameters on 16 devices of two slices, 10 bytes each: a device receives half of its
    # slice's part of what is gathered, 5e9 bytes; gradients in four bytes, twice half
    assert seconds(config.Mesh(data=1, fsdp=16)) == pytest.approx(8e10 / 2 / 8 / 1e9)
    assert seconds(config.Mesh(data=2, fsdp=8)) == pytest.approx(4 * 8e9 / 8 / 1e9)
    assert seconds(config.Mesh(data=2, fsdp=4, sequence=2)) == pytest.approx(4 * 8e9 / 8 / 1e9)
    assert plan_search.seconds_between(config.Mesh(), 8e9, 10.0, 1.0, cpus) == 0


def test_a_search_tries_what_seems_to_fit_and_the_fastest_of_it(cpus, tmp_path):
    experiment = make_experiment(tmp_path, **{"model.source": "llama-3.1-8b"})
    examples = abstract_step.read_examples(experiment, LENGTHS)
    target = cpus._replace(flops=1e14, bandwidth=1e12, links=1e11, capacity=15.75 * 2**30)
    found = plan_search.candidates(experiment, examples, target)
    memory = np.array([one.memory for one in found])
    fits = memory <= target.capacity
    # 8B parameters, 16 bytes each, on 8 devices: 16 GB without a reference
    assert fits.any() and not fits.all()
    assert fits[: fits.sum()].all()
    first = [one.seconds for one in found[: fits.sum()]]
    assert first == sorted(first)
    # what takes as much memory as what failed, or more, is not tried
    one = found[0].experiment
    assert plan_search.is_greedier(one, one)
    thriftier = one.replace(microbatches=8, model=dataclasses.replace(one.model, remat="full"))
    assert plan_search.is_greedier(one, thriftier)
    assert not plan_search.is_greedier(thriftier, one.replace(microbatches=1))


@pytest.mark.slow
def test_a_search_compiles_and_puts_the_best_first(cpus, tmp_path):
    experiment = make_experiment(tmp_path)
    examples = abstract_step.read_examples(experiment, LENGTHS)
    records = plan_search.search(experiment, examples, cpus, plan_search.Bounds(2))
    assert len(records) == 2
    times = [one["seconds"]["none hidden"] for one in records]
    assert times == sorted(times)
    text = plan_search.describe(records)
    assert f"2 of {records[0]['candidates']} settings compiled in" in text
    assert records[0]["settings"] in text
    odd = experiment.replace(batch_size=1)
    with pytest.raises(ValueError, match="no mesh of 8 devices divides it"):
        plan_search.search(odd, examples, cpus, plan_search.Bounds(2))
    # one is compiled however short the time is
    assert len(plan_search.search(experiment, examples, cpus, plan_search.Bounds(2, 1e-9))) == 1


def write_shape(folder: Path, positions: int) -> str:
    """A small Llama's config.json of which no weights are there."""
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 1024,
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 512,
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(fields))
    return str(folder)


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("topology", "accelerator", "devices"),
    [
        ("v4:2x2x1", "v4-8", 4),
        ("v5e:2x2", "v5litepod-4", 4),
        ("v5p:2x2x1", "v5p-8", 4),
        ("v6e:2x2", "v6e-4", 4),
        ("7x:2x2x1", "tpu7x-8", 8),
    ],
)
def test_a_small_step_compiles_for_every_tpu(libtpu, tmp_path, topology, accelerator, devices):
    source = write_shape(tmp_path, 256)
    experiment = make_experiment(tmp_path, **{"model.source": source, "mesh.fsdp": None})
    target = targets.find(topology)
    assert len(target.devices) == devices
    found = plan.plan(experiment, abstract_step.read_examples(experiment, LENGTHS), target)
    assert (found["topology"], found["accelerator_type"]) == (topology, accelerator)
    assert found["fits"]
    assert found["dtype"] == "bfloat16"
    assert found["uncounted"] == []
    assert found["estimated_cycles"] > 0
    # matrices of bfloat16, at worst padded to twice their size
    assert found["flops_per_step"] > found["model_flops_per_step"]
    assert all(math.isfinite(one) for one in found["seconds"].values())
    assert f"{topology} ({found['chips']} chips, accelerator type {accelerator})" in (
        plan_text.describe(found)
    )


@pytest.mark.tpu
@pytest.mark.parametrize("data", [1, 2])
def test_what_slices_send_each_other_is_counted_apart(libtpu, tmp_path, data):
    source = write_shape(tmp_path, 256)
    changes = {"model.source": source, "mesh.fsdp": None, "mesh.data": data}
    experiment = make_experiment(tmp_path, **changes)
    examples = abstract_step.read_examples(experiment, LENGTHS)
    found = plan.plan(experiment, examples, targets.find("v5e:2x2", 2))
    far = [one for one in found["collectives"] if one["is_between_slices"]]
    parameters, fsdp = found["parameters"], 8 // data
    sent = {one["kind"]: one["bytes"] for one in far}
    if data == 1:
        # each device gathers its slice's part of the matrices, in bfloat16, for three passes
        assert {one["axes"] for one in far} == {("fsdp",)}
        assert sent["all-gather"] == pytest.approx(3 * 2 * parameters / 4, rel=0.2)
    else:
        # gradients of its shard of the parameters, of which most are in bfloat16
        assert {(one["kind"], one["axes"]) for one in far} == {("all-reduce", ("data",))}
        assert 2 * parameters / fsdp <= sent["all-reduce"] <= 4.5 * parameters / fsdp
    near = [one for one in found["collectives"] if not one["is_between_slices"]]
    assert {one["axes"] for one in near} == {("fsdp",)}
    seconds = found["seconds"]
    assert seconds["data-centre network"] == pytest.approx(sum(one["seconds"] for one in far))
    names = ("chip", "interconnect", "data-centre network")
    assert seconds["none hidden"] == pytest.approx(sum(seconds[name] for name in names))
    described = plan_text.describe(found)
    assert "2 slices of v5e:2x2 (4 chips, accelerator type v5litepod-4 each), 8 chips in all" in (
        described
    )
    assert (found["slices"], found["chips"], found["devices"]) == (2, 8, 8)
    assert found["uncounted"] == []
    assert "between slices (DCN)" in described and "| data-centre network | " in described


@pytest.mark.tpu
def test_what_a_tpu_has_no_memory_for_is_told_in_numbers(libtpu, tmp_path):
    changes = {
        "model.source": write_shape(tmp_path, 131072),
        "data.max_length": 131072,
        "mesh.fsdp": None,
    }
    experiment = make_experiment(tmp_path, **changes).replace(batch_size=64)
    examples = abstract_step.read_examples(experiment, made_up.Lengths(16000, 64000, 1000))
    found = plan.plan(experiment, examples, targets.find("v5e:2x2"))
    assert not found["fits"]
    assert found["memory_bytes_per_device"]["temporaries"] > 15.75 * 2**30
    assert "seconds" not in found
    text = plan_text.describe(found)
    assert "It does not fit: " in text
    assert "--model.remat full" in text
    assert "Traceback" not in text


@pytest.mark.tpu
@pytest.mark.parametrize("tensor", [1, 2])
def test_tpus_send_each_other_matrices_and_no_logits(libtpu, tmp_path, tensor):
    source = write_shape(tmp_path, 256)
    changes = {"model.source": source, "mesh.fsdp": None, "mesh.tensor": tensor}
    target = targets.find("v5e:2x2")
    experiment = plan.resolve(make_experiment(tmp_path, **changes), target)
    mesh = sharding.make_mesh(experiment.mesh, target.devices)
    step = abstract_step.make(experiment, abstract_step.read_examples(experiment, LENGTHS), mesh)
    program = plan.compile_step(step).program
    assert program is not None
    gathered = [one.bytes for one in collectives.collectives(program) if one.kind == "all-gather"]
    # the output matrix, in bfloat16; the logits of all scored tokens are more
    head = 2 * 256 * 1024
    shape = step.plan.ladder[-1]
    assert 2 * shape.rows * shape.scored * 1024 > 2 * head
    assert 0 < max(gathered) <= head


@pytest.mark.slow
def test_the_padded_layout_is_planned_as_it_is_timed(cpus, tmp_path):
    experiment = make_experiment(tmp_path)
    examples = abstract_step.read_examples(experiment, LENGTHS)
    found = plan.plan(experiment, examples, cpus, None, abstract_step.make_padded)
    # a row for each of two completions, as long as a prompt and a completion may be
    assert list(found["batch_shape"].values()) == [32, 128, 128, 1]
    data = examples.data
    assert found["tokens_per_step"] == pytest.approx(16 * len(data.tokens) / len(data.prompts))
    assert found["fits"]
    packed = plan.plan(experiment, examples, cpus)
    assert found["flops_per_step"] / found["tokens_per_step"] > 1.5 * (
        packed["flops_per_step"] / packed["tokens_per_step"]
    )


@pytest.mark.tpu
def test_a_mesh_may_split_an_axis_of_the_torus(libtpu):
    devices = targets.find("v5p:4x4x4").devices
    mesh = sharding.make_mesh(config.Mesh(data=2, fsdp=32), devices)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 32, "sequence": 1, "tensor": 1}
    assert len({device.id for device in mesh.devices.flat}) == 64

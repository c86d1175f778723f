"""A step of shapes is the step that a run compiles."""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest

from dpo_jax import abstract_step, assemble, config, losses, sharding, train
from dpo_jax.data import made_up
from dpo_jax.model import presets
from tests import tiny

ADAPTER = {"lora.rank": 2, "lora.dropout": 0.1, "model.frozen": "int8"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"reference.cached": True, "model.remat": "full"}, marks=pytest.mark.slow),
        pytest.param({"reference.update_every": 2, "microbatches": 2}, marks=pytest.mark.slow),
        pytest.param({"optimizer.moments_dtype": "bfloat16"}, marks=pytest.mark.slow),
        {**ADAPTER, "mesh.fsdp": 2, "mesh.sequence": 2, "mesh.tensor": 2},
        pytest.param({"lora.rank": 2, "reference.source": "base"}, marks=pytest.mark.slow),
        pytest.param(
            {"loss": config.Loss(losses.bco, beta=0.1), "data.examples": "unpaired"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"loss": config.Loss(losses.simpo, beta=2.0, gamma=1.0), "reference.source": None},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_step_of_shapes_lowers_to_the_program_of_a_run(folder, tmp_path, changes):
    experiment = tiny.experiment(folder, tmp_path, batch_size=16, **changes)
    mesh = sharding.make_mesh(experiment.mesh, jax.devices())
    run, state = assemble.assemble(experiment, mesh)
    _, batch, _ = next(train.batches(run, 0))
    expected: Any = run.step
    expected = expected.lower(state, run.held, batch, run.numbers)
    examples = abstract_step.read_examples(experiment, None)
    found = abstract_step.make(experiment, examples, mesh)
    lowered: Any = found.step
    lowered = lowered.lower(found.state, found.held, found.batch, found.numbers)
    assert examples.count == len(run.train.data.prompts)
    assert lowered.as_text() == expected.as_text()


def test_nothing_of_a_large_model_is_made(tmp_path):
    settings = {"model.source": "llama-3.1-70b", "data.max_length": 1024}
    experiment = tiny.experiment(tmp_path, tmp_path, **settings)
    mesh = sharding.make_mesh(experiment.mesh, jax.devices())
    before = {id(array) for array in jax.live_arrays()}
    lengths = made_up.Lengths(100, 200, 1000)
    step = abstract_step.make(experiment, abstract_step.read_examples(experiment, lengths), mesh)
    assert sum(leaf.size for leaf in jax.tree.leaves(step.state.params)) > 70e9
    new = [array for array in jax.live_arrays() if id(array) not in before]
    assert sum(array.nbytes for array in new) < 1000


def test_the_shape_of_a_model_is_read_from_its_config_alone(tmp_path):
    # the fields that HF's config.json of Llama has
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 96,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    experiment = tiny.experiment(tmp_path, tmp_path)
    model = dataclasses.replace(experiment.model, source=str(tmp_path))
    shape = abstract_step.read_shape(experiment.replace(model=model))
    assert (shape.width, shape.layers, shape.vocabulary_size) == (32, 2, 96)
    built_in = dataclasses.replace(experiment.model, source="builtin")
    shape = abstract_step.read_shape(experiment.replace(model=built_in))
    assert shape == presets.PRESETS["reviews-1m"]


def test_planned_lengths_have_their_medians_and_are_cut():
    data = made_up.draw(made_up.Lengths(100, 200, 1), 512, "pairs")
    prompts = data.prompts[:, 1] - data.prompts[:, 0]
    answers = data.completions[..., 1] - data.completions[..., 0]
    assert data.names == ("chosen", "rejected")
    assert np.median(prompts) == pytest.approx(100, rel=0.05)
    assert np.median(answers) == pytest.approx(200, rel=0.05)
    assert prompts.max() == 256
    assert (prompts[:, None] + answers).max() == 512
    assert answers.min() >= 1
    # one after another, each its own tokens
    assert data.completions[-1, -1, 1] == len(data.tokens) == prompts.sum() + answers.sum()


@pytest.mark.parametrize(
    ("lengths", "message"),
    [((400, 200, 1), "data.max_length is 512"), ((0, 200, 1), "each must be 1 or more")],
)
def test_planned_lengths_without_room_are_an_error(lengths, message):
    with pytest.raises(ValueError, match=message):
        made_up.draw(made_up.Lengths(*lengths), 512, "pairs")


def test_the_built_in_task_is_planned_without_its_model(tmp_path):
    experiment = tiny.experiment(tmp_path, tmp_path)
    data = dataclasses.replace(experiment.data, source="builtin")
    found = abstract_step.read_examples(experiment.replace(data=data), None)
    assert found.count == made_up.BUILTIN.examples
    assert "medians 5 of a prompt and 26 of a completion" in found.note

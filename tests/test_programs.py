"""Which runs share compiled functions."""

from pathlib import Path
from typing import Any

import jax
import pytest

from dpo_jax import config, initial, losses, programs, sharding
from dpo_jax.model import decoder
from tests import tiny

# numbers that are traced, and what no compiled function of a run depends on but by its shapes
SHARED: dict[str, Any] = {
    "loss.beta": 0.7,
    "loss.label_smoothing": 0.1,
    "optimizer.learning_rate": 0.5,
    "seed": 3,
    "workdir": "elsewhere",
    "batch_size": 16,
    "balance_steps": False,
    "batch_tokens": 1024,
    "evaluate_every": 1,
    "checkpoint_every": 1,
    "data.label_noise": 0.1,
    "data.max_length": 64,
    "samples.count": 4,
    "checkpoint.keep": 2,
    "log.progress": True,
    "profile.start": 1,
    "task.seed": 1,
    "reference.update_weight": 0.5,
}
OWN: dict[str, Any] = {
    "loss.score": losses.forward_kl,
    "steps": 7,
    "microbatches": 2,
    "statistics": "microbatch",
    "lora.dropout": 0.1,
    "reference.cached": True,
    "reference.source": None,
    "optimizer.kind": "rmsprop",
    "optimizer.schedule": "linear",
    "optimizer.warmup_steps": 2,
    "optimizer.clip": None,
    "optimizer.weight_decay": 0.1,
    "optimizer.b1": 0.8,
    "optimizer.b2": 0.9,
    "optimizer.eps": 1e-6,
    "optimizer.moments_dtype": "bfloat16",
}
# by the decoder, the mesh and the tree of what is trained
THROUGH_MODEL = ("model.", "mesh.", "lora.")


def form(experiment: config.Experiment, start: initial.Initial | None = None) -> programs.Form:
    """The form of a run that starts from the smallest decoder, or another."""
    mesh = sharding.make_mesh(experiment.mesh, jax.devices())
    return programs.form(experiment, start_of(experiment) if start is None else start, mesh)


def start_of(experiment: config.Experiment) -> initial.Initial:
    mesh = sharding.make_mesh(experiment.mesh, jax.devices())
    model = initial.make_decoder(tiny.DECODER, experiment.model, mesh)
    return initial.Initial(model, decoder.shapes(tiny.DECODER), None, "")


@pytest.fixture
def run() -> config.Experiment:
    return tiny.experiment(Path("data"), Path("run"))


@pytest.mark.parametrize("name", SHARED)
def test_runs_that_differ_in_what_is_not_compiled_have_one_form(run, name):
    other = form(config.override(run, {name: SHARED[name]}))
    assert other == form(run) and hash(other) == hash(form(run))


@pytest.mark.parametrize("name", OWN)
def test_runs_that_differ_in_what_is_compiled_have_forms_of_their_own(run, name):
    assert form(config.override(run, {name: OWN[name]})) != form(run)


def test_every_field_of_a_run_is_known_to_be_compiled_or_not(run):
    sections = {name.partition(".")[0] for name in SHARED}
    compiled_or_not = {*SHARED, *OWN}
    # of these sections no field is compiled
    apart = {"data", "samples", "checkpoint", "log", "profile", "task"}
    assert apart <= sections
    for name in config.flatten(run):
        known = name in compiled_or_not or name.startswith(THROUGH_MODEL)
        assert known or name.partition(".")[0] in apart | {"reference"}, name


def test_another_loss_decoder_mesh_tree_or_adapter_is_another_form(run):
    forms = [form(run)]
    forms.append(form(run.replace(loss=config.Loss(losses.hinge, beta=0.1))))
    forms.append(form(config.override(run, {"mesh.data": 2, "mesh.fsdp": 4})))
    forms += [
        form(config.override(run, {f"model.{name}": value}))
        for name, value in {"dtype": "bfloat16", "remat": "full", "attention": "plain"}.items()
    ]
    start = start_of(run)
    forms.append(form(run, start._replace(params={"norm": start.params["norm"]})))
    assert len(set(forms)) == len(forms) == 7

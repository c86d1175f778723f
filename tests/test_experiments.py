"""The experiment files: each is a run, its sweep fits it, and a new one needs no other edit."""

import json
import re
from pathlib import Path

import pytest

from dpo_jax import config, flags, train
from tests import tiny

FILES = sorted(file for file in (tiny.ROOT / "experiments").glob("[a-z]*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_experiment_is_a_run_and_every_point_of_its_sweep_too(file: Path):
    module = flags.load_module(file)
    experiment = flags.built(module, file)
    points = [config.override(experiment, change) for change in module.sweep()]
    assert len(set(points)) == len(points) >= 3
    assert {point.seed for point in points} == {0, 1, 2}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_experiment_names_its_paper_command_and_hardware(file: Path):
    header = file.read_text().split('"""')[1]
    assert "https://arxiv.org/abs/" in header
    assert f"python -m scripts.train experiments/{file.name}" in header
    assert "Hardware" in header


def test_the_four_methods_start_alike_and_differ_in_the_loss():
    runs = {
        name: flags.load(tiny.ROOT / "experiments" / f"{name}.py") for name in ("dpo", "ipo", "kto")
    }
    assert runs["ipo"].replace(loss=runs["dpo"].loss) == runs["dpo"]
    assert runs["kto"].data.examples == "unpaired"
    assert flags.load(tiny.ROOT / "experiments" / "orpo.py").reference.source is None


def readme_loss() -> str:
    """The experiment file that the README shows."""
    found = re.search(r"```python\n(.*?)```", (tiny.ROOT / "README.md").read_text(), re.DOTALL)
    assert found is not None
    return found[1]


def test_the_readmes_new_loss_runs_untouched_from_a_folder_of_its_own(folder: Path, tmp_path: Path):
    file = tmp_path / "hinge.py"
    file.write_text(readme_loss())
    experiment = flags.parse(flags.load(file), ["--loss.beta", "0.3"], "train")
    assert experiment.loss.hyperparameters == {"beta": 0.3}
    base = tiny.experiment(folder, tmp_path / "run", steps=2, evaluate_every=None)
    train.train(base.replace(loss=experiment.loss), file)
    # policy equals reference: relu(1 - 0)
    assert tiny.metrics(tmp_path / "run")[1]["loss"] == pytest.approx(1.0)
    loaded = flags.load_run(str(tmp_path / "run"))
    assert loaded.loss.function.__name__ == "hinge"
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["experiment"]["loss"] == {"function": "experiment.py:hinge", "beta": 0.3}

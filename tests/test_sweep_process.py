"""Points that one process trains, against runs that are alone in theirs."""

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

from dpo_jax import compiling, config, initial, losses, sharding, sweep, sweep_process, train
from tests import tiny

DPO, HINGE = config.Loss(losses.dpo, beta=0.1), config.Loss(losses.hinge, beta=0.5)
# the second fails in its third step, when the parameters have overflown
CHANGES = {
    "first": {"loss": DPO},
    "fails": {"loss": DPO, "optimizer.learning_rate": 1e38},
    "other numbers": {"loss": DPO, "loss.beta": 0.5, "optimizer.learning_rate": 2e-3, "seed": 5},
    "other loss": {"loss": HINGE},
}


class Swept(NamedTuple):
    """A sweep that is over."""

    folder: Path
    failures: list[sweep.Failure]
    spans: list[compiling.Span]
    # bytes of all arrays before each point and after the last
    held: list[int]
    described: str


def experiment(folder: Path, workdir: Path, name: str) -> config.Experiment:
    short = {"steps": 3, "evaluate_every": None, "checkpoint_every": None, "mesh.fsdp": 1}
    # attention of all pairs, which compiles in less time
    alone = {"data.evaluation_source": None, "reference.cached": True, "model.attention": "plain"}
    return tiny.experiment(folder, workdir / name, **{**short, **alone, **CHANGES[name]})


def held() -> int:
    return sum(one.nbytes for one in jax.live_arrays())


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """One device, for which a step compiles in less time."""
    with pytest.MonkeyPatch.context() as patch:
        one = jax.devices()[:1]
        patch.setattr(jax, "devices", lambda: one)
        yield


@pytest.fixture(scope="module")
def swept(folder: Path, tmp_path_factory) -> Swept:
    workdir = tmp_path_factory.mktemp("sweep")
    training, noted = sweep_process.make_training(), list[int]()

    def note_and_train(run: config.Experiment, file: Path) -> None:
        noted.append(held())
        training.train(run, file)

    points = [
        sweep.Point(index, name, experiment(folder, workdir, name), tiny.FILE)
        for index, name in enumerate(CHANGES)
    ]
    with compiling.recorded() as spans:
        failures = sweep.run(points, note_and_train)
    return Swept(workdir, failures, spans, [*noted, held()], training.describe())


def test_a_step_is_compiled_once_for_each_loss(swept: Swept):
    assert compiling.count(swept.spans, "step") == 2
    traced = [one for one in swept.spans if (one.event, one.program) == (compiling.TRACED, "step")]
    assert len(traced) == 2
    dpo, hinge = swept.described.splitlines()
    assert dpo.startswith("dpo: 2 points, 1 train step compiled; ")
    assert hinge.startswith("hinge: 1 point, 1 train step compiled; ")
    assert hinge.endswith("about 0.0 s saved") and not dpo.endswith("about 0.0 s saved")


@pytest.mark.parametrize("name", ["other numbers", "other loss"])
def test_a_point_is_bit_for_bit_the_run_that_is_alone(
    swept: Swept, folder: Path, tmp_path: Path, name: str
):
    train.train(experiment(folder, tmp_path, name), tiny.FILE)
    both = [tiny.metrics(root / name) for root in (swept.folder, tmp_path)]
    shared, alone = (
        [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]
        for lines in both
    )
    assert shared == alone and len(alone) == 4
    mesh = sharding.make_mesh(config.Mesh(), jax.devices())
    trained, expected = (
        initial.load(str(root / name), config.Model(), 0, mesh).params
        for root in (swept.folder, tmp_path)
    )
    jax.tree.map(np.testing.assert_array_equal, trained, expected)


def test_a_failing_point_leaves_no_arrays_and_the_rest_as_it_would_be(swept: Swept):
    failed = {failure.point.name: failure.reason for failure in swept.failures}
    assert list(failed) == ["fails"] and failed["fails"].startswith("FloatingPointError")
    done = [name for name in CHANGES if (swept.folder / name / "DONE").exists()]
    assert done == ["first", "other numbers", "other loss"]
    # a copy of the smallest model's parameters has 427,264 bytes
    assert max(swept.held) - swept.held[0] < 100_000


def test_what_is_saved_is_what_each_point_would_have_compiled_as_the_first_did():
    seconds = {"dpo": (10.0, 1.0, 0.5), "ipo": (8.0, 8.0)}
    compiled = [
        sweep_process.Compiled(loss, int(one >= 8), one)
        for loss, times in seconds.items()
        for one in times
    ]
    assert sweep_process.describe(compiled).splitlines() == [
        "dpo: 3 points, 1 train step compiled; 11.5 s of compiling, about 18.5 s saved",
        "ipo: 2 points, 2 train steps compiled; 16.0 s of compiling, about 0.0 s saved",
    ]
    assert sweep_process.describe([]) == ""

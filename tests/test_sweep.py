"""The points of a sweep and what becomes of each."""

import gc
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest

from dpo_jax import config, flags, origins, paths, sweep

EXPERIMENT = """
from dpo_jax import config

def hinge(policy, reference, batch, *, beta: config.Positive = 0.1):
    return policy, {}

def experiment():
    return config.Experiment(loss=config.Loss(hinge), steps=10)

def sweep():
    return config.grid({"seed": [0, 1], "loss.beta": [0.1, 0.5]})
"""
NAMES = ["loss.beta=0.1,seed=0", "loss.beta=0.5,seed=0", "loss.beta=0.1,seed=1"]
NAMES += ["loss.beta=0.5,seed=1"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "hinge.py"
    path.write_text(EXPERIMENT)
    return path


@pytest.fixture
def root(tmp_path: Path) -> str:
    return str(tmp_path / "runs")


class Trainer:
    """Stands in for training: notes what it is asked to train, and can fail at one point."""

    def __init__(self, error: BaseException | None = None, at: str = ""):
        self.trained: list[str] = []
        self.error, self.at = error, at

    def __call__(self, experiment: config.Experiment, experiment_file: Path) -> None:
        folder = str(experiment.workdir)
        self.trained.append(Path(folder).name)
        flags.write_run(folder, experiment, experiment_file)
        if self.error is not None and folder.endswith(self.at):
            raise self.error
        paths.write_text(paths.join(folder, "DONE"), "")


def points(file: Path, root: str, *arguments: str) -> list[sweep.Point]:
    return sweep.from_command_line([str(file), "--workdir", root, *arguments], "sweep").points


def refused(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        sweep.from_command_line(arguments, "sweep")
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_the_points_are_the_overrides_in_order_in_folders_of_their_names(file, root):
    found = points(file, root)
    assert [point.name for point in found] == NAMES
    assert [point.index for point in found] == [0, 1, 2, 3]
    third = found[2].experiment
    assert (third.seed, third.loss.hyperparameters["beta"]) == (1, 0.1)
    assert third.workdir == f"{root}/hinge/{NAMES[2]}"
    assert found[2].experiment_file == file


def test_folders_in_a_bucket_are_joined_with_slashes(file):
    assert points(file, "gs://bucket/runs")[0].experiment.workdir == (
        "gs://bucket/runs/hinge/loss.beta=0.1,seed=0"
    )


def test_flags_change_every_point_and_no_name(file, root):
    found = points(file, root, "--steps", "3", "--data.label-noise=0.2")
    assert [point.name for point in found] == NAMES
    assert {(p.experiment.steps, p.experiment.data.label_noise) for p in found} == {(3, 0.2)}


def test_index_gives_one_point_and_shards_share_them_out_without_rest(file, root):
    assert [p.name for p in points(file, root, "--index", "2")] == [NAMES[2]]
    shards = [[p.index for p in points(file, root, "--shard", f"{i}/3")] for i in range(3)]
    assert shards == [[0, 3], [1], [2]]


def test_a_shard_may_be_empty(file, root):
    assert points(file, root, "--shard", "5/6") == []


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"seed": 1, "loss.beta": 0.1}, "loss.beta=0.1,seed=1"),
        ({"optimizer.learning_rate": 1e-6}, "optimizer.learning_rate=1e-06"),
        ({"model.source": "/models/a b"}, "model.source=%2Fmodels%2Fa%20b"),
        ({"model.source": "a,seed=1"}, "model.source=a%2Cseed%3D1"),
        ({"optimizer.clip": None}, "optimizer.clip=None"),
        ({"samples.reward": len}, "samples.reward=len"),
        ({}, "default"),
    ],
)
def test_a_folders_name_is_stable_and_safe(change, name):
    assert sweep.folder_name(change) == name


def test_a_name_too_long_for_a_file_system_is_refused():
    with pytest.raises(ValueError, match="a folder name of 413 characters"):
        sweep.folder_name({"model.source": "a" * 400})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([{"seed": 1}, {"seed": 2}, {"seed": 1}], "points 0 and 2 are the same: seed=1"),
        ([{"loss.beta": 1}, {"loss.beta": 1.0}], "points 0 and 1 are the same: loss.beta=1.0"),
        (
            [{"seed": 1}, {"sede": 1}],
            r"point 1 of the sweep, \{'sede': 1\}: .* did you mean 'seed'",
        ),
        ([{"loss.beta": -1.0}], "point 0 of the sweep.*loss.beta is -1.0; it must be > 0"),
        ([{"workdir": "x"}], "point 0 sets workdir"),
    ],
)
def test_wrong_overrides_name_the_point(file, changes, message):
    with pytest.raises(ValueError, match=message):
        sweep.points(flags.load(file), changes, file, "runs")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--index", "4"], "--index is 4; the sweep's points are 0 to 3"),
        (["--index", "-1"], "--index is -1; the sweep's points are 0 to 3"),
        (["--index", "x"], "argument --index: invalid int value: 'x'"),
        (["--shard", "3/3"], "--shard: '3/3' was given; it must be i/n with 0 <= i < n"),
        (["--shard", "1"], "--shard: '1' was given; it must be i/n"),
        (["--shard", "0/0"], "--shard: '0/0' was given; it must be i/n"),
        (["--shard", "0/2", "--index", "1"], "--index: not allowed with argument --shard"),
        (["--stepz", "3"], "Unrecognized options: --stepz"),
        (["--loss.beta", "0.3"], "--loss.beta is set for all points, and sweep() of"),
        (["--seed=3"], "--seed is set for all points, and sweep() of"),
        (["--steps", "0"], "steps is 0; it must be >= 1"),
    ],
)
def test_a_wrong_command_line_is_refused(file, root, capsys, arguments, message):
    assert message in refused(capsys, str(file), "--workdir", root, *arguments)


def test_a_sweep_needs_a_root_and_an_experiment_file(file, capsys):
    assert "--workdir ROOT is missing" in refused(capsys, str(file))
    assert "the first argument must be an experiment file" in refused(capsys, "--list")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "has no function sweep()"),
        ("def sweep(): return 3", "returns 3; it must return a list of dicts"),
        ("def sweep(): return []", "has no points"),
        ("def sweep(): return 1 / 0", "fails: ZeroDivisionError"),
    ],
)
def test_a_file_without_a_sweep_says_what_is_wrong(file, root, capsys, source, message):
    file.write_text(EXPERIMENT.partition("def sweep")[0] + source)
    assert message in refused(capsys, str(file), "--workdir", root)


def test_help_shows_the_sweeps_own_flags_and_the_experiments(file, capsys):
    with pytest.raises(SystemExit) as stopped:
        sweep.from_command_line([str(file), "--help"], "sweep")
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "--shard i/n" in printed and "--loss.beta FLOAT" in printed


def test_every_point_is_trained_once_and_a_second_run_skips_them(file, root, capsys):
    first, second = Trainer(), Trainer()
    assert sweep.run(points(file, root), first) == []
    assert first.trained == NAMES
    assert sweep.run(points(file, root), second) == []
    assert second.trained == []
    assert capsys.readouterr().out.count("finished before, skipping") == 4


def test_a_failing_point_does_not_stop_the_rest_and_is_tried_again(file, root, capsys):
    failures = sweep.run(points(file, root), Trainer(ValueError("no such file"), at=NAMES[1]))
    assert [(f.point.index, f.reason) for f in failures] == [(1, "ValueError: no such file")]
    again = Trainer()
    assert sweep.run(points(file, root), again) == []
    assert again.trained == [NAMES[1]]
    assert f"resuming {NAMES[1]}" in capsys.readouterr().out


def test_what_a_failing_point_has_made_is_gone_before_the_next_starts(file, root):
    made: list[weakref.ref[Trainer]] = []

    def train(experiment: config.Experiment, experiment_file: Path) -> None:
        assert [one() for one in made] == [None] * len(made)
        state = Trainer()
        made.append(weakref.ref(state))
        # its traceback has this function's variables, of which it is one
        error = ValueError("out of memory")
        raise error

    gc.disable()
    try:
        failures = sweep.run(points(file, root), train)
    finally:
        gc.enable()
    assert {failure.reason for failure in failures} == {"ValueError: out of memory"}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143)])
def test_an_interrupt_stops_the_sweep(file, root, error):
    trainer = Trainer(error, at=NAMES[1])
    with pytest.raises(type(error)):
        sweep.run(points(file, root), trainer)
    assert trainer.trained == NAMES[:2]


def test_a_finished_folder_of_another_config_is_a_failure(file, root):
    sweep.run(points(file, root), Trainer())
    trainer = Trainer()
    failures = sweep.run(points(file, root, "--steps", "20", "--index", "0"), trainer)
    assert trainer.trained == []
    assert "another config: steps: 10 in the folder, 20 now" in failures[0].reason


def test_files_that_the_built_in_task_has_made_are_no_other_config(file, root):
    def train(experiment: config.Experiment, experiment_file: Path) -> None:
        made = {"data.source": "made.jsonl", "data.tokenizer": "made", "model.source": "sft"}
        Trainer()(config.override(experiment, made), experiment_file)

    chosen = points(file, root, "--index", "0")
    assert sweep.run(chosen, train) == []
    assert sweep.run(chosen, train) == []
    named = points(file, root, "--index", "0", "--data.source", "x", "--model.source", "y")
    assert "data.source: made.jsonl in the folder, x now" in sweep.run(named, train)[0].reason


def test_a_source_by_a_relative_path_is_no_other_config(file, root, tmp_path, monkeypatch):
    def train(experiment: config.Experiment, experiment_file: Path) -> None:
        Trainer()(origins.with_absolute_sources(experiment), experiment_file)

    (tmp_path / "sft").mkdir()
    monkeypatch.chdir(tmp_path)
    # no row of the built-in task, whose sweeps may differ in what it has made
    flags_of_run = ("--model.source", "sft", "--data.source", "rows.jsonl")
    chosen = points(file, root, "--index", "0", *flags_of_run)
    assert sweep.run(chosen, train) == []
    assert sweep.run(chosen, train) == []
    assert flags.load_run(str(chosen[0].experiment.workdir)).model.source == str(tmp_path / "sft")


def test_the_listing_has_index_status_and_name(file, root):
    sweep.run(points(file, root, "--index", "0"), Trainer())
    sweep.run(points(file, root, "--index", "3"), Trainer(ValueError(), at=NAMES[3]))
    assert [line.split() for line in sweep.listing(points(file, root)).splitlines()] == [
        ["0", "done", NAMES[0]],
        ["1", "new", NAMES[1]],
        ["2", "new", NAMES[2]],
        ["3", "started", NAMES[3]],
    ]


def main(file: Path, root: str, trainer: Any, *arguments: str) -> int:
    return sweep.main(
        [str(file), "--workdir", root, *arguments], "sweep", lambda: sweep.Training(trainer, str)
    )


def test_the_exit_code_is_one_if_a_point_failed_and_the_reasons_come_last(file, root, capsys):
    assert main(file, root, Trainer(ValueError("full disk"), at=NAMES[2])) == 1
    assert capsys.readouterr().err.splitlines()[-4:] == [
        "3 of 4 points finished",
        "failed:",
        f"   2  {NAMES[2]}",
        "      ValueError: full disk",
    ]
    assert main(file, root, Trainer()) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "4 of 4 points finished"


def test_listing_trains_nothing(file, root, capsys):
    assert main(file, root, None, "--list") == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert not Path(root).exists()


def test_listing_a_folder_that_cannot_be_read_is_one_line(file, capsys, monkeypatch):
    def exists(path: str) -> bool:
        raise ValueError(f"{path}: no such file system") from ImportError("of no use to the reader")

    monkeypatch.setattr(paths, "exists", exists)
    with pytest.raises(SystemExit) as stopped:
        main(file, "xx://bucket", None, "--list")
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: xx://bucket/hinge/") and printed.count("\n") == 1


def test_listing_imports_no_jax(file, root):
    program = (
        "import runpy, sys\n"
        "try: runpy.run_module('scripts.sweep', run_name='__main__')\n"
        "except SystemExit as stopped: assert stopped.code == 0\n"
        "assert 'jax' not in sys.modules"
    )
    command = [sys.executable, "-c", program, str(file), "--workdir", root, "--list"]
    project = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert (done.returncode, done.stdout.count("new")) == (0, 4), done.stderr


def test_a_point_whose_folder_was_removed_is_new_again(file, root):
    sweep.run(points(file, root), Trainer())
    shutil.rmtree(Path(root) / "hinge" / NAMES[0])
    assert [sweep.status(point) for point in points(file, root)] == ["new", *["done"] * 3]

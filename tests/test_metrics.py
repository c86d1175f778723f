import math
import sys
from pathlib import Path

import fsspec
import pytest
from tensorboardX.event_file_writer import EventFileWriter

from dpo_jax import config, metrics, paths
from tests import tiny

QUIET = config.Log(tensorboard=False, progress=False)


@pytest.fixture(params=["local", "file", "memory"])
def folder(request, tmp_path):
    """A run folder on this machine, by path and by URL, and in an object store."""
    if request.param == "memory":
        yield "memory://runs/one"
        fsspec.filesystem("memory").store.clear()
    else:
        path = tmp_path / "one"
        path.mkdir()
        yield str(path) if request.param == "local" else f"file://{path}"


def write(folder: str, lines: dict[int, dict], log: config.Log = QUIET, first: int = 0) -> None:
    with metrics.Writer(folder, log, 10, first, {}) as writer:
        for step, values in lines.items():
            writer.write(step, values)


def text(folder: str) -> str:
    return paths.read_text(paths.join(folder, "metrics.jsonl"))


def test_the_writer_writes_a_line_a_step_and_appends_to_those_before(folder):
    write(folder, {0: {"loss": 0.5, "kl": 0.25}, 1: {"loss": 0.125}})
    write(folder, {2: {"loss": 1.0}}, first=1)
    assert text(folder) == (
        '{"step": 0, "loss": 0.5, "kl": 0.25}\n{"step": 1, "loss": 0.125}\n'
        '{"step": 2, "loss": 1.0}\n'
    )
    assert tiny.metrics(folder) == [
        {"step": 0, "loss": 0.5, "kl": 0.25},
        {"step": 1, "loss": 0.125},
        {"step": 2, "loss": 1.0},
    ]


def test_lines_are_in_the_file_once_they_are_flushed(folder):
    with metrics.Writer(folder, QUIET, 10, 0, {}) as writer:
        writer.write(1, {"loss": 0.5})
        writer.flush()
        assert len(tiny.metrics(folder)) == 1


def test_a_local_line_is_in_the_file_at_once(tmp_path):
    with metrics.Writer(str(tmp_path), QUIET, 10, 0, {}) as writer:
        writer.write(1, {"loss": 0.5})
        assert len(tiny.metrics(tmp_path)) == 1


def test_cutting_drops_later_lines_and_one_that_was_cut_short(folder):
    write(folder, {step: {"loss": float(step)} for step in range(5)})
    whole = text(folder)
    paths.write_text(paths.join(folder, "metrics.jsonl"), whole + '{"step": 2, "lo')
    metrics.cut(folder, 2)
    assert text(folder) == whole[: whole.index('{"step": 3')]
    write(folder, {3: {"loss": 7.0}}, first=2)
    assert [line["step"] for line in tiny.metrics(folder)] == [0, 1, 2, 3]


def test_cutting_a_folder_without_metrics_makes_none(folder):
    metrics.cut(folder, 3)
    assert not paths.exists(paths.join(folder, "metrics.jsonl"))


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_and_its_line_is_kept(folder, loss):
    with pytest.raises(FloatingPointError, match=f"loss is {loss} at step 2: lower --optimizer"):
        write(folder, {1: {"loss": 1.0}, 2: {"loss": loss, "kl": 0.5}, 3: {"loss": 1.0}})
    last = tiny.metrics(folder)[-1]
    assert (last["step"], last["kl"]) == (2, 0.5)
    assert not math.isfinite(last["loss"])


def test_a_line_without_a_loss_is_no_reason_to_stop(folder):
    write(folder, {0: {"eval/loss": 1.0}})
    assert tiny.metrics(folder) == [{"step": 0, "eval/loss": 1.0}]


def test_tensorboard_gets_every_value_of_a_local_run(tmp_path, monkeypatch):
    added = []
    monkeypatch.setattr(
        EventFileWriter, "add_event", lambda self, event, *_: added.append((event.step, event))
    )
    write(f"file://{tmp_path}", {3: {"loss": 0.5, "kl": 0.25}}, config.Log(progress=False))
    assert list((tmp_path / "tensorboard").glob("events.*"))
    scalars = {
        value.tag: (step, value.simple_value)
        for step, event in added
        for value in event.summary.value
    }
    assert scalars == {"loss": (3, 0.5), "kl": (3, 0.25)}


def test_no_tensorboard_file_where_it_is_off(tmp_path):
    write(str(tmp_path), {0: {"loss": 0.5}})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_the_bar_shows_the_step_and_the_loss(tmp_path, capsys):
    log = config.Log(tensorboard=False, progress=True)
    write(str(tmp_path), {10: {"loss": 0.5, "rewards/accuracies": 0.75}}, log)
    shown = capsys.readouterr().err
    assert "10/10" in shown and "loss=0.5" in shown and "accuracy=0.75" in shown


def test_wandb_that_is_not_installed_is_named_with_the_cure(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    log = config.Log(tensorboard=False, progress=False, wandb_project="dpo")
    with pytest.raises(ValueError, match="wandb is not installed: pip install wandb"):
        metrics.Writer(str(tmp_path), log, 10, 0, {})


class Recorder:
    """Stands for the package wandb and for a run of it."""

    def __init__(self):
        self.calls: list = []

    def init(self, **arguments):
        self.calls.append(arguments)
        return self

    def log(self, values, step):
        self.calls.append((step, values))

    def finish(self):
        self.calls.append("finished")


def start_of_wandb(folder: Path, monkeypatch) -> list:
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", recorder)
    folder.mkdir(parents=True, exist_ok=True)
    log = config.Log(tensorboard=False, progress=False, wandb_project="dpo")
    with metrics.Writer(f"{folder}/", log, 10, 0, {"seed": 1}) as writer:
        writer.write(4, {"loss": 0.5})
    return recorder.calls


def test_wandb_goes_on_with_the_run_of_the_folder(tmp_path, monkeypatch):
    started, *rest = start_of_wandb(tmp_path / "dpo" / "beta=0.1", monkeypatch)
    again, *_ = start_of_wandb(tmp_path / "dpo" / "beta=0.1", monkeypatch)
    other, *_ = start_of_wandb(tmp_path / "kto" / "beta=0.1", monkeypatch)
    assert (started["project"], started["name"]) == ("dpo", "dpo/beta=0.1")
    assert started["id"] == again["id"] != other["id"]
    assert started["resume"] == "allow"
    assert started["config"] == {"seed": 1}
    assert rest == [(4, {"loss": 0.5}), "finished"]


def test_a_gradient_that_is_not_finite_stops_the_run_once_its_line_is_written(tmp_path):
    log = config.Log(tensorboard=False, progress=False)
    with pytest.raises(FloatingPointError, match="grad_norm is inf at step 3"):
        with metrics.Writer(str(tmp_path), log, 10, 0, {}) as writer:
            writer.write(3, {"loss": 0.5, "grad_norm": float("inf")})
    assert tiny.metrics(tmp_path)[-1]["step"] == 3

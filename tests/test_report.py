"""Run folders, made by hand here, as tables and figures."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo_jax import config, figures, flags, paths, report, runs

PROJECT = Path(__file__).resolve().parent.parent
EXPERIMENT = """
from dpo_jax import config

def {loss}(policy, reference, batch, *, beta: config.Positive = 0.1):
    return policy, {{}}

def experiment():
    return config.Experiment(loss=config.Loss({loss}), steps=2)
"""


def lines(last_reward: float, last_kl: float, accuracy: float = 0.75) -> list[dict[str, Any]]:
    """The metrics of a run of two steps, evaluated before the first and after the last."""
    return [
        {"step": 0, "eval/loss": 0.75, "samples/reward": 0.5, "samples/kl": 0.0},
        {"step": 1, "loss": 0.75, "time/tokens_per_second": 10.0},
        {
            "step": 2,
            "loss": 0.25,
            "eval/loss": 0.5,
            "eval/rewards/accuracies": accuracy,
            "samples/reward": last_reward,
            "samples/kl": last_kl,
        },
    ]


def make_run(
    root: Path,
    loss: str,
    metrics: list[dict[str, Any]],
    changes: dict[str, Any],
    finished: bool = True,
) -> Path:
    file = root.parent / f"{loss}.py"
    file.write_text(EXPERIMENT.format(loss=loss))
    folder = root / loss / ",".join(f"{name}={value}" for name, value in changes.items())
    run = config.override(flags.load(file), {**changes, "workdir": str(folder)})
    flags.write_run(str(folder), run, file)
    text = "".join(json.dumps(line) + "\n" for line in metrics)
    (folder / "metrics.jsonl").write_text(text)
    if finished:
        (folder / "DONE").write_text("")
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """DPO with two seeds and one beta more, and an unfinished IPO."""
    folder = tmp_path / "runs"
    make_run(folder, "dpo", lines(1.0, 4.0, 0.8), {"loss.beta": 0.1, "seed": 0})
    make_run(folder, "dpo", lines(2.0, 6.0, 0.9), {"loss.beta": 0.1, "seed": 1})
    make_run(folder, "dpo", lines(1.5, 2.0), {"loss.beta": 0.5, "seed": 0})
    make_run(folder, "ipo", lines(0.75, 1.0)[:2], {"seed": 0}, finished=False)
    return folder


def table_rows(table: str) -> list[list[str]]:
    rows = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_the_table_has_a_row_a_run_and_one_for_the_start(root):
    rows = table_rows(report.run_table(runs.read(str(root))))
    assert rows[0][3:] == ["eval/loss", "eval/rewards/accuracies", "samples/reward", "samples/kl"]
    assert rows[2:] == [
        ["dpo", "loss.beta=0.1, seed=0", "2", "0.5000", "0.800", "1.000", "4.00"],
        ["dpo", "loss.beta=0.1, seed=1", "2", "0.5000", "0.900", "2.000", "6.00"],
        ["dpo", "loss.beta=0.5, seed=0", "2", "0.5000", "0.750", "1.500", "2.00"],
        ["ipo", "", "1 of 2", "0.7500", "", "0.500", "0.00"],
        ["before training", "", "0", "", "", "0.500", "0.00"],
    ]


def test_seeds_of_one_config_give_mean_and_sample_standard_deviation(root):
    rows = table_rows(report.seed_table(runs.read(str(root))))
    # deviation of 1 and 2 with n - 1: sqrt(0.5) = 0.7071; of 4 and 6: sqrt(2) = 1.414
    assert rows[2:] == [
        ["dpo", "loss.beta=0.1", "2", "0.5000 ± 0.0000", "0.850 ± 0.071"]
        + ["1.500 ± 0.707", "5.00 ± 1.41"]
    ]


def test_a_seed_that_has_not_finished_is_in_no_mean(root):
    before = report.seed_table(runs.read(str(root)))
    changes = {"loss.beta": 0.1, "seed": 2}
    make_run(root, "dpo", lines(9.0, 9.0), changes, finished=False)
    found = runs.read(str(root))
    assert len(found) == 5
    assert report.seed_table(found) == before


def test_there_is_no_table_of_seeds_without_seeds(tmp_path):
    make_run(tmp_path / "runs", "dpo", lines(1.0, 4.0), {"loss.beta": 0.1})
    make_run(tmp_path / "runs", "dpo", lines(1.0, 4.0), {"loss.beta": 0.2})
    assert report.seed_table(runs.read(str(tmp_path / "runs"))) == ""


def test_the_csv_has_the_fields_that_differ_and_every_final_metric(root):
    found = runs.read(str(root))
    rows = list(csv.DictReader(report.csv_text(found, str(root)).splitlines()))
    assert list(rows[0]) == [
        *("folder", "experiment", "loss.function", "finished", "step", "loss.beta", "seed"),
        *("eval/loss", "eval/rewards/accuracies", "loss", "samples/kl", "samples/reward"),
        "time/tokens_per_second",
    ]
    assert (rows[1]["loss.function"], rows[1]["loss"]) == ("dpo", "0.25")
    assert rows[1]["folder"] == "dpo/loss.beta=0.1,seed=1"
    assert (rows[1]["seed"], rows[1]["loss.beta"]) == ("1", "0.1")
    assert (rows[1]["eval/rewards/accuracies"], rows[1]["time/tokens_per_second"]) == (
        "0.9",
        "10.0",
    )
    assert (rows[3]["finished"], rows[3]["step"]) == ("False", "1")
    assert rows[3]["eval/rewards/accuracies"] == ""


def test_an_sft_run_from_random_weights_is_not_where_the_others_start(root):
    start, end = lines(1.0, 4.0)[0], {"step": 1, "loss": 1.0, "samples/reward": -1.0}
    sft = [{**{k: v for k, v in start.items() if k != "samples/kl"}, "samples/reward": -7.0}, end]
    make_run(root, "sft", sft, {"seed": 0})
    found = runs.read(str(root))
    rows = table_rows(report.run_table(found))
    assert ["before training", "", "0", "", "", "0.500", "0.00"] in rows
    axis = figures.frontier(found).axes[0]
    star = axis.collections[-1]
    np.testing.assert_allclose(star.get_offsets(), [[0.0, 0.5]])
    assert len(axis.lines) == 4


def test_write_leaves_table_csv_and_pictures_and_names_the_unfinished(root, tmp_path):
    written = report.write(str(root), str(tmp_path / "out"))
    names = ["report.csv", "curves.png", "frontier.png", "report.md"]
    assert written.files == [str(tmp_path / "out" / name) for name in names]
    text = (tmp_path / "out" / "report.md").read_text()
    assert "Not finished: ipo/seed=0" in text
    assert "![curves.png](curves.png)" in text and "![frontier.png](frontier.png)" in text
    assert written.table in text
    for name in ("curves.png", "frontier.png"):
        assert (tmp_path / "out" / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_report_of_runs_that_never_sampled_has_no_frontier(tmp_path):
    plain = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25, "eval/loss": 0.4}]
    make_run(tmp_path / "runs", "dpo", plain, {"seed": 0})
    files = report.write(str(tmp_path / "runs")).files
    assert [Path(file).name for file in files] == ["report.csv", "curves.png", "report.md"]
    assert "before training" not in Path(files[-1]).read_text()


def test_a_folder_that_is_itself_a_run_is_reported(tmp_path):
    folder = make_run(tmp_path / "runs", "dpo", lines(1.0, 4.0), {"seed": 0})
    found = runs.read(str(folder))
    assert [runs.relative(run, str(folder)) for run in found] == ["."]


def test_runs_in_a_remote_folder_are_read_and_reported(tmp_path):
    folder = make_run(tmp_path / "runs", "dpo", lines(1.0, 4.0), {"seed": 0})
    for name in ("config.json", "metrics.jsonl", "DONE"):
        paths.write_bytes(f"memory://report_test/dpo/{name}", (folder / name).read_bytes())
    written = report.write("memory://report_test")
    assert paths.read_text("memory://report_test/report.md").startswith("# Report")
    assert "dpo" in written.table


def test_nothing_finished_is_an_error_that_names_what_is_there(tmp_path):
    with pytest.raises(ValueError, match="no run below .* has finished; there is none that has"):
        runs.read(str(tmp_path))
    make_run(tmp_path / "runs", "ipo", lines(1.0, 1.0)[:2], {"seed": 0}, finished=False)
    with pytest.raises(ValueError, match=r"has finished; unfinished: ipo/seed=0 \(step 1\)"):
        runs.read(str(tmp_path / "runs"))


def test_a_folder_without_config_is_left_out(root):
    (root / "other").mkdir()
    (root / "other" / "metrics.jsonl").write_text("not a run's\n")
    assert len(runs.read(str(root))) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"step": 1}\n{"step": \n{"step": 3}\n', r"metrics\.jsonl:2 is not JSON"),
        ('{"loss": 1}\n', r"metrics\.jsonl:1 is .*; it must have a step"),
        ("[1]\n", r"metrics\.jsonl:1 is '\[1\]'; it must have a step"),
    ],
)
def test_a_broken_line_names_file_and_number(tmp_path, text, message):
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        runs.read_lines(str(tmp_path / "metrics.jsonl"))


def test_a_last_line_that_is_being_written_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    assert runs.read_lines(str(tmp_path / "metrics.jsonl")) == [{"step": 1}]


def test_a_bar_in_an_override_does_not_break_the_table():
    assert report.aligned([["a", "b"], ["x|y", "1"]], left=1).splitlines() == [
        "| a    |   b |",
        "| ---- | --: |",
        r"| x\|y |   1 |",
    ]


def test_the_running_mean_is_that_of_each_window():
    values = np.array([[1.0, 2.0], [2.0, 4.0], [3.0, 9.0]])
    np.testing.assert_allclose(figures.running_mean(values, 2), [[1.5, 3.0], [2.5, 6.5]])
    np.testing.assert_allclose(figures.running_mean(values, 1), values)


def test_series_leaves_out_lines_that_lack_a_finite_value():
    found = [{"step": 1, "loss": 0.5}, {"step": 2}, {"step": 3, "loss": float("nan")}]
    run = runs.Run("folder", "dpo", "dpo", {}, found, True)
    assert figures.series(run, "step", "loss").tolist() == [[1.0, 0.5]]
    assert figures.series(run, "step", "kl").shape == (0, 2)


def test_a_loss_of_ones_own_gets_a_colour_beside_the_four():
    made = [runs.Run("", "", loss, {}, [], True) for loss in ("hinge", "dpo", "slic")]
    colours = figures.colours(made)
    assert list(colours) == ["dpo", "hinge", "slic"]
    assert colours["dpo"] == figures.COLOURS["dpo"]
    assert len(set(colours.values())) == 3


def test_the_frontier_ends_in_a_large_point_and_starts_at_a_star(root):
    picture = figures.frontier([run for run in runs.read(str(root)) if run.finished])
    axis = picture.axes[0]
    assert axis.get_xlabel() == "sequence-level KL to the SFT model (nats)"
    assert axis.get_ylabel() == "ground-truth reward of sampled reviews"
    points = [collection.get_offsets().tolist() for collection in axis.collections]
    assert points == [[[4.0, 1.0]], [[6.0, 2.0]], [[2.0, 1.5]], [[0.0, 0.5]]]
    assert axis.lines[0].get_xydata().tolist() == [[0.0, 0.5], [4.0, 1.0]]
    texts = [text.get_text() for text in picture.legends[0].get_texts()]
    assert texts == ["DPO", "SFT model (start)"]


def test_curves_have_a_panel_a_loss_and_one_of_accuracy(root):
    picture = figures.curves(runs.read(str(root)))
    titles = [axis.get_title() for axis in picture.axes]
    assert titles == ["DPO: training loss", "IPO: training loss", "Held-out accuracy"]
    assert picture.axes[0].lines[0].get_xydata().tolist() == [[1.0, 0.75], [2.0, 0.25]]


def test_there_are_no_curves_of_nothing():
    assert figures.curves([runs.Run("", "", "dpo", {}, [], True)]) is None


def script(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "scripts.report", *arguments]
    environment = {**os.environ, "MPLBACKEND": "Agg"}
    return subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)


def test_the_script_prints_the_table_and_the_paths(root):
    done = script(str(root))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("| experiment")
    assert done.stdout.splitlines()[-2] == str(root / "frontier.png")


def test_the_script_says_in_one_line_that_nothing_has_finished(tmp_path):
    done = script(str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no run below") and done.stderr.count("\n") == 1

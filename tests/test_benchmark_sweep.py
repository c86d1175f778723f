"""What a sweep costs against its points alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_jax import benchmark, benchmark_sweep, benchmark_worker, config, losses
from tests import tiny


def test_the_points_are_each_loss_with_each_beta_and_one_cached_reference(tmp_path: Path):
    run = tiny.experiment(tmp_path, tmp_path)
    found = benchmark_sweep.points(run, tiny.FILE, tmp_path)
    experiments = [point.experiment for point in found]
    ways = [(one.loss.function, one.loss.hyperparameters["beta"]) for one in experiments]
    every = (losses.dpo, losses.ipo, losses.hinge, losses.robust)
    assert ways == [(loss, beta) for loss in every for beta in (0.1, 0.5)]
    assert all(one.reference == config.Reference(cached=True) for one in experiments)
    assert len({one.workdir for one in experiments}) == len(found) == 8


def test_the_ratio_is_of_the_seconds_without_compiling():
    record = {
        **{"model": "tiny", "data": "rows.jsonl", "device": "cpu", "devices": 1},
        **{"examples": 50, "steps": 7, "batch_size": 8},
        # 6 + 14 s without compiling
        "alone": [
            {"names": ["dpo, beta 0.1"], "wall": 10.0, "compiling": 4.0, "steps": 1},
            {"names": ["dpo, beta 0.5"], "wall": 17.0, "compiling": 3.0, "steps": 1},
        ],
        # 16 s
        "together": {"names": [], "wall": 21.0, "compiling": 5.0, "steps": 1},
    }
    printed = benchmark_sweep.describe(record).splitlines()
    assert "| dpo, beta 0.5 | 17.0 | 3.0 | 14.0 | 1 |" in printed
    assert "| all 2 alone | 27.0 | 7.0 | 20.0 | 2 |" in printed
    assert "| the sweep of 2 | 21.0 | 5.0 | 16.0 | 1 |" in printed
    assert printed[-1] == (
        "Without compiling, the sweep takes 0.800 of its points alone (at most 0.85 is wanted). "
        "Compiling saved apart from that: 2.0 s of 7.0. All in all it takes 0.778."
    )


def test_a_process_is_timed_to_its_end_with_a_cache_of_its_own_and_its_failure_told(tmp_path: Path):
    program = (
        "import json, os, time; time.sleep(0.2); print('a line of its own'); "
        f"print({benchmark_worker.ANSWER!r} + json.dumps("
        "{'names': [os.environ['DPO_JAX_CACHE']], 'compiling': 0.5, 'steps': 2}))"
    )
    found = benchmark_sweep.time_process([sys.executable, "-c", program], str(tmp_path))
    assert found[0] == [str(tmp_path / "cache")] and found[2:] == (0.5, 2) and found.wall > 0.2
    command = [sys.executable, "-c", "print('the disk is full'); raise SystemExit(3)"]
    with pytest.raises(ValueError, match="exit code 3; .*the disk is full"):
        benchmark_sweep.time_process(command, str(tmp_path))


@pytest.mark.parametrize("given", ["data.source", "model.source"])
def test_a_built_in_source_is_refused_by_both_races(folder: Path, given: str):
    values = {"data.source": str(folder / "train.jsonl"), "model.source": "tiny"}
    run = config.Experiment(loss=config.Loss(losses.dpo), steps=1)
    run = config.override(run, {given: values[given]})
    with pytest.raises(ValueError, match="'builtin'.*give --data.source and --model.source"):
        benchmark_sweep.run(run, tiny.FILE, [])
    with pytest.raises(ValueError, match="'builtin'.*give --data.source and --model.source"):
        benchmark.run(run, tiny.FILE, [], benchmark.Settings())


@pytest.mark.slow
def test_a_sweep_and_its_points_race_from_the_command_line(folder: Path, tmp_path: Path):
    command = [
        *(sys.executable, "-m", "scripts.benchmark", "--sweep", "experiments/dpo.py"),
        *("--json", str(tmp_path / "record.json")),
        *("--data.source", str(folder / "train.jsonl"), "--data.max-length", "128"),
        *("--data.tokenizer", str(folder / "tokenizer"), "--model.source", "tiny"),
        *("--batch-size", "16"),
    ]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        command, cwd=tiny.ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "record.json").read_text())
    assert (record["examples"], record["steps"]) == (50, 4)
    alone, together = record["alone"], record["together"]
    assert [one["names"] for one in alone] == [[name] for name in together["names"]]
    assert len(alone) == 8 and all(one["wall"] > one["compiling"] > 0 for one in [*alone, together])
    # each loss compiles once what each of its points alone compiles
    assert 2 * together["steps"] == sum(one["steps"] for one in alone)
    assert "| the sweep of 8 |" in done.stdout

"""Training on real preference data from the command line, as a user does, on one device."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dpo_jax import runs
from tests import tiny


def run(arguments: list[str], shared: Path, workdir: Path) -> tuple[str, list[dict]]:
    """What the command prints, and the lines of metrics.jsonl."""
    command = [
        *(sys.executable, "-m", "scripts.train", "experiments/hh.py", "--workdir", str(workdir)),
        *("--data.tokenizer", str(shared / "tokenizers" / "neox-20b")),
        *("--log.no-progress", "--log.no-tensorboard", *arguments),
    ]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "DPO_JAX_CACHE": str(workdir / "cache")}
    done = subprocess.run(
        command, cwd=tiny.ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, runs.read_lines(str(workdir / "metrics.jsonl"))


@pytest.mark.slow
def test_200_steps_on_hh_lower_the_loss_of_training_rows_from_ln_2(shared: Path, tmp_path: Path):
    printed, found = run(
        [
            *("--data.source", str(shared / "data" / "hh_harmless_train.jsonl.gz")),
            *("--data.evaluation-source", str(shared / "data" / "hh_harmless_test.jsonl.gz")),
            *("--data.max-length", "96", "--data.max-prompt-length", "48", "--batch-size", "8"),
        ],
        shared,
        tmp_path,
    )
    assert "1500 rows gave 1498 examples; dropped 2 empty completion" in printed
    np.testing.assert_allclose(found[1]["loss"], np.log(2), rtol=1e-3)
    assert np.mean([line["loss"] for line in found[-20:]]) < np.log(2) - 0.02
    assert found[-1]["step"] == 200 and "eval/rewards/accuracies" in found[-1]


@pytest.mark.slow
def test_judged_outputs_train_with_their_own_form(shared: Path, tmp_path: Path):
    printed, found = run(
        [
            *("--data.source", str(shared / "data" / "alpaca_eval_judged.jsonl.gz")),
            *("--data.evaluation-source", "None", "--data.held-out", "100"),
            *(
                "--data.form",
                "judged",
                "--data.max-length",
                "256",
                "--data.max-prompt-length",
                "128",
            ),
            *("--steps", "3", "--batch-size", "8", "--optimizer.warmup-steps", "1"),
        ],
        shared,
        tmp_path,
    )
    assert "training: " in printed and "held out: 100 rows" in printed
    np.testing.assert_allclose(found[1]["loss"], np.log(2), rtol=1e-3)
    assert found[-1]["step"] == 3 and "eval/rewards/accuracies" in found[-1]

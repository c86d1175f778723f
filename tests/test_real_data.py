"""Training on real preference data, from the experiment file with flags, as a user does."""

from pathlib import Path

import numpy as np
import pytest

from dpo_jax import flags, task
from tests import tiny

FILE = tiny.ROOT / "experiments" / "hh.py"
QUIET = ["--log.no-progress", "--log.no-tensorboard", "--mesh.fsdp", "8"]


def run(arguments: list[str], workdir: Path) -> list[dict]:
    experiment = flags.parse(flags.load(FILE), [*arguments, *QUIET], "train")
    task.run(experiment.replace(workdir=str(workdir)), FILE)
    return tiny.metrics(workdir)


@pytest.mark.slow
def test_200_steps_on_hh_lower_the_loss_of_training_rows_from_ln_2(shared: Path, tmp_path: Path):
    found = run(
        [
            *("--data.source", str(shared / "data" / "hh_harmless_train.jsonl.gz")),
            *("--data.evaluation-source", str(shared / "data" / "hh_harmless_test.jsonl.gz")),
            *("--data.tokenizer", str(shared / "tokenizers" / "neox-20b")),
            *("--data.max-length", "256", "--data.max-prompt-length", "128", "--batch-size", "8"),
        ],
        tmp_path,
    )
    np.testing.assert_allclose(found[1]["loss"], np.log(2), rtol=1e-3)
    assert np.mean([line["loss"] for line in found[-20:]]) < np.log(2) - 0.02
    assert "eval/rewards/accuracies" in found[-1]


@pytest.mark.slow
def test_judged_outputs_train_with_their_own_form(shared: Path, tmp_path: Path):
    found = run(
        [
            *("--data.source", str(shared / "data" / "alpaca_eval_judged.jsonl.gz")),
            *("--data.evaluation-source", "None", "--data.held-out", "100"),
            *("--data.tokenizer", str(shared / "tokenizers" / "neox-20b")),
            *("--data.form", "judged", "--steps", "3", "--optimizer.warmup-steps", "1"),
        ],
        tmp_path,
    )
    np.testing.assert_allclose(found[1]["loss"], np.log(2), rtol=1e-3)
    assert found[-1]["step"] == 3

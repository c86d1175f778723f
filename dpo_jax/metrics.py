"""Metrics to metrics.jsonl, TensorBoard and wandb; a progress bar; the check that the loss is
finite.
"""

import hashlib
import importlib
import json
import math
import os
import sys
from collections.abc import Mapping
from typing import Any

import tqdm

from dpo_jax import config, paths

JSONL = "metrics.jsonl"
# metrics that stop a run when they are not finite
CHECKED = ("loss", "grad_norm")


def cut(folder: str, step: int) -> None:
    """Drops the lines after a step, which a resumed run writes again, and a line that was cut
    short.
    """
    path = paths.join(folder, JSONL)
    if paths.exists(path):
        kept = [line for line in paths.read_text(path).splitlines() if _step_of(line) <= step]
        paths.write_text(path, "".join(line + "\n" for line in kept))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return math.inf


class Writer:
    """Writes one line a step wherever the config says."""

    def __init__(self, folder: str, log: config.Log, steps: int, first_step: int, run_config: dict):
        self._wandb = None
        if log.wandb_project is not None:
            # first, since it may refuse, and nothing is open yet
            self._wandb = start_wandb(log.wandb_project, folder, run_config)
        self._lines = _Appender(paths.join(folder, JSONL))
        self._bar = tqdm.tqdm(
            total=steps,
            initial=first_step,
            unit="step",
            disable=not log.progress,
            # a file or a pipe gets a line now and then
            mininterval=0.5 if sys.stderr.isatty() else 20,
        )
        self._board = None
        self._accuracy: float | None = None
        if log.tensorboard and not paths.is_local(folder):
            print(f"no TensorBoard files: they need a local folder, and the run is in {folder}")
        elif log.tensorboard:
            import tensorboardX

            _, name = paths.locate(paths.join(folder, "tensorboard"))
            self._board = tensorboardX.SummaryWriter(name, purge_step=first_step + 1)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line: the step, then its metrics.

        Raises FloatingPointError where the loss or the gradient's norm is not finite, once the line
        is written.
        """
        self._lines.append(json.dumps({"step": step, **values}))
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)
        self._show(step, values)
        check_finite(step, values)

    def _show(self, step: int, values: Mapping[str, float]) -> None:
        # of unpaired examples, which have none of their own, the last held-out accuracy
        held_out = values.get("eval/rewards/accuracies", self._accuracy)
        self._accuracy = held_out
        shown = {
            "loss": values.get("loss"),
            "accuracy": values.get("rewards/accuracies", held_out),
            "tokens/s": values.get("time/tokens_per_second"),
        }
        self._bar.set_postfix(
            {k: f"{v:.4g}" for k, v in shown.items() if v is not None}, refresh=False
        )
        self._bar.update(step - self._bar.n)

    def flush(self) -> None:
        """All lines so far are in the file."""
        self._lines.flush()
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        """Flushes and ends the bar and the loggers."""
        self.flush()
        self._lines.close()
        self._bar.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


class Unwritten:
    """Stands for the Writer in all processes of a run but the first: it checks alone."""

    def __enter__(self) -> "Unwritten":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Raises FloatingPointError where `Writer.write` does in the first process."""
        check_finite(step, values)

    def flush(self) -> None:
        """Nothing is written."""


def check_finite(step: int, values: Mapping[str, float]) -> None:
    """Raises FloatingPointError where the loss or the gradient's norm is not finite."""
    for name in CHECKED:
        if not math.isfinite(values.get(name, 0.0)):
            raise FloatingPointError(
                f"{name} is {values[name]} at step {step}: lower --optimizer.learning-rate, or "
                "look at the rows (scripts.show); the last checkpoint is untouched"
            )


class _Appender:
    """Lines to a file that grows. Object stores cannot append, so there a flush writes the whole
    file.
    """

    def __init__(self, path: str):
        self._path = path
        self._local = paths.open(path, "a") if paths.is_local(path) else None
        self._lines = (
            paths.read_text(path).splitlines() if not self._local and paths.exists(path) else []
        )

    def append(self, line: str) -> None:
        if self._local:
            self._local.write(line + "\n")
            self._local.flush()
        else:
            self._lines.append(line)

    def close(self) -> None:
        if self._local:
            self._local.close()

    def flush(self) -> None:
        if not self._local:
            paths.write_text(self._path, "".join(line + "\n" for line in self._lines))


def start_wandb(project: str, folder: str, run_config: dict) -> Any:
    """A wandb run that goes on where the folder's last one stopped."""
    try:
        # by name, since few have it installed, type checkers included
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        raise ValueError(
            "log.wandb_project is set and wandb is not installed: pip install wandb"
        ) from error
    whole = os.path.abspath(folder) if paths.is_local(folder) else folder.rstrip("/")
    identity = hashlib.blake2b(whole.encode(), digest_size=8).hexdigest()
    name = "/".join(whole.split("/")[-2:])
    return wandb.init(project=project, name=name, id=identity, resume="allow", config=run_config)

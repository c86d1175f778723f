"""The points of a sweep that one process trains: what they share, and what compiling that saves."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dpo_jax import compiling, config, kept, sweep, task, train


class Compiled(NamedTuple):
    """What a point that has finished compiled."""

    loss: str
    # train steps: one for each shape of batches that no earlier point had
    steps: int
    # that tracing, lowering and compiling took, of all programs
    seconds: float


def make_training() -> sweep.Training:
    """Trains points one after the other; each takes what earlier ones have made in its form."""
    keeper, compiled = kept.Kept(), list[Compiled]()

    def run(experiment: config.Experiment, experiment_file: Path) -> None:
        # what the built-in task trains and samples, once, is no point's own
        experiment = task.prepare_run(experiment)
        with compiling.recorded() as spans:
            train.train(experiment, experiment_file, keeper)
        steps, seconds = compiling.count(spans, "step"), compiling.seconds(spans)
        compiled.append(Compiled(experiment.loss.function.__name__, steps, seconds))

    return sweep.Training(run, lambda: describe(compiled))


def describe(compiled: Sequence[Compiled]) -> str:
    """A line a loss: how many points compiled how many steps, in what time, and what that saved."""
    lines = []
    for loss in dict.fromkeys(one.loss for one in compiled):
        own = [one for one in compiled if one.loss == loss]
        points, steps = len(own), sum(one.steps for one in own)
        lines.append(
            f"{loss}: {points} point{'s' * (points > 1)}, {steps} train step{'s' * (steps != 1)} "
            f"compiled; {total(own):.1f} s of compiling, about {saved(own):.1f} s saved"
        )
    return "\n".join(lines)


def total(compiled: Sequence[Compiled]) -> float:
    """Seconds that these points compiled."""
    return sum(one.seconds for one in compiled)


def saved(compiled: Sequence[Compiled]) -> float:
    """Seconds that points of a loss would have compiled beyond these, had each compiled as much as
    the one that compiled most.
    """
    return max(one.seconds for one in compiled) * len(compiled) - total(compiled)

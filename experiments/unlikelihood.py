"""The unlikelihood baseline on the built-in task, Fig. 2 left of https://arxiv.org/abs/2305.18290.

The paper's run: GPT-2-large after SFT on IMDb, alpha 0.05, 0.1, 0.5 and 1 (the sweep's range). It
shows none on dialogue and summaries, where this loss, which has no lower bound, ends in nonsense.
Here the learning rate and steps are those of experiments/dpo.py.

python -m scripts.train experiments/unlikelihood.py --workdir runs/unlikelihood
Hardware: two CPU cores; time not measured yet. Expected: not measured yet.
"""

from dpo_jax import config, losses
from experiments import dpo


def experiment() -> config.Experiment:
    """The run."""
    return dpo.experiment().replace(
        loss=config.Loss(losses.unlikelihood, alpha=0.1), reference=config.Reference(source=None)
    )


def sweep() -> list[dict]:
    """Weight of the rejected completion, and seed."""
    return config.grid({"loss.alpha": [0.05, 0.1, 0.5, 1.0], "seed": [0, 1, 2]})

"""EXO on pairs on the built-in task (https://arxiv.org/abs/2402.00856, section 3.2).

The paper's run (appendix B): IMDb, Reddit TL;DR and Anthropic's HH, batch 64, learning rate 1e-6,
beta_r 0.1 (numbers: TRL's paper index). Label smoothing 1e-3 is TRL's advice. Here the learning
rate and steps are those of experiments/dpo.py. The sweep's ranges are ours.

python -m scripts.train experiments/exo_pair.py --workdir runs/exo_pair
Hardware: two CPU cores; time not measured yet. Expected: not measured yet.
"""

from dpo_jax import config, losses
from experiments import dpo


def experiment() -> config.Experiment:
    """The run."""
    return dpo.experiment().replace(
        loss=config.Loss(losses.exo_pair, beta=0.1, label_smoothing=1e-3)
    )


def sweep() -> list[dict]:
    """Strength of the tie to the reference, label smoothing and seed."""
    return config.grid(
        {"loss.beta": [0.05, 0.1, 0.5], "loss.label_smoothing": [1e-3, 1e-2], "seed": [0, 1, 2]}
    )

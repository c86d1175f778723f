"""NCA on pairs on the built-in task (https://arxiv.org/abs/2402.05369).

The paper's run (appendix C): Mistral-7B and Mixtral-8x7B on UltraFeedback, batch 32, learning rate
5e-6, alpha (our beta) 0.01 (numbers: TRL's paper index). Here the learning rate and steps are those
of experiments/dpo.py. The sweep's range is ours.

python -m scripts.train experiments/nca_pair.py --workdir runs/nca_pair
Hardware: two CPU cores; time not measured yet. Expected: not measured yet.
"""

from dpo_jax import config, losses
from experiments import dpo


def experiment() -> config.Experiment:
    """The run."""
    return dpo.experiment().replace(loss=config.Loss(losses.nca_pair, beta=0.01))


def sweep() -> list[dict]:
    """Strength of the tie to the reference, and seed."""
    return config.grid({"loss.beta": [0.01, 0.1, 0.5], "seed": [0, 1, 2]})

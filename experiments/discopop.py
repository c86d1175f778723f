"""DiscoPOP on the built-in task (https://arxiv.org/abs/2406.08414, section 3).

The paper's run (appendix B.1): a Gemma-7B after SFT, on argilla/dpo-mix-7k, batch 64, learning rate
5e-7, beta 0.05, tau 0.05 (numbers: TRL's paper index). Here the learning rate and steps are those
of experiments/dpo.py. The sweep's ranges are ours.

python -m scripts.train experiments/discopop.py --workdir runs/discopop
Hardware: two CPU cores; time not measured yet. Expected: not measured yet.
"""

from dpo_jax import config, losses
from experiments import dpo


def experiment() -> config.Experiment:
    """The run."""
    return dpo.experiment().replace(loss=config.Loss(losses.discopop, beta=0.05, tau=0.05))


def sweep() -> list[dict]:
    """Strength of the tie to the reference, temperature of the switch, and seed."""
    return config.grid({"loss.beta": [0.05, 0.1, 0.5], "loss.tau": [0.05, 1.0], "seed": [0, 1, 2]})

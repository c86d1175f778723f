"""R-DPO, with a price on length, on the built-in task (https://arxiv.org/abs/2403.19159).

The paper's run: Pythia-2.8B on Anthropic's HH and Reddit TL;DR; batch, learning rate and its
alphas: not known here. The sweep is SimPO's search (https://arxiv.org/abs/2405.14734): beta 0.01,
0.05 and 0.1, alpha 0.05, 0.1, 0.5 and 1, and alpha 0, which is DPO. Here the learning rate and
steps are those of experiments/dpo.py.

python -m scripts.train experiments/r_dpo.py --workdir runs/r_dpo
Hardware: two CPU cores; time not measured yet. Expected: not measured yet.
"""

from dpo_jax import config, losses
from experiments import dpo


def experiment() -> config.Experiment:
    """The run."""
    return dpo.experiment().replace(loss=config.Loss(losses.r_dpo, beta=0.1, alpha=0.05))


def sweep() -> list[dict]:
    """Strength of the tie to the reference, price of a token, and seed."""
    return config.grid(
        {
            "loss.beta": [0.01, 0.05, 0.1],
            "loss.alpha": [0.0, 0.05, 0.1, 0.5, 1.0],
            "seed": [0, 1, 2],
        }
    )

"""f-DPO under an alpha-divergence on the built-in task (https://arxiv.org/abs/2309.16240).

The paper's runs are those of experiments/f_dpo.py, with alpha 0.3, 0.5 and 0.7, which are 0.7, 0.5
and 0.3 here: alpha is TRL's, 1 less the paper's; 1 is DPO, 0 the forward KL. Batch, learning rate
and betas: not known here. Here the learning rate and steps are those of experiments/dpo.py.

python -m scripts.train experiments/alpha_dpo.py --workdir runs/alpha_dpo
Hardware: two CPU cores; time not measured yet. Expected: not measured yet.
"""

from dpo_jax import config, losses
from experiments import dpo


def experiment() -> config.Experiment:
    """The run."""
    return dpo.experiment().replace(loss=config.Loss(losses.alpha_dpo, beta=0.1, alpha=0.5))


def sweep() -> list[dict]:
    """Order of the divergence, and seed."""
    return config.grid({"loss.alpha": [0.0, 0.3, 0.5, 0.7, 1.0], "seed": [0, 1, 2]})

"""IPO on the built-in task (https://arxiv.org/abs/2310.12036, Eq. 17), in its token-sum reading.

The paper's runs are bandits of three actions, where the two readings are one (batch 90, learning
rate 1e-2 in the published version; numbers: TRL's paper index). experiments/ipo.py has the token
mean. Here the learning rate and steps are those of experiments/dpo.py. The sweep over tau is
SimPO's search for IPO (https://arxiv.org/abs/2405.14734).

python -m scripts.train experiments/ipo_sum.py --workdir runs/ipo_sum
Hardware: two CPU cores; time not measured yet. Expected: not measured yet.
"""

from dpo_jax import config, losses
from experiments import dpo


def experiment() -> config.Experiment:
    """The run."""
    return dpo.experiment().replace(loss=config.Loss(losses.ipo_sum, beta=0.1))


def sweep() -> list[dict]:
    """The paper's tau, and seed."""
    return config.grid({"loss.beta": [0.01, 0.1, 0.5, 1.0], "seed": [0, 1, 2]})

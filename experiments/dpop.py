"""DPO-Positive (Smaug) on the built-in task (https://arxiv.org/abs/2402.13228).

The paper's run: 7B to 72B models on pairs made of MetaMath, ARC and HellaSwag, lambda 50; beta,
batch and learning rate: not known here. The authors found results much alike for lambda from 5 to
500 (github.com/abacusai/smaug, issue 2), which is the sweep's range; 0 is DPO. Here the learning
rate and steps are those of experiments/dpo.py.

python -m scripts.train experiments/dpop.py --workdir runs/dpop
Hardware: two CPU cores; time not measured yet. Expected: not measured yet.
"""

from dpo_jax import config, losses
from experiments import dpo


def experiment() -> config.Experiment:
    """The run."""
    return dpo.experiment().replace(loss=config.Loss(losses.dpop, beta=0.1, lam=50.0))


def sweep() -> list[dict]:
    """The paper's lambda, and seed."""
    return config.grid({"loss.lam": [0.0, 5.0, 50.0, 500.0], "seed": [0, 1, 2]})

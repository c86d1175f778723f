"""RPO on the built-in task (https://arxiv.org/abs/2405.16436, section 5): DPO and a little SFT.

The paper's run (appendix E.1): Zephyr-7B models, one epoch, beta 0.01, weight of the SFT loss
0.005, learning rate 5e-7 (numbers: TRL's paper index). Its code sums that loss over tokens on one
code base and takes their mean on another; here it is the mean, so that 0.005 is the smaller by the
length. The learning rate and steps are those of experiments/dpo.py. The sweep's ranges are ours.

python -m scripts.train experiments/rpo.py --workdir runs/rpo
Hardware: two CPU cores; time not measured yet. Expected: not measured yet.
"""

from dpo_jax import config, losses
from experiments import dpo


def experiment() -> config.Experiment:
    """The run."""
    return dpo.experiment().replace(loss=config.Loss(losses.rpo, beta=0.01, alpha=0.005))


def sweep() -> list[dict]:
    """Strength of the tie to the reference, weight of the NLL, and seed."""
    return config.grid(
        {"loss.beta": [0.01, 0.1], "loss.alpha": [0.0, 0.005, 0.1, 1.0], "seed": [0, 1, 2]}
    )

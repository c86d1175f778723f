"""MPO on the built-in task (https://arxiv.org/abs/2411.10442, section 3.2): DPO, BCO and SFT in one
sum.

The paper's run (section 7): InternVL2-8B on its MMPR pairs of images and text, weights 0.8, 0.2 and
1, learning rate 5e-6 (numbers: TRL's paper index); here text alone, beta 0.1. The learning rate and
steps are those of experiments/dpo.py. The sweep's ranges are ours.

python -m scripts.train experiments/mpo.py --workdir runs/mpo
Hardware: two CPU cores; time not measured yet. Expected: not measured yet.
"""

from dpo_jax import config, losses
from experiments import dpo


def experiment() -> config.Experiment:
    """The run."""
    return dpo.experiment().replace(
        loss=config.Loss(losses.mpo, beta=0.1, preference=0.8, quality=0.2, generation=1.0)
    )


def sweep() -> list[dict]:
    """Weights of BCO and of SFT, and seed."""
    return config.grid(
        {"loss.quality": [0.0, 0.2], "loss.generation": [0.0, 1.0], "seed": [0, 1, 2]}
    )

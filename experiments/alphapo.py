"""AlphaPO on the built-in task (https://arxiv.org/abs/2501.03884), which has no reference model.

The paper's run for Mistral-7B-Instruct (Table 3): alpha 0.25, beta 2.5, gamma / beta 0.1, learning
rate 7e-7 (numbers: TRL's paper index), the rest as SimPO. Alpha 0 is SimPO. Here the learning rate
and steps are those of experiments/dpo.py. The sweep's range is ours.

python -m scripts.train experiments/alphapo.py --workdir runs/alphapo
Hardware: two CPU cores; time not measured yet. Expected: not measured yet.
"""

from dpo_jax import config, losses
from experiments import dpo


def experiment() -> config.Experiment:
    """The run."""
    return dpo.experiment().replace(
        loss=config.Loss(losses.alphapo, beta=2.5, gamma=0.25, alpha=0.25),
        reference=config.Reference(source=None),
    )


def sweep() -> list[dict]:
    """The reward's curvature, and seed."""
    return config.grid({"loss.alpha": [-0.25, 0.0, 0.25, 0.5], "seed": [0, 1, 2]})

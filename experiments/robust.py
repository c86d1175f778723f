"""Robust DPO on the built-in task, a tenth of its labels flipped
(https://arxiv.org/abs/2403.00409).

The paper's run (section 6, appendix B): IMDb and Anthropic's HH with labels flipped at random, e
0.1, batch 16, learning rate 1e-3, 512 tokens (numbers: TRL's paper index, which has beta 0.1 in one
version and 0.01 in another). Here the learning rate and steps are those of experiments/dpo.py. A
label_smoothing of 0 is DPO; the sweep's ranges are ours.

python -m scripts.train experiments/robust.py --workdir runs/robust
Hardware: two CPU cores; time not measured yet. Expected: not measured yet.
"""

import dataclasses

from dpo_jax import config, losses
from experiments import dpo


def experiment() -> config.Experiment:
    """The run."""
    base = dpo.experiment()
    return base.replace(
        loss=config.Loss(losses.robust, beta=0.1, label_smoothing=0.1),
        data=dataclasses.replace(base.data, label_noise=0.1),
    )


def sweep() -> list[dict]:
    """The share of flips that is assumed, the share that there is, and seed."""
    return config.grid(
        {
            "loss.label_smoothing": [0.0, 0.1, 0.2],
            "data.label_noise": [0.0, 0.1, 0.2],
            "seed": [0, 1, 2],
        }
    )

"""DPO on rankings on the built-in task: Eq. 20 of https://arxiv.org/abs/2305.18290, appendix A.3.

The paper derives the loss and has no run of it. Here an example is three completions of a prefix,
best first. The learning rate and steps are those of experiments/dpo.py. The sweep's range is that
of the paper's Fig. 2.

python -m scripts.train experiments/plackett_luce.py --workdir runs/plackett_luce
Hardware: two CPU cores; time not measured yet. Expected: not measured yet.
"""

import dataclasses

from dpo_jax import config, losses
from experiments import dpo


def experiment() -> config.Experiment:
    """The run."""
    base = dpo.experiment()
    return base.replace(
        loss=config.Loss(losses.plackett_luce, beta=0.1),
        data=dataclasses.replace(base.data, examples="ranked"),
    )


def sweep() -> list[dict]:
    """Strength of the tie to the reference, and seed."""
    return config.grid({"loss.beta": [0.05, 0.1, 1.0, 5.0], "seed": [0, 1, 2]})

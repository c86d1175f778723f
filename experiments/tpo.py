"""TPO on the built-in task (https://arxiv.org/abs/2405.16681, section 3), which has no reference
model.

The paper's run (Table 6): Llama-3-8B-Base on 5,000 triples of UltraFeedback, beta 0.01, alpha 1,
learning rate 5e-7, one epoch, 1024 tokens (numbers: TRL's paper index). Here they are the best, the
middle and the worst of a prefix's completions. The learning rate and steps are those of
experiments/dpo.py. The sweep's ranges are ours.

python -m scripts.train experiments/tpo.py --workdir runs/tpo
Hardware: two CPU cores; time not measured yet. Expected: not measured yet.
"""

import dataclasses

from dpo_jax import config, losses
from experiments import dpo


def experiment() -> config.Experiment:
    """The run."""
    base = dpo.experiment()
    return base.replace(
        loss=config.Loss(losses.tpo, beta=0.01, alpha=1.0),
        data=dataclasses.replace(base.data, examples="triples"),
        reference=config.Reference(source=None),
    )


def sweep() -> list[dict]:
    """Scale of the difference, weight of the NLL, and seed."""
    return config.grid({"loss.beta": [0.01, 0.1], "loss.alpha": [0.1, 1.0], "seed": [0, 1, 2]})

"""The hinge loss of SLiC and RSO on the built-in task (https://arxiv.org/abs/2309.06657).

RSO's normalised hinge: T5 models on Reddit TL;DR and Anthropic's HH, gamma (our beta) 0.05. The
hinge is that of SLiC-HF, https://arxiv.org/abs/2305.10425 (batch 512, learning rate 1e-4; numbers:
TRL's paper index). RSO's batch and learning rate: not known here. Without its rejection sampling.
Here the learning rate and steps are those of experiments/dpo.py. The sweep's range is ours.

python -m scripts.train experiments/hinge.py --workdir runs/hinge
Hardware: two CPU cores; time not measured yet. Expected: not measured yet.
"""

from dpo_jax import config, losses
from experiments import dpo


def experiment() -> config.Experiment:
    """The run."""
    return dpo.experiment().replace(loss=config.Loss(losses.hinge, beta=0.05))


def sweep() -> list[dict]:
    """One over the margin that is asked for, and seed."""
    return config.grid({"loss.beta": [0.01, 0.05, 0.5], "seed": [0, 1, 2]})

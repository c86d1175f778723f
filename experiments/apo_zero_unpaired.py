"""APO-zero on single completions on the built-in task (https://arxiv.org/abs/2408.06266).

The paper's runs are on pairs (experiments/apo_zero.py); on single, labelled completions it is KTO
without its estimate of the KL, beta 0.1. What this form was run on: not known here. Here the
learning rate and steps are those of experiments/kto.py. The sweep's range is ours.

python -m scripts.train experiments/apo_zero_unpaired.py --workdir runs/apo_zero_unpaired
Hardware: two CPU cores; time not measured yet. Expected: not measured yet.
"""

from dpo_jax import config, losses
from experiments import kto


def experiment() -> config.Experiment:
    """The run."""
    return kto.experiment().replace(loss=config.Loss(losses.apo_zero_unpaired, beta=0.1))


def sweep() -> list[dict]:
    """Strength of the tie to the reference, and seed."""
    return config.grid({"loss.beta": [0.05, 0.1, 0.5], "seed": [0, 1, 2]})

"""BCO on the built-in task (https://arxiv.org/abs/2404.04656): a binary classifier of single
completions.

The paper's run (appendix C): batch 128, learning rate 5e-7, beta 0.01, prompts of up to 1536 and
completions of up to 512 tokens (numbers: TRL's paper index); its models and data: not known here.
Here the learning rate and steps are those of experiments/kto.py. The sweep's range is ours.
losses.bco_joint has one baseline for both classes; losses.bco_pair reads pairs.

python -m scripts.train experiments/bco.py --workdir runs/bco
Hardware: two CPU cores; time not measured yet. Expected: not measured yet.
"""

from dpo_jax import config, losses
from experiments import kto


def experiment() -> config.Experiment:
    """The run."""
    return kto.experiment().replace(loss=config.Loss(losses.bco, beta=0.01))


def sweep() -> list[dict]:
    """Strength of the tie to the reference, and seed."""
    return config.grid({"loss.beta": [0.01, 0.1, 0.5], "seed": [0, 1, 2]})

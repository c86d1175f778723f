"""APO-down on the built-in task (https://arxiv.org/abs/2408.06266, section 4).

The paper's run (section 5.2): Llama-3-8B-Instruct on 32,000 pairs of CLAIR, batch 64, learning rate
2e-7, beta 0.1, prompts and completions of up to 512 tokens (numbers: TRL's paper index). For chosen
completions that are worse than the policy's own; here they are the policy's own. Here the learning
rate and steps are those of experiments/dpo.py. The sweep's range is ours.

python -m scripts.train experiments/apo_down.py --workdir runs/apo_down
Hardware: two CPU cores; time not measured yet. Expected: not measured yet.
"""

from dpo_jax import config, losses
from experiments import dpo


def experiment() -> config.Experiment:
    """The run."""
    return dpo.experiment().replace(loss=config.Loss(losses.apo_down, beta=0.1))


def sweep() -> list[dict]:
    """Strength of the tie to the reference, and seed."""
    return config.grid({"loss.beta": [0.05, 0.1, 0.5], "seed": [0, 1, 2]})

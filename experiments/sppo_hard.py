"""SPPO with hard labels on the built-in task (https://arxiv.org/abs/2405.00675, section 3).

The paper's run (section 5): Mistral-7B-Instruct-v0.2, three iterations on UltraFeedback's prompts
with PairRM as judge, eta 1000 (beta 0.001), batch 64, learning rate 5e-7 (numbers: TRL's paper
index). Here one iteration on fixed pairs, so that each log-ratio is drawn to 500 nats, farther than
the run gets. The learning rate and steps are those of experiments/dpo.py. The sweep's range is
ours.

python -m scripts.train experiments/sppo_hard.py --workdir runs/sppo_hard
Hardware: two CPU cores; time not measured yet. Expected: not measured yet.
"""

from dpo_jax import config, losses
from experiments import dpo


def experiment() -> config.Experiment:
    """The run."""
    return dpo.experiment().replace(loss=config.Loss(losses.sppo_hard, beta=0.001))


def sweep() -> list[dict]:
    """One over the paper's eta, and seed."""
    return config.grid({"loss.beta": [0.001, 0.01, 0.1], "seed": [0, 1, 2]})

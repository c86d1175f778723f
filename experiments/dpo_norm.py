"""Length-normalised DPO of Tulu 3 on the built-in task (https://arxiv.org/abs/2411.15124, section
5).

The paper's run: Llama-3.1-8B after SFT, some 270,000 pairs, one epoch, batch 128, learning rate
5e-7 (70B: 2e-7), linear, beta 5, 2048 tokens. Here the learning rate and steps are those of
experiments/dpo.py. The sweep's range is ours.

python -m scripts.train experiments/dpo_norm.py --workdir runs/dpo_norm
Hardware: two CPU cores; time not measured yet. Expected: not measured yet.
"""

from dpo_jax import config, losses
from experiments import dpo


def experiment() -> config.Experiment:
    """The run."""
    return dpo.experiment().replace(loss=config.Loss(losses.dpo_norm, beta=5.0))


def sweep() -> list[dict]:
    """Strength of the tie to the reference, and seed."""
    return config.grid({"loss.beta": [2.0, 5.0, 10.0], "seed": [0, 1, 2]})

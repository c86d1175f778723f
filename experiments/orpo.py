"""ORPO on the built-in task (https://arxiv.org/abs/2403.07691), which has no reference model.

The paper's run: Mistral-7B on UltraFeedback, lambda 0.1, learning rate 5e-6, 5 epochs.

python -m scripts.train experiments/orpo.py --workdir runs/orpo
Hardware: two CPU cores, 4 minutes after SFT and sampling, which take 10 once.
Expected: reward 0.43 at a KL of 1 nat, accuracy 0.58 (README).
"""

from dpo_jax import config, losses
from experiments import dpo


def experiment() -> config.Experiment:
    """The run."""
    return dpo.experiment().replace(
        loss=config.Loss(losses.orpo, lam=0.1), reference=config.Reference(source=None)
    )


def sweep() -> list[dict]:
    """The paper's lambda, learning rate and seed."""
    return config.grid(
        {"loss.lam": [0.1, 0.5, 1.0], "optimizer.learning_rate": [3e-4, 1e-3], "seed": [0, 1, 2]}
    )

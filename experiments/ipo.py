"""IPO on the built-in task (https://arxiv.org/abs/2310.12036), in its token-mean reading.

The paper's experiments are bandits of three actions; it has none of a language model.

python -m scripts.train experiments/ipo.py --workdir runs/ipo
Hardware: two CPU cores, 4 minutes after SFT and sampling, which take 10 once.
Expected: reward 0.40 at a KL of 12 nats, accuracy 0.92 (README).
"""

from dpo_jax import config, losses
from experiments import dpo


def experiment() -> config.Experiment:
    """The run."""
    return dpo.experiment().replace(loss=config.Loss(losses.ipo, beta=1.0))


def sweep() -> list[dict]:
    """The paper's tau, learning rate and seed."""
    return config.grid(
        {"loss.beta": [0.3, 1.0, 3.0], "optimizer.learning_rate": [3e-4, 1e-3], "seed": [0, 1, 2]}
    )

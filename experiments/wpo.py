"""WPO on the built-in task (https://arxiv.org/abs/2406.11827): unlikely pairs count less.

The paper's run (section 4): Mistral-7B and Llama-3-8B-Instruct on UltraFeedback, beta 0.01. The
released Llama-3-Instruct-8B-WPO-HB-v2: batch 128, learning rate 1e-6, cosine, a tenth of warm-up,
two epochs, 2048 tokens. Here the pairs are the initial policy's own, so that the weights start near
1. The learning rate and steps are those of experiments/dpo.py. The sweep's range is ours.

python -m scripts.train experiments/wpo.py --workdir runs/wpo
Hardware: two CPU cores; time not measured yet. Expected: not measured yet.
"""

from dpo_jax import config, losses
from experiments import dpo


def experiment() -> config.Experiment:
    """The run."""
    return dpo.experiment().replace(loss=config.Loss(losses.wpo, beta=0.01))


def sweep() -> list[dict]:
    """Strength of the tie to the reference, and seed."""
    return config.grid({"loss.beta": [0.01, 0.1, 0.5], "seed": [0, 1, 2]})

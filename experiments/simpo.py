"""SimPO on the built-in task (https://arxiv.org/abs/2405.14734, section 3), which has no reference
model.

The paper's runs: UltraFeedback, batch 128, one epoch, cosine, a tenth of warm-up, 2048 tokens;
beta, gamma / beta and learning rate: Mistral-7B-Base 2, 0.8, 3e-7; Mistral-7B-Instruct 2.5, 0.1,
5e-7; Llama-3-8B-Base 2, 0.5, 6e-7; Llama-3-8B-Instruct 2.5, 0.55, 1e-6; Gemma-2-9B 10, 0.5, 8e-7.
Its ablation on Mistral-7B-Base (length-controlled win rate): 21.5, at gamma 0 16.8, without length
normalisation (experiments/simpo_sum.py) 11.9. Here the learning rate and steps are those of
experiments/dpo.py. The sweep is the paper's search, with gamma 0.

python -m scripts.train experiments/simpo.py --workdir runs/simpo
Hardware: two CPU cores; time not measured yet. Expected: not measured yet.
"""

from dpo_jax import config, losses
from experiments import dpo


def experiment() -> config.Experiment:
    """The run."""
    return dpo.experiment().replace(
        loss=config.Loss(losses.simpo, beta=2.0, gamma=1.6), reference=config.Reference(source=None)
    )


def sweep() -> list[dict]:
    """Scale of the reward, margin and seed."""
    return config.grid(
        {
            "loss.beta": [2.0, 2.5],
            "loss.gamma": [0.0, 0.3, 0.5, 1.0, 1.2, 1.4, 1.6],
            "seed": [0, 1, 2],
        }
    )

"""LD-DPO on the built-in task (https://arxiv.org/abs/2409.06411): the longer completion's tail
counts less.

The paper's run: Llama-2-13B, Llama-3-8B and Qwen2-7B, base and instruct; its best alpha differs
between them, and TRL takes 0.5. Data, batch and learning rate: not known here. Here the learning
rate and steps are those of experiments/dpo.py. The sweep's range is alpha's whole one; 1 is DPO.
losses.ld_dpo_policy leaves the reference's sums as they are.

python -m scripts.train experiments/ld_dpo.py --workdir runs/ld_dpo
Hardware: two CPU cores; time not measured yet. Expected: not measured yet.
"""

from dpo_jax import config, losses
from experiments import dpo


def experiment() -> config.Experiment:
    """The run."""
    return dpo.experiment().replace(loss=config.Loss(losses.ld_dpo, beta=0.1, alpha=0.5))


def sweep() -> list[dict]:
    """Weight of the tail, and seed."""
    return config.grid({"loss.alpha": [0.0, 0.25, 0.5, 0.75, 1.0], "seed": [0, 1, 2]})

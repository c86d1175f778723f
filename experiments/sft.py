"""SFT on the built-in task: a small Llama learns to write film reviews, the start of every other
run.

The 'Preferred-FT' and SFT stage of https://arxiv.org/abs/2305.18290, section 6.

python -m scripts.train experiments/sft.py --workdir runs/sft
Hardware: two CPU cores. Hours and held-out loss: not measured yet.
"""

from dpo_jax import config, task


def experiment() -> config.Experiment:
    """The run."""
    return task.sft(config.Task())


def sweep() -> list[dict]:
    """Learning rate and seed."""
    return config.grid({"optimizer.learning_rate": [1e-3, 2e-3, 4e-3], "seed": [0, 1, 2]})

"""The Preferred-FT baseline on the built-in task, Fig. 2 left of https://arxiv.org/abs/2305.18290.

The paper's run: GPT-2-large after SFT, trained on the chosen completions of IMDb, several seeds.
Here the learning rate and steps are those of experiments/dpo.py.

python -m scripts.train experiments/preferred_ft.py --workdir runs/preferred_ft
Hardware: two CPU cores; time not measured yet. Expected: not measured yet.
"""

from dpo_jax import config, losses
from experiments import dpo


def experiment() -> config.Experiment:
    """The run."""
    return dpo.experiment().replace(
        loss=config.Loss(losses.preferred_ft), reference=config.Reference(source=None)
    )


def sweep() -> list[dict]:
    """Seed."""
    return config.grid({"seed": [0, 1, 2]})

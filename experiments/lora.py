"""DPO of a low-rank adapter (https://arxiv.org/abs/2106.09685) on the built-in task.

Only the adapter is trained, kept by the optimizer and saved; the reference is the same base with
the adapter off. `scripts.export RUN OUT --adapter` writes it in PEFT's form, and without the flag
merged.

python -m scripts.train experiments/lora.py --workdir runs/lora
Hardware: two CPU cores; time not measured yet. Expected: not measured yet.
"""

import dataclasses

from dpo_jax import config
from experiments import dpo


def experiment() -> config.Experiment:
    """The run."""
    run = dpo.experiment()
    return run.replace(
        lora=config.Lora(rank=8, alpha=16.0),
        optimizer=dataclasses.replace(run.optimizer, learning_rate=1.5e-3),
        # the base is in memory anyway
        reference=config.Reference(),
    )


def sweep() -> list[dict]:
    """Rank, learning rate and seed."""
    return config.grid(
        {
            "lora.rank": [4, 8, 32],
            "optimizer.learning_rate": [2e-3, 5e-3],
            "seed": [0, 1, 2],
        }
    )

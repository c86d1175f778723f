"""AOT on the built-in task (https://arxiv.org/abs/2406.05882, section 3): the batch's margins are
sorted.

The paper's run: Merlinite-7B on UltraFeedback, beta 0.01 (Fig. 2; number: TRL's paper index); batch
and learning rate: not known here. Here the learning rate and steps are those of experiments/dpo.py.
The sweep's ranges are ours; the batch is what is sorted. losses.aot_unpaired sorts the log-ratios
of chosen and rejected apart.

python -m scripts.train experiments/aot.py --workdir runs/aot
Hardware: two CPU cores; time not measured yet. Expected: not measured yet.
"""

from dpo_jax import config, losses
from experiments import dpo


def experiment() -> config.Experiment:
    """The run."""
    return dpo.experiment().replace(loss=config.Loss(losses.aot, beta=0.01))


def sweep() -> list[dict]:
    """Strength of the tie to the reference, batch and seed."""
    return config.grid({"loss.beta": [0.01, 0.1], "batch_size": [16, 64], "seed": [0, 1, 2]})

"""KTO on the built-in task (https://arxiv.org/abs/2402.01306): each pair is one desirable and one
undesirable example.

The paper's runs: Pythia and Llama from 1.4B to 30B, beta 0.1; batches of 8 to 128 are advised.

python -m scripts.train experiments/kto.py --workdir runs/kto
Hardware: two CPU cores, 6 minutes after SFT and sampling, which take 10 once.
Expected: reward 0.58 at a KL of 4 nats, accuracy 0.87 (README).
"""

import dataclasses

from dpo_jax import config, losses
from experiments import dpo


def experiment() -> config.Experiment:
    """The run."""
    base = dpo.experiment()
    return base.replace(
        loss=config.Loss(losses.kto, beta=0.1),
        # as many pairs as the other methods see, at two examples a pair
        steps=2 * base.steps,
        evaluate_every=100,
        data=dataclasses.replace(base.data, examples="unpaired"),
    )


def sweep() -> list[dict]:
    """Strength of the tie to the reference, learning rate and seed."""
    return config.grid(
        {"loss.beta": [0.05, 0.1, 0.5], "optimizer.learning_rate": [3e-4, 1e-3], "seed": [0, 1, 2]}
    )

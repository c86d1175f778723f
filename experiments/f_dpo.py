"""f-DPO under the Jensen-Shannon divergence on the built-in task
(https://arxiv.org/abs/2309.16240).

The paper's runs: GPT-2-large on IMDb and Pythia-2.8B on Anthropic's HH, under the reverse KL (DPO),
the forward KL, Jensen-Shannon and alpha-divergences (experiments/alpha_dpo.py). Batch, learning
rate and betas: not known here. Here the learning rate and steps are those of experiments/dpo.py.

python -m scripts.train experiments/f_dpo.py --workdir runs/f_dpo
Hardware: two CPU cores; time not measured yet. Expected: not measured yet.
"""

from dpo_jax import config, losses
from experiments import dpo


def experiment() -> config.Experiment:
    """The run."""
    return dpo.experiment().replace(
        loss=config.Loss(losses.dpo, beta=0.1, score=losses.jensen_shannon)
    )


def sweep() -> list[dict]:
    """Divergence, strength of the tie to the reference, and seed."""
    return config.grid(
        {
            "loss.score": [losses.reverse_kl, losses.forward_kl, losses.jensen_shannon],
            "loss.beta": [0.05, 0.1, 1.0],
            "seed": [0, 1, 2],
        }
    )

"""CPO on the built-in task (https://arxiv.org/abs/2401.08417, section 3), which has no reference
model.

The paper's run (section 4.2): ALMA-13B with LoRA on 22,000 pairs of translations, beta 0.1, alpha
1, batch 128, one epoch, a hundredth of warm-up, 512 tokens; its code has a learning rate of 1e-4,
inverse square root. Here the learning rate and steps are those of experiments/dpo.py. The sweep
over beta is SimPO's search for CPO (https://arxiv.org/abs/2405.14734).

python -m scripts.train experiments/cpo.py --workdir runs/cpo
Hardware: two CPU cores; time not measured yet. Expected: not measured yet.
"""

from dpo_jax import config, losses
from experiments import dpo


def experiment() -> config.Experiment:
    """The run."""
    return dpo.experiment().replace(
        loss=config.Loss(losses.cpo, beta=0.1, alpha=1.0), reference=config.Reference(source=None)
    )


def sweep() -> list[dict]:
    """Scale of the difference, weight of the NLL, and seed."""
    return config.grid(
        {"loss.beta": [0.01, 0.05, 0.1], "loss.alpha": [0.0, 1.0], "seed": [0, 1, 2]}
    )

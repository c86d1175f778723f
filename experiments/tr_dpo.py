"""TR-DPO on the built-in task (https://arxiv.org/abs/2404.09656, section 3): the reference follows
the policy.

The paper's run (Tables 1 and 2): Pythia up to 12B on Anthropic's HH and Reddit TL;DR, alpha 0.6
every step or tau 512, beta 0.05, learning rate 1e-6, 100 warm-up steps, clip 2, one epoch, 1024
tokens (numbers: TRL's paper index, which has both alpha and tau). Here a run has 150 steps, so an
update comes every 30; for a long one: --reference.update-every 512. A weight of 1 copies the
policy. The learning rate and steps are those of experiments/dpo.py. The sweep's ranges are ours.

python -m scripts.train experiments/tr_dpo.py --workdir runs/tr_dpo
Hardware: two CPU cores; time not measured yet. Expected: not measured yet.
"""

from dpo_jax import config, losses
from experiments import dpo


def experiment() -> config.Experiment:
    """The run."""
    return dpo.experiment().replace(
        loss=config.Loss(losses.dpo, beta=0.05),
        reference=config.Reference(update_every=30, update_weight=0.6),
    )


def sweep() -> list[dict]:
    """Steps between updates, share of the policy in one, and seed."""
    return config.grid(
        {
            "reference.update_every": [15, 30, 75],
            "reference.update_weight": [0.6, 1.0],
            "seed": [0, 1, 2],
        }
    )

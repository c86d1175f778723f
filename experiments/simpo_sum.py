"""SimPO without length normalisation, the ablation of https://arxiv.org/abs/2405.14734, section 4.

The paper's run: Mistral-7B-Base on UltraFeedback, where the length-controlled win rate falls from
21.5 to 11.9; with which beta and gamma: not known here, so beta is DPO's. Here the learning rate
and steps are those of experiments/dpo.py. The sweep's ranges are ours.

python -m scripts.train experiments/simpo_sum.py --workdir runs/simpo_sum
Hardware: two CPU cores; time not measured yet. Expected: not measured yet.
"""

from dpo_jax import config, losses
from experiments import dpo


def simpo_sum(policy, reference, batch, *, beta: losses.Positive, gamma: losses.NonNegative):
    """-log sig(b (p_w - p_l) - gamma), p a sum over tokens."""
    chosen, rejected = policy["chosen"].total, policy["rejected"].total
    margin = beta * (chosen - rejected) - gamma
    return losses.logistic(margin), losses.pair_metrics(beta * chosen, beta * rejected)


def experiment() -> config.Experiment:
    """The run."""
    return dpo.experiment().replace(
        loss=config.Loss(simpo_sum, beta=0.1, gamma=1.6), reference=config.Reference(source=None)
    )


def sweep() -> list[dict]:
    """Scale of the reward, margin and seed."""
    return config.grid({"loss.beta": [0.05, 0.1, 0.5], "loss.gamma": [0.0, 1.6], "seed": [0, 1, 2]})

"""ORPO on the built-in task (https://arxiv.org/abs/2403.07691), its NLL over prompt and completion.

The authors' own reading; experiments/orpo.py has the completion's NLL alone. The paper's run
(appendix C): Mistral-7B on UltraFeedback, lambda 0.1, learning rate 5e-6, inverse square root, 200
warm-up steps, five epochs, batch 8 a device (numbers: TRL's paper index). Here the learning rate
and steps are those of experiments/dpo.py. The sweep is that of orpo.py.

python -m scripts.train experiments/orpo_prompt.py --workdir runs/orpo_prompt
Hardware: two CPU cores; time not measured yet. Expected: not measured yet.
"""

from dpo_jax import config, losses
from experiments import dpo


def experiment() -> config.Experiment:
    """The run."""
    return dpo.experiment().replace(
        loss=config.Loss(losses.orpo_prompt, lam=0.1), reference=config.Reference(source=None)
    )


def sweep() -> list[dict]:
    """The paper's lambda, and seed."""
    return config.grid({"loss.lam": [0.1, 0.5, 1.0], "seed": [0, 1, 2]})

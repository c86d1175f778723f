"""DPO on the built-in task: reward against KL, Fig. 2 left of https://arxiv.org/abs/2305.18290.

The paper's runs: GPT-2-large on IMDb, beta 0.05, 0.1, 1 and 5; Pythia-2.8B on Anthropic's HH, beta
0.1; batch 64, RMSprop at 1e-6 with 150 warm-up steps.

python -m scripts.train experiments/dpo.py --workdir runs/dpo
Hardware: two CPU cores, 4 minutes after SFT and sampling, which take 10 once.
Expected: reward 0.47 at a KL of 32 nats, accuracy 0.91 (README).
"""

from dpo_jax import config, losses
from dpo_jax.data import builtin


def experiment() -> config.Experiment:
    """The run."""
    return config.Experiment(
        loss=config.Loss(losses.dpo, beta=0.1),
        steps=150,
        batch_size=64,
        evaluate_every=50,
        data=config.Data(max_length=128),
        reference=config.Reference(cached=True),
        optimizer=config.Optimizer(learning_rate=1e-3, schedule="linear", warmup_steps=15),
        samples=config.Samples(count=256, max_tokens=80, reward=builtin.reward),
    )


def sweep() -> list[dict]:
    """Strength of the tie to the reference, learning rate and seed."""
    return config.grid(
        {
            "loss.beta": [0.05, 0.1, 1.0, 5.0],
            "optimizer.learning_rate": [3e-4, 1e-3],
            "seed": [0, 1, 2],
        }
    )

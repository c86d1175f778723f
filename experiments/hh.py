"""DPO on Anthropic's HH dialogues, as in https://arxiv.org/abs/2305.18290, section 6, but small.

The paper's run: Pythia-2.8B after SFT, batch 64, beta 0.1, RMSprop at 1e-6 with 150 warm-up steps,
512 tokens of which the prompt has up to 256. Here a model of random weights shows that the path
works; `--model.source` takes a better one.

python -m scripts.train experiments/hh.py --workdir runs/hh
Hardware: two CPU cores, some minutes. Expected: not measured yet, nor the hours on all rows.
"""

from dpo_jax import config, losses


def experiment() -> config.Experiment:
    """The run."""
    return config.Experiment(
        loss=config.Loss(losses.dpo, beta=0.1),
        steps=200,
        batch_size=16,
        evaluate_every=100,
        model=config.Model(source="tiny-50k"),
        data=config.Data(
            source="hf:Anthropic/hh-rlhf",
            evaluation_source="hf:Anthropic/hh-rlhf",
            form="transcripts",
            tokenizer="EleutherAI/gpt-neox-20b",
            eos_token="<|endoftext|>",
            max_length=512,
            max_prompt_length=256,
            # the published rows have some that are equal or empty
            bad_rows="drop",
        ),
        reference=config.Reference(cached=True),
        optimizer=config.Optimizer(kind="rmsprop", learning_rate=3e-4, warmup_steps=20),
    )


def sweep() -> list[dict]:
    """Strength of the tie to the reference, and seed."""
    return config.grid({"loss.beta": [0.05, 0.1, 0.5], "seed": [0, 1, 2]})

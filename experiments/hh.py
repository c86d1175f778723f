"""DPO on Anthropic's HH dialogues, the set-up of https://arxiv.org/abs/2305.18290, section 6, at a
small scale.

python -m scripts.train experiments/hh.py --workdir runs/hh --data.source hh_train.jsonl.gz
--data.tokenizer TOKENIZER The paper's run: Pythia-2.8B, batch 64, beta 0.1, RMSprop at 1e-6 with
150 warm-up steps, 512 tokens, prompts up to 256. Here the model is a small one with random weights.
Hardware, hours, held-out accuracy: not measured yet.
"""

from dpo_jax import config, losses


def experiment() -> config.Experiment:
    """The run."""
    return config.Experiment(
        loss=config.Loss(losses.dpo, beta=0.1),
        steps=200,
        batch_size=64,
        model=config.Model(source="llama-15m"),
        data=config.Data(
            source="hf:Anthropic/hh-rlhf",
            held_out=0,
            form="transcripts",
            tokenizer="EleutherAI/gpt-neox-20b",
            eos_token="<|endoftext|>",
            max_length=512,
            max_prompt_length=256,
            # the published rows have some equal pairs
            bad_rows="drop",
        ),
        optimizer=config.Optimizer(kind="rmsprop", learning_rate=1e-6, warmup_steps=150, clip=10.0),
    )


def sweep() -> list[dict]:
    """Strength of the tie to the reference, and seed."""
    return config.grid({"loss.beta": [0.05, 0.1, 0.5], "seed": [0, 1, 2]})

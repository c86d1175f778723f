"""Text from a trained run."""

from typing import NamedTuple

import jax

from dpo_jax import config, generate, initial, sharding, stops
from dpo_jax.data import tokenizer


class Options(NamedTuple):
    """How to sample."""

    count: int = 4
    max_tokens: int = 128
    # of the softmax; 0: the likeliest token always
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    # the prompt is a user's message, in the tokenizer's chat template
    chat: bool = False
    # tokens that end a sample beside the model's own ends
    stop: tuple[str, ...] = ()


def sample(source: str, prompt: str, options: Options) -> list[str]:
    """Continuations of a prompt, without it and the token that ends them, by a run folder's newest
    weights (or an HF folder's).

    ValueError for a folder without weights, and options that cannot be met.
    """
    check_options(options)
    mesh = sharding.make_mesh(config.Mesh(), jax.devices())
    model = initial.load(source, config.Model(), options.seed, mesh)
    words = tokenizer.load_tokenizer(config.Data(), model.tokenizer)
    if options.chat and words.chat_template is None:
        raise ValueError(f"chat is set, and the tokenizer of {source} has no chat template")
    stop_ids = stops.find(source, words, options.stop)
    messages = [{"role": "user", "content": prompt}]
    ids = words.encode_prompt(messages if options.chat else prompt)
    greedy = options.temperature == 0
    completions = generate.complete(
        model.model,
        initial.policy(model),
        [ids] * options.count,
        jax.random.key(options.seed),
        select=generate.greedy if greedy else generate.make_sampler(options.top_k, options.top_p),
        max_tokens=options.max_tokens,
        temperature=options.temperature or 1.0,
        stop_ids=stop_ids,
        batch_size=options.count,
        mesh=mesh,
    )
    bodies = [ids[:-1] if ids[-1] in stop_ids else ids for ids in completions]
    return [words.decode_plain(body) for body in bodies]


def check_options(options: Options) -> None:
    """Raises ValueError for numbers out of range, and those without effect."""
    if options.count < 1:
        raise ValueError(f"count is {options.count}; it must be at least 1")
    if options.temperature == 0 and (options.top_k, options.top_p) != (None, None):
        raise ValueError(
            "temperature is 0, and top_k and top_p then have no effect: leave them out"
        )
    if options.temperature < 0:
        raise ValueError(f"temperature is {options.temperature}; it must be >= 0")

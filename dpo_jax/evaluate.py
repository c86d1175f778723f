"""Held-out metrics of preferences, and of text sampled from the policy.

Dimensions: N examples of a batch.
"""

import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import config, generate, logps, losses, paths, reference, sharding
from dpo_jax.data import pack, tokenise, tokenizer
from dpo_jax.model import decoder


def preferences(evaluate: Callable, held_out: reference.LaidOut, mesh) -> dict[str, float]:
    """Means over all held-out examples, each once: {metric: float}.

    `evaluate` maps a batch on the mesh to `train_step.Sums`.
    """
    total: dict[str, np.ndarray] = {}
    held = sharding.held_rows(mesh)
    for batch in pack.evaluation_batches(held_out.data, held_out.plan, held):
        batch = sharding.put_batch(reference.with_table(batch, held_out.table), mesh)
        sums = jax.device_get(evaluate(batch).metrics)
        for name, value in sums.items():
            total[name] = total.get(name, 0.0) + np.asarray(value, np.float64)
    return {name: float(value[0] / value[1]) for name, value in total.items() if value[1]}


def prompts(data: tokenise.Tokenised, count: int) -> list[list[int]]:
    """The first `count` distinct prompts as token ids, over again where there are fewer."""
    distinct = dict.fromkeys(
        tuple(data.tokens[start:stop].tolist()) for start, stop in data.prompts
    )
    return [list(prompt) for prompt in itertools.islice(itertools.cycle(distinct), count)]


class Sampler(NamedTuple):
    """What sampling needs beside parameters."""

    model: decoder.Decoder
    tokenizer: tokenizer.Tokenizer
    prompts: list[list[int]]
    settings: config.Samples
    mesh: jax.sharding.Mesh
    batch_size: int
    # jitted (params, batch) -> {name: Logps}, whole on every device
    score: Callable


def sample(
    sampler: Sampler, params, anchor_params, key: jax.Array
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Metrics of completions sampled from the policy, and the completions as rows.

    `kl`, where there are parameters to compare with, is the mean over samples of log pi(y|x) - log
    pi_ref(y|x) in nats, an unbiased estimate of the sequence-level KL where temperature is 1 and
    neither top_k nor top_p is set; `length` is in tokens, `ended` the share that ended with EOS,
    `repetition` the mean share of a sample's 3-grams that it has had before.
    """
    settings = sampler.settings
    completions = generate.complete(
        sampler.model,
        params,
        sampler.prompts,
        key,
        max_tokens=settings.max_tokens,
        select=generate.make_sampler(settings.top_k, settings.top_p),
        temperature=settings.temperature,
        # what training teaches, so other stop tokens of the model count as text
        stop_ids=[sampler.tokenizer.eos_id],
        batch_size=sampler.batch_size,
        mesh=sampler.mesh,
    )
    data = as_examples(sampler.prompts, completions)
    rows = [
        describe(sampler, prompt, completion)
        for prompt, completion in zip(sampler.prompts, completions, strict=True)
    ]
    if anchor_params is not None:
        ratio = totals(sampler, params, data) - totals(sampler, anchor_params, data)
        rows = [{**row, "kl": float(one)} for row, one in zip(rows, ratio, strict=True)]
    names = [name for name in rows[0] if name not in ("prompt", "completion")]
    return {name: float(np.mean([row[name] for row in rows])) for name in names}, rows


def describe(sampler: Sampler, prompt: list[int], completion: list[int]) -> dict[str, Any]:
    """One sample as a row: texts, and its numbers."""
    ended = bool(completion) and completion[-1] == sampler.tokenizer.eos_id
    body = completion[:-1] if ended else completion
    row = {
        "prompt": sampler.tokenizer.decode_plain(prompt),
        "completion": sampler.tokenizer.decode_plain(body),
    }
    numbers = {
        "length": len(completion),
        "ended": float(ended),
        "repetition": repetition(completion),
    }
    if sampler.settings.reward is not None:
        numbers["reward"] = sampler.settings.reward(row["prompt"], row["completion"])
    return {**row, **numbers}


def repetition(tokens: list[int]) -> float:
    """Share of the 3-grams that stood before in the same sample; 0 where there is none."""
    grams = list(zip(tokens, tokens[1:], tokens[2:], strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def as_examples(prompts: list[list[int]], completions: list[list[int]]) -> tokenise.Tokenised:
    """Sampled completions as examples of one completion each."""
    pieces = [piece for pair in zip(prompts, completions, strict=True) for piece in pair]
    bounds = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])]).astype(np.int64)
    spans = np.stack([bounds[:-1], bounds[1:]], axis=1).reshape(-1, 2, 2)
    tokens = np.array([token for piece in pieces for token in piece], np.int32)
    return tokenise.Tokenised(("completion",), tokens, spans[:, 0], spans[:, 1:], {}, "", {})


def totals(sampler: Sampler, params, data: tokenise.Tokenised) -> np.ndarray:
    """log p(completion | prompt) of each example in nats: float64 [N]."""
    # from bounds and not from what was sampled, so that every evaluation has the same shapes
    longest = max(map(len, sampler.prompts)) + sampler.settings.max_tokens
    shards = sharding.batch_shards(sampler.mesh)
    plan = pack.plan_within(
        longest,
        sampler.settings.max_tokens,
        sampler.batch_size,
        shards,
        sharding.row_shards(sampler.mesh),
    )
    found = np.zeros(len(data.prompts))
    for batch in pack.evaluation_batches(data, plan, sharding.held_rows(sampler.mesh)):
        filled, index = batch["weight"] > 0, batch["index"]
        scored: Mapping[str, logps.Logps] = sampler.score(
            params, sharding.put_batch(batch, sampler.mesh)
        )
        found[index[filled]] = np.asarray(scored["completion"].total)[filled]
    return found


def pair_rewards(policy, anchor, batch, *, beta: Any = 1.0):
    """Stands for a loss where only a pair's rewards are wanted; zeros [N] and the metrics of
    `losses.pair_metrics`.
    """
    chosen = beta * losses.log_ratio(policy, anchor, "chosen")
    rejected = beta * losses.log_ratio(policy, anchor, "rejected")
    return jnp.zeros_like(chosen), losses.pair_metrics(chosen, rejected)


def write_rows(folder: str, step: int, rows: list[dict[str, Any]]) -> None:
    """Sampled texts of a step into the run folder's samples/."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    paths.write_text(paths.join(folder, "samples", f"{step:08d}.jsonl"), lines)

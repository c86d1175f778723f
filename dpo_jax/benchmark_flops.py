"""FLOPs that a training step needs at least, and seconds that FLOPs take at a machine's rates."""

from collections.abc import Mapping

import numpy as np

from dpo_jax.data import tokenise
from dpo_jax.model import config as model_config


def floor_flops(
    shape: model_config.DecoderConfig,
    data: tokenise.Tokenised,
    chosen: np.ndarray,
    *,
    has_reference: bool = True,
    is_adapter: bool = False,
) -> float:
    """FLOPs that a step with a live reference needs at least: each distinct token once through the
    layers, each scored one once through the head, each pair of tokens that see each other once
    through attention; three times for the policy, whose gradient costs two, and once for the
    reference, if there is one. Of an adapter, the base's weights have no gradient, which then
    costs one. Mismatched completions have none.
    """
    trained = 2 if is_adapter else 3
    prompts = (data.prompts[chosen, 1] - data.prompts[chosen, 0]).astype(float)
    answers = (data.completions[chosen, :, 1] - data.completions[chosen, :, 0]).astype(float)
    total = (trained + has_reference) * forward_flops(
        shape, prompts.sum(), 0, (prompts * (prompts + 1) / 2).sum()
    )
    for name, tokens in zip(data.names, answers.T, strict=True):
        passes = has_reference + (1 if name == tokenise.MISMATCHED else trained)
        pairs = (tokens * prompts + tokens * (tokens + 1) / 2).sum()
        total += passes * forward_flops(shape, tokens.sum(), tokens.sum(), pairs)
    return float(total)


def forward_flops(
    shape: model_config.DecoderConfig, tokens: float, scored: float, pairs: float
) -> float:
    """FLOPs of a forward pass of so many tokens, of which some meet the head, and pairs of tokens
    that attention computes.
    """
    kernels = shape.width * shape.head_dim * 2 * (shape.heads + shape.key_value_heads)
    matrices = 3 if shape.gated else 2
    of_token = shape.experts.chosen if shape.experts else 1
    body = shape.layers * (kernels + of_token * matrices * shape.width * shape.hidden)
    attention = 4 * shape.layers * shape.heads * shape.head_dim
    return 2 * body * tokens + 2 * shape.width * shape.vocabulary_size * scored + attention * pairs


def shortest_time(flops: Mapping[str, float], products: Mapping[str, float]) -> float | None:
    """Seconds that FLOPs by type take where all run at the rates of matrix products of these types;
    None where a rate is not known.
    """
    needed = {kind: number for kind, number in flops.items() if number}
    if not needed or not needed.keys() <= products.keys():
        return None
    return sum(number / products[kind] for kind, number in needed.items())

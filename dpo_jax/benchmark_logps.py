"""Log-probabilities from stripes of the vocabulary and from all logits, timed in turn.

Dimensions: B rows, S scored tokens, D width, V vocabulary.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import vocabulary
from dpo_jax.model import decoder

ROWS = 4
HEADER = """\
| width | tokens | vocabulary | head | all logits | stripes | stripes / all logits |
| ---: | ---: | ---: | --- | ---: | ---: | ---: |"""


class Size(NamedTuple):
    """What is timed."""

    tokens: int  # B * S
    width: int
    vocabulary: int = 50304
    tied: bool = False
    # whether the head's gradient is wanted
    trained: bool = True


class Result(NamedTuple):
    """Seconds of forward and backward pass, of each round."""

    size: Size
    stripes: list[float]
    logits: list[float]


SIZES = tuple(
    Size(tokens, width, tied=tied, trained=trained)
    for width in (288, 768)
    for tokens in (512, 2048)
    for tied in (True, False)
    for trained in (True, False)
)


def from_logits(hidden: jax.Array, head: decoder.Head, target: jax.Array) -> jax.Array:
    """log p(target) [B, S] from logits [B, S, V]."""
    scores = jax.nn.log_softmax(decoder.logits(hidden, head))
    return jnp.take_along_axis(scores, target[..., None], axis=-1)[..., 0]


def run(rounds: int, dtype: Any = jnp.float32, sizes: tuple[Size, ...] = SIZES) -> Iterator[Result]:
    """Times each size: in each round the stripes once and all logits once, A B A B."""
    for size in sizes:
        arguments = draw(size, dtype)
        ways = [make_gradient(way, size) for way in (vocabulary.token_logps, from_logits)]
        for way in ways:
            jax.block_until_ready(way(*arguments))
        seconds: list[list[float]] = [[], []]
        for _ in range(rounds):
            for own, way in zip(seconds, ways, strict=True):
                start = time.perf_counter()
                jax.block_until_ready(way(*arguments))
                own.append(time.perf_counter() - start)
        yield Result(size, *seconds)


def draw(size: Size, dtype: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Hidden states, matrix and targets."""
    generator, shape = np.random.default_rng(0), (ROWS, size.tokens // ROWS)
    hidden = generator.normal(size=(*shape, size.width))
    matrix = generator.normal(size=(size.vocabulary, size.width)) * 0.02
    target = generator.integers(0, size.vocabulary, shape, np.int32)
    matrix = jnp.asarray(matrix if size.tied else matrix.T, jnp.float32)
    return jnp.asarray(hidden, dtype), matrix, jnp.asarray(target)


def make_gradient(way: Callable, size: Size) -> Callable:
    """The jitted sum of log-probabilities with its gradients."""

    def total(hidden: jax.Array, matrix: jax.Array, target: jax.Array) -> jax.Array:
        return way(hidden, decoder.Head(matrix, is_embedding=size.tied), target).sum()

    return jax.jit(jax.value_and_grad(total, (0, 1) if size.trained else (0,)))


def describe(result: Result) -> str:
    """A line of a Markdown table: medians, and the median of the rounds' ratios."""
    size, stripes, logits = result
    kind = f"{'tied' if size.tied else 'apart'}, {'trained' if size.trained else 'frozen'}"
    ratio = float(np.median(np.array(stripes) / np.array(logits)))
    return (
        f"| {size.width} | {size.tokens} | {size.vocabulary:,} | {kind} | "
        f"{np.median(logits):.3f} s | {np.median(stripes):.3f} s | {ratio:.2f} |"
    )

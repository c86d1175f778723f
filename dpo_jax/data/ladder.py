"""The shapes of a run: few [B, L, S] that hold its steps at least cost, chosen from lengths alone.

Dimensions: n sampled steps of b examples, c candidate shapes, B rows, L tokens, S scored tokens, E
examples of a row at most.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dpo_jax.data import rows

# compiled shapes of a run
MOST_SHAPES = 4
# a further one must save this share of the cost
WORTH_A_SHAPE = 0.005
# and over the run as much as so many steps cost, which is about what compiling it takes: 3 to 7 s
# of two CPU cores, up to a minute of an accelerator's host
WORTH_A_COMPILE = 20.0
TOKENS_MULTIPLE = 32
SCORED_MULTIPLE = 16
# of tokens and scored tokens on each shard of a row: vector registers have as many rows
SHARD_MULTIPLE = 8
# rows that hold so many times the longest example are tried
LENGTHS = (1.15, 1.33, 1.6, 2.2, 3.0)
# the same for steps that are to be full, which rows of more examples can be
FULL_LENGTHS = (2.0, 2.6, 3.5)
# of the positions are filled by the steps from which it is learnt how many can be
FIRST_SHARE = 0.985
# the share of steps whose fullest row that leaves room for; most of the others fit when their rows
# are spread for the shape itself
UNEVEN = 0.9
# multiples of tokens or scored tokens by which the largest shape grows at most for one step
MOST_WIDENING = 16
# tokens of a row at which attention costs as much as all else: about 6 times a model's width
ATTENTION = 16384
# a scored position against one of the body: products with the output matrix against a layer's
SCORED_COST = 0.5
# numbers of tokens, and of scored tokens, that are tried for each number of rows
QUANTILES = 24
# what a row has room for beyond the most examples seen
SPARE_EXAMPLES = 1.5


class Multiples(NamedTuple):
    """What the rows, tokens and scored tokens of every shape are multiples of."""

    rows: int
    tokens: int = TOKENS_MULTIPLE
    scored: int = SCORED_MULTIPLE


class Fill(NamedTuple):
    """Shares of the positions and of the scored positions that hold a token."""

    tokens: float
    scored: float


class Ladder(NamedTuple):
    """Shapes from cheap to dear, and what would be filled with 1, 2, ... shapes."""

    shapes: tuple[rows.Shape, ...]
    curve: tuple[Fill, ...]


class Layout(NamedTuple):
    """What sampled steps need when spread over a number of rows."""

    rows: int
    # of the fullest row of each step, int64 [n]
    tokens: np.ndarray
    scored: np.ndarray
    examples: np.ndarray


class Candidates(NamedTuple):
    """Shapes to choose from, which steps they hold, and what the steps then cost."""

    shapes: list[rows.Shape]  # c
    cost: np.ndarray  # float64 [c]
    fits: np.ndarray  # bool [c, n]


def multiples(parts: int, row_shards: int) -> Multiples:
    """Those of shapes of so many parts, where the tokens of a row lie on so many shards."""
    each = row_shards * SHARD_MULTIPLE
    return Multiples(parts, math.lcm(TOKENS_MULTIPLE, each), math.lcm(SCORED_MULTIPLE, each))


def climb(
    steps: rows.Sizes, multiples: Multiples, longest: rows.Most, number: float = math.inf
) -> Ladder:
    """Chooses shapes for a number of steps like these [n, b].

    The largest has room for the tokens and the scored tokens of `longest` in each row, so that it
    holds any step once it has enough rows.
    """
    tokens = steps.tokens.sum(axis=1).mean()
    parts = multiples.rows
    wanted = [round(tokens / (longest.tokens * length) / parts) * parts for length in LENGTHS]
    layouts = [lay_out(steps, number) for number in sorted({max(one, parts) for one in wanted})]
    return choose(steps, make_candidates(layouts, multiples), longest, multiples, number)


def climb_within(
    cut: Callable[[int], rows.Sizes],
    positions: int,
    multiples: Multiples,
    longest: rows.Most,
    number: float = math.inf,
) -> tuple[Ladder, int]:
    """Chooses shapes of at most so many positions for a number of steps, and the tokens at which a
    step ends.

    `cut` gives sampled steps [n, b] that end at a number of tokens. ValueError where there is no
    room for the longest example in a row.
    """
    found: list[tuple[float, Ladder, int]] = []
    parts = multiples.rows
    for count in sorted({row_count(positions, parts, longest, one) for one in FULL_LENGTHS}):
        tokens = positions // count // multiples.tokens * multiples.tokens
        if tokens < longest.tokens:
            continue
        steps = cut(int(count * tokens * FIRST_SHARE))
        means = steps.tokens.sum(axis=1) / count
        uneven = float(np.quantile(lay_out(steps, count).tokens / means, UNEVEN))
        limit = int(count * tokens / uneven)
        steps = cut(limit)
        layout = lay_out(steps, count)
        # the few that are over it by a little are laid out once more when their shape is known
        layout = layout._replace(tokens=np.minimum(layout.tokens, tokens))
        candidates = make_candidates([layout], multiples)
        costs = step_costs(candidates, pick(candidates, MOST_SHAPES))
        chosen = choose(steps, candidates, longest, multiples, number)
        found.append((costs.sum() / steps.tokens.sum(), chosen, limit))
    if not found:
        least = parts * round_up(longest.tokens, multiples.tokens)
        raise ValueError(
            f"batch_tokens is {positions}, and the longest example has {longest.tokens} tokens, so "
            f"that {parts} rows (batch shards x microbatches) of a multiple of {multiples.tokens} "
            f"tokens take {least}: raise --batch-tokens, or lower --data.max-length"
        )
    _, ladder, limit = min(found, key=lambda one: one[0])
    return ladder, limit


def row_count(positions: int, parts: int, longest: rows.Most, length: float) -> int:
    """Rows that hold so many times the longest example."""
    return max(int(positions / (longest.tokens * length) / parts) * parts, parts)


def choose(
    steps: rows.Sizes,
    candidates: Candidates,
    longest: rows.Most,
    multiples: Multiples,
    number: float,
) -> Ladder:
    """The ladder of as many of the candidates as are worth it in a number of steps."""
    picks = [pick(candidates, count) for count in range(1, MOST_SHAPES + 1)]
    costs = [step_costs(candidates, picked).mean() for picked in picks]
    count = 0
    worth = max(WORTH_A_SHAPE, WORTH_A_COMPILE / number)
    while count + 1 < MOST_SHAPES and costs[count + 1] < costs[count] * (1 - worth):
        count += 1
    picked = sorted(picks[count], key=lambda one: candidates.cost[one])
    shapes = [candidates.shapes[one] for one in picked]
    shapes[-1] = shapes[-1]._replace(
        tokens=max(shapes[-1].tokens, round_up(longest.tokens, multiples.tokens)),
        scored=max(shapes[-1].scored, round_up(longest.scored, multiples.scored)),
    )
    return Ladder(tuple(shapes), tuple(fill(steps, candidates, picked) for picked in picks))


def widen(ladder: Ladder, steps: list[rows.Sizes], multiples: Multiples) -> Ladder:
    """The ladder with its largest shape made larger, where it holds one of these steps [b] only
    so.
    """
    *others, largest = ladder.shapes
    for step in steps:
        if any(rows.assign(step, shape) for shape in others):
            continue
        for _ in range(MOST_WIDENING):
            if rows.assign(step, largest) is not None:
                break
            tokens = step.tokens.sum() / largest.tokens
            if tokens > step.scored.sum() / largest.scored:
                largest = largest._replace(tokens=largest.tokens + multiples.tokens)
            else:
                largest = largest._replace(scored=largest.scored + multiples.scored)
    return ladder._replace(shapes=(*others, largest))


def lay_out(steps: rows.Sizes, number: int) -> Layout:
    """Spreads each step over so many rows, tokens and scored tokens alike."""
    means = (np.maximum(one.sum(axis=1, keepdims=True) // number, 1) for one in steps)
    row = rows.spread(steps, number, rows.Sizes(*means))
    return Layout(number, *(one.max(axis=1) for one in rows.loads(steps, row, number)))


def make_candidates(layouts: list[Layout], multiples: Multiples) -> Candidates:
    """Of each layout the shapes that hold shares of the steps by tokens and by scored tokens."""
    shapes, fits = [], []
    for layout in layouts:
        examples = int(np.ceil(SPARE_EXAMPLES * layout.examples.max()))
        for tokens in quantiles(layout.tokens, multiples.tokens):
            for scored in quantiles(layout.scored, multiples.scored):
                shapes.append(rows.Shape(layout.rows, tokens, scored, examples))
                fits.append((layout.tokens <= tokens) & (layout.scored <= scored))
    return Candidates(shapes, np.array([cost(shape) for shape in shapes]), np.array(fits))


def quantiles(needed: np.ndarray, multiple: int) -> list[int]:
    """Multiples that hold growing shares of the steps, the last all of them."""
    shares = np.linspace(0, 1, QUANTILES + 1)[1:]
    found = np.quantile(needed, shares, method="higher")
    return sorted({round_up(float(number), multiple) for number in found})


def cost(shape: rows.Shape) -> float:
    """What a step costs in this shape, in positions of a body without attention."""
    body = shape.tokens * (1 + shape.tokens / ATTENTION)
    return shape.rows * (body + SCORED_COST * shape.scored)


def pick(candidates: Candidates, count: int) -> list[int]:
    """At most so many candidates that hold every step at little cost: added one by one, and then
    each exchanged for another as long as that helps.
    """
    picked: list[int] = []
    table = np.where(candidates.fits, candidates.cost[:, None], np.inf)  # [c, n]
    # a step that nothing holds yet costs more than any shape
    table = np.minimum(table, 1e3 * candidates.cost.max())

    def best_beside(others: list[int]) -> tuple[int, float]:
        beside = table[others].min(axis=0) if others else np.full(table.shape[1], np.inf)
        means = np.minimum(table, beside).mean(axis=1)
        return int(means.argmin()), float(means.min())

    for _ in range(count):
        one, mean = best_beside(picked)
        picked.append(one)
    helped = True
    while helped:
        helped = False
        for place in range(count):
            one, lower = best_beside(picked[:place] + picked[place + 1 :])
            if lower < mean * (1 - 1e-9):
                picked[place], mean, helped = one, lower, True
    return sorted(set(picked))


def step_costs(candidates: Candidates, picked: list[int]) -> np.ndarray:
    """What each step costs in the cheapest of these candidates that holds it: float64 [n]."""
    held = np.where(candidates.fits[picked], candidates.cost[picked][:, None], np.inf)
    return held.min(axis=0)


def fill(steps: rows.Sizes, candidates: Candidates, picked: list[int]) -> Fill:
    """What is filled where each step takes the cheapest of these candidates that holds it."""
    held = np.where(candidates.fits[picked], candidates.cost[picked][:, None], np.inf)
    taken = [candidates.shapes[picked[one]] for one in held.argmin(axis=0)]
    return Fill(
        float(steps.tokens.sum() / sum(shape.rows * shape.tokens for shape in taken)),
        float(steps.scored.sum() / sum(shape.rows * shape.scored for shape in taken)),
    )


def round_up(number: float, multiple: int) -> int:
    """The next multiple."""
    return int(np.ceil(number / multiple)) * multiple

"""Which examples of a step share a row: spread over a number of rows so that the fullest is least
full.

Dimensions: n steps of b examples, R rows of each, N examples.
"""

from typing import NamedTuple

import numpy as np

from dpo_jax.data import tokenise

# an exchange must take this share off the fullest row
WORTH_AN_EXCHANGE = 1 / 4096
# places in the least full rows of which one takes part in an exchange, in so many rows at least
PARTNERS, PARTNER_ROWS = 192, 8


class Shape(NamedTuple):
    """A compiled shape: rows B, tokens L, scored S, examples E."""

    rows: int
    tokens: int
    scored: int
    examples: int


class Sizes(NamedTuple):
    """Tokens that examples take in a row, and how many of them are scored: int64 [N] each, or [n,
    b] by step, where places without an example have 0 of both.
    """

    tokens: np.ndarray
    scored: np.ndarray


class Most(NamedTuple):
    """Most tokens, and most scored tokens, of any example."""

    tokens: int
    scored: int


def sizes(
    data: tokenise.Tokenised,
    scores_prompt: bool = False,
    indices: np.ndarray | slice = slice(None),
) -> Sizes:
    """Row tokens and scored tokens of each example, or of those at the indices: every token of its
    completions and, where the prompt is scored, those of the prompt but the first.
    """
    spans, completions = data.prompts[indices], data.completions[indices]
    prompts = spans[:, 1] - spans[:, 0]
    scored = (completions[:, :, 1] - completions[:, :, 0]).sum(axis=1)
    return Sizes(prompts + scored, scored + prompts - 1 if scores_prompt else scored)


def assign(step: Sizes, shape: Shape) -> list[list[int]] | None:
    """Rows of places in the step [b], each within L, S and E of the shape; None where they were
    not found.
    """
    if not may_fit(step, shape):
        return None
    steps = Sizes(step.tokens[None], step.scored[None])
    row = spread(steps, shape.rows, shape)[0]
    tokens, scored, examples = loads(steps, row[None], shape.rows)
    fits = (tokens <= shape.tokens) & (scored <= shape.scored) & (examples <= shape.examples)
    if not fits.all():
        return None
    return [np.flatnonzero(row == number).tolist() for number in range(shape.rows)]


def may_fit(step: Sizes, shape: Shape) -> bool:
    """Whether the step [b] has no more tokens, scored tokens and examples than the shape."""
    return bool(
        step.tokens.sum() <= shape.rows * shape.tokens
        and step.scored.sum() <= shape.rows * shape.scored
        and len(step.tokens) <= shape.rows * shape.examples
        and step.tokens.max(initial=0) <= shape.tokens
        and step.scored.max(initial=0) <= shape.scored
    )


def loads(steps: Sizes, row: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, scored tokens and examples of each row: int64 [n, R] each, for row [n, b]."""
    place = (np.arange(len(row))[:, None] * rows + row).ravel()

    def summed(values: np.ndarray) -> np.ndarray:
        # float64 holds these sums exactly
        flat = np.bincount(place, values.ravel(), minlength=len(row) * rows)
        return flat.reshape(len(row), rows).astype(np.int64)

    return summed(steps.tokens), summed(steps.scored), summed(steps.tokens > 0)


def spread(steps: Sizes, rows: int, room: Sizes | Shape) -> np.ndarray:
    """The row of each example, int64 [n, b]: the largest first, each to the row that is then least
    full, and then exchanges between the fullest row and others.

    `room` has the tokens and scored tokens of a row, a number or [n, 1] each, by which fullness is
    measured: the larger of both shares. Exchanges end where all rows are within it.
    """
    # two shares with a common denominator are whole numbers, equal on every machine
    shares = np.stack([steps.tokens * room.scored, steps.scored * room.tokens])
    row = _place(shares, rows)
    places = _by_row(row, shares[0] > 0, rows)
    padded = np.concatenate([shares, np.zeros_like(shares[:, :, :1])], axis=2)
    shares = np.take_along_axis(padded, places.reshape(1, len(row), -1), axis=2)
    shares = shares.reshape(2, *places.shape)
    enough = np.broadcast_to(np.asarray(room.tokens * room.scored).reshape(-1), len(row))
    left = np.flatnonzero(shares.sum(axis=3).max(axis=(0, 2)) > enough)
    for _ in range(4 * rows + 16):
        if not len(left):
            break
        part = shares[:, left], places[left]
        helped, worst = _exchange(*part)
        shares[:, left], places[left] = part
        left = left[helped & (worst > enough[left])]
    found = np.zeros((len(row), row.shape[1] + 1), np.int64)
    steps_of = np.arange(len(row))[:, None, None]
    found[steps_of, places] = np.arange(rows)[None, :, None]
    return found[:, :-1]


def _place(shares: np.ndarray, rows: int) -> np.ndarray:
    """The row [n, b] of each example by the first rule; shares [2, n, b]."""
    _, count, examples = shares.shape
    steps = np.arange(count)
    row = np.zeros((count, examples), np.int64)
    full = np.zeros((2, count, rows), np.int64)
    for place in np.argsort(-shares.sum(axis=0), axis=1, kind="stable").T:
        more = shares[:, steps, place]
        to = (full + more[:, :, None]).max(axis=0).argmin(axis=1)
        row[steps, place] = to
        full[:, steps, to] += more
    return row


def _by_row(row: np.ndarray, there: np.ndarray, rows: int) -> np.ndarray:
    """Places of the examples of each row, int64 [n, R, m]; b where none is, in each row at least
    once.
    """
    count, examples = row.shape
    order = np.argsort(np.where(there, row, rows), axis=1, kind="stable")
    by_row = np.take_along_axis(np.where(there, row, rows), order, axis=1)
    numbers = np.stack([(by_row == number).sum(axis=1) for number in range(rows)], axis=1)  # [n, R]
    firsts = np.cumsum(numbers, axis=1) - numbers
    places = np.full((count, rows, numbers.max() + 1), examples)
    steps, at = np.nonzero(by_row < rows)
    to = by_row[steps, at]
    places[steps, to, at - firsts[steps, to]] = order[steps, at]
    return places


def _exchange(shares: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Exchanges one example of each step's fullest row for one of the least full rows, or for none,
    so that the fuller of the two rows becomes least full: in place.

    shares [2, n, R, m], places [n, R, m]. Returns whether that helped [n], and the fullest row's
    fullness [n] after it.
    """
    count, rows, most = places.shape
    steps = np.arange(count)
    full = shares.sum(axis=3)  # [2, n, R]
    fullness = full.max(axis=0)
    order = np.argsort(fullness, axis=1, kind="stable")
    partners = min(max(PARTNERS // most, PARTNER_ROWS), rows - 1)
    source, others = order[:, -1], order[:, :partners]
    before = fullness[steps, source]
    if rows == 1:
        return np.zeros(count, bool), before
    own = shares[:, steps, source]  # [2, n, m]
    theirs = shares[:, steps[:, None], others].reshape(2, count, 1, -1)
    moved = own[:, :, :, None] - theirs  # [2, n, m, K m]
    their_full = np.repeat(full[:, steps[:, None], others], most, axis=2)[:, :, None]
    after = np.maximum(full[:, steps, source][:, :, None, None] - moved, their_full + moved)
    after = after.max(axis=0).reshape(count, -1)
    best = after.argmin(axis=1)
    helped = before - after[steps, best] > before * WORTH_AN_EXCHANGE
    at = steps[helped]
    member, other = np.divmod(best[helped], others.shape[1] * most)
    source, target, other = source[at], others[at, other // most], other % most
    for array in (*shares, places):
        first, second = array[at, source, member], array[at, target, other]
        array[at, source, member], array[at, target, other] = second, first
    return helped, shares.sum(axis=3).max(axis=(0, 2))

"""Examples to fixed-shape rows: prefix-shared, packed, a pure function of (data, seed, step,
parts).

Dimensions: B rows, L tokens of a row, S scored tokens of a row, E examples of a row at most, C
completions of an example, N = B * E slots for examples.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from dpo_jax.data import tokenise

# the name under which a prompt's own tokens are scored
PROMPT = "prompt"
MULTIPLE = 32
LADDER = 4
# examples of the steps that are tried out while the shapes are chosen
SIMULATED_EXAMPLES = 3072
# a further compiled shape must save at least this share of the rows
WORTH_A_SHAPE = 0.04


class Shape(NamedTuple):
    """A compiled shape: rows B, tokens L, scored S, examples E."""

    rows: int
    tokens: int
    scored: int
    examples: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the steps of a run are laid out in rows."""

    batch_size: int
    parts: int
    seed: int
    # from few rows to many; equal but for rows
    ladder: tuple[Shape, ...]
    # the prompts' own tokens are scored too, but for the first, as a completion PROMPT
    scores_prompt: bool = False


class Sizes(NamedTuple):
    """Tokens that each example takes in a row (int64 [N]), and how many of them are scored (int64
    [N]).
    """

    tokens: np.ndarray
    scored: np.ndarray


def sizes(data: tokenise.Tokenised, scores_prompt: bool = False) -> Sizes:
    """Row tokens and scored tokens of each example: every token of its completions and, where the
    prompt is scored, those of the prompt but the first.
    """
    prompts = data.prompts[:, 1] - data.prompts[:, 0]
    scored = (data.completions[:, :, 1] - data.completions[:, :, 0]).sum(axis=1)
    return Sizes(prompts + scored, scored + prompts - 1 if scores_prompt else scored)


def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """Order of the examples in an epoch: int64 [count], a function of (seed, epoch)."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)


def step_examples(count: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Examples [step b, (step + 1) b) of the epochs' orders, end to end: int64 [b]. A step may
    straddle epochs.
    """
    first, last = step * batch_size, (step + 1) * batch_size
    epochs = range(first // count, (last - 1) // count + 1)
    order = np.concatenate([permutation(count, seed, epoch) for epoch in epochs])
    return order[first - epochs[0] * count :][:batch_size]


def plan(
    data: tokenise.Tokenised,
    batch_size: int,
    parts: int,
    seed: int,
    *,
    scores_prompt: bool = False,
) -> Plan:
    """Chooses the ladder of shapes from the lengths alone, so that a typical step wastes least.

    `parts` is batch shards times microbatches; the rows of every shape are a multiple of it.
    With `scores_prompt`, the prompts' own tokens are scored too.
    """
    all_sizes, count = sizes(data, scores_prompt), len(data.prompts)
    simulated = range(min(max(SIMULATED_EXAMPLES // batch_size, 4), 48))
    sampled = [step_examples(count, batch_size, seed, step) for step in simulated]
    steps = [Sizes(all_sizes.tokens[i], all_sizes.scored[i]) for i in sampled]
    candidates = [_fit(shape, steps, parts) for shape in _candidates(all_sizes, batch_size)]
    _, ladder = min(candidates, key=lambda candidate: candidate[0])
    return Plan(batch_size, parts, seed, ladder, scores_prompt)


def plan_within(longest: int, scored: int, batch_size: int, parts: int) -> Plan:
    """A plan made before the examples are there: each has at most so many tokens and scored ones.

    Two of the largest fit into a row, so that no step needs more than half as many rows as
    examples.
    """
    tokens, scored = _round_up(2 * longest, MULTIPLE), _round_up(2 * scored, MULTIPLE)
    rows = dict.fromkeys(_round_up(batch_size / share, parts) for share in (8, 4, 2))
    shapes = (Shape(count, tokens, scored, min(batch_size, 16)) for count in rows)
    return Plan(batch_size, parts, 0, tuple(shapes))


def _candidates(all_sizes: Sizes, batch_size: int) -> list[Shape]:
    longest, most_scored = int(all_sizes.tokens.max()), int(all_sizes.scored.max())
    share = all_sizes.scored.sum() / all_sizes.tokens.sum()
    shapes = set()
    for factor in (1.0, 1.25, 1.5, 2.0, 3.0):
        tokens = _round_up(longest * factor, MULTIPLE)
        examples = min(batch_size, int(np.ceil(2 * tokens / all_sizes.tokens.mean())))
        for slack in (1.0, 1.1, 1.25, 1.5):
            scored = min(
                tokens,
                max(_round_up(tokens * share * slack, MULTIPLE), _round_up(most_scored, MULTIPLE)),
            )
            shapes.add(Shape(0, tokens, scored, examples))
    return sorted(shapes)


def _fit(shape: Shape, steps: list[Sizes], parts: int) -> tuple[float, tuple[Shape, ...]]:
    """Mean cost of a step with this shape's rows, and the ladder over the number of rows."""
    needed = np.array([_round_up(len(assign(step, shape)), parts) for step in steps])
    ladders = [_rungs(needed, count) for count in range(1, LADDER + 1)]
    best = min(mean for _, mean in ladders)
    rungs, mean = next(ladder for ladder in ladders if ladder[1] <= best * (1 + WORTH_A_SHAPE))
    # a body token costs about as much as a scored one; attention makes long rows dearer
    cost = mean * (shape.tokens * (1 + shape.tokens / 2048) + shape.scored)
    return float(cost), tuple(shape._replace(rows=int(rung)) for rung in rungs)


def _rungs(needed: np.ndarray, count: int) -> tuple[np.ndarray, float]:
    """At most `count` numbers of rows that hold every step, and the mean over the steps of that
    used.
    """
    quantiles = np.linspace(1 / count, 1, count)
    rungs = np.unique(np.quantile(needed, quantiles, method="higher"))
    return rungs, float(rungs[np.searchsorted(rungs, needed)].mean())


def assign(step: Sizes, shape: Shape) -> list[list[int]]:
    """Best fit, longest first: rows of places in the step, each within L, S and E of the shape.

    The order of the rows is mixed, so that no shard or microbatch gets the longest examples.
    """
    rows: list[list[int]] = []
    free_tokens, free_scored = np.empty(len(step.tokens), int), np.empty(len(step.tokens), int)
    for place in np.argsort(-step.tokens, kind="stable").tolist():
        tokens, scored = int(step.tokens[place]), int(step.scored[place])
        opened = len(rows)
        fits = (free_tokens[:opened] >= tokens) & (free_scored[:opened] >= scored)
        if fits.any():
            row = int(np.where(fits, free_tokens[:opened], np.iinfo(int).max).argmin())
        else:
            row = opened
            rows.append([])
            free_tokens[row], free_scored[row] = shape.tokens, shape.scored
        rows[row].append(place)
        free_tokens[row] -= tokens
        free_scored[row] -= scored
        if len(rows[row]) == shape.examples:
            free_tokens[row] = 0
    mixed = np.random.Generator(np.random.Philox(key=len(rows))).permutation(len(rows))
    return [rows[row] for row in mixed]


def batch(data: tokenise.Tokenised, plan: Plan, step: int) -> dict:
    """The batch of a training step, as `docs/design.md` lists it, NumPy arrays, and `index` int32
    [N] beside it.
    """
    return pack(data, plan, step_examples(len(data.prompts), plan.batch_size, plan.seed, step))


def evaluation_batches(data: tokenise.Tokenised, plan: Plan):
    """All examples once, in order, the last batch with empty slots of weight 0."""
    for start in range(0, len(data.prompts), plan.batch_size):
        yield pack(data, plan, np.arange(start, min(start + plan.batch_size, len(data.prompts))))


def pack(data: tokenise.Tokenised, plan: Plan, indices: np.ndarray) -> dict:
    """These examples in rows of the smallest shape of the ladder that holds them."""
    all_sizes = sizes(data, plan.scores_prompt)
    step = Sizes(all_sizes.tokens[indices], all_sizes.scored[indices])
    rows = assign(step, plan.ladder[-1])
    needed = _round_up(len(rows), plan.parts)
    # a step that needs more rows than any that was simulated has a shape of its own
    shape = next(
        (s for s in plan.ladder if s.rows >= needed), plan.ladder[-1]._replace(rows=needed)
    )
    members = [[int(indices[place]) for place in row] for row in rows]
    return _fill(data, members, shape, plan.scores_prompt)


def _fill(
    data: tokenise.Tokenised, rows: list[list[int]], shape: Shape, scores_prompt: bool
) -> dict:
    body = {
        k: np.zeros((shape.rows, shape.tokens), np.int32)
        for k in ("tokens", "example", "branch", "position")
    }
    scored = {
        k: np.zeros((shape.rows, shape.scored), np.int32) for k in ("source", "target", "slot")
    }
    slots = shape.rows * shape.examples
    index, weight = np.zeros(slots, np.int32), np.zeros(slots, np.float32)
    names: list[str] = sorted([*data.names, *([PROMPT] if scores_prompt else [])])
    length = {name: np.zeros(slots, np.int32) for name in names}
    for row, examples in enumerate(rows):
        at, at_scored = 0, 0
        for local, example in enumerate(examples):
            slot = row * shape.examples + local
            index[slot], weight[slot] = example, 1.0
            spans = dict(zip(data.names, data.completions[example], strict=True))
            at, sources = _write_example(data, example, local, row, at, body)
            if scores_prompt:
                # nothing stands before its first token
                spans[PROMPT] = data.prompts[example] + np.array([1, 0])
            for number, name in enumerate(names):
                first, stop = spans[name]
                length[name][slot] = stop - first
                there = slice(at_scored, at_scored + stop - first)
                scored["source"][row, there] = sources[name]
                scored["target"][row, there] = data.tokens[first:stop]
                scored["slot"][row, there] = local * len(names) + number + 1
                at_scored = there.stop
    columns = {
        name: np.where(weight > 0, values[index], 0).astype(np.float32)
        for name, values in data.columns.items()
    }
    return {**body, **scored, **columns, "length": length, "weight": weight, "index": index}


def _write_example(data, example, local, row, at, body) -> tuple[int, dict[str, np.ndarray]]:
    """Writes an example's prompt and completions from `at` on of a row.

    Returns where the next one goes, and by name which positions predict a completion's tokens, and
    the prompt's own from its second on.
    """
    first, stop = data.prompts[example]
    count = stop - first
    here = slice(at, at + count)
    body["tokens"][row, here] = data.tokens[first:stop]
    body["example"][row, here] = local + 1
    body["position"][row, here] = np.arange(count)
    last_of_prompt, sources = at + count - 1, {PROMPT: np.arange(at, at + count - 1)}
    for completion, name in enumerate(data.names):
        first, stop = data.completions[example, completion]
        at, length = here.stop, stop - first
        here = slice(at, at + length)
        body["tokens"][row, here] = data.tokens[first:stop]
        body["example"][row, here] = local + 1
        body["branch"][row, here] = completion + 1
        body["position"][row, here] = np.arange(count, count + length)
        sources[name] = np.arange(at - 1, at + length - 1)
        # the first token of every completion is predicted by the prompt's last
        sources[name][0] = last_of_prompt
    return here.stop, sources


def fill(batch: dict) -> dict[str, float]:
    """Shares of the positions and of the scored positions that hold a token."""
    return {
        "fill/tokens": float((batch["example"] > 0).mean()),
        "fill/scored": float((batch["slot"] > 0).mean()),
    }


def _round_up(number: float, multiple: int) -> int:
    return int(np.ceil(number / multiple)) * multiple

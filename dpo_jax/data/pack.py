"""Examples to fixed-shape rows: prefix-shared, packed, a pure function of (data, seed, step,
parts).

Dimensions: B rows, L tokens of a row, S scored tokens of a row, E examples of a row at most, C
completions of an example, N = B * E slots for examples.
"""

import dataclasses
import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np

from dpo_jax import config
from dpo_jax.data import epochs, fold, rows, steps, tokenise
from dpo_jax.data import ladder as data_ladder

# says which of so many rows of a batch are held here: bool [B]
Held = Callable[[int], np.ndarray]
# the name under which a prompt's own tokens are scored
PROMPT = "prompt"
# examples of the steps that are tried out while the shapes are chosen, and how many steps they are
SAMPLED_EXAMPLES = 24576
FEWEST_SAMPLED, MOST_SAMPLED = 16, 384
# among so many times as many steps the largest are looked for, this many by tokens and as many by
# scored tokens
LOOKED_THROUGH, LARGEST = 4, 4
# of the order in which they are tried out, and of evaluations, so that runs that differ in their
# own compile the same shapes, evaluate the same batches and go on with each other's tables
TRIED_SEED = 0


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the steps of a run are laid out in rows."""

    # examples of an evaluation's batch, and of a step where `starts` is None
    batch_size: int
    parts: int
    # of the examples; None: as the data have them, and no steps can be made
    order: epochs.Order | None
    # from cheap to dear
    ladder: tuple[rows.Shape, ...]
    # the prompts' own tokens are scored too, but for the first, as a completion PROMPT
    scores_prompt: bool = False
    # what 1, 2, ... shapes would fill
    curve: tuple[data_ladder.Fill, ...] = ()
    # places in the epochs' orders at which the steps start, and the last one's end, int64 [steps +
    # 1], where they are counted in tokens
    starts: np.ndarray | None = None
    # on which a row's tokens lie
    row_shards: int = 1


def plan(
    data: tokenise.Tokenised,
    batch_size: int,
    parts: int,
    seed: int,
    *,
    number: float = math.inf,
    scores_prompt: bool = False,
    row_shards: int = 1,
    balanced: bool = True,
) -> Plan:
    """Chooses the shapes for steps of so many examples, from the lengths alone, so that a typical
    step wastes least, and where they are balanced their examples too.

    `parts` is batch shards times microbatches; the rows of every shape are a multiple of it, and
    its tokens and scored tokens one of the shards over which a row lies. In a small number of
    steps, fewer shapes are worth compiling.
    With `scores_prompt`, the prompts' own tokens are scored too.
    """
    all_sizes = rows.sizes(data, scores_prompt)
    count = sampled_steps(batch_size)
    starts = steps.by_number(batch_size, count * LOOKED_THROUGH)
    if balanced:
        tried = epochs.balanced(data, batch_size, TRIED_SEED)
    else:
        tried = epochs.shuffled(data, TRIED_SEED)
    found = steps.sizes(all_sizes, starts, tried)
    if number * batch_size <= len(data.prompts):
        # a run that ends within the first epoch has no steps that straddle two
        inside = steps.within_epochs(starts, len(data.prompts))
        found = rows.Sizes(found.tokens[inside], found.scored[inside])
    sampled = rows.Sizes(found.tokens[:count], found.scored[:count])
    multiples = data_ladder.multiples(parts, row_shards)
    climbed = data_ladder.climb(sampled, multiples, most(all_sizes), number)
    climbed = data_ladder.widen(climbed, largest(found), multiples)
    shapes, curve = climbed
    order = dataclasses.replace(tried, seed=seed)
    return Plan(batch_size, parts, order, shapes, scores_prompt, curve, row_shards=row_shards)


def plan_by_tokens(
    data: tokenise.Tokenised,
    batch_tokens: int,
    parts: int,
    seed: int,
    number: int,
    *,
    scores_prompt: bool = False,
    row_shards: int = 1,
) -> Plan:
    """The same for a number of steps that take examples until at most so many positions are full.

    ValueError where that is too few for the longest example.
    """
    all_sizes = rows.sizes(data, scores_prompt)
    count = sampled_steps(round(batch_tokens / all_sizes.tokens.mean()))
    tried, order = (epochs.shuffled(data, one) for one in (TRIED_SEED, seed))

    def cut(limit: int) -> rows.Sizes:
        starts = steps.by_tokens(all_sizes.tokens, limit, TRIED_SEED, count)
        return steps.sizes(all_sizes, starts, tried)

    multiples = data_ladder.multiples(parts, row_shards)
    climbed, limit = data_ladder.climb_within(cut, batch_tokens, multiples, most(all_sizes), number)
    starts = steps.by_tokens(all_sizes.tokens, limit, seed, number)
    fewest = int(np.diff(starts).min())
    shapes, curve = climbed
    return Plan(fewest, parts, order, shapes, scores_prompt, curve, starts, row_shards)


def plan_run(
    data: tokenise.Tokenised,
    experiment: config.Experiment,
    parts: int,
    *,
    scores_prompt: bool = False,
    row_shards: int = 1,
) -> Plan:
    """The plan of a run's training steps, counted in examples or in tokens as it says."""
    size, seed, tokens = experiment.batch_size, experiment.seed, experiment.batch_tokens
    balanced = experiment.balance_steps
    run: Callable[..., Plan] = functools.partial(plan, data, size, balanced=balanced)
    if tokens is not None:
        run = functools.partial(plan_by_tokens, data, tokens)
    number = experiment.steps
    return run(parts, seed, number=number, scores_prompt=scores_prompt, row_shards=row_shards)


def sampled_steps(examples: int) -> int:
    """How many steps of so many examples are tried out."""
    return int(np.clip(SAMPLED_EXAMPLES // max(examples, 1), FEWEST_SAMPLED, MOST_SAMPLED))


def most(all_sizes: rows.Sizes) -> rows.Most:
    """Most tokens and most scored tokens of an example."""
    return rows.Most(int(all_sizes.tokens.max()), int(all_sizes.scored.max()))


def largest(found: rows.Sizes) -> list[rows.Sizes]:
    """The largest of the steps [n, b], by tokens and by scored tokens."""
    totals = np.stack([one.sum(axis=1) for one in found])
    numbers = np.unique(np.argsort(-totals, axis=1, kind="stable")[:, :LARGEST])
    return [rows.Sizes(found.tokens[one], found.scored[one]) for one in numbers]


def plan_within(
    longest: int, scored: int, batch_size: int, parts: int, row_shards: int = 1
) -> Plan:
    """A plan made before the examples are there: each has at most so many tokens and scored ones.

    Two of the largest fit into a row, so that no step needs more than half as many rows as
    examples.
    """
    multiples = data_ladder.multiples(parts, row_shards)
    tokens = data_ladder.round_up(2 * longest, multiples.tokens)
    scored = data_ladder.round_up(2 * scored, multiples.scored)
    counts = dict.fromkeys(data_ladder.round_up(batch_size / share, parts) for share in (8, 4, 2))
    shapes = (rows.Shape(count, tokens, scored, min(batch_size, 16)) for count in counts)
    return Plan(batch_size, parts, None, tuple(shapes), row_shards=row_shards)


def describe(plan: Plan, count: int, number: int) -> str:
    """What `number` steps take of `count` examples, the shapes and what they fill, for the
    terminal.
    """
    taken = plan.batch_size * number if plan.starts is None else int(plan.starts[number])
    shapes = ", ".join(f"{s.rows} x {s.tokens} ({s.scored})" for s in plan.ladder)
    curve = ", ".join(
        f"{used} {'shape' if used == 1 else 'shapes'} {one.tokens:.1%} ({one.scored:.1%})"
        for used, one in enumerate(plan.curve, 1)
    )
    return (
        f"{number} steps of {taken / number:.4g} examples: {taken / count:.3g} epochs\n"
        f"rows x tokens (of which scored) over {plan.parts} batch shards x microbatches: {shapes}\n"
        f"positions (scored positions) filled with {curve}; {len(plan.ladder)} worth compiling"
    )


def examples(plan: Plan, step: int) -> np.ndarray:
    """The examples of a step: int64 [b]; ValueError where the plan was made before them."""
    if plan.order is None:
        raise ValueError("a plan that was made before the examples has no steps of them")
    if plan.starts is None:
        first, last = step * plan.batch_size, (step + 1) * plan.batch_size
    else:
        first, last = plan.starts[step : step + 2].tolist()
    return epochs.between(plan.order, first, last)


def fingerprint(plan: Plan) -> str:
    """Content hash of which examples each step takes where they are counted in tokens."""
    starts = np.asarray(plan.starts, np.int64)
    return hashlib.blake2b(starts.tobytes(), digest_size=16).hexdigest()


def all_rows(count: int) -> np.ndarray:
    """Says that every row of a batch is held here: bool [B]."""
    return np.ones(count, bool)


def batch(data: tokenise.Tokenised, plan: Plan, step: int, held: Held = all_rows) -> dict:
    """The batch of a training step, as `docs/design.md` lists it, NumPy arrays, and `index` int32
    [N] beside it. Rows that are not held here stay empty: their tokens are not read.
    """
    return pack(data, plan, examples(plan, step), held)


def evaluation_batches(
    data: tokenise.Tokenised, plan: Plan, held: Held = all_rows
) -> Iterator[dict]:
    """All examples once, in an order that does not depend on the run's seed, the last batch with
    empty slots of weight 0.
    """
    count = len(data.prompts)
    order = np.arange(count)
    if plan.order is not None:
        order = epochs.between(dataclasses.replace(plan.order, seed=TRIED_SEED), 0, count)
    for start in range(0, count, plan.batch_size):
        yield pack(data, plan, order[start : start + plan.batch_size], held)


def pack(data: tokenise.Tokenised, plan: Plan, indices: np.ndarray, held: Held = all_rows) -> dict:
    """These examples in rows of the cheapest shape of the ladder that holds them."""
    step = rows.sizes(data, plan.scores_prompt, indices)
    for shape in itertools.chain(plan.ladder, own_shapes(plan, len(indices))):
        found = rows.assign(step, shape)
        if found is not None:
            members = [[int(indices[place]) for place in row] for row in found]
            filled = _fill(data, members, shape, plan.scores_prompt, held(shape.rows))
            return fold.fold(filled, plan.row_shards)
    raise ValueError(
        f"an example has {step.tokens.max()} tokens in a row, {step.scored.max()} of them scored, "
        f"and the plan was made for examples of at most {plan.ladder[-1]}"
    )


def empty(data: tokenise.Tokenised, shape: rows.Shape, *, scores_prompt: bool) -> dict:
    """A batch of this shape without any example: what one looks like."""
    return _fill(data, [], shape, scores_prompt, all_rows(shape.rows))


def own_shapes(plan: Plan, examples: int) -> Iterator[rows.Shape]:
    """Shapes for a step that no planned one holds: the largest with more rows, up to one for each
    example.
    """
    last = plan.ladder[-1]
    most = max(data_ladder.round_up(examples, plan.parts), last.rows + plan.parts)
    for count in range(last.rows + plan.parts, most + 1, plan.parts):
        yield last._replace(rows=count)


def _fill(
    data: tokenise.Tokenised,
    members: list[list[int]],
    shape: rows.Shape,
    scores_prompt: bool,
    held: np.ndarray,
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
    for row, inside in enumerate(members):
        at, at_scored, found = 0, 0, []
        for local, example in enumerate(inside):
            slot = row * shape.examples + local
            index[slot], weight[slot] = example, 1.0
            if not held[row]:
                continue
            spans = dict(zip(data.names, data.completions[example], strict=True))
            at, sources = _write_example(data, example, local, row, at, body)
            if scores_prompt:
                # nothing stands before its first token
                spans[PROMPT] = data.prompts[example] + np.array([1, 0])
            for number, name in enumerate(names):
                first, stop = spans[name]
                length[name][slot] = stop - first
                found.append((name, local * len(names) + number + 1, first, stop, sources[name]))
        # what has no gradient comes last, so that blocks of it are not differentiated
        found.sort(key=lambda one: one[0] == tokenise.MISMATCHED)
        for _, slot, first, stop, sources in found:
            there = slice(at_scored, at_scored + stop - first)
            scored["source"][row, there] = sources
            scored["target"][row, there] = data.tokens[first:stop]
            scored["slot"][row, there] = slot
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


def fill(data: tokenise.Tokenised, plan: Plan, batch: dict) -> dict[str, float]:
    """Shares of the positions and of the scored positions of all rows that hold a token."""
    found = rows.sizes(data, plan.scores_prompt, batch["index"][batch["weight"] > 0])
    return {
        "fill/tokens": float(found.tokens.sum() / batch["tokens"].size),
        "fill/scored": float(found.scored.sum() / batch["slot"].size),
    }

"""The shapes of a run, and what they fill on real data."""

import itertools
import time
from pathlib import Path

import numpy as np
import pytest

from dpo_jax import config
from dpo_jax.data import epochs, ladder, pack, rows, steps, tokenise, tokenizer

ONE = ladder.Multiples(1)


def settings(shared: Path, name: str, max_length: int, **changes) -> config.Data:
    return config.Data(
        source=str(shared / "data" / f"{name}.jsonl.gz"),
        tokenizer=str(shared / "tokenizers" / "neox-20b"),
        eos_token="<|endoftext|>",
        max_length=max_length,
        max_prompt_length=max_length // 2,
        bad_rows="drop",
        **changes,
    )


@pytest.fixture(scope="module")
def real(shared: Path) -> dict[str, tokenise.Tokenised]:
    """Pairs of both real files."""
    sources = {
        "hh": settings(shared, "hh_harmless_train", 512),
        "alpaca": settings(shared, "alpaca_eval_judged", 1024, form="judged"),
    }
    return {
        name: tokenise.load(one, tokenizer.load_tokenizer(one, None), "pairs")[0]
        for name, one in sources.items()
    }


def filled(data: tokenise.Tokenised, plan: pack.Plan, number: int) -> tuple[float, float]:
    """Mean fill of the first steps, none of which may need a shape of its own."""
    found = []
    for step in range(number):
        batch = pack.batch(data, plan, step)
        found.append(tuple(pack.fill(data, plan, batch).values()))
        shape = (*batch["tokens"].shape, batch["source"].shape[1])
        assert shape in [one[:3] for one in plan.ladder]
    tokens, scored = np.mean(found, axis=0)
    return float(tokens), float(scored)


@pytest.mark.parametrize(
    ("name", "batch_size", "parts"),
    [(name, *step) for name in ("hh", "alpaca") for step in [(8, 1), (64, 1), (64, 8), (512, 8)]],
)
def test_an_epoch_of_real_pairs_fills_95_percent_and_94_of_the_scored_positions(
    real, name, batch_size, parts
):
    data, count = real[name], len(real[name].prompts)
    plan = pack.plan(data, batch_size, parts, seed=0)
    number = -(-count // batch_size)
    tokens, scored = filled(data, plan, number)
    print(f"{name} {batch_size} x {parts}: {tokens:.1%}/{scored:.1%}")
    print(pack.describe(plan, count, number))
    assert tokens > 0.95 and scored > 0.94
    # what was foreseen comes true, but for the few steps of an epoch
    picked = plan.curve[len(plan.ladder) - 1]
    assert (tokens, scored) == pytest.approx(picked, abs=0.04)
    taken = [i for step in range(number) for i in pack.examples(plan, step).tolist()]
    assert sorted(taken[:count]) == list(range(count)) and len(taken) == number * batch_size


@pytest.mark.parametrize(
    ("name", "batch_tokens", "parts"),
    [("hh", 16384, 1), ("hh", 131072, 8), ("alpaca", 65536, 1), ("alpaca", 524288, 8)],
)
def test_steps_counted_in_tokens_fill_97_percent_with_real_pairs(real, name, batch_tokens, parts):
    data = real[name]
    number = -(-int(rows.sizes(data).tokens.sum()) // batch_tokens)
    plan = pack.plan_by_tokens(data, batch_tokens, parts, 0, number)
    tokens, scored = filled(data, plan, number)
    print(f"{name} {batch_tokens} x {parts}: {tokens:.1%}/{scored:.1%}")
    assert tokens > 0.97
    assert all(shape.rows * shape.tokens <= batch_tokens for shape in plan.ladder)


def test_the_time_of_a_plan_for_100000_examples_is_printed(real):
    found = rows.sizes(real["hh"])
    generator = np.random.default_rng(0)
    drawn = generator.integers(0, len(found.tokens), 100_000)
    prompts, scored = (found.tokens - found.scored)[drawn], found.scored[drawn]
    stops = np.cumsum(np.stack([prompts, scored], axis=1).ravel()).reshape(-1, 2)
    spans = np.stack([stops - np.stack([prompts, scored], axis=1), stops], axis=-1)
    data = tokenise.Tokenised(
        ("completion",), np.zeros(0, np.int32), spans[:, 0], spans[:, 1:], {}, "", {}
    )
    plans = {
        "64 x 1": lambda: pack.plan(data, 64, 1, 0),
        "512 x 8": lambda: pack.plan(data, 512, 8, 0),
        "16384 tokens": lambda: pack.plan_by_tokens(data, 16384, 1, 0, 1300),
        "131072 tokens x 8": lambda: pack.plan_by_tokens(data, 131072, 8, 0, 160),
    }
    for name, make in plans.items():
        started = time.process_time()
        plan = make()
        print(f"{name}: {time.process_time() - started:.2f} s of a core, {plan.ladder}")


def draw(count: int, examples: int) -> rows.Sizes:
    generator = np.random.default_rng(0)
    tokens = generator.integers(20, 200, (count, examples))
    return rows.Sizes(tokens, generator.integers(5, tokens))


def test_a_cost_is_that_of_its_rows():
    # 16384 tokens cost as much again in attention, and a scored position half of one
    assert ladder.cost(rows.Shape(3, 16384, 100, 9)) == 3 * (2 * 16384 + 50)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_what_is_picked_is_near_the_best_of_all_choices(count):
    generator = np.random.default_rng(count)
    needed = generator.normal(100, 10, (2, 40))
    shapes = [
        rows.Shape(1, int(a), int(b), 9) for a in range(80, 141, 15) for b in range(90, 141, 25)
    ]
    fits = np.array([(needed[0] <= one.tokens) & (needed[1] <= one.scored) for one in shapes])
    candidates = ladder.Candidates(shapes, np.array([ladder.cost(one) for one in shapes]), fits)
    least = min(
        ladder.step_costs(candidates, list(choice)).mean()
        for choice in itertools.combinations(range(len(shapes)), count)
    )
    picked = ladder.pick(candidates, count)
    assert len(picked) <= count
    assert least <= ladder.step_costs(candidates, picked).mean() <= 1.01 * least


def test_one_by_one_is_not_where_picking_ends():
    # halves and then a quarter are added first, and thirds are cheaper
    needed = np.arange(1, 100)
    shapes = [rows.Shape(1, int(tokens), 0, 9) for tokens in range(3, 100, 3)]
    fits = np.array([needed <= one.tokens for one in shapes])
    cost = np.array([float(one.tokens) for one in shapes])
    picked = ladder.pick(ladder.Candidates(shapes, cost, fits), 3)
    assert [shapes[one].tokens for one in picked] == [33, 66, 99]


def test_more_shapes_never_cost_more_and_every_sampled_step_fits_one():
    sampled = draw(60, 32)
    found = ladder.climb(sampled, ladder.Multiples(2), rows.Most(199, 198))
    assert all(shape.rows % 2 == 0 for shape in found.shapes)
    for step in map(rows.Sizes, *sampled):
        assert any(rows.assign(step, shape) for shape in found.shapes)
    fills = [one.tokens for one in found.curve]
    assert fills == sorted(fills)


def test_a_shape_is_taken_where_the_run_is_long_enough_to_be_worth_compiling_it():
    sampled, longest = draw(60, 8), rows.Most(199, 198)
    layouts = {
        number: ladder.climb(sampled, ONE, longest, number) for number in (1, 20, 100, 1000, 10**6)
    }
    counts = [len(found.shapes) for found in layouts.values()]
    assert counts == sorted(counts) and counts[:2] == [1, 1] and counts[-1] == 4
    # what is saved by the shapes that are taken is worth it, and by one more would not be
    costs = [1 / one.tokens for one in layouts[10**6].curve]
    assert all(found.curve == layouts[1].curve for found in layouts.values())
    for number, count in zip(layouts, counts, strict=True):
        if count > 1:
            assert number * (costs[count - 2] / costs[count - 1] - 1) > ladder.WORTH_A_COMPILE / 2
        if count < 4:
            assert number * (1 - costs[count] / costs[count - 1]) < ladder.WORTH_A_COMPILE * 2


def test_the_largest_shape_has_room_for_the_longest_example_though_no_step_has_it():
    found = ladder.climb(draw(20, 4), ladder.Multiples(4), rows.Most(901, 455))
    largest = found.shapes[-1]
    assert (largest.tokens, largest.scored) == (928, 464)


def test_steps_larger_than_those_sampled_widen_the_largest_shape_alone():
    found = ladder.climb(draw(20, 32), ONE, rows.Most(199, 198))
    for longer in ("tokens", "scored"):
        step = rows.Sizes(np.full(32, 150), np.full(32, 70))
        shape = found.shapes[-1]
        room = shape.rows * getattr(shape, longer) * 21 // 20 // 32
        step = step._replace(**{longer: np.full(32, room)})
        step = step._replace(tokens=np.maximum(step.tokens, step.scored + 1))
        assert not any(rows.assign(step, one) for one in found.shapes)
        wider = ladder.widen(found, [step], ONE)
        assert rows.assign(step, wider.shapes[-1]) and wider.shapes[:-1] == found.shapes[:-1]
    assert ladder.widen(found, [], ONE) == found


def test_a_step_ends_where_its_rows_are_full():
    all_sizes = rows.Sizes(*(one.ravel() for one in draw(1, 500)))

    def cut(limit: int) -> rows.Sizes:
        starts = steps.by_tokens(all_sizes.tokens, limit, 0, 40)
        return steps.sizes(all_sizes, starts, epochs.Order(500, 0))

    found, limit = ladder.climb_within(cut, 8192, ladder.Multiples(4), rows.Most(199, 198))
    assert 0.95 * 8192 < limit <= 8192
    assert all(shape.rows % 4 == 0 and shape.rows * shape.tokens <= 8192 for shape in found.shapes)
    assert found.curve[-1].tokens > 0.95

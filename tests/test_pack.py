import dataclasses

import numpy as np
import pytest

from dpo_jax import config, losses
from dpo_jax.data import epochs, ladder, pack, rows, tokenise

# prompt 11 12, chosen 21 22 23, rejected 31 (from elsewhere in the tokens); prompt 41, 51, 61 62
HAND = tokenise.Tokenised(
    names=("chosen", "rejected"),
    tokens=np.array([11, 12, 21, 22, 23, 41, 31, 51, 61, 62], np.int32),
    prompts=np.array([[0, 2], [5, 6]]),
    completions=np.array([[[2, 5], [6, 7]], [[7, 8], [8, 10]]]),
    columns={"desirable": np.array([0.5, 2.0], np.float32)},
    fingerprint="",
    report={},
)


def equal(first: dict, second: dict) -> bool:
    lengths = first["length"].keys() == second["length"].keys() and all(
        np.array_equal(first["length"][name], second["length"][name]) for name in first["length"]
    )
    rest = (name for name in first if name != "length")
    return lengths and all(np.array_equal(first[name], second[name]) for name in rest)


def indices(batch: dict) -> list[int]:
    """The examples of a batch, in ascending order."""
    return sorted(batch["index"][batch["weight"] > 0].tolist())


def spans_of(batch: dict, names: tuple[str, ...]) -> dict[tuple[int, int], list[list[int]]]:
    """(row, example) -> tokens of prompt and completions, read back from a batch."""
    found = {}
    for row in range(len(batch["tokens"])):
        for local in range(1, batch["example"][row].max() + 1):
            mine = batch["example"][row] == local
            parts = [mine & (batch["branch"][row] == b) for b in range(len(names) + 1)]
            found[row, local] = [batch["tokens"][row][part].tolist() for part in parts]
    return found


def seed_of(plan: pack.Plan) -> int:
    assert plan.order is not None
    return plan.order.seed


def test_seeds_of_a_sweep_have_the_same_shapes(draw_examples):
    data = draw_examples(200, seed=1, tokens=(1, 60))
    first, second = (pack.plan(data, 8, 2, seed=seed) for seed in (0, 5))
    assert first.ladder == second.ladder and (seed_of(first), seed_of(second)) == (0, 5)
    first, second = (pack.plan_by_tokens(data, 2048, 2, seed, 9) for seed in (0, 5))
    assert first.ladder == second.ladder and (seed_of(first), seed_of(second)) == (0, 5)


def test_a_batch_is_a_function_of_data_seed_step_and_parts(draw_examples):
    data = draw_examples(50, seed=1)
    plan = pack.plan(data, 8, 2, seed=3)
    first = pack.batch(data, plan, 5)
    for step in (0, 1, 6):  # nothing that was asked for before matters
        pack.batch(data, plan, step)
    copy = dataclasses.replace(data, tokens=data.tokens.copy())
    assert equal(first, pack.batch(copy, pack.plan(copy, 8, 2, seed=3), 5))
    assert not equal(first, pack.batch(data, plan, 6))
    assert not equal(first, pack.batch(data, pack.plan(data, 8, 2, seed=4), 5))


def test_a_run_takes_balanced_steps_or_a_plain_shuffle_as_it_says(draw_examples):
    data, run = draw_examples(100, tokens=(1, 60)), config.Experiment(config.Loss(losses.dpo), 20)
    run = run.replace(batch_size=8, seed=5)
    for order, experiment in (
        (epochs.balanced(data, 8, 5), run),
        (epochs.shuffled(data, 5), run.replace(balance_steps=False)),
        (epochs.shuffled(data, 5), run.replace(batch_tokens=2048)),
    ):
        plan = pack.plan_run(data, experiment, 1)
        taken = np.concatenate([pack.examples(plan, step) for step in range(15)])
        np.testing.assert_array_equal(taken, epochs.between(order, 0, len(taken)))


def test_a_run_within_an_epoch_has_no_shape_for_steps_that_straddle_two(draw_examples):
    data = draw_examples(1003, tokens=(1, 90))
    short, long = (pack.plan(data, 8, 1, 0, number=number) for number in (125, 126))
    sizes = rows.sizes(data)
    found = [sizes.tokens[pack.examples(short, step)].sum() for step in range(1000)]
    inside = max(total for step, total in enumerate(found) if (8 * step) % 1003 <= 995)
    # the uneven ones are larger, and the shapes of a run that has one hold them
    assert max(found) > 1.1 * inside
    most = [max(one.rows * one.tokens for one in plan.ladder) for plan in (short, long)]
    assert most[0] < 1.1 * inside and most[1] > 1.1 * inside


def test_a_plan_made_before_the_examples_has_no_steps():
    with pytest.raises(ValueError, match="made before the examples"):
        pack.examples(pack.plan_within(10, 5, 4, 1), 0)


def test_the_parts_change_the_rows_and_not_the_examples(draw_examples):
    data = draw_examples(50, seed=1)
    for step in range(8):
        one, four = (pack.batch(data, pack.plan(data, 8, p, seed=3), step) for p in (1, 4))
        assert indices(one) == indices(four)
        assert len(four["tokens"]) % 4 == 0


@pytest.mark.parametrize(("count", "batch_size"), [(24, 8), (20, 8), (7, 8), (3, 16), (1, 4)])
def test_step_s_has_the_examples_s_b_to_s_plus_1_b_of_the_epochs_end_to_end(
    draw_examples, count, batch_size
):
    data = draw_examples(count)
    plan = pack.plan(data, batch_size, 1, seed=9)
    order = epochs.balanced(data, batch_size, 9)
    for step in range(8):
        batch = pack.batch(data, plan, step)
        assert indices(batch) == sorted(
            epochs.between(order, step * batch_size, (step + 1) * batch_size).tolist()
        )
        assert sorted(set(batch["weight"].tolist())) in ([1.0], [0.0, 1.0])
        assert batch["weight"].sum() == batch_size


@pytest.mark.parametrize("row_shards", [2, 3, 8])
def test_tokens_and_scored_tokens_divide_over_the_shards_of_a_row(draw_examples, row_shards):
    data = draw_examples(100, tokens=(1, 40))
    plans = [
        pack.plan(data, 24, 2, seed=0, row_shards=row_shards),
        pack.plan_by_tokens(data, 4096, 2, 0, 10, row_shards=row_shards),
        pack.plan_within(70, 33, 24, 2, row_shards),
    ]
    for plan in plans:
        assert plan.row_shards == row_shards
        for shape in plan.ladder:
            assert shape.tokens % (8 * row_shards) == shape.scored % (8 * row_shards) == 0
            assert shape.tokens % 32 == shape.scored % 16 == 0
    assert all(shape.rows * shape.tokens <= 4096 for shape in plans[1].ladder)
    with pytest.raises(ValueError, match=r"2 rows .* of a multiple of 256 tokens take 512: raise"):
        pack.plan_by_tokens(data, 500, 2, 0, 10, row_shards=32)


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_the_rows_of_every_batch_are_a_multiple_of_the_parts(draw_examples, parts):
    data = draw_examples(100, tokens=(1, 40))
    plan = pack.plan(data, 24, parts, seed=0)
    batches = [pack.batch(data, plan, step) for step in range(10)]
    batches += pack.evaluation_batches(data, plan)
    assert all(len(batch["tokens"]) % parts == 0 for batch in batches)
    assert all(shape.rows % parts == 0 for shape in plan.ladder)


def test_the_layout_of_two_examples_in_one_row_token_by_token():
    shape = rows.Shape(rows=1, tokens=12, scored=9, examples=3)
    plan = pack.Plan(2, 1, None, (shape,))
    batch = pack.pack(HAND, plan, np.array([0, 1]))
    expected = {
        "tokens": [11, 12, 21, 22, 23, 31, 41, 51, 61, 62, 0, 0],
        "example": [1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0],
        "branch": [0, 0, 1, 1, 1, 2, 0, 1, 2, 2, 0, 0],
        "position": [0, 1, 2, 3, 4, 2, 0, 1, 1, 2, 0, 0],
        "source": [1, 2, 3, 1, 6, 6, 8, 0, 0],
        "target": [21, 22, 23, 31, 51, 61, 62, 0, 0],
        "slot": [1, 1, 1, 2, 3, 4, 4, 0, 0],
    }
    for name, values in expected.items():
        assert batch[name].tolist() == [values], name
        assert batch[name].dtype == np.int32
    per_example = {
        "weight": [1, 1, 0],
        "index": [0, 1, 0],
        "desirable": [0.5, 2, 0],
    }
    for name, values in per_example.items():
        assert batch[name].tolist() == values, name
    assert batch["length"]["chosen"].tolist() == [3, 1, 0]
    assert batch["length"]["rejected"].tolist() == [1, 2, 0]
    assert list(batch["length"]) == ["chosen", "rejected"]
    assert batch["length"]["chosen"].dtype == np.int32
    assert batch["weight"].dtype == np.float32
    assert pack.fill(HAND, plan, batch) == {"fill/tokens": 10 / 12, "fill/scored": 7 / 9}


def test_of_rows_that_are_not_held_here_no_token_is_read_and_the_others_are_the_same(
    draw_examples,
):
    data = draw_examples(60, tokens=(2, 12))
    plan = pack.plan(data, 16, 4, seed=3)
    whole = pack.batch(data, plan, 1)
    count = len(whole["tokens"])
    held = np.arange(count) % 4 == 1
    slots = np.repeat(held, len(whole["weight"]) // count)
    read = np.zeros(len(data.tokens), bool)
    for example in whole["index"][slots & (whole["weight"] > 0)]:
        for first, stop in (data.prompts[example], *data.completions[example]):
            read[first:stop] = True
    # what is not read may as well be another token
    hidden = dataclasses.replace(data, tokens=np.where(read, data.tokens, -1))
    part = pack.batch(hidden, plan, 1, lambda rows: np.arange(rows) % 4 == 1)
    for name in ("tokens", "example", "branch", "position", "source", "target", "slot"):
        np.testing.assert_array_equal(part[name][held], whole[name][held])
        assert not part[name][~held].any()
    for name, length in part["length"].items():
        np.testing.assert_array_equal(length[slots], whole["length"][name][slots])
    assert pack.fill(data, plan, part) == pack.fill(data, plan, whole)


def test_mismatched_completions_are_scored_behind_all_others_of_their_row():
    data = dataclasses.replace(HAND, names=("completion", "mismatched"))
    batch = pack.pack(data, pack.Plan(2, 1, None, (rows.Shape(1, 12, 9, 3),)), np.array([0, 1]))
    assert batch["source"].tolist() == [[1, 2, 3, 6, 1, 6, 8, 0, 0]]
    assert batch["target"].tolist() == [[21, 22, 23, 51, 31, 61, 62, 0, 0]]
    assert batch["slot"].tolist() == [[1, 1, 1, 3, 2, 4, 4, 0, 0]]
    # their place among the tokens stays
    assert batch["branch"].tolist() == [[0, 0, 1, 1, 1, 2, 0, 1, 2, 2, 0, 0]]


def test_a_row_without_examples_is_empty_throughout():
    shape = rows.Shape(rows=2, tokens=12, scored=9, examples=3)
    batch = pack.pack(HAND, pack.Plan(2, 2, None, (shape,)), np.array([0]))
    assert batch["weight"].tolist() == [1, 0, 0, 0, 0, 0]
    for name in ("tokens", "example", "branch", "position", "source", "target", "slot"):
        assert batch[name][0].any() and not batch[name][1].any(), name
    for name in ("chosen", "rejected"):
        assert not batch["length"][name][1:].any()
    assert not batch["desirable"][1:].any()


def test_a_batch_read_back_holds_the_tokens_of_its_examples(draw_examples):
    data = draw_examples(40, ("completion", "mismatched"), seed=2)
    plan = pack.plan(data, 16, 2, seed=0)
    batch = pack.batch(data, plan, 3)
    per_row = plan.ladder[0].examples
    for (row, local), parts in spans_of(batch, data.names).items():
        slot = row * per_row + local - 1
        example = batch["index"][slot]
        spans = [data.prompts[example], *data.completions[example]]
        assert parts == [data.tokens[start:stop].tolist() for start, stop in spans]
        assert batch["desirable"][slot] == data.columns["desirable"][example]


def test_every_completion_begins_with_what_the_prompts_last_token_predicts(draw_examples):
    data = draw_examples(40, seed=5)
    batch = pack.batch(data, pack.plan(data, 16, 1, seed=0), 0)
    starts = 0
    for row in range(len(batch["tokens"])):
        for place in np.flatnonzero(batch["slot"][row]):
            source = batch["source"][row, place]
            slot = int(batch["slot"][row, place])
            local, branch = (slot - 1) // 2 + 1, (slot - 1) % 2 + 1
            mine = batch["example"][row] == local
            if batch["slot"][row, place - 1] != slot or place == 0:
                prompt = np.flatnonzero(mine & (batch["branch"][row] == 0))
                completion = np.flatnonzero(mine & (batch["branch"][row] == branch))
                assert source == prompt.max()
                assert batch["target"][row, place] == batch["tokens"][row, completion.min()]
                starts += 1
            else:
                assert batch["branch"][row, source] == branch
                assert batch["target"][row, place] == batch["tokens"][row, source + 1]
    assert starts == 32


@pytest.mark.parametrize(("count", "batch_size", "parts"), [(20, 8, 2), (24, 8, 1), (3, 8, 4)])
def test_evaluation_visits_every_example_once_and_empty_slots_weigh_nothing(
    draw_examples, count, batch_size, parts
):
    data = draw_examples(count, ("completion", "mismatched"))
    plan = pack.plan(data, batch_size, parts, seed=7)
    batches = list(pack.evaluation_batches(data, plan))
    order = epochs.between(epochs.balanced(data, batch_size, 0), 0, count)
    expected = [order[first : first + batch_size] for first in range(0, count, batch_size)]
    assert [indices(batch) for batch in batches] == [sorted(one.tolist()) for one in expected]
    assert sorted(order.tolist()) == list(range(count))
    for batch in batches:
        empty = batch["weight"] == 0
        assert batch["weight"][~empty].tolist() == [1.0] * (~empty).sum()
        assert all(not values[empty].any() for values in batch["length"].values())
        assert not batch["desirable"][empty].any()
        slots = set(np.unique(batch["slot"])) - {0}
        assert max(slots) <= len(empty) // len(batch["tokens"]) * len(data.names)


def test_a_step_that_needs_more_rows_than_the_ladder_has_still_packs(draw_examples):
    data = draw_examples(40, seed=6)
    plan = pack.plan(data, 16, 2, seed=0)
    largest = plan.ladder[-1]
    short = dataclasses.replace(plan, ladder=(largest._replace(rows=2, tokens=32, scored=32),))
    batch = pack.batch(data, short, 0)
    assert indices(batch) == sorted(pack.examples(plan, 0).tolist())
    assert len(batch["tokens"]) > 2
    assert len(batch["tokens"]) % 2 == 0
    # no more than it needs: two rows fewer do not hold it
    step = rows.sizes(data, indices=pack.examples(plan, 0))
    fewer = rows.Shape(len(batch["tokens"]) - 2, 32, 32, largest.examples)
    assert rows.assign(step, fewer) is None


def test_an_example_that_no_row_of_the_plan_holds_is_an_error_with_its_size(draw_examples):
    data = draw_examples(4, tokens=(20, 30))
    plan = pack.plan_within(10, 5, 4, 1)
    with pytest.raises(ValueError, match=r"an example has \d+ tokens in a row, .* tokens=32"):
        pack.pack(data, plan, np.arange(4))


def test_a_plan_made_before_the_examples_holds_as_many_of_the_largest_as_it_says(draw_examples):
    data = draw_examples(48, ("completion",), tokens=(9, 9))
    plan = pack.plan_within(18, 9, 16, 2)
    for batch in pack.evaluation_batches(data, plan):
        assert batch["weight"].sum() == 16
        assert len(batch["tokens"]) in [shape.rows for shape in plan.ladder]


def test_a_batch_takes_the_cheapest_rung_that_holds_it():
    rungs = tuple(rows.Shape(number, 6, 6, 1) for number in (1, 2, 4))
    plan = pack.Plan(2, 1, None, rungs)
    assert len(pack.pack(HAND, plan, np.array([0]))["tokens"]) == 1
    assert len(pack.pack(HAND, plan, np.array([0, 1]))["tokens"]) == 2
    assert len(pack.pack(HAND, plan, np.array([0, 1, 0]))["tokens"]) == 4


def test_a_plan_has_few_shapes_and_says_what_fewer_and_more_would_fill(draw_examples):
    plan = pack.plan(draw_examples(500, tokens=(1, 60)), 16, 1, seed=0)
    assert 1 <= len(plan.ladder) <= ladder.MOST_SHAPES == len(plan.curve)
    costs = [ladder.cost(shape) for shape in plan.ladder]
    assert costs == sorted(set(costs))
    text = pack.describe(plan, 500, 125)
    assert text.startswith("125 steps of 16 examples: 4 epochs\n")
    largest = plan.ladder[-1]
    assert f"{largest.rows} x {largest.tokens} ({largest.scored})" in text
    assert f"4 shapes {plan.curve[3].tokens:.1%} ({plan.curve[3].scored:.1%})" in text


def by_tokens(data: tokenise.Tokenised, parts: int = 2, number: int = 40) -> pack.Plan:
    return pack.plan_by_tokens(data, 1024, parts, 5, number)


def starts(plan: pack.Plan) -> list[int]:
    assert plan.starts is not None
    return plan.starts.tolist()


@pytest.mark.parametrize("names", [("chosen", "rejected"), ("completion", "mismatched")])
def test_steps_counted_in_tokens_take_every_example_in_turn(draw_examples, names):
    data = draw_examples(90, names, tokens=(2, 30))
    plan = by_tokens(data)
    found = [pack.batch(data, plan, step) for step in range(40)]
    taken = [i for step in range(40) for i in pack.examples(plan, step).tolist()]
    assert taken == epochs.between(epochs.Order(90, 5), 0, len(taken)).tolist()
    for step, batch in enumerate(found):
        assert indices(batch) == sorted(pack.examples(plan, step).tolist())
        assert len(batch["tokens"]) % 2 == 0
    held = [batch["tokens"].size for batch in found]
    # none of the drawn steps needs a shape of its own
    assert max(held) <= 1024 and len({batch["tokens"].shape for batch in found}) <= 4
    # the examples that they take differ in number, and few would have found room in the last step
    assert len({batch["weight"].sum() for batch in found}) > 1
    assert np.mean([pack.fill(data, plan, batch)["fill/tokens"] for batch in found]) > 0.9


def test_steps_counted_in_tokens_are_a_function_of_data_seed_step_and_parts(draw_examples):
    data = draw_examples(90, tokens=(2, 30))
    plan, again = by_tokens(data), by_tokens(dataclasses.replace(data, tokens=data.tokens.copy()))
    assert plan.ladder == again.ladder and starts(plan) == starts(again)
    assert pack.fingerprint(plan) == pack.fingerprint(again)
    # of a plan made anew, as a resumed run makes it, without the steps before
    assert equal(pack.batch(data, plan, 7), pack.batch(data, again, 7))
    # a longer run begins with the same steps
    assert starts(by_tokens(data, number=60))[:41] == starts(plan)
    assert pack.fingerprint(by_tokens(data, parts=8)) != pack.fingerprint(plan)
    other_end = dataclasses.replace(plan, starts=np.array([*starts(plan)[:-1], 0]))
    assert pack.fingerprint(other_end) != pack.fingerprint(plan)


def test_an_example_longer_than_the_rows_of_batch_tokens_is_refused_with_what_is_needed(
    draw_examples,
):
    data = draw_examples(90, tokens=(2, 30))
    needed = 8 * ladder.round_up(rows.sizes(data).tokens.max(), 32)
    with pytest.raises(ValueError, match=rf"batch_tokens is 500, .* take {needed}: raise"):
        pack.plan_by_tokens(data, 500, 8, 0, 10)
    pack.plan_by_tokens(data, needed, 8, 0, 10)

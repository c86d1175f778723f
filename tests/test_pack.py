import dataclasses

import numpy as np
import pytest

from dpo_jax import config
from dpo_jax.data import pack, tokenise, tokenizer

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


def epochs_end_to_end(count: int, seed: int, epochs: int) -> list[int]:
    return [i for epoch in range(epochs) for i in pack.permutation(count, seed, epoch).tolist()]


def spans_of(batch: dict, names: tuple[str, ...]) -> dict[tuple[int, int], list[list[int]]]:
    """(row, example) -> tokens of prompt and completions, read back from a batch."""
    found = {}
    for row in range(len(batch["tokens"])):
        for local in range(1, batch["example"][row].max() + 1):
            mine = batch["example"][row] == local
            parts = [mine & (batch["branch"][row] == b) for b in range(len(names) + 1)]
            found[row, local] = [batch["tokens"][row][part].tolist() for part in parts]
    return found


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
    order = epochs_end_to_end(count, 9, 8 * batch_size // count + 1)
    for step in range(8):
        batch = pack.batch(data, plan, step)
        assert indices(batch) == sorted(order[step * batch_size : (step + 1) * batch_size])
        assert sorted(set(batch["weight"].tolist())) in ([1.0], [0.0, 1.0])
        assert batch["weight"].sum() == batch_size


def test_every_epoch_has_an_order_of_its_own_with_every_example_once():
    orders = [pack.permutation(30, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(30)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_the_rows_of_every_batch_are_a_multiple_of_the_parts(draw_examples, parts):
    data = draw_examples(100, tokens=(1, 40))
    plan = pack.plan(data, 24, parts, seed=0)
    batches = [pack.batch(data, plan, step) for step in range(10)]
    batches += pack.evaluation_batches(data, plan)
    assert all(len(batch["tokens"]) % parts == 0 for batch in batches)
    assert all(shape.rows % parts == 0 for shape in plan.ladder)


def test_the_layout_of_two_examples_in_one_row_token_by_token():
    shape = pack.Shape(rows=2, tokens=12, scored=9, examples=3)
    batch = pack.pack(HAND, pack.Plan(2, 2, 0, (shape,)), np.array([0, 1]))
    # the longer example is laid out first; which of the two rows is filled is mixed
    row = int(batch["example"].any(axis=1).argmax())
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
        assert batch[name][row].tolist() == values, name
        assert not batch[name][1 - row].any(), name
        assert batch[name].dtype == np.int32
    per_example = {
        "weight": [1, 1, 0],
        "index": [0, 1, 0],
        "desirable": [0.5, 2, 0],
    }
    for name, values in per_example.items():
        assert batch[name].reshape(2, 3)[row].tolist() == values, name
        assert not batch[name].reshape(2, 3)[1 - row].any(), name
    assert batch["length"]["chosen"].reshape(2, 3)[row].tolist() == [3, 1, 0]
    assert batch["length"]["rejected"].reshape(2, 3)[row].tolist() == [1, 2, 0]
    assert list(batch["length"]) == ["chosen", "rejected"]
    assert batch["length"]["chosen"].dtype == np.int32
    assert batch["weight"].dtype == np.float32
    assert pack.fill(batch) == {"fill/tokens": 10 / 24, "fill/scored": 7 / 18}


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
    plan = pack.plan(data, batch_size, parts, seed=0)
    batches = list(pack.evaluation_batches(data, plan))
    assert [i for batch in batches for i in indices(batch)] == list(range(count))
    for batch in batches:
        empty = batch["weight"] == 0
        assert batch["weight"][~empty].tolist() == [1.0] * (~empty).sum()
        assert all(not values[empty].any() for values in batch["length"].values())
        assert not batch["desirable"][empty].any()
        slots = set(np.unique(batch["slot"])) - {0}
        assert max(slots) <= len(empty) // len(batch["tokens"]) * len(data.names)


def test_nothing_exceeds_tokens_scored_and_examples_of_the_shape(draw_examples):
    data = draw_examples(300, tokens=(1, 30), seed=4)
    plan = pack.plan(data, 32, 1, seed=0)
    all_sizes = pack.sizes(data)
    tight = plan.ladder[-1]._replace(examples=2)
    for step in range(20):
        chosen = pack.step_examples(300, 32, 0, step)
        sizes = pack.Sizes(all_sizes.tokens[chosen], all_sizes.scored[chosen])
        for shape in (plan.ladder[-1], tight):
            rows = pack.assign(sizes, shape)
            assert sorted(place for row in rows for place in row) == list(range(32))
            assert all(sizes.tokens[row].sum() <= shape.tokens for row in rows)
            assert all(sizes.scored[row].sum() <= shape.scored for row in rows)
            assert max(map(len, rows)) <= shape.examples
    assert max(map(len, rows)) == 2  # the last ones: the limit was met


def test_scored_tokens_alone_can_close_a_row():
    sizes = pack.Sizes(np.array([4, 4, 4]), np.array([3, 3, 3]))
    rows = pack.assign(sizes, pack.Shape(rows=0, tokens=100, scored=6, examples=9))
    assert sorted(map(len, rows)) == [1, 2]


def test_a_step_that_needs_more_rows_than_the_ladder_has_still_packs(draw_examples):
    data = draw_examples(40, seed=6)
    plan = pack.plan(data, 16, 2, seed=0)
    largest = plan.ladder[-1]
    short = dataclasses.replace(plan, ladder=(largest._replace(rows=2, tokens=32, scored=32),))
    batch = pack.batch(data, short, 0)
    assert indices(batch) == sorted(pack.step_examples(40, 16, 0, 0).tolist())
    assert len(batch["tokens"]) > 2
    assert len(batch["tokens"]) % 2 == 0


def test_a_batch_takes_the_smallest_rung_that_holds_it():
    rungs = tuple(pack.Shape(rows, 6, 6, 1) for rows in (1, 2, 4))
    plan = pack.Plan(2, 1, 0, rungs)
    assert len(pack.pack(HAND, plan, np.array([0]))["tokens"]) == 1
    assert len(pack.pack(HAND, plan, np.array([0, 1]))["tokens"]) == 2
    assert len(pack.pack(HAND, plan, np.array([0, 1, 0]))["tokens"]) == 4


def test_a_plan_has_few_shapes_that_differ_in_rows_alone(draw_examples):
    plan = pack.plan(draw_examples(500, tokens=(1, 60)), 16, 1, seed=0)
    assert 1 <= len(plan.ladder) <= pack.LADDER
    assert len({shape[1:] for shape in plan.ladder}) == 1
    rows = [shape.rows for shape in plan.ladder]
    assert rows == sorted(set(rows))


def test_rows_of_real_pairs_are_over_85_percent_full(shared):
    settings = config.Data(
        source=str(shared / "data" / "hh_harmless_train.jsonl.gz"),
        tokenizer=str(shared / "tokenizers" / "neox-20b"),
        eos_token="<|endoftext|>",
        max_length=512,
        max_prompt_length=256,
        bad_rows="drop",
    )
    data, _ = tokenise.load(settings, tokenizer.load_tokenizer(settings, None), "pairs")
    plan = pack.plan(data, 64, 1, seed=0)
    fills = [pack.fill(pack.batch(data, plan, step)) for step in range(20)]
    assert np.mean([fill["fill/tokens"] for fill in fills]) > 0.85

"""What is read of a source for each side, and how often."""

import collections
import json

from dpo_jax import config
from dpo_jax.data import sides


def write(folder, rows):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "rows.jsonl")


def pairs(count):
    return [{"prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(count)]


def read(side):
    drops = collections.Counter()
    return [example.prompt for example in side.read(drops)], dict(drops)


def test_a_side_gives_the_same_examples_and_counts_each_time_that_it_is_read(tmp_path):
    rows = [*pairs(3), {"prompt": "p", "chosen": "", "rejected": "r"}, *pairs(5)[3:]]
    data = config.Data(source=write(tmp_path, rows), bad_rows="drop", held_out=2)
    for side in sides.sides(data, "pairs").values():
        first = read(side)
        assert read(side) == first and len(first[0]) == {4: 3, 2: 2}[side.rows]


def test_bad_rows_count_for_the_training_side_alone_and_none_of_them_is_held_out(tmp_path):
    bad = {"prompt": "p", "chosen": "", "rejected": "r"}
    rows = [row for pair in pairs(6) for row in (pair, bad)]
    data = config.Data(source=write(tmp_path, rows), bad_rows="drop", held_out=2)
    found = sides.sides(data, "pairs")
    (train, drops), (held, none) = read(found["train"]), read(found["held_out"])
    assert drops == {"empty completion": 6} and none == {}
    assert (found["train"].rows, found["held_out"].rows) == (10, 2)
    assert sorted(train + held) == [f"p{i}" for i in range(6)] and len(held) == 2


def test_examples_are_read_one_after_the_other(tmp_path):
    data = config.Data(source=write(tmp_path, [*pairs(2), {"prompt": "p"}]))
    found = sides.sides(data, "unpaired")["train"].read(collections.Counter())
    # the third row is one that stops a run
    assert [next(found).where.rpartition(":")[2] for _ in range(4)] == ["1", "1", "2", "2"]

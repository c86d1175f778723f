import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import config, logps, paths, reference, sharding, tables, train_step
from dpo_jax.data import epochs, pack, tokenise
from dpo_jax.model import decoder
from dpo_jax.model.presets import PRESETS

MODEL = decoder.Decoder(PRESETS["tiny"])
score = functools.partial(logps.score, MODEL)


@pytest.fixture(scope="module")
def params(draw_params) -> dict:
    return draw_params(MODEL.config)


@pytest.fixture(scope="module")
def data(draw_examples):
    return draw_examples(20, seed=1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_JAX_CACHE", str(tmp_path))
    return tmp_path


def load(params, data, model=MODEL, batch_size=8, params_hash=None) -> reference.Table:
    mesh = sharding.make_mesh(config.Mesh(), jax.devices()[:1])
    plan = pack.plan(data, batch_size, 1, seed=0)
    params_hash = params_hash or reference.fingerprint(params)
    return reference.load_table(model, params, params_hash, data, plan, mesh)


class Counter:
    """Stands for the scoring of all data, and counts how often it runs."""

    def __init__(self, monkeypatch, data):
        self.runs = 0
        self.table = {name: np.arange(len(data.prompts), dtype=np.float32) for name in data.names}
        monkeypatch.setattr(reference, "_score_all", self)

    def __call__(self, *_):
        self.runs += 1
        return self.table


@pytest.fixture
def counter(monkeypatch, data) -> Counter:
    return Counter(monkeypatch, data)


def test_the_cached_log_probabilities_are_those_of_live_scoring(params, data):
    table = load(params, data)
    assert set(table) == {"chosen", "rejected"}
    plan, held = pack.plan(data, 12, 1, seed=3), train_step.Held({}, params)

    def score_held(params, held: train_step.Held, batch: dict):
        return score(params, batch)

    live, seen = jax.jit(functools.partial(reference.live, score_held)), set()
    for step in range(3):
        host = reference.with_table(pack.batch(data, plan, step), table)
        filled = host["weight"] > 0
        seen |= set(host["index"][filled].tolist())
        batch = {name: value for name, value in host.items() if name != "index"}
        expected, found = live(held, batch), reference.cached(held, batch)
        for name in data.names:
            np.testing.assert_allclose(
                found[name].total[filled], np.asarray(expected[name].total)[filled], rtol=1e-5
            )
            np.testing.assert_array_equal(found[name].length, expected[name].length)
            assert not found[name].total[~filled].any()
            assert found[name].total.dtype == np.float32
    assert seen == set(range(20))


def test_the_second_load_reads_what_the_first_computed(params, data, counter):
    first = load(params, data)
    second = load(params, data, batch_size=4)
    assert counter.runs == 1
    for name in data.names:
        np.testing.assert_array_equal(second[name], first[name])
        np.testing.assert_array_equal(second[name], counter.table[name])


def test_other_weights_data_model_or_compute_type_are_computed_anew(
    params, data, counter, draw_examples, draw_params
):
    load(params, data)
    load(draw_params(MODEL.config, seed=2), data)
    load(params, draw_examples(20, seed=2))
    load(params, data, decoder.Decoder(PRESETS["tiny"], dtype=jax.numpy.bfloat16))
    load(params, data, decoder.Decoder(PRESETS["reviews-500k"]))
    assert counter.runs == 5
    load(params, data)
    assert counter.runs == 5


def test_a_table_that_was_interrupted_is_computed_again(params, data, counter, own_cache):
    load(params, data)
    (done,) = own_cache.glob("reference/*/DONE")
    done.unlink()
    load(params, data)
    assert counter.runs == 2
    assert done.exists()


def test_done_is_written_after_the_tables(params, data, counter, monkeypatch):
    written = []

    def record(write):
        return lambda path, content: (written.append(path.rsplit("/", 1)[1]), write(path, content))

    monkeypatch.setattr(paths, "write_text", record(paths.write_text))
    monkeypatch.setattr(paths, "write_bytes", record(paths.write_bytes))
    load(params, data)
    assert written[:3] == ["chosen.npy", "rejected.npy", "DONE"]


class Killed(BaseException):
    """Stands for the end of the process."""


class Batches:
    """Watches the batches that are scored: their examples, and what is done before one of them."""

    def __init__(self, monkeypatch):
        self.scored: list[list[int]] = []
        self.before: dict[int, Callable] = {}
        self.put = sharding.put_batch
        monkeypatch.setattr(sharding, "put_batch", self)

    def __call__(self, batch, mesh):
        act = self.before.pop(len(self.scored), None)
        if act is not None:
            act()
        self.scored.append(sorted(batch["index"][batch["weight"] > 0].tolist()))
        return self.put(batch, mesh)

    def die(self):
        raise Killed


@pytest.fixture
def batches(monkeypatch) -> Batches:
    monkeypatch.setattr(reference, "PART", 2)
    return Batches(monkeypatch)


@pytest.fixture
def quick(monkeypatch):
    """Scores by the tokens of a batch alone, which compiles at once."""

    def score(model, params, batch, *, statistics):
        slots = len(batch["weight"])
        total = batch["weight"] * batch["tokens"].sum() * 0.1 + jnp.arange(slots)
        return {name: logps.Logps(total, n, {}) for name, n in batch["length"].items()}

    monkeypatch.setattr(logps, "score", score)


def two_shards(params, data, batch_size=4) -> reference.Table:
    """The table from a mesh with two batch shards."""
    mesh = sharding.make_mesh(config.Mesh(fsdp=2), jax.devices()[:2])
    plan = pack.plan(data, batch_size, 2, seed=0)
    placed = sharding.place(params, mesh)
    return reference.load_table(MODEL, placed, "two shards", data, plan, mesh)


def copied(table: reference.Table) -> reference.Table:
    return {name: np.array(values) for name, values in table.items()}


def parts_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("reference/*/part-*.npy"))


def batches_of(data: tokenise.Tokenised, size: int = 4) -> list[list[int]]:
    """The examples of each batch, in the order in which they are scored."""
    order = epochs.between(epochs.balanced(data, size, 0), 0, 20)
    return [sorted(order[start : start + size].tolist()) for start in range(0, 20, size)]


def test_a_table_killed_in_the_middle_goes_on_bit_for_bit_over_a_mesh(
    params, data, batches, own_cache, capsys
):
    whole = copied(two_shards(params, data))
    assert batches.scored == batches_of(data)
    assert not parts_of(own_cache)
    (own_cache / "reference").rename(own_cache / "before")
    # two batches are in the first part, and the third is lost with the process
    batches.before[5 + 3] = batches.die
    with pytest.raises(Killed):
        two_shards(params, data)
    assert len(parts_of(own_cache)) == 1 and not list(own_cache.glob("reference/*/DONE"))
    batches.scored.clear()
    capsys.readouterr()
    resumed = two_shards(params, data)
    assert batches.scored == batches_of(data)[2:]
    assert "scoring 20 examples with the reference, once, 8 of which are" in capsys.readouterr().out
    assert set(resumed) == set(whole)
    for name, values in whole.items():
        assert type(resumed[name]) is np.memmap
        np.testing.assert_array_equal(resumed[name], values)
    assert not parts_of(own_cache)


def kill(params, data, batches, at: int, batch_size: int = 4) -> None:
    batches.before[at] = batches.die
    with pytest.raises(Killed):
        load(params, data, batch_size=batch_size)
    batches.scored.clear()


def test_a_half_written_part_is_scored_again(params, data, batches, quick, own_cache):
    kill(params, data, batches, 4)
    first, second = parts_of(own_cache)
    examples = batches_of(data)
    (cut,) = (path for path in (first, second) if examples[2][0] in np.load(path)["index"])
    cut.write_bytes(cut.read_bytes()[:-1])
    resumed = copied(load(params, data, batch_size=4))
    assert batches.scored == examples[2:]
    (own_cache / "reference").rename(own_cache / "before")
    whole = load(params, data, batch_size=4)
    for name, values in whole.items():
        np.testing.assert_array_equal(resumed[name], values)


def test_a_table_killed_before_done_is_not_scored_again(params, data, batches, quick, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(tables, "finish", lambda *_: batches.die())
        with pytest.raises(Killed):
            load(params, data, batch_size=4)
    batches.scored.clear()
    assert len(load(params, data, batch_size=4)["chosen"]) == 20
    assert batches.scored == []


def test_another_batch_size_goes_on_too(params, data, batches, quick):
    kill(params, data, batches, 3)
    load(params, data, batch_size=5)
    known = {one for batch in batches_of(data)[:2] for one in batch}
    unknown = [batch for batch in batches_of(data, 5) if not known.issuperset(batch)]
    assert batches.scored == unknown
    # some of which have examples that are known
    assert any(known.intersection(batch) for batch in unknown)


@pytest.mark.parametrize("batch_size", [4, 5])
def test_two_processes_may_fill_one_table_at_once(
    params, data, batches, quick, own_cache, batch_size
):
    alone = {}
    for size in {4, batch_size}:
        alone[size] = copied(load(params, data, batch_size=size))
        (own_cache / "reference").rename(own_cache / f"before {size}")
    batches.scored.clear()
    seen = []

    def other():
        batches.scored = []
        seen.append(load(params, data, batch_size=batch_size))

    # the other has started, scored the rest and finished before this one's fourth batch
    batches.before[3] = other
    found = load(params, data, batch_size=4)
    for name, values in found.items():
        # each number is what one of the two gets alone
        first, second = alone[4][name], alone[batch_size][name]
        assert ((values == first) | (values == second)).all()
        (early, *_), late = batches_of(data), batches_of(data)[-1]
        if batch_size == 4:  # of 5, every batch has an example that the other must score
            np.testing.assert_array_equal(values[early], first[early])
        np.testing.assert_array_equal(values[late], second[late])
        np.testing.assert_array_equal(values, seen[0][name])
    assert not parts_of(own_cache)


def test_how_far_the_scoring_is_is_printed_now_and_then(
    params, data, batches, quick, monkeypatch, capsys
):
    monkeypatch.setattr(reference, "EVERY", 0)
    load(params, data, batch_size=4)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("scoring 20 examples with the reference, once: ")
    assert [line.split(" examples")[0] for line in lines[1:]] == [
        *("scored 8 of 20", "scored 16 of 20", "scored 20 of 20")
    ]
    load(params, data, batch_size=4)
    assert capsys.readouterr().out == ""


def test_a_table_in_a_remote_cache_goes_on_and_is_read_whole(
    params, data, batches, quick, monkeypatch, tmp_path
):
    monkeypatch.setenv("DPO_JAX_CACHE", f"memory://{tmp_path.name}")
    kill(params, data, batches, 3)
    table = load(params, data, batch_size=4)
    assert batches.scored == batches_of(data)[2:]
    assert type(table["chosen"]) is np.ndarray


def test_a_batch_reads_only_its_own_rows():
    read = []

    class Column(np.ndarray):
        def __getitem__(self, index):
            read.append(index)
            return np.asarray(self)[index]

        def __array__(self, *_, **__):
            raise AssertionError("the whole column is read")

    column = np.arange(100, dtype=np.float32).view(Column)
    batch = {"index": np.array([7, 3]), "weight": np.ones(2, np.float32)}
    found = reference.with_table(batch, {"chosen": column})["reference"]["chosen"]
    assert found.tolist() == [7, 3]
    assert [index.tolist() for index in read] == [[7, 3]]


def test_the_fingerprint_goes_by_names_shapes_types_and_numbers():
    base = {"a": np.arange(6, dtype=np.float32)}
    others = [
        {"b": base["a"]},
        {"a": base["a"].reshape(2, 3)},
        {"a": base["a"].astype(np.float16)},
        {"a": base["a"] + np.array([0, 0, 0, 0, 0, 1e-6], np.float32)},
    ]
    found = [reference.fingerprint(params) for params in [base, *others]]
    assert len(set(found)) == 5
    assert reference.fingerprint({"a": jax.numpy.asarray(base["a"])}) == found[0]


def test_the_fingerprint_stays_what_it_was_when_tables_were_written():
    params = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": {"c": np.ones(4, np.float32)}}
    assert reference.fingerprint(params) == "c99d587274d7c62c2a4364db6ad025b0"


def test_the_fingerprint_does_not_depend_on_the_mesh(params):
    mesh = sharding.make_mesh(config.Mesh(data=2, tensor=2), jax.devices())
    placed = sharding.place(params, mesh)
    assert reference.fingerprint(placed) == reference.fingerprint(params)


def test_a_batch_gets_the_totals_of_its_examples_and_zeros_in_empty_slots():
    batch = {"index": np.array([2, 0, 0]), "weight": np.array([1, 1, 0], np.float32)}
    table = {"chosen": np.array([-1, -2, -3], np.float32)}
    found = reference.with_table(batch, table)
    assert found["reference"]["chosen"].tolist() == [-3, -1, 0]
    assert found["index"] is batch["index"]
    assert reference.with_table(batch, None) is batch


def test_without_a_reference_there_is_none():
    assert reference.none(train_step.Held({}), {}) is None

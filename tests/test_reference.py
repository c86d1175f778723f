import functools

import jax
import numpy as np
import pytest

from dpo_jax import config, logps, paths, reference, sharding, train_step
from dpo_jax.data import pack
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

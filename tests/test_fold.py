"""The order of a row's tokens on several shards."""

import dataclasses

import numpy as np
import pytest

from dpo_jax.data import fold, pack
from dpo_jax.model import attention, blocks
from dpo_jax.model.attention import Ids


def ids(batch: dict) -> Ids:
    return Ids(*(batch[name] for name in Ids._fields))


@pytest.fixture(scope="module")
def plan_and_data(draw_examples):
    data = draw_examples(64, tokens=(20, 60))
    return pack.plan(data, 8, 2, seed=0, row_shards=4), data


@pytest.fixture
def folded(plan_and_data, monkeypatch) -> tuple[dict, dict]:
    """A batch as it was, and with folded rows."""
    plan, data = plan_and_data
    plain = pack.batch(data, plan, 0)
    monkeypatch.setattr(fold, "CHUNK", 8)
    return plain, pack.batch(data, plan, 0)


def test_each_shard_has_a_chunk_from_either_end():
    assert fold.order(8, 2).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    assert fold.order(12, 3).tolist() == [0, 1, 10, 11, 2, 3, 8, 9, 4, 5, 6, 7]
    # of an odd share, the chunk from the end is the longer one
    assert fold.order(6, 2).tolist() == [0, 4, 5, 1, 2, 3]
    with pytest.raises(ValueError, match="7 tokens do not divide over 2 shards"):
        fold.order(7, 2)


def test_what_is_scored_points_at_the_same_tokens(folded):
    plain, moved = folded
    assert not np.array_equal(plain["tokens"], moved["tokens"])
    for name in ("tokens", "example", "branch", "position"):
        np.testing.assert_array_equal(
            np.take_along_axis(moved[name], moved["source"], axis=1),
            np.take_along_axis(plain[name], plain["source"], axis=1),
        )
    for name in ("target", "slot", "weight"):
        np.testing.assert_array_equal(moved[name], plain[name])
    assert moved["source"].dtype == np.int32


def test_every_token_sees_what_it_saw(folded):
    plain, moved = folded
    taken = fold.order(plain["tokens"].shape[1], 4)
    before = np.asarray(attention.visible(ids(plain), ids(plain), None))
    after = np.asarray(attention.visible(ids(moved), ids(moved), None))
    np.testing.assert_array_equal(after, before[:, taken][:, :, taken])


def test_rows_of_short_chunks_and_of_one_shard_stay_as_they_are(plan_and_data):
    plan, data = plan_and_data
    short = pack.batch(data, plan, 0)
    assert short["tokens"].shape[1] < 2 * 4 * fold.CHUNK
    alone = pack.batch(data, dataclasses.replace(plan, row_shards=1), 0)
    np.testing.assert_array_equal(short["tokens"], alone["tokens"])
    batch = {"tokens": np.zeros((1, 2 * fold.CHUNK))}
    assert fold.fold(batch, 1) is batch


def test_of_one_long_pair_shards_compute_about_as_many_pairs_of_blocks():
    prompt, completion, shards = 10240, 3072, 4
    length = prompt + 2 * completion
    branch = np.repeat([0, 1, 2], [prompt, completion, completion])
    behind = prompt + np.arange(completion)
    position = np.concatenate([np.arange(prompt), behind, behind])
    whole = Ids(*np.stack([np.ones(length), branch, position]).astype(np.int32)[:, None])

    def counts(order: np.ndarray) -> np.ndarray:
        ordered = Ids(*(array[:, order] for array in whole))
        keys, found = blocks.cut_ids(ordered, 128), []
        for part in np.split(np.arange(length), shards):
            queries = blocks.cut_ids(Ids(*(array[:, part] for array in ordered)), 128)
            found.append(np.asarray(blocks.find_needed(queries, keys, 1, None)).sum())
        return np.array(found)

    plain, folded = counts(np.arange(length)), counts(fold.order(length, shards))
    assert plain.sum() == folded.sum()
    assert plain.max() > 1.4 * plain.mean()
    assert folded.max() < 1.1 * folded.mean()

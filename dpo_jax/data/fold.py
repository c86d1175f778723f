"""The order of a row's tokens where it lies on several shards: from the first on and from the last
back, so that each has tokens that see few others and tokens that see many.

What a token may see is told by its example, branch and position, so that any order is right. A row
is cut into twice as many chunks as shards, of which each shard has one from either end, as in
section 3.3.2 of https://arxiv.org/abs/2407.21783.

Dimensions: B rows, L tokens of a row, S scored tokens of a row.
"""

import numpy as np

# tokens of a chunk, at least: shorter ones cut through blocks of attention, and rows that hold them
# hold examples so short that their shards are about equal
CHUNK = 512


def fold(batch: dict, shards: int) -> dict:
    """The batch with the tokens of its rows in that order, where chunks are long enough."""
    length = batch["tokens"].shape[1]
    if shards == 1 or length < 2 * shards * CHUNK:
        return batch
    taken = order(length, shards)
    place = np.empty_like(taken)
    place[taken] = np.arange(length)
    moved = {name: batch[name][:, taken] for name in ("tokens", "example", "branch", "position")}
    return {**batch, **moved, "source": place[batch["source"]].astype(np.int32)}


def order(length: int, shards: int) -> np.ndarray:
    """Which token of a row stands at each place: int64 [L]; ValueError where shards do not divide
    it.
    """
    if length % shards:
        raise ValueError(f"{length} tokens do not divide over {shards} shards")
    front = length // (2 * shards)
    back = length // shards - front
    first = np.arange(front * shards).reshape(shards, front)
    last = np.arange(front * shards, length).reshape(shards, back)[::-1]
    return np.concatenate([first, last], axis=1).reshape(-1)

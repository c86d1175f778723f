"""Where a loss's reference log-probabilities come from: a second model, a table that was computed
once, or nowhere.

Dimensions: N examples of a batch or of the data.
"""

import hashlib
import io
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import logps, paths, sharding
from dpo_jax.data import pack, tokenise
from dpo_jax.model import decoder

# bumped when what a table holds changes
VERSION = 1

Table = dict[str, np.ndarray]


class LaidOut(NamedTuple):
    """Examples, their layout, and the reference's log-probabilities where they are cached."""

    data: tokenise.Tokenised
    plan: pack.Plan
    table: Table | None


def live(score, params, batch: dict) -> dict[str, logps.Logps]:
    """Scores the batch with the reference's own parameters; no gradient passes."""
    return jax.lax.stop_gradient(score(params, batch))


def cached(params: None, batch: dict) -> dict[str, logps.Logps]:
    """Reads what `with_table` put into the batch."""
    return {
        name: logps.Logps(total, batch["length"][name])
        for name, total in batch["reference"].items()
    }


def none(params: None, batch: dict) -> None:
    """For losses without a reference."""


def with_table(batch: dict, table: Table | None) -> dict:
    """The host batch with its examples' reference totals {name: [N]}, 0 in empty slots."""
    if table is None:
        return batch
    filled = batch["weight"] > 0
    totals = {
        name: np.where(filled, totals[batch["index"]], 0).astype(np.float32)
        for name, totals in table.items()
    }
    return {**batch, "reference": totals}


def fingerprint(params) -> str:
    """Content hash of parameters: names, shapes, types, and two checksums of each array's bits.

    The checksums are integers, summed where the arrays lie, so that no array moves and the hash is
    the same on every mesh.
    """
    content = hashlib.blake2b(digest_size=16)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        content.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
        content.update(np.asarray(checksums(leaf)).tobytes())
    return content.hexdigest()


@jax.jit
def checksums(array: jax.Array) -> jax.Array:
    """Sums modulo 2^32 of the bits, mixed with each number's place: uint32 [2]."""
    bits = jax.lax.bitcast_convert_type(array.astype(jnp.float32), jnp.uint32)
    place = jnp.zeros(array.shape, jnp.uint32)
    for axis, size in enumerate(array.shape):
        place = place * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
    odd = place * np.uint32(2654435769) * np.uint32(2) + np.uint32(1)
    mixed = bits ^ (bits >> np.uint32(15)) ^ odd
    return jnp.stack([jnp.sum(bits * odd), jnp.sum(mixed * mixed * odd)])


def load_table(
    model: decoder.Decoder,
    params,
    params_hash: str,
    data: tokenise.Tokenised,
    plan: pack.Plan,
    mesh,
) -> Table:
    """Total log-probability of every completion of the data, {name: float32 [N]}, computed once and
    kept on disk.

    Kept under a hash of the weights, the tokenised data, the model's config and the compute type.
    """
    identity = [
        VERSION,
        params_hash,
        data.fingerprint,
        repr(model.config),
        str(np.dtype(model.dtype)),
    ]
    name = hashlib.blake2b(json.dumps(identity).encode(), digest_size=16).hexdigest()
    folder = paths.join(paths.cache_folder(), "reference", name)
    if not paths.exists(paths.join(folder, "DONE")):
        table = _score_all(model, params, data, plan, mesh)
        paths.make_folder(folder)
        for completion, totals in table.items():
            content = io.BytesIO()
            np.save(content, totals)
            paths.write_bytes(paths.join(folder, f"{completion}.npy"), content.getvalue())
        paths.write_text(paths.join(folder, "DONE"), "")
    files = {completion: paths.join(folder, f"{completion}.npy") for completion in data.names}
    return {
        completion: np.load(io.BytesIO(paths.read_bytes(file)))
        for completion, file in files.items()
    }


def _score_all(
    model: decoder.Decoder, params, data: tokenise.Tokenised, plan: pack.Plan, mesh
) -> Table:
    table = {name: np.zeros(len(data.prompts), np.float32) for name in data.names}

    @jax.jit
    def totals(params, batch):
        return {name: scored.total for name, scored in logps.score(model, params, batch).items()}

    for batch in pack.evaluation_batches(data, plan):
        filled, index = batch["weight"] > 0, batch["index"]
        for name, values in totals(params, sharding.put_batch(batch, mesh)).items():
            table[name][index[filled]] = np.asarray(values)[filled]
    return table

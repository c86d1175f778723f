"""Where a loss's reference log-probabilities come from: a second model, which may follow the
policy, a table that was computed once, or nowhere.

Dimensions: N examples of a batch or of the data.
"""

import functools
import hashlib
import itertools
import json
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import functions, logps, paths, processes, sharding, tables
from dpo_jax.data import pack, tokenise
from dpo_jax.model import decoder
from dpo_jax.tables import Table

# bumped when what a table holds changes
VERSION = 2
# batches that are written together, and lost where a process is killed
PART = 16
# seconds between lines that say how far the scoring is
EVERY = 20


class LaidOut(NamedTuple):
    """Examples, their layout, and the reference's log-probabilities where they are cached."""

    data: tokenise.Tokenised
    plan: pack.Plan
    table: Table | None


def live(score, held, batch: dict) -> dict[str, logps.Logps]:
    """Scores the batch as a policy with the held reference's parameters; no gradient passes."""
    return jax.lax.stop_gradient(score(held.reference, held, batch))


def cached(held, batch: dict) -> dict[str, logps.Logps]:
    """Reads what `with_table` put into the batch."""
    columns = batch["reference"]

    def statistics(name: str) -> dict[str, jax.Array]:
        prefix = column(name, "")
        return {c.removeprefix(prefix): v for c, v in columns.items() if c.startswith(prefix)}

    return {
        name: logps.Logps(columns[name], length, statistics(name))
        for name, length in batch["length"].items()
    }


def column(completion: str, statistic: str) -> str:
    """The name of a completion's statistic in a table."""
    return f"{completion}.{statistic}"


def follow(reference, policy, weight: jax.Array):
    """weight * policy + (1 - weight) * reference, parameter by parameter: TR-DPO's update,
    https://arxiv.org/abs/2404.09656.
    """
    return jax.tree.map(lambda old, new: weight * new + (1 - weight) * old, reference, policy)


def none(held, batch: dict) -> None:
    """For losses without a reference."""


def with_table(batch: dict, table: Table | None) -> dict:
    """The host batch with its examples' columns of the table {name: [N]}, 0 in empty slots."""
    if table is None:
        return batch
    filled = batch["weight"] > 0
    columns = {
        name: np.where(filled, values[batch["index"]], 0).astype(np.float32)
        for name, values in table.items()
    }
    return {**batch, "reference": columns}


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


def digest(*parts: Any) -> str:
    """A hash of values, which go in as JSON."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


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
    statistics: Mapping[str, logps.Statistic] | None = None,
) -> Table:
    """Total log-probability under a completion's name, and statistics under
    "completion.statistic", of every completion of the data, computed once and kept on disk.

    Kept under a hash of the weights, the tokenised data, the model's config, the compute type, and
    of what is scored. A process that is killed leaves the parts it has scored, which the next one
    goes on from.
    """
    identity = [
        VERSION,
        params_hash,
        data.fingerprint,
        repr(model.config),
        str(np.dtype(model.dtype)),
        plan.scores_prompt,
        sorted((name, *functions.described(make)) for name, make in (statistics or {}).items()),
    ]
    folder = paths.join(paths.cache_folder(), "reference", digest(*identity))
    if not processes.everywhere(np.array(tables.is_finished(folder))):
        score = jax.jit(
            functools.partial(logps.score, model, statistics=statistics),
            out_shardings=sharding.replicated(mesh),
        )
        table = _score_all(score, params, data, plan, mesh, folder)
        if processes.is_first():
            tables.finish(folder, table)
        processes.wait("the reference's table is there")
        if not processes.is_first():
            # into a cache of its own
            tables.finish(folder, table)
    return tables.read(folder)


def _score_all(
    score, params, data: tokenise.Tokenised, plan: pack.Plan, mesh, folder: str
) -> Table:
    """The table of all data, of which the folder's parts are not scored again."""
    count, parts, shown = len(data.prompts), tables.read_parts(folder), time.monotonic()
    # what is not known to all of several processes is scored by all of them together
    known = processes.everywhere(tables.known(parts, count))
    before = f", {known.sum():,} of which are there" if parts else ""
    print(f"scoring {count:,} examples with the reference, once{before}: {folder}", flush=True)
    scored = _score_batches(score, params, data, plan, mesh, known)
    while fresh := list(itertools.islice(scored, PART)):
        is_written = processes.is_first()
        parts.append(tables.write_part(folder, fresh) if is_written else tables.joined(fresh))
        if time.monotonic() >= shown + EVERY:
            shown = time.monotonic()
            done = tables.known(parts, count).sum()
            print(f"scored {done:,} of {count:,} examples with the reference", flush=True)
    return tables.whole(parts, count)


def _score_batches(
    score, params, data: tokenise.Tokenised, plan: pack.Plan, mesh, known: np.ndarray
) -> Iterator[tables.Part]:
    """The rows of each batch that has examples which are not known (bool [N])."""
    for batch in pack.evaluation_batches(data, plan, sharding.held_rows(mesh)):
        filled = batch["weight"] > 0
        index = batch["index"][filled]
        if known[index].all():
            continue
        columns: Table = {}
        for completion, scored in score(params, sharding.put_batch(batch, mesh)).items():
            own = {column(completion, name): sums for name, sums in scored.statistics.items()}
            for name, values in {completion: scored.total, **own}.items():
                columns[name] = np.asarray(values)[filled].astype(np.float32)
        yield tables.Part(index, columns)

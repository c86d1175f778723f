"""Tables of numbers by example on disk, a file a column, which are filled part by part, so that a
process that is killed loses no more than its last part.

A part's name is the hash of its content: one that is half-written or damaged is not believed. That
is also why processes that fill one table at once need no lock. A part that two of them name alike
has the same bytes, and each part is true by itself, whoever wrote it; every file is renamed into
place whole; and each process makes the columns of what it has itself, so that they are equal but
for the rounding of other batches, and it does not matter whose stay.

Dimensions: N examples of a table, n of a part.
"""

import hashlib
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dpo_jax import paths

DONE = "DONE"
PREFIX = "part-"
INDEX = "index"

# float32 [N] each
Table = dict[str, np.ndarray]


class Part(NamedTuple):
    """Some examples' rows of a table: their places int32 [n], and their numbers {name: [n]}."""

    index: np.ndarray
    columns: Table


def is_finished(folder: str) -> bool:
    """Whether the folder has a whole table."""
    return paths.exists(paths.join(folder, DONE))


def read(folder: str) -> Table:
    """The finished table of a folder. On this machine's disk its columns are mapped into memory, so
    that only the rows that are looked up are read.
    """
    columns = paths.read_text(paths.join(folder, DONE)).split("\n")
    return {name: read_column(paths.join(folder, f"{name}.npy")) for name in columns}


def read_column(path: str) -> np.ndarray:
    """A column, mapped where the file is local and read whole where it is not."""
    if paths.is_local(path):
        return np.load(paths.locate(path)[1], mmap_mode="r")
    return np.load(io.BytesIO(paths.read_bytes(path)))


def finish(folder: str, table: Table) -> None:
    """Writes the columns, then DONE, whose lines are their names, and removes the parts; a table
    that is finished already is left as it is, since others may have it mapped.
    """
    if not is_finished(folder):
        for name, values in table.items():
            paths.write_bytes(paths.join(folder, f"{name}.npy"), as_bytes(values))
        paths.write_text(paths.join(folder, DONE), "\n".join(table))
    for path in list_parts(folder):
        paths.remove(path)


def joined(parts: Sequence[Part]) -> Part:
    """These as one part."""
    index = np.concatenate([part.index for part in parts])
    columns = {
        name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns
    }
    return Part(index, columns)


def write_part(folder: str, parts: Sequence[Part]) -> Part:
    """Writes these as one part, and returns it."""
    index, columns = part = joined(parts)
    rows = np.empty(len(index), [(INDEX, np.int32), *((name, np.float32) for name in columns)])
    rows[INDEX] = index
    for name, values in columns.items():
        rows[name] = values
    content = as_bytes(rows)
    paths.write_bytes(paths.join(folder, part_name(content)), content)
    return part


def read_parts(folder: str) -> list[Part]:
    """The parts of a table that are whole."""
    parts = []
    for path in list_parts(folder):
        try:
            content = paths.read_bytes(path)
        except FileNotFoundError:
            # another process has finished the table since
            continue
        if path.endswith(part_name(content)):
            rows = np.load(io.BytesIO(content))
            names = [name for name in rows.dtype.names if name != INDEX]
            parts.append(Part(rows[INDEX], {name: rows[name] for name in names}))
    return parts


def known(parts: Sequence[Part], count: int) -> np.ndarray:
    """Which of so many examples are in a part: bool [N]."""
    found = np.zeros(count, bool)
    for part in parts:
        found[part.index] = True
    return found


def whole(parts: Sequence[Part], count: int) -> Table:
    """The table of parts that have all of so many examples together."""
    table = {name: np.zeros(count, np.float32) for name in parts[0].columns}
    for part in parts:
        for name, values in part.columns.items():
            table[name][part.index] = values
    return table


def list_parts(folder: str) -> list[str]:
    """The paths of all parts, whole or not."""
    return paths.listing(paths.join(folder, f"{PREFIX}*.npy"))


def part_name(content: bytes) -> str:
    """The file name of a part with this content."""
    return f"{PREFIX}{hashlib.blake2b(content, digest_size=16).hexdigest()}.npy"


def as_bytes(values: np.ndarray) -> bytes:
    """An array as the content of a .npy file."""
    content = io.BytesIO()
    np.save(content, values)
    return content.getvalue()

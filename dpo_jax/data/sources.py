"""Rows of a file, a folder or a dataset, each a dict of plain Python values."""

import array
import contextlib
import difflib
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple, cast

import numpy as np

from dpo_jax import paths
from dpo_jax.data import hub

FILES = (".jsonl", ".jsonl.gz", ".parquet")
# bytes and rows that are read at a time
BUFFER, BATCH = 1 << 16, 256
KINDS = (
    "a .jsonl, .jsonl.gz or .parquet file (local, or gs:// with gcsfs), a folder that "
    "datasets.save_to_disk wrote, hf:NAME for the Hugging Face hub, or tfds:DIR for a prepared "
    "TFDS folder"
)


class Rows:
    """Rows, and the place that each came from."""

    def __init__(self, items: Any, where: Callable[[int], str]):
        self.items = items
        self.where = where

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        return plain(self.items[i])


class InOrder:
    """Rows that are read from the first to the last, of which one is held; to look up an earlier
    one begins anew.
    """

    def __init__(self, count: int, begin: Callable[[], Iterator[dict[str, Any]]]):
        self.count = count
        self.begin = begin
        self.place, self.row, self.rest = -1, {}, begin()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < self.count:
            raise IndexError(i)
        if i < self.place:
            self.place, self.rest = -1, self.begin()
        while self.place < i:
            self.place, self.row = self.place + 1, next(self.rest)
        return self.row


class Line(NamedTuple):
    """A row of a JSONL file and its line, counted from 1."""

    row: dict[str, Any]
    number: int


def read(source: str, split: str) -> Rows:
    """The rows of a source; split counts for saved folders with splits, hf: and tfds: only.

    where(i) is "file.jsonl:12" with lines counted from 1, else "file.parquet row 12" or
    "hf:NAME[train] row 12" with rows counted from 0, as dataset[12] counts them. ValueError for a
    source of no known kind, one that is not there, one without rows, or a line that is no JSON
    object.
    """
    if source == "builtin":
        raise ValueError(
            "data.source 'builtin' is prepared as files before data are read, and here it is "
            "read as a file; scripts.train prepares it, otherwise name one of these: " + KINDS
        )
    if source.startswith("hf:"):
        rows = read_hub(source, split)
    elif source.startswith("tfds:"):
        rows = read_tfds(source, split)
    elif source.endswith(FILES):
        rows = read_parquet(source) if source.endswith(".parquet") else read_jsonl(source)
    elif paths.is_folder(source):
        rows = read_saved(source, split)
    elif os.path.splitext(source)[1] or paths.exists(source):
        raise ValueError(f"{source}: its rows cannot be read; a source is {KINDS}")
    else:
        raise ValueError(
            f"{source!r} is no source, and no folder of this name exists; a source is {KINDS}"
        )
    if len(rows) == 0:
        raise ValueError(
            f"{source} has no rows{f' in split {split!r}' if '[' in rows.where(0) else ''}"
        )
    return rows


def fingerprint(source: str, split: str) -> str:
    """A hash of a source's content: of the bytes of files and saved folders, else of the rows."""
    digest = hashlib.sha256(split.encode())
    if source.startswith(("hf:", "tfds:")) or not paths.exists(source):
        rows = read(source, split)
        for i in range(len(rows)):
            digest.update(json.dumps(rows[i], sort_keys=True, default=str).encode())
        return digest.hexdigest()
    if not paths.is_folder(source):
        # a file has no splits
        digest = hashlib.sha256(b"file")
        hash_file(source, digest)
        return digest.hexdigest()
    for path in paths.listing(paths.join(source, "**")):
        if not paths.is_folder(path):
            digest.update(path.removeprefix(source).encode())
            hash_file(path, digest)
    return digest.hexdigest()


def hash_file(path: str, digest: Any) -> None:
    """Feeds a file's bytes to a hash."""
    with paths.open(path) as file:
        while block := file.read(BUFFER):
            digest.update(block)


def read_jsonl(path: str) -> Rows:
    """The objects of a JSONL file, gzipped where its name says so; blank lines count as lines."""
    check_file(path)
    # every line is parsed once, so that a wrong one is named before anything is made of the others
    numbers = array.array("q", (line.number for line in read_lines(path)))
    rows = InOrder(len(numbers), lambda: (line.row for line in read_lines(path)))
    return Rows(rows, lambda i: f"{path}:{numbers[i]}")


def read_lines(path: str) -> Iterator[Line]:
    """The lines of a JSONL file that are not blank."""
    with paths.open(path) as file, unzipped(file, path) as lines:
        # split at newlines only: JSON text may hold U+2028 and others that str.splitlines splits at
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield Line(parse(line, f"{path}:{number}"), number)


@contextlib.contextmanager
def unzipped(file: IO[bytes], path: str) -> Iterator[IO[bytes]]:
    """The file, or what is in it where its name says that it is gzipped."""
    if not path.endswith(".gz"):
        yield file
        return
    try:
        with gzip.open(file) as inner:
            yield cast(IO[bytes], inner)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a complete gzip file ({error})") from None


def parse(line: bytes, where: str) -> dict[str, Any]:
    """The object that a line of JSON holds."""
    beginning = shorten(line.decode("utf-8", errors="replace").strip())
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error}): {beginning}") from None
    if not isinstance(row, dict):
        raise ValueError(
            f'{where}: a row must be a JSON object {{"field": value, ...}}, and this line is of '
            f"type {type(row).__name__}: {beginning}"
        )
    return row


def read_parquet(path: str) -> Rows:
    """The rows of a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    check_file(path)

    def begin() -> Iterator[dict[str, Any]]:
        try:
            # with a buffer, pages are read as they are needed and not columns of a row group
            with (
                paths.open(path) as file,
                pyarrow.parquet.ParquetFile(file, buffer_size=BUFFER) as table,
            ):
                for batch in table.iter_batches(BATCH):
                    yield from batch.to_pylist()
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{path}: not a Parquet file ({error})") from None

    try:
        with paths.open(path) as file:
            count = pyarrow.parquet.read_metadata(file).num_rows
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a Parquet file ({error})") from None
    return Rows(InOrder(count, begin), lambda i: f"{path} row {i}")


def check_file(path: str) -> None:
    """Raises ValueError that names the nearest file where this one is absent, or that it is
    empty.
    """
    if not paths.exists(path):
        folder, name = path.rpartition("/")[::2]
        others = [
            other.rpartition("/")[2] for other in paths.listing(paths.join(folder or ".", "*"))
        ]
        close = difflib.get_close_matches(name, others, n=1)
        hint = f"; did you mean {paths.join(folder, close[0])}?" if close else ""
        raise ValueError(f"{path}: no such file{hint}")
    with paths.open(path) as file:
        while block := file.read(BUFFER):
            if block.strip():
                return
    raise ValueError(f"{path}: the file is empty")


def read_saved(folder: str, split: str) -> Rows:
    """The rows of a folder that datasets.save_to_disk wrote."""
    import datasets

    if not any(
        paths.exists(paths.join(folder, name)) for name in ("dataset_dict.json", "state.json")
    ):
        inside = [path.rpartition("/")[2] for path in paths.listing(paths.join(folder, "*"))]
        raise ValueError(
            f"{folder}: no dataset that datasets.save_to_disk wrote (it has neither "
            "dataset_dict.json nor state.json); the folder holds: "
            f"{', '.join(inside[:10]) or 'nothing'}. A source is {KINDS}"
        )
    data = datasets.load_from_disk(folder)
    if isinstance(data, datasets.Dataset):
        return Rows(data, lambda i: f"{folder} row {i}")
    if split not in data:
        raise ValueError(
            f"{folder} has no split {split!r}; there are: {', '.join(map(repr, data))}"
        )
    return Rows(data[split], lambda i: f"{folder}[{split}] row {i}")


def read_hub(source: str, split: str) -> Rows:
    """The rows of a dataset of the hub, from its local cache where the hub cannot be asked."""
    import datasets

    name = source.removeprefix("hf:")
    reason = hub.why_unreachable()
    try:
        if reason is None:
            data = datasets.load_dataset(name, split=split)
        else:
            with hub.local_files_only():
                data = datasets.load_dataset(name, split=split)
    except (OSError, ValueError) as error:
        if reason is None:
            raise ValueError(f"{source}, split {split!r}: {error}") from error
        raise ValueError(
            f"{source}, split {split!r}, is not in the local cache, and the hub cannot be asked: "
            f"{reason}. Where there is a network, run "
            f"datasets.load_dataset({name!r}).save_to_disk('FOLDER'), copy the folder here and "
            "give data.source FOLDER; or copy the cache folder (HF_HOME)"
        ) from error
    return Rows(data, lambda i: f"{source}[{split}] row {i}")


def read_tfds(source: str, split: str) -> Rows:
    """The rows of a TFDS folder of file_format="array_record", which needs no TensorFlow."""
    import tensorflow_datasets as tfds

    folder = source.removeprefix("tfds:")
    if not paths.exists(paths.join(folder, "dataset_info.json")):
        raise ValueError(
            f"{source}: no dataset_info.json in {folder}; the folder must be the one of a "
            "version, such as DATA_DIR/NAME/1.0.0"
        )
    builder: Any = tfds.builder_from_directory(folder)
    written = builder.info.file_format.value if builder.info.file_format else "unknown"
    if written != "array_record":
        raise ValueError(
            f"{source} is written as {written}; only array_record can be read without "
            "TensorFlow: prepare it "
            'again with file_format="array_record"'
        )
    name = split.split("[")[0]
    if name not in builder.info.splits:
        raise ValueError(
            f"{source} has no split {name!r}; there are: {', '.join(builder.info.splits)}"
        )
    return Rows(builder.as_data_source(split=split), lambda i: f"{source}[{split}] row {i}")


def plain(value: Any) -> Any:
    """The value with NumPy scalars, arrays and bytes turned into Python's own.

    TFDS gives chat messages, a sequence of dicts, as one dict of arrays: they become a list of
    dicts again.
    """
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, np.ndarray):
        return [plain(item) for item in value.tolist()]
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        fields = {name: plain(item) for name, item in value.items()}
        columns = list(fields.values())
        if {"role", "content"} <= set(fields) and all(
            isinstance(column, list) for column in columns
        ):
            return [dict(zip(fields, row, strict=True)) for row in zip(*columns, strict=True)]
        return fields
    return value


def shorten(value: Any, length: int = 60) -> str:
    """A value's repr, its middle left out where it is long."""
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 12]}...{text[-9:]}"

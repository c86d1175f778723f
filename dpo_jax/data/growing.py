"""Files that grow at their end, for what is made row by row and is never held in memory whole."""

import array
import contextlib
import functools
import mmap
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, Self

import numpy as np


@contextlib.contextmanager
def column(path: str, dtype: Any) -> Iterator[Callable[[np.ndarray], None]]:
    """A function that appends arrays [n] to a local .npy file, which is the one that NumPy writes
    of all of them together.
    """
    with open(path, "wb") as file:
        count = 0

        def append(values: np.ndarray) -> None:
            nonlocal count
            file.write(np.ascontiguousarray(values, dtype).data)
            count += len(values)

        write_header(file, dtype, 0)
        yield append
        file.seek(0)
        # NumPy leaves room for the digits of any count, so that this one is as long as the first
        write_header(file, dtype, count)


def write_header(file: IO[bytes], dtype: Any, count: int) -> None:
    """Writes what a .npy file of an array [count] begins with."""
    described = np.lib.format.dtype_to_descr(np.dtype(dtype))
    np.lib.format.write_array_header_1_0(
        file, {"descr": described, "fortran_order": False, "shape": (count,)}
    )


class Texts(Sequence[str]):
    """Texts in a file of a folder, which is gone with the end of the block; they are all added
    before the first is looked up.
    """

    def __init__(self, folder: str):
        self.file = tempfile.TemporaryFile(dir=folder)
        self.stops = array.array("q", [0])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: Any) -> None:
        self.file.close()

    def append(self, text: str) -> None:
        """Adds a text."""
        self.stops.append(self.stops[-1] + self.file.write(text.encode("utf-8")))

    @functools.cached_property
    def content(self) -> mmap.mmap:
        """All texts end to end, mapped."""
        self.file.flush()
        return mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self.stops) - 1

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self.content[self.stops[i] : self.stops[i + 1]].decode("utf-8")

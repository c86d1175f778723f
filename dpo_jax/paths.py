"""Files of a local folder, gs://, or another file system that fsspec knows, read and written alike.

A path is a string. Every function raises ValueError where the file system's package is not
installed, and the usual OSError (FileNotFoundError, ...) where the file system itself says no.
"""

import builtins
import contextlib
import fcntl
import os
import socket
import tempfile
import uuid
from collections.abc import Iterator
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs"}


def cache_folder() -> str:
    """The folder of everything that can be computed again: $DPO_JAX_CACHE, or ~/.cache/dpo_jax."""
    return os.environ.get("DPO_JAX_CACHE") or os.path.expanduser("~/.cache/dpo_jax")


def join(folder: str, *names: str) -> str:
    """The path of a name within a folder."""
    if is_local(folder):
        return os.path.join(folder, *names)
    return "/".join([folder.rstrip("/"), *(name.strip("/") for name in names)])


def is_local(path: str) -> bool:
    """Whether the path is one of this machine's own files."""
    return "://" not in path or path.startswith(("file://", "local://"))


def exists(path: str) -> bool:
    """Whether a file or folder is there."""
    system, name = locate(path)
    return system.exists(name)


def is_folder(path: str) -> bool:
    """Whether a folder is there."""
    system, name = locate(path)
    return system.isdir(name)


def open(path: str, mode: str = "rb") -> IO[Any]:
    """An open file, as the built-in open gives it; text is UTF-8. Not atomic: see write_bytes."""
    system, name = locate(path)
    file: Any = system.open(name, mode, **({} if "b" in mode else {"encoding": "utf-8"}))
    return file


def read_bytes(path: str) -> bytes:
    """The content of a file."""
    system, name = locate(path)
    content: Any = system.cat_file(name)
    return content


def read_text(path: str) -> str:
    """The content of a UTF-8 file."""
    return read_bytes(path).decode("utf-8")


def write_bytes(path: str, content: bytes) -> None:
    """Writes a file and the folders above it; a reader sees old or new content, never a part."""
    system, name = locate(path)
    if not isinstance(system, LocalFileSystem):
        # object stores publish an object only once it is complete
        system.pipe_file(name, content)
        return
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(content)


@contextlib.contextmanager
def replacing(path: str) -> Iterator[str]:
    """The name of a local file, empty as yet, to be written bit by bit, which takes the path's
    place once it is whole; where the block fails it is removed. For a path of another file system
    it lies in the folder of temporary files ($TMPDIR).
    """
    system, name = locate(path)
    is_here = isinstance(system, LocalFileSystem)
    folder = os.path.dirname(name) if is_here else tempfile.gettempdir()
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(
        folder, f"{os.path.basename(name)}.{uuid.uuid4().hex}{temporary_end()}"
    )
    # locked until this process ends, however it ends: see remove_abandoned
    with builtins.open(temporary, "w+b") as lock:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_SH)
        try:
            yield temporary
            if is_here:
                os.replace(temporary, name)
            else:
                system.put_file(temporary, name)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.remove(temporary)


def temporary_end() -> str:
    """How the name of a file ends that this machine is writing."""
    return f".{socket.gethostname()}.tmp"


def remove_abandoned(folder: str) -> None:
    """Removes from a local folder and those in it what this machine's processes were writing there
    when they were killed.
    """
    if not is_local(folder):
        return
    _, name = locate(folder)
    for place, _, files in os.walk(name):
        for file in files:
            if file.endswith(temporary_end()):
                # an error where a process is writing it
                with (
                    contextlib.suppress(OSError),
                    builtins.open(os.path.join(place, file), "r+b") as lock,
                ):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.remove(os.path.join(place, file))


def write_text(path: str, content: str) -> None:
    """Writes a UTF-8 file as write_bytes does."""
    write_bytes(path, content.encode("utf-8"))


def remove(path: str) -> None:
    """Removes a file; one that is not there is no error."""
    system, name = locate(path)
    with contextlib.suppress(FileNotFoundError):
        system.rm_file(name)


def listing(pattern: str) -> list[str]:
    """The sorted paths that match a pattern such as folder/*.jsonl."""
    system, name = locate(pattern)
    found = sorted(str(path) for path in system.glob(name))
    if isinstance(system, LocalFileSystem):
        return found
    return [system.unstrip_protocol(path) for path in found]


def make_folder(path: str) -> None:
    """Makes a folder and those above it; one that is there is left as it is."""
    system, name = locate(path)
    system.makedirs(name, exist_ok=True)


def locate(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a path, and the path's name within it."""
    try:
        system, name = fsspec.core.url_to_fs(os.path.expanduser(path) if is_local(path) else path)
    except ImportError as error:
        protocol = path.split("://")[0]
        package = PACKAGES.get(protocol, protocol)
        raise ValueError(
            f"{path}: paths that start with {protocol}:// need the package {package}, which is not "
            f"installed: pip install {package}"
        ) from error
    return system, name

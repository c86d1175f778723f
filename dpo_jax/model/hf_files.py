"""Folders in HF format, local or of the hub: where their tensors lie, and reading slices of them.

A folder's weights are model.safetensors, or several files that model.safetensors.index.json lists.
"""

import functools
import json
import pathlib
import re
import urllib.error
import urllib.request
from typing import Any, NamedTuple

import numpy as np
import safetensors

from dpo_jax.model.presets import PRESETS

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
FLOATS = {"F32", "F16", "BF16"}


class Stored(NamedTuple):
    """Where a tensor lies."""

    file: pathlib.Path
    # the file's own name for it
    name: str


class Reader:
    """Reads slices of tensors from files that it keeps open."""

    def __init__(self, files: dict[str, Stored]):
        self.files = files
        self.open: dict[pathlib.Path, Any] = {}

    def find(self, name: str) -> Any:
        """A tensor of which nothing is read yet; ValueError where the file is not whole."""
        file, stored = self.files[name]
        try:
            if file not in self.open:
                self.open[file] = safetensors.safe_open(file, framework="numpy")
            return self.open[file].get_slice(stored)
        except safetensors.SafetensorError as error:
            raise ValueError(
                f"tensor {stored} cannot be read from {file} ({error}); fetch that file again"
            ) from None

    def check(self, name: str, expected: tuple[int, ...]) -> None:
        """Raises ValueError unless a tensor has this shape and a supported type."""
        file, stored = self.files[name]
        found = self.find(name)
        if tuple(found.get_shape()) != expected:
            raise ValueError(
                f"tensor {stored} in {file} has shape {tuple(found.get_shape())}; "
                f"{CONFIG} makes it {expected}"
            )
        if found.get_dtype() not in FLOATS:
            raise ValueError(
                f"tensor {stored} in {file} is {found.get_dtype()}; supported: "
                f"{', '.join(sorted(FLOATS))}"
            )

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A slice of a tensor, in the file's own type."""
        return self.find(name)[index]


def add_prefix(files: dict[str, Stored], prefix: str) -> dict[str, Stored]:
    """The tensors under the names that they have in a model with its head, which files of a model
    without one leave the prefix out of.
    """
    if any(name.startswith(prefix) for name in files):
        return files
    return {prefix + name: stored for name, stored in files.items()}


def find_tensors(folder: pathlib.Path) -> dict[str, Stored]:
    """Where each tensor of a folder lies."""
    if (folder / INDEX).exists():
        index = read_json(folder / INDEX)["weight_map"]
        for file in sorted(set(index.values())):
            if not (folder / file).exists():
                raise ValueError(f"{folder / file} is missing, and {INDEX} lists it")
        return {name: Stored(folder / file, name) for name, file in index.items()}
    file = folder / "model.safetensors"
    if not file.exists():
        raise ValueError(f"{folder} has neither model.safetensors nor {INDEX}")
    with safetensors.safe_open(file, framework="numpy") as opened:
        return {name: Stored(file, name) for name in opened.keys()}


def clear(folder: pathlib.Path) -> None:
    """Makes a folder that holds no model: of one that is there, removes the model's files.

    First those without which the rest is not taken for a model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = [file for file in sorted(folder.iterdir()) if WEIGHTS.fullmatch(file.name)]
    for file in (folder / CONFIG, folder / INDEX, *weights):
        file.unlink(missing_ok=True)


def read_json(file: pathlib.Path) -> dict:
    """The object in a JSON file; ValueError names the file where there is none."""
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        cure = "the folder must be in HF format"
        if file.with_name("adapter_config.json").exists():
            cure = "the folder holds an adapter alone: merge it into its base, and give that"
        raise ValueError(f"{file} is missing; {cure}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None


def write_json(file: pathlib.Path, value: dict, *, sort_keys: bool = False) -> None:
    """Writes a JSON file as transformers does."""
    file.write_text(json.dumps(value, indent=2, sort_keys=sort_keys) + "\n")


def find_folder(source: str) -> pathlib.Path:
    """The local folder that a path or hub name means."""
    folder = pathlib.Path(source).expanduser()
    if folder.is_dir():
        return folder
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not source.startswith("."):
        return download(source)
    raise ValueError(
        f"there is no folder {source!r} to read a model from; give a folder in HF format, a hub "
        f"name (owner/name), or one of the presets: {', '.join(PRESETS)}"
    )


def is_whole(folder: pathlib.Path) -> bool:
    """Whether a folder of the hub's cache has config.json and all weights; downloads can be cut."""
    try:
        return (folder / CONFIG).exists() and bool(find_tensors(folder))
    except ValueError:
        return False


def download(name: str) -> pathlib.Path:
    """The folder of a hub model: the local cache's, or else downloaded into it."""
    import huggingface_hub
    from huggingface_hub import constants, errors

    fetch = functools.partial(
        huggingface_hub.snapshot_download,
        name,
        allow_patterns=[CONFIG, "model*.safetensors", INDEX],
    )
    try:
        folder = pathlib.Path(fetch(local_files_only=True))
        if is_whole(folder):
            return folder
    except errors.LocalEntryNotFoundError:
        pass
    missing = (
        f"there is no folder {name!r}, it is none of the presets ({', '.join(PRESETS)}), and the "
        f"hub's model of that name is not in the local cache, or not with all of its files"
    )
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"{missing}; HF_HUB_OFFLINE forbids to fetch it")
    # The client itself would retry for tens of seconds where there is no network.
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=3).close()
    except urllib.error.HTTPError:
        pass
    except OSError as error:
        raise ValueError(f"{missing}; {constants.ENDPOINT} cannot be reached ({error})") from None
    try:
        return pathlib.Path(fetch())
    except errors.HfHubHTTPError as error:
        raise ValueError(f"{missing}; the hub says: {error}") from None

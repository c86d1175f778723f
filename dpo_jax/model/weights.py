"""Parameter trees read from and written to folders in HF format: config.json and safetensors.

A folder's weights are model.safetensors, or several files that model.safetensors.index.json lists.
"""

import functools
import json
import os
import pathlib
import re
import urllib.error
import urllib.request
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
import safetensors.numpy

from dpo_jax.model import decoder, hf_config, tensors
from dpo_jax.model.config import DecoderConfig
from dpo_jax.model.families import FAMILIES
from dpo_jax.model.presets import PRESETS

# Computed from the config; files of the time of Llama 2 and before hold them too.
BUFFERS = re.compile(r".*\.(rotary_emb\.inv_freq|(attn|attention)\.(masked_)?bias)")
FLOATS = {"F32", "F16", "BF16"}
INDEX = "model.safetensors.index.json"


class Stored(NamedTuple):
    """Where a tensor lies."""

    file: pathlib.Path
    # the file's own name for it
    name: str


class Row(NamedTuple):
    """The part of the parameters that one tensor of the files holds."""

    tensor: tensors.Tensor
    # of each parameter in the tree
    paths: tuple[tuple[str, ...], ...]
    # of the layer and the expert in the parameter's leading axes
    index: tuple[int, ...]


def load(source: str | os.PathLike) -> tuple[DecoderConfig, dict]:
    """Config and parameters (float32 in host memory) of a folder in HF format or a hub name.

    Raises ValueError that names what is missing, unexpected, unsupported or of the wrong shape.
    """
    folder = find_folder(str(source))
    config = hf_config.from_hf(read_json(folder / "config.json"))
    files = add_prefix(find_tensors(folder), FAMILIES[config.family].prefix)
    shapes = leaves(decoder.shapes(config))
    rows = find_rows(config, shapes)
    check_names(set(rows), set(files), config, folder)
    reader = Reader(files)
    found = {path: np.empty(shape.shape, np.float32) for path, shape in shapes.items()}
    for name, row in rows.items():
        parts = [found[path][row.index] for path in row.paths]
        part_shapes = [part.shape for part in parts]
        stored = reader.read(name, tensors.stored_shape(row.tensor, part_shapes))
        for part, value in zip(
            parts, tensors.split(stored, row.tensor, part_shapes, config.heads), strict=True
        ):
            part[...] = value
    check_tied(config, files, reader, found[("embedding",)])
    return config, nest(found)


def save(path: str | os.PathLike, config: DecoderConfig, params: dict) -> None:
    """Writes config.json and model.safetensors, for HF's `from_pretrained`, into a folder."""
    text = json.dumps(hf_config.to_hf(config), indent=2)
    folder = pathlib.Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    found = {path: np.asarray(leaf) for path, leaf in leaves(params).items()}
    # transformers refuses files without the format.
    safetensors.numpy.save_file(
        {
            name: tensors.join([found[p][row.index] for p in row.paths], row.tensor, config.heads)
            for name, row in find_rows(config, found).items()
        },
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    (folder / "config.json").write_text(text + "\n")


def leaves(params: dict) -> dict[tuple[str, ...], Any]:
    """The leaves of a tree by path."""
    pairs = jax.tree_util.tree_leaves_with_path(params)
    return {tuple(entry.key for entry in path): leaf for path, leaf in pairs}


def nest(found: dict[tuple[str, ...], Any]) -> dict:
    """The tree of leaves by path."""
    tree: dict = {}
    for path, leaf in found.items():
        parent = functools.reduce(lambda node, key: node.setdefault(key, {}), path[:-1], tree)
        parent[path[-1]] = leaf
    return tree


def find_rows(config: DecoderConfig, present: Collection[tuple[str, ...]]) -> dict[str, Row]:
    """What each tensor of the files holds, by its name, of a tree with these paths."""
    experts = config.experts.count if config.experts else 0
    found = {}
    for template, tensor in FAMILIES[config.family].names.items():
        if not all(tuple(path.split("/")) in present for path in tensor.paths):
            continue
        layer_numbers = range(config.layers) if "{}" in template else [None]
        for layer in layer_numbers:
            if layer is None:
                numbers: list[tuple[int, ...]] = [()]
            elif template.count("{}") == 2:
                numbers = [(layer, expert) for expert in range(experts)]
            else:
                numbers = [(layer,)]
            for number in numbers:
                found[template.format(*number)] = make_row(tensor, number, config)
    return found


def make_row(tensor: tensors.Tensor, number: tuple[int, ...], config: DecoderConfig) -> Row:
    """Where a tensor goes that belongs to a layer and an expert of these numbers."""
    paths = [tuple(path.split("/")) for path in tensor.paths]
    if number and number[0] >= config.scanned:
        paths = [("remainder", *path[1:]) for path in paths]
        number = (number[0] - config.scanned, *number[1:])
    return Row(tensor, tuple(paths), number)


class Reader:
    """Reads tensors one at a time from files that it keeps open."""

    def __init__(self, files: dict[str, Stored]):
        self.files = files
        self.open: dict[pathlib.Path, Any] = {}

    def read(self, name: str, expected: tuple[int, ...]) -> np.ndarray:
        """A tensor as float32; ValueError where its shape is not the expected one."""
        file, name = self.files[name]
        if file not in self.open:
            self.open[file] = safetensors.safe_open(file, framework="numpy")
        stored = self.open[file].get_slice(name)
        if tuple(stored.get_shape()) != expected:
            raise ValueError(
                f"tensor {name} in {file} has shape {tuple(stored.get_shape())}; "
                f"config.json makes it {expected}"
            )
        if stored.get_dtype() not in FLOATS:
            raise ValueError(
                f"tensor {name} in {file} is {stored.get_dtype()}; supported: "
                f"{', '.join(sorted(FLOATS))}"
            )
        return self.open[file].get_tensor(name).astype(np.float32)


def head_name(config: DecoderConfig) -> str:
    """The name of the output matrix in the files of a config's family."""
    names = FAMILIES[config.family].names
    return next(name for name, tensor in names.items() if tensor.paths == ("head",))


def check_names(
    expected: set[str], present: set[str], config: DecoderConfig, folder: pathlib.Path
) -> None:
    """Raises ValueError unless the tensors of the files are those that the config asks for."""
    missing = sorted(expected - present)
    extra = {name for name in present - expected if not BUFFERS.fullmatch(name)}
    unexpected = sorted(extra - {head_name(config)} if config.tied_head else extra)
    if missing or unexpected:
        parts = [("lacks", missing), ("has, beyond what config.json asks for,", unexpected)]
        text = " and ".join(f"{verb} {shorten(names)}" for verb, names in parts if names)
        raise ValueError(f"{folder} {text}")


def shorten(names: list[str]) -> str:
    """The first few of a list of names, and how many more there are."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def check_tied(
    config: DecoderConfig, files: dict[str, Stored], reader: Reader, embedding: np.ndarray
) -> None:
    """Raises ValueError where a tied head is stored too and is not the embedding."""
    name = head_name(config)
    if config.tied_head and name in files:
        if not np.array_equal(reader.read(name, embedding.shape), embedding):
            raise ValueError(
                f"{files[name].file} has an {name} that differs from the embedding, "
                f"though config.json says tie_word_embeddings; set that to false to use it"
            )


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


def read_json(file: pathlib.Path) -> dict:
    """The object in a JSON file; ValueError names the file where there is none."""
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        raise ValueError(f"{file} is missing; the folder must be in HF format") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None


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


def download(name: str) -> pathlib.Path:
    """The folder of a hub model: the local cache's, or else downloaded into it."""
    import huggingface_hub
    from huggingface_hub import constants, errors

    fetch = functools.partial(
        huggingface_hub.snapshot_download,
        name,
        allow_patterns=["config.json", "model*.safetensors", INDEX],
    )
    try:
        folder = pathlib.Path(fetch(local_files_only=True))
        if (folder / "config.json").exists() and any(folder.glob("model*.safetensors")):
            return folder
    except errors.LocalEntryNotFoundError:
        pass
    missing = (
        f"there is no folder {name!r}, it is none of the presets ({', '.join(PRESETS)}), and the "
        f"hub's model of that name is not in the local cache"
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

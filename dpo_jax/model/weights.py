"""Parameter trees read from and written to folders in HF format: config.json and safetensors.

Of the files nothing is read but the slices that a host's devices hold, and those once; host memory
holds one shard of one parameter at a time. Files are written one after the other from the devices.
"""

import collections
import functools
import math
import os
import pathlib
import re
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
import safetensors.numpy
from jax.sharding import Mesh, Sharding

from dpo_jax import sharding
from dpo_jax.model import decoder, frozen, hf_config, hf_files, tensors
from dpo_jax.model.config import DecoderConfig
from dpo_jax.model.families import FAMILIES

# Computed from the config; files of the time of Llama 2 and before hold them too.
BUFFERS = re.compile(r".*\.(rotary_emb\.inv_freq|(attn|attention)\.(masked_)?bias)")
DTYPES = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16))
# rows of embedding and head that are compared at a time
COMPARED_ROWS = 1024

Path = tuple[str, ...]


class Row(NamedTuple):
    """The part of the parameters that one tensor of the files holds."""

    tensor: tensors.Tensor
    # of each parameter in the tree
    paths: tuple[Path, ...]
    # of the layer and the expert in the parameter's leading axes
    index: tuple[int, ...]


class Part(NamedTuple):
    """The part of a parameter that one tensor of the files holds."""

    name: str
    row: Row
    # of the parameter among those of the tensor
    place: int


class Source(NamedTuple):
    """Files that hold what a config asks for."""

    config: DecoderConfig
    reader: hf_files.Reader
    # of the parameters, with their types
    shapes: dict[Path, jax.ShapeDtypeStruct]
    parts: dict[Path, list[Part]]


def load(
    source: str | os.PathLike, mesh: Mesh | None = None, dtype: Any = np.float32
) -> tuple[DecoderConfig, dict]:
    """Config and parameters of a folder in HF format or a hub name: matrices in float32 or
    bfloat16, vectors in float32, in which norms are computed.

    They lie on the mesh as `sharding.parameters` says; without one, in host memory (NumPy). Raises
    ValueError that names what is missing, unexpected, unsupported or of the wrong shape, before
    parameters are read.
    """
    check_dtype(dtype)
    found = find_source(hf_files.find_folder(str(source)))
    readers = {
        path: functools.partial(
            read_slice, found, path, dtype=dtype if frozen.is_matrix(path) else np.float32
        )
        for path in found.shapes
    }
    if mesh is None:
        params = {
            path: read(tuple(slice(0, size) for size in found.shapes[path].shape))
            for path, read in readers.items()
        }
    else:
        placed = leaves(sharding.parameters(nest(found.shapes), mesh))
        params = {
            path: make_array(found.shapes[path].shape, placed[path], read)
            for path, read in readers.items()
        }
    return found.config, nest(params)


def find_source(folder: pathlib.Path) -> Source:
    """The files of a folder; ValueError unless they hold exactly what its config.json asks for."""
    config = hf_config.from_hf(hf_files.read_json(folder / hf_files.CONFIG))
    files = hf_files.find_tensors(folder)
    files = hf_files.add_prefix(files, FAMILIES[config.family].prefix)
    shapes = leaves(decoder.shapes(config))
    rows = find_rows(config, shapes)
    check_names(set(rows), set(files), config, folder)
    reader = hf_files.Reader(files)
    parts = collections.defaultdict(list)
    for name, row in rows.items():
        reader.check(name, tensors.stored_shape(row.tensor, part_shapes(row, shapes)))
        for place, path in enumerate(row.paths):
            parts[path].append(Part(name, row, place))
    check_tied(config, reader, parts[("embedding",)][0].name, shapes[("embedding",)].shape)
    return Source(config, reader, shapes, dict(parts))


def part_shapes(row: Row, params: dict[Path, Any]) -> list[tuple[int, ...]]:
    """The shapes of the parts of parameters (arrays or shapes) that a tensor holds."""
    return [params[path].shape[len(row.index) :] for path in row.paths]


def read_slice(source: Source, path: Path, index: tuple[slice, ...], dtype: Any) -> np.ndarray:
    """The slice of a parameter at `index`, a start and a stop for each axis."""
    found = np.empty([bounds.stop - bounds.start for bounds in index], dtype)
    for name, row, place in source.parts[path]:
        # A layer's (and an expert's) number is its place on the parameter's leading axes.
        leading, rest = index[: len(row.index)], index[len(row.index) :]
        numbers = zip(row.index, leading, strict=True)
        at = tuple(number - bounds.start for number, bounds in numbers)
        if all(0 <= number < size for number, size in zip(at, found.shape, strict=False)):
            shapes = part_shapes(row, source.shapes)
            layout = tensors.Layout(row.tensor, shapes, source.config.heads)
            read = functools.partial(source.reader.read, name)
            tensors.read_part(found[at], layout, place, rest, read)
    return found


def make_array(
    shape: tuple[int, ...], placed: Sharding, read: Callable[[tuple[slice, ...]], np.ndarray]
) -> jax.Array:
    """The array of this sharding whose slices `read(index)` gives, each read once.

    `jax.make_array_from_callback` would hold all of this host's slices at a time, and read those
    of several devices again for each.
    """
    devices = collections.defaultdict(list)
    for device, index in placed.addressable_devices_indices_map(shape).items():
        bounds = zip(index or (), shape, strict=True)
        devices[tuple(part.indices(size)[:2] for part, size in bounds)].append(device)
    shards: list[jax.Array] = []
    for bounds, holders in devices.items():
        value = read(tuple(slice(start, stop) for start, stop in bounds))
        shards += [jax.device_put(value, device) for device in holders]
        # This slice leaves host memory before the next one is read.
        jax.block_until_ready(shards)
        del value
    return jax.make_array_from_single_device_arrays(shape, placed, shards)


def save(
    path: str | os.PathLike,
    config: DecoderConfig,
    params: dict,
    dtype: Any = np.float32,
    max_file_bytes: int = 5_000_000_000,
) -> None:
    """Writes a model for HF's `from_pretrained` into a folder, in place of one that is there.

    Tensors are float32 or bfloat16, at most max_file_bytes of them a file (a larger one has a file
    of its own). config.json is written last: without it no folder is taken for a model.
    """
    import huggingface_hub

    check_dtype(dtype)
    values = {**hf_config.to_hf(config), "torch_dtype": np.dtype(dtype).name}
    found = leaves(params)
    rows = find_rows(config, found)
    counts = {
        name: math.prod(tensors.stored_shape(row.tensor, part_shapes(row, found)))
        for name, row in rows.items()
    }
    plan = huggingface_hub.split_state_dict_into_shards_factory(
        counts,
        get_storage_size=lambda count: count * np.dtype(dtype).itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_file_bytes,
    )
    folder = pathlib.Path(path)
    hf_files.clear(folder)
    for file, names in plan.filename_to_tensors.items():
        # transformers refuses files without the format.
        safetensors.numpy.save_file(
            {name: make_tensor(rows[name], found, config, dtype) for name in names},
            folder / file,
            metadata={"format": "pt"},
        )
    if plan.is_sharded:
        metadata = {"total_parameters": sum(counts.values()), **plan.metadata}
        index = {"metadata": metadata, "weight_map": plan.tensor_to_filename}
        hf_files.write_json(folder / hf_files.INDEX, index, sort_keys=True)
    hf_files.write_json(folder / hf_files.CONFIG, values)


def make_tensor(row: Row, params: dict[Path, Any], config: DecoderConfig, dtype: Any) -> np.ndarray:
    """A tensor of the files, in host memory."""
    parts = [fetch(params[path], row.index).astype(dtype, copy=False) for path in row.paths]
    return tensors.join(parts, row.tensor, config.heads)


def fetch(leaf: Any, number: tuple[int, ...]) -> np.ndarray:
    """A parameter's part at a place on its leading axes, from the devices if it lies there."""
    if not isinstance(leaf, jax.Array):
        return leaf[number]
    rest = leaf.shape[len(number) :]
    start, sizes = (*number, *(0 for _ in rest)), (*(1 for _ in number), *rest)
    # `leaf[number]` would be compiled for each layer, and a whole leaf keeps its copy on the host.
    return np.asarray(jax.lax.dynamic_slice(leaf, start, sizes)).reshape(rest)


def check_dtype(dtype: Any) -> None:
    """Raises ValueError unless parameters may have this type."""
    if np.dtype(dtype) not in DTYPES:
        raise ValueError(f"dtype is {np.dtype(dtype)}; it must be float32 or bfloat16")


def leaves(params: dict) -> dict[Path, Any]:
    """The leaves of a tree by path."""
    pairs = jax.tree_util.tree_leaves_with_path(params)
    return {tuple(entry.key for entry in path): leaf for path, leaf in pairs}


def nest(found: dict[Path, Any]) -> dict:
    """The tree of leaves by path."""
    tree: dict = {}
    for path, leaf in found.items():
        parent = functools.reduce(lambda node, key: node.setdefault(key, {}), path[:-1], tree)
        parent[path[-1]] = leaf
    return tree


def find_rows(config: DecoderConfig, present: Collection[Path]) -> dict[str, Row]:
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
    config: DecoderConfig, reader: hf_files.Reader, embedding: str, shape: tuple[int, ...]
) -> None:
    """Raises ValueError where a tied head is stored too and is not the embedding."""
    name = head_name(config)
    if not config.tied_head or name not in reader.files:
        return
    reader.check(name, shape)
    for start in range(0, shape[0], COMPARED_ROWS):
        rows = (slice(start, min(start + COMPARED_ROWS, shape[0])), slice(0, shape[1]))
        head, tied = (reader.read(one, rows).astype(np.float32) for one in (name, embedding))
        if not np.array_equal(head, tied):
            raise ValueError(
                f"{reader.files[name].file} has an {name} that differs from the embedding, "
                f"though config.json says tie_word_embeddings; set that to false to use it"
            )

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
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
import safetensors.numpy

from dpo_jax.model import config as model_config
from dpo_jax.model import decoder
from dpo_jax.model.config import PRESETS, DecoderConfig


class Tensor(NamedTuple):
    """Where a tensor of the file goes in the parameter tree."""

    path: tuple[str, ...]
    # leading axes of the parameter that are inputs of a matrix, kept as [outputs, inputs] by HF;
    # 0: kept as it is
    inputs: int


# {} is the layer.
TENSORS: dict[str, Tensor] = {
    "model.embed_tokens.weight": Tensor(("embedding",), 0),
    "model.layers.{}.input_layernorm.weight": Tensor(("layers", "attention_norm", "scale"), 0),
    "model.layers.{}.self_attn.q_proj.weight": Tensor(
        ("layers", "attention", "query", "kernel"), 1
    ),
    "model.layers.{}.self_attn.k_proj.weight": Tensor(("layers", "attention", "key", "kernel"), 1),
    "model.layers.{}.self_attn.v_proj.weight": Tensor(
        ("layers", "attention", "value", "kernel"), 1
    ),
    "model.layers.{}.self_attn.o_proj.weight": Tensor(
        ("layers", "attention", "output", "kernel"), 2
    ),
    "model.layers.{}.post_attention_layernorm.weight": Tensor(("layers", "mlp_norm", "scale"), 0),
    "model.layers.{}.mlp.gate_proj.weight": Tensor(("layers", "mlp", "gate", "kernel"), 1),
    "model.layers.{}.mlp.up_proj.weight": Tensor(("layers", "mlp", "up", "kernel"), 1),
    "model.layers.{}.mlp.down_proj.weight": Tensor(("layers", "mlp", "down", "kernel"), 1),
    "model.norm.weight": Tensor(("norm", "scale"), 0),
    "lm_head.weight": Tensor(("head",), 1),
}

# Computed from the config; files of Llama 2's time hold them too.
BUFFERS = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
FLOATS = {"F32", "F16", "BF16"}
INDEX = "model.safetensors.index.json"


def load(source: str | os.PathLike) -> tuple[DecoderConfig, dict]:
    """Config and parameters (float32 in host memory) of a folder in HF format or a hub name.

    Raises ValueError that names what is missing, unexpected, unsupported or of the wrong shape.
    """
    folder = find_folder(str(source))
    config = model_config.from_hf(read_json(folder / "config.json"))
    files = find_tensors(folder)
    params: dict = jax.eval_shape(functools.partial(decoder.init, config), jax.random.key(0))
    templates = {name: t for name, t in TENSORS.items() if t.path in paths(params)}
    expected = {name for template in templates for name in layer_names(template, config)}
    check_names(expected, set(files), config, folder)
    reader = Reader(files)
    for template, tensor in templates.items():
        names = layer_names(template, config)
        parent: dict = functools.reduce(dict.__getitem__, tensor.path[:-1], params)
        shape = parent[tensor.path[-1]].shape
        stacked = np.empty(shape, np.float32)
        # A view with one row a tensor, whether or not there are layers.
        rows = stacked if "{}" in template else stacked[None]
        for i, name in enumerate(names):
            rows[i] = reader.read(name, rows.shape[1:], tensor.inputs)
        parent[tensor.path[-1]] = stacked
    check_tied(config, files, reader, params)
    return config, params


def save(path: str | os.PathLike, config: DecoderConfig, params: dict) -> None:
    """Writes config.json and model.safetensors, for HF's `from_pretrained`, into a folder."""
    folder = pathlib.Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    present = paths(params)
    tensors = {}
    for template, (keys, inputs) in TENSORS.items():
        if keys not in present:
            continue
        leaf = np.asarray(functools.reduce(lambda tree, key: tree[key], keys, params))
        rows = leaf if "{}" in template else leaf[None]
        for name, row in zip(layer_names(template, config), rows, strict=True):
            if inputs:
                row = row.reshape(matrix_shape(row.shape, inputs)[::-1]).T
            # safetensors writes the memory as it lies, without a look at the strides.
            tensors[name] = np.ascontiguousarray(row)
    # transformers refuses files without the format.
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    text = json.dumps(model_config.to_hf(config), indent=2)
    (folder / "config.json").write_text(text + "\n")


def paths(params: dict) -> set[tuple[str, ...]]:
    """The path of every leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {tuple(entry.key for entry in path) for path, _ in leaves}


def layer_names(template: str, config: DecoderConfig) -> list[str]:
    """The tensors that one parameter is made of."""
    return [template.format(i) for i in range(config.layers)] if "{}" in template else [template]


def matrix_shape(shape: tuple[int, ...], inputs: int) -> tuple[int, ...]:
    """The shape that HF keeps a parameter of this shape in."""
    if not inputs:
        return tuple(shape)
    return int(np.prod(shape[inputs:])), int(np.prod(shape[:inputs]))


class Reader:
    """Reads tensors one at a time from files that it keeps open."""

    def __init__(self, files: dict[str, pathlib.Path]):
        self.files = files
        self.open: dict[pathlib.Path, Any] = {}

    def read(self, name: str, shape: tuple[int, ...], inputs: int) -> np.ndarray:
        """A tensor as float32 of a parameter's shape."""
        file = self.files[name]
        if file not in self.open:
            self.open[file] = safetensors.safe_open(file, framework="numpy")
        stored = self.open[file].get_slice(name)
        expected = matrix_shape(shape, inputs)
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
        array = self.open[file].get_tensor(name).astype(np.float32)
        return array.T.reshape(shape) if inputs else array


def check_names(
    expected: set[str], present: set[str], config: DecoderConfig, folder: pathlib.Path
) -> None:
    """Raises ValueError unless the tensors of the files are those that the config asks for."""
    missing = sorted(expected - present)
    extra = {name for name in present - expected if not BUFFERS.fullmatch(name)}
    unexpected = sorted(extra - {"lm_head.weight"} if config.tied_head else extra)
    if missing or unexpected:
        parts = [("lacks", missing), ("has, beyond what config.json asks for,", unexpected)]
        text = " and ".join(f"{verb} {shorten(names)}" for verb, names in parts if names)
        raise ValueError(f"{folder} {text}")


def shorten(names: list[str]) -> str:
    """The first few of a list of names, and how many more there are."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def check_tied(config: DecoderConfig, files: dict, reader: Reader, params: dict) -> None:
    """Raises ValueError where a tied head is stored too and is not the embedding."""
    if config.tied_head and "lm_head.weight" in files:
        head = reader.read("lm_head.weight", params["embedding"].shape[::-1], 1)
        if not np.array_equal(head.T, params["embedding"]):
            raise ValueError(
                f"{files['lm_head.weight']} has an lm_head.weight that differs from the embedding, "
                f"though config.json says tie_word_embeddings; set that to false to use it"
            )


def find_tensors(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """The file of each tensor of a folder."""
    if (folder / INDEX).exists():
        index = read_json(folder / INDEX)["weight_map"]
        for file in sorted(set(index.values())):
            if not (folder / file).exists():
                raise ValueError(f"{folder / file} is missing, and {INDEX} lists it")
        return {name: folder / file for name, file in index.items()}
    file = folder / "model.safetensors"
    if not file.exists():
        raise ValueError(f"{folder} has neither model.safetensors nor {INDEX}")
    with safetensors.safe_open(file, framework="numpy") as tensors:
        return {name: file for name in tensors.keys()}


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

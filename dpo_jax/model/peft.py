"""Adapters written in the form of PEFT: adapter_config.json and adapter_model.safetensors.

Where HF fuses linear maps that are apart here, their adapters become one, whose rank is the sum of
theirs.

Dimensions: R rank of one linear map's adapter, m of them in a fused one.
"""

import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors.numpy

from dpo_jax.model import tensors
from dpo_jax.model.config import DecoderConfig
from dpo_jax.model.families import FAMILIES

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# what PEFT puts before the names of a causal language model's modules
PREFIX = "base_model.model."


class Settings(NamedTuple):
    """What an adapter is beside its matrices."""

    rank: int
    alpha: float
    rank_stabilised: bool
    dropout: float
    # folder or hub name of the model that it belongs to
    base_model: str


class Module(NamedTuple):
    """A linear map of HF that an adapter is beside."""

    # with {} for the layer
    name: str
    tensor: tensors.Tensor
    # the linear maps that it holds, by our names, and those of them that have an adapter
    parts: tuple[str, ...]
    adapted: tuple[str, ...]


def save(
    path: str | os.PathLike, config: DecoderConfig, adapter: dict, settings: Settings, dtype: Any
) -> None:
    """Writes an adapter, as `lora.init` makes it, into a folder."""
    folder = pathlib.Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    modules = find_modules(config, adapter)
    stored: dict[str, np.ndarray] = {}
    for module in modules:
        for layer in range(config.layers):
            down, up = join(module, config, layer_of(config, adapter, layer))
            name = f"{PREFIX}{module.name.format(layer)}"
            stored[f"{name}.lora_A.weight"] = np.ascontiguousarray(down.astype(dtype))
            stored[f"{name}.lora_B.weight"] = np.ascontiguousarray(up.astype(dtype))
    safetensors.numpy.save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    text = json.dumps(describe(config, modules, settings), indent=2)
    (folder / CONFIG).write_text(text + "\n")


def find_modules(config: DecoderConfig, adapter: dict) -> list[Module]:
    """The linear maps of HF's model that an adapter of a decoder is beside."""
    adapted = {name for module in adapter["layers"].values() for name in module}
    found = []
    for name, tensor in FAMILIES[config.family].names.items():
        parts = tuple(path.split("/")[-2] for path in tensor.paths if path.endswith("/kernel"))
        own = tuple(part for part in parts if part in adapted)
        if own:
            found.append(Module(name.removesuffix(".weight"), tensor, parts, own))
    return found


def layer_of(config: DecoderConfig, adapter: dict, layer: int) -> dict[str, dict[str, np.ndarray]]:
    """The matrices of one layer by linear map."""
    within = layer < config.scanned
    stack = adapter["layers" if within else "remainder"]
    index = layer if within else layer - config.scanned
    return {
        name: {leaf: np.asarray(jax.device_get(matrix[index])) for leaf, matrix in pair.items()}
        for module in stack.values()
        for name, pair in module.items()
    }


def join(module: Module, config: DecoderConfig, layer: dict) -> tuple[np.ndarray, np.ndarray]:
    """A layer's matrices of a module as PEFT has them: [m R, inputs] and [outputs, m R]."""
    downs = [layer[part]["lora_a"] for part in module.adapted]
    rank = downs[0].shape[-1]
    down = np.concatenate([matrix.reshape(-1, rank).T for matrix in downs])
    ups = []
    for part in module.parts:
        up = np.zeros((len(down), *output_shape(config, part)), np.float32)
        if part in module.adapted:
            start = module.adapted.index(part) * rank
            up[start : start + rank] = layer[part]["lora_b"]
        ups.append(up)
    layout = module.tensor._replace(inputs=1, transposed=True)
    return down, tensors.join(ups, layout, config.heads)


def output_shape(config: DecoderConfig, name: str) -> tuple[int, ...]:
    """The shape of what a linear map gives."""
    heads = {"query": config.heads, "key": config.key_value_heads, "value": config.key_value_heads}
    if name in heads:
        return heads[name], config.head_dim
    return (config.hidden,) if name in ("gate", "up") else (config.width,)


def describe(config: DecoderConfig, modules: Sequence[Module], settings: Settings) -> dict:
    """The content of adapter_config.json."""
    names = short_names(config, modules)
    fused = {name: len(module.adapted) for name, module in zip(names, modules, strict=True)}
    fused = {name: count for name, count in fused.items() if count > 1}

    # the scale stays alpha / R, or alpha / sqrt(R)
    def alpha(count: int) -> float:
        return settings.alpha * (math.sqrt(count) if settings.rank_stabilised else count)

    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": settings.base_model,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rank_stabilised,
        "bias": "none",
        "target_modules": names,
        "rank_pattern": {name: count * settings.rank for name, count in fused.items()},
        "alpha_pattern": {name: alpha(count) for name, count in fused.items()},
        # PEFT's word for kernels of [inputs, outputs]
        "fan_in_fan_out": any(not module.tensor.transposed for module in modules),
        "inference_mode": True,
    }


def short_names(config: DecoderConfig, modules: Sequence[Module]) -> list[str]:
    """The modules' names within a layer, as short as no other linear map of the model has them."""
    ends = [
        name.removesuffix(".weight").split("{}.")[-1]
        for name, tensor in FAMILIES[config.family].names.items()
        if name.endswith(".weight") and tensor.inputs
    ]
    found = []
    for module in modules:
        whole = module.name.split("{}.")[-1]
        last = whole.split(".")[-1]
        unique = sum(end.split(".")[-1] == last for end in ends) == 1
        found.append(last if unique else whole)
    return found

"""Low-rank adapters beside the linear maps of a decoder (https://arxiv.org/abs/2106.09685).

A linear map of the parameter tree, {"kernel", "bias"}, with an adapter has two matrices more,
{"lora_a", "lora_b"}, and where it has them the decoder adds their product. An adapter is the tree
of these alone; the decoder's other parameters are its base.

Dimensions: n layers of a stack, R rank.
"""

import math
from collections.abc import Collection

import jax
import jax.numpy as jnp

from dpo_jax.model import decoder, layers, products
from dpo_jax.model.config import DecoderConfig

# the module of a layer that each linear map belongs to
TARGETS = {
    **dict.fromkeys(("query", "key", "value", "output"), "attention"),
    **dict.fromkeys(("gate", "up", "down"), "mlp"),
}
LEAVES = ("lora_a", "lora_b")


def scale(alpha: float, rank: int, *, rank_stabilised: bool) -> float:
    """What an adapter's product is multiplied by: alpha / R, or alpha / sqrt(R) where it is
    stabilised (rsLoRA, https://arxiv.org/abs/2312.03732).
    """
    return alpha / (math.sqrt(rank) if rank_stabilised else rank)


def find_targets(config: DecoderConfig, names: Collection[str] | None) -> tuple[str, ...]:
    """The linear maps that an adapter of a decoder is beside; None: all that it has.

    ValueError names one that the decoder does not have. Experts and their router have none.
    """
    there = [
        name
        for name, module in TARGETS.items()
        if not (module == "mlp" and config.experts is not None)
        and not (name == "gate" and not config.gated)
    ]
    for name in names or ():
        if name not in there:
            raise ValueError(
                f"lora.targets has {name!r}, and of this {config.family} model's linear maps only "
                f"these can be adapted: {', '.join(there)}"
            )
    return tuple(name for name in there if names is None or name in names)


def shapes(config: DecoderConfig, targets: Collection[str], rank: int) -> dict:
    """The tree of an adapter as shapes and types."""
    whole, found = decoder.shapes(config), {}
    for stack in ("layers", "remainder"):
        for name in targets if stack in whole else ():
            kernel = whole[stack][TARGETS[name]][name]["kernel"].shape
            split = 1 + layers.input_axes(name)
            sides = (*kernel[:split], rank), (kernel[0], rank, *kernel[split:])
            pair = {
                leaf: jax.ShapeDtypeStruct(side, jnp.float32)
                for leaf, side in zip(LEAVES, sides, strict=True)
            }
            found.setdefault(stack, {}).setdefault(TARGETS[name], {})[name] = pair
    return found


def init(config: DecoderConfig, targets: Collection[str], rank: int, key: jax.Array) -> dict:
    """A new adapter, which changes nothing yet: lora_a uniform within 1 / sqrt(inputs), as PEFT
    draws it, and lora_b 0.
    """

    def one(path: tuple, shape: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
        if path[-1].key == "lora_b":
            return jnp.zeros(shape.shape, shape.dtype)
        bound = 1.0 / math.sqrt(math.prod(shape.shape[1:-1]))
        return jax.random.uniform(key, shape.shape, shape.dtype, -bound, bound)

    tree = shapes(config, targets, rank)
    keys = jax.random.split(key, len(jax.tree.leaves(tree)))
    keys = jax.tree.unflatten(jax.tree.structure(tree), list(keys))
    return jax.tree_util.tree_map_with_path(one, tree, keys)


def join(base: dict, trained: dict, scale: float) -> dict:
    """The parameters that a decoder takes: those of a base, and what is trained beside them or in
    their place; an adapter's product is multiplied by `scale`.

    No array of the base is copied. `join({}, params, 1.0)` is params.
    """
    joined = dict(base)
    for name, value in trained.items():
        if isinstance(value, dict):
            inner = joined.get(name, {})
            joined[name] = join(inner if isinstance(inner, dict) else {}, value, scale)
        else:
            joined[name] = value * scale if name == "lora_b" else value
    return joined


def merge(params: dict) -> dict:
    """The joined parameters with each adapter's product added to its kernel, float32, and without
    adapters.
    """
    if "kernel" in params:
        merged = {name: leaf for name, leaf in params.items() if name not in LEAVES}
        kernel = products.dequantise(params["kernel"]).astype(jnp.float32)
        if "lora_a" in params:
            kernel = kernel + multiply_out(params["lora_a"], params["lora_b"])
        return merged | {"kernel": kernel}
    return {
        name: merge(value)
        if isinstance(value, dict)
        else products.dequantise(value).astype(jnp.float32)
        for name, value in params.items()
    }


def multiply_out(down: jax.Array, up: jax.Array) -> jax.Array:
    """The product of an adapter's matrices, [n, inputs, R] and [n, R, outputs], as a kernel."""
    count, rank = up.shape[:2]
    product = jnp.matmul(
        down.reshape(count, -1, rank), up.reshape(count, rank, -1), precision="highest"
    )
    return product.reshape(*down.shape[:-1], *up.shape[2:])

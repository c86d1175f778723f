"""Parameters that are not trained, held in less memory than trained ones need."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.model import layers, products

INT8 = "int8"
EXPERTS = ("gate", "up", "down")
# those that are no linear map of a layer, and the router, which stays out of int8
MATRICES = ("embedding", "positions", "head", "router")


def hold(params: dict, held_as: str, others_as: str, *, donated: bool = False) -> dict:
    """A copy of parameters for forward passes only, with matrices in less memory.

    The layers' linear maps are held as float32, bfloat16 or int8 with a float32 scale for each
    output, other matrices as float32 or bfloat16; a forward pass in the same type is not changed by
    that. Vectors stay as they are, for norms are computed in float32. Donated parameters are
    deleted one by one, so that no second set of them is in memory.
    """

    def one(path: tuple, leaf: jax.Array) -> Any:
        keys = tuple(entry.key for entry in path)
        held = hold_one(keys, leaf, held_as, others_as)
        if donated:
            jax.block_until_ready(held)
            leaf.delete()
        return held

    return jax.tree_util.tree_map_with_path(one, params)


def hold_one(keys: tuple[str, ...], leaf: jax.Array, held_as: str, others_as: str) -> Any:
    """A copy of one parameter as `hold` has it."""
    inputs = input_axes(keys)
    if inputs is not None and held_as == INT8:
        return quantise(leaf, inputs)
    kind = held_as if inputs is not None else others_as
    dtype = jnp.dtype(kind) if is_matrix(keys) else leaf.dtype
    return jnp.array(leaf, dtype, copy=True)


def is_matrix(keys: tuple[str, ...]) -> bool:
    """Whether a parameter by its path is a matrix of a decoder, and no vector of norm or bias."""
    return input_axes(keys) is not None or keys[-1] in MATRICES


def input_axes(keys: tuple[str, ...]) -> tuple[int, ...] | None:
    """The axes of a parameter that are a linear map's inputs; None: it is no linear map of a
    layer.
    """
    if keys[-1] == "kernel":
        return tuple(range(1, 1 + layers.input_axes(keys[-2])))
    if keys[-2:-1] == ("experts",) and keys[-1] in EXPERTS:
        return (2,)
    return None


@functools.partial(jax.jit, static_argnums=1)
def quantise(leaf: jax.Array, inputs: tuple[int, ...]) -> products.Weights:
    """One stack of linear maps in int8, where the stack lies."""
    return products.quantise(leaf, inputs)


def bytes_of(tree: Any) -> int:
    """The size of all arrays of a tree, over all devices that share them."""
    return sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))

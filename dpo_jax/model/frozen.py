"""Parameters that are not trained, held in less memory than trained ones need."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.model import layers, products

INT8 = "int8"
EXPERTS = ("gate", "up", "down")


def hold(params: dict, held_as: str, *, donated: bool = False) -> dict:
    """A copy of parameters for forward passes only, with the matrices as `held_as` says.

    float32 or bfloat16: all matrices; a forward pass in the same type is not changed by it. int8:
    the linear maps of the layers, with a float32 scale for each output; embedding and output matrix
    stay as they are. Vectors always do, for norms are computed in float32. Donated parameters are
    deleted one by one, so that no second set of them is in memory.
    """

    def one(path: tuple, leaf: jax.Array) -> Any:
        held = hold_one(path, leaf, held_as)
        if donated:
            jax.block_until_ready(held)
            leaf.delete()
        return held

    return jax.tree_util.tree_map_with_path(one, params)


def hold_one(path: tuple, leaf: jax.Array, held_as: str) -> Any:
    """A copy of one parameter as `hold` has it."""
    keys = tuple(entry.key for entry in path)
    inputs = input_axes(keys)
    stacked = keys[0] in ("layers", "remainder")
    if held_as == INT8:
        return leaf.copy() if inputs is None else quantise(leaf, inputs)
    # of a stack of layers, vectors have two axes
    is_matrix = inputs is not None or (not stacked and leaf.ndim == 2) or keys[-1] == "router"
    return jnp.array(leaf, jnp.dtype(held_as) if is_matrix else leaf.dtype, copy=True)


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

"""What of a layer is kept for its backward pass; the rest is computed again from it.

Single elements (norms, activations, rotations) cost less to compute again than to write to memory
and read back, so that a policy says which results of products are kept, and of attention.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import ad_checkpoint

PRODUCT, ATTENTION = "product", "attention"
# by model.remat: none, so that no product is computed twice; dots, attention is; full, all are
POLICIES: dict[str, Callable[..., Any]] = {
    "none": jax.checkpoint_policies.save_only_these_names(PRODUCT, ATTENTION),
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def of_product(tree: Any) -> Any:
    """The tree, whose arrays are kept but where `model.remat` is full: a product with weights has
    made them, or they cost much to make again.
    """
    return ad_checkpoint.checkpoint_name(tree, PRODUCT)


def of_attention(tree: Any) -> Any:
    """The tree, whose arrays, made by attention, are kept where `model.remat` is none."""
    return ad_checkpoint.checkpoint_name(tree, ATTENTION)


def rematerialise(run: Callable, remat: str, *, prevent_cse: bool) -> Callable:
    """A layer's function (kind, carry, params, layer) under a policy; ValueError for another."""
    if remat not in POLICIES:
        raise ValueError(f"remat is {remat!r}; it must be {', '.join(POLICIES)}")
    policy = POLICIES[remat]
    return jax.checkpoint(run, policy=policy, prevent_cse=prevent_cse, static_argnums=(0,))

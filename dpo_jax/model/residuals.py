"""What of a layer is kept for its backward pass; the rest is computed again from it.

What costs little to compute again (norms, activations, rotations) is not written to memory and read
back: a policy says by name what is kept.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import ad_checkpoint

KEPT, OF_ATTENTION = "kept", "kept of attention"
# by model.remat: none, so that no product is computed twice; dots, attention is; full, all are
POLICIES: dict[str, Callable[..., Any]] = {
    "none": jax.checkpoint_policies.save_only_these_names(KEPT, OF_ATTENTION),
    "dots": jax.checkpoint_policies.save_only_these_names(KEPT),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def keep(tree: Any) -> Any:
    """The tree, whose arrays are kept but where `model.remat` is full: what products with weights
    give, and whatever else costs much, or must not come out otherwise the second time.
    """
    return ad_checkpoint.checkpoint_name(tree, KEPT)


def keep_of_attention(tree: Any) -> Any:
    """The tree, whose arrays, made by attention, are kept where `model.remat` is none."""
    return ad_checkpoint.checkpoint_name(tree, OF_ATTENTION)


def rematerialise(run: Callable, remat: str, *, prevent_cse: bool) -> Callable:
    """A layer's function (kind, carry, params, layer) under a policy; ValueError for another."""
    if remat not in POLICIES:
        raise ValueError(f"remat is {remat!r}; it must be {', '.join(POLICIES)}")
    policy = POLICIES[remat]
    return jax.checkpoint(run, policy=policy, prevent_cse=prevent_cse, static_argnums=(0,))

"""Config to optax. The learning rate stays outside, a traced number of the step, so that changing
it compiles nothing.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dpo_jax import config

# half of the widest gap between two bfloat16 numbers, as a share of the smaller one
HALF_STEP = 2.0**-8


def make(optimizer: config.Optimizer) -> optax.GradientTransformation:
    """Gradient to descent direction, before the learning rate."""
    check(optimizer)
    decay = optimizer.weight_decay
    parts = [] if optimizer.clip is None else [optax.clip_by_global_norm(optimizer.clip)]
    if optimizer.kind == "adamw":
        b1, b2 = default(optimizer.b1, 0.9), default(optimizer.b2, 0.999)
        adam = optax.scale_by_adam(b1, b2, default(optimizer.eps, 1e-8))
        parts += [
            adam if optimizer.moments_dtype == "float32" else with_narrow_first_moment(adam),
            optax.add_decayed_weights(decay, matrices),
            optax.scale(-1.0),
        ]
    elif optimizer.kind == "rmsprop":
        # PyTorch's form, which the DPO paper's code uses: eps outside the root
        parts += [
            optax.scale_by_rms(
                default(optimizer.b2, 0.99), default(optimizer.eps, 1e-8), eps_in_sqrt=False
            ),
            optax.scale(-1.0),
        ]
    else:
        parts += [
            optax.adafactor(
                None,
                multiply_by_parameter_scale=False,
                weight_decay_rate=decay or None,
                weight_decay_mask=matrices,
            )
        ]
    return optax.chain(*parts)


def with_narrow_first_moment(adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """Adam whose first moment is bfloat16 between its updates, which are computed in float32.

    optax's own mu_dtype would multiply the moment by b1 in bfloat16, and so round it twice a step.
    """

    def narrow(state: Any) -> Any:
        return state._replace(mu=optax.tree.cast(state.mu, jnp.bfloat16))

    def init(params):
        return narrow(adam.init(params))

    def update(updates, state: Any, params=None):
        wide = state._replace(mu=optax.tree.cast(state.mu, jnp.float32))
        updates, state = adam.update(updates, wide, params)
        return updates, narrow(state)

    return optax.GradientTransformation(init, update)


def default(value: float | None, otherwise: float) -> float:
    """The value, or the default where it is None."""
    return otherwise if value is None else value


def matrices(params):
    """Which parameters decay: all but the norms' scales."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: "norm" not in jax.tree_util.keystr(path), params
    )


def check(optimizer: config.Optimizer) -> None:
    """Raises ValueError for a number that this kind of optimizer does not read."""
    unread = {
        "adamw": (),
        "rmsprop": ("b1", "weight_decay"),
        "adafactor": ("b1", "b2", "eps"),
    }[optimizer.kind]
    for name in unread:
        value = getattr(optimizer, name)
        if value != getattr(config.Optimizer, name):
            raise ValueError(
                f"optimizer.{name} is {value}, and {optimizer.kind} does not read it: leave it out"
            )
    if optimizer.moments_dtype == "float32":
        return
    if optimizer.kind != "adamw":
        raise ValueError(
            f"optimizer.moments_dtype is {optimizer.moments_dtype}, and {optimizer.kind} has only "
            "second moments, which are float32 always: leave it out"
        )
    if 1 - default(optimizer.b1, 0.9) < HALF_STEP:
        raise ValueError(
            f"optimizer.b1 is {optimizer.b1}, and a first moment in bfloat16 would stand still, "
            f"since steps of 1 - b1 are rounded away below {HALF_STEP}: take a smaller b1, or "
            "--optimizer.moments-dtype float32"
        )


def make_schedule(optimizer: config.Optimizer, steps: int) -> Callable[[jax.Array], jax.Array]:
    """Step (0 for the first update) to the share of the peak learning rate.

    Rises linearly over warmup_steps (the first update has share 1 / warmup_steps); then constant,
    linear or cosine to 0, which the step after the last would have; or sqrt(warmup / step).
    """
    warmup = optimizer.warmup_steps
    if warmup >= steps and warmup > 0:
        raise ValueError(
            f"optimizer.warmup_steps is {warmup}, and the run has {steps} steps: it must be fewer"
        )

    def share(step: jax.Array) -> jax.Array:
        done = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((done - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        rise = jnp.minimum((done + 1) / warmup, 1.0) if warmup else jnp.ones_like(done)
        course = {
            "constant": lambda: jnp.ones_like(done),
            "linear": lambda: 1.0 - progress,
            "cosine": lambda: 0.5 * (1.0 + jnp.cos(jnp.pi * progress)),
            "inverse_sqrt": lambda: jnp.sqrt(
                max(warmup, 1) / jnp.maximum(done + 1, max(warmup, 1))
            ),
        }[optimizer.schedule]()
        return rise * course

    return share

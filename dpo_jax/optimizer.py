"""Config to optax. The learning rate stays outside, a traced number of the step, so that changing
it compiles nothing.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from dpo_jax import config


def make(optimizer: config.Optimizer) -> optax.GradientTransformation:
    """Gradient to descent direction, before the learning rate."""
    check(optimizer)
    decay = optimizer.weight_decay
    parts = [] if optimizer.clip is None else [optax.clip_by_global_norm(optimizer.clip)]
    if optimizer.kind == "adamw":
        b1, b2 = default(optimizer.b1, 0.9), default(optimizer.b2, 0.999)
        parts += [
            optax.scale_by_adam(b1, b2, default(optimizer.eps, 1e-8)),
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

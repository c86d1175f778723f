"""Rotary positions.

Dimensions: B rows, L tokens, H heads, Dh dimensions a head, R of them turned.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.model.config import LinearScaling, Llama3Scaling, Rope, YarnScaling

# cosine and sine of each position's angles: float32 [B, L, R / 2] both
Rotation = tuple[jax.Array, jax.Array]


def make_rotation(position: jax.Array, rope: Rope, head_dim: int) -> Rotation:
    """Cosine and sine of each position's angles: position int32 [B, L] -> float32 [B, L, R / 2]."""
    dimensions = rope.dimensions(head_dim)
    frequency = rope.theta ** -(np.arange(0, dimensions, 2) / dimensions)
    amplitude = 1.0
    match rope.scaling:
        case LinearScaling(factor):
            frequency = frequency / factor
        case Llama3Scaling():
            frequency = stretch_by_llama3(frequency, rope.scaling)
        case YarnScaling():
            frequency = stretch_by_yarn(frequency, rope.scaling, rope.theta)
            amplitude = rope.scaling.attention_factor
        case None:
            pass
    angle = position.astype(jnp.float32)[:, :, None] * jnp.float32(frequency)[None, None, :]
    return amplitude * jnp.cos(angle), amplitude * jnp.sin(angle)


def stretch_by_llama3(frequency: np.ndarray, scaling: Llama3Scaling) -> np.ndarray:
    """The slow frequencies divided by the factor, the fast kept, a ramp in the number of turns."""
    turns = scaling.original_max_positions * frequency / (2 * np.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return frequency * (kept + (1 - kept) / scaling.factor)


def stretch_by_yarn(frequency: np.ndarray, scaling: YarnScaling, theta: float) -> np.ndarray:
    """The same with a ramp in the number of the dimension, between those of given turns."""
    half = len(frequency)

    def dimension(turns: float) -> float:
        wavelengths = scaling.original_max_positions / (turns * 2 * math.pi)
        return half * math.log(wavelengths) / math.log(theta)

    low, high = dimension(scaling.fast_turns), dimension(scaling.slow_turns)
    if scaling.whole_dimensions:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    # A thousandth where they meet, as in the published code.
    stretched = np.clip((np.arange(half) - low) / ((high - low) or 1e-3), 0, 1)
    return frequency * (1 - stretched + stretched / scaling.factor)


def rotate(heads: jax.Array, rotation: Rotation) -> jax.Array:
    """Rotates dimension i of [B, L, H, Dh] with i + R / 2 (HF Llama's pairing), in float32.

    Dimensions from R on stay.
    """
    cosine, sine = (array[:, :, None, :] for array in rotation)
    half = cosine.shape[-1]
    first, second, rest = jnp.split(heads, (half, 2 * half), axis=-1)
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    turned = jnp.concatenate(
        [first * cosine - second * sine, second * cosine + first * sine], axis=-1
    )
    return jnp.concatenate([turned.astype(heads.dtype), rest], axis=-1)

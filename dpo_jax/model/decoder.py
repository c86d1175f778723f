"""The decoder: embedding, scanned layers, final norm, and its cache of keys and values.

Dimensions: B rows, L tokens, T slots of the cache, V vocabulary, D width, H heads, K key and value
heads, Dh dimensions a head. Parameters are float32, a plain nested dict; the layers' are stacked on
axis 0.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dpo_jax.model import attention
from dpo_jax.model.config import DecoderConfig, RopeScaling

# Logical axes of every parameter, by path. `sharding` maps them to axes of the mesh.
LOGICAL_AXES: dict[tuple[str, ...], tuple[str, ...]] = {
    ("embedding",): ("vocabulary", "width"),
    ("layers", "attention_norm", "scale"): ("layers", "width"),
    ("layers", "attention", "query", "kernel"): ("layers", "width", "heads", "head_dim"),
    ("layers", "attention", "key", "kernel"): ("layers", "width", "key_value_heads", "head_dim"),
    ("layers", "attention", "value", "kernel"): ("layers", "width", "key_value_heads", "head_dim"),
    ("layers", "attention", "output", "kernel"): ("layers", "heads", "head_dim", "width"),
    ("layers", "mlp_norm", "scale"): ("layers", "width"),
    ("layers", "mlp", "gate", "kernel"): ("layers", "width", "hidden"),
    ("layers", "mlp", "up", "kernel"): ("layers", "width", "hidden"),
    ("layers", "mlp", "down", "kernel"): ("layers", "hidden", "width"),
    ("norm", "scale"): ("width",),
    ("head",): ("width", "vocabulary"),
}

REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}

ONTO_RESIDUAL = ("output", "down")


class Cache(NamedTuple):
    """Keys and values of the tokens so far. Slots that nothing was written to are padding."""

    key: jax.Array  # [layers, B, T, K, Dh]
    value: jax.Array  # [layers, B, T, K, Dh]
    ids: attention.Ids  # int32 [B, T] each


class Norm(nn.Module):
    """Root-mean-square norm of the last axis, in float32."""

    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """hidden: [B, L, D]."""
        scale = self.param("scale", nn.initializers.ones, (hidden.shape[-1],))
        hidden = hidden.astype(jnp.float32)
        square = jnp.mean(jnp.square(hidden), axis=-1, keepdims=True)
        normed = hidden * jax.lax.rsqrt(square + self.epsilon)
        return (normed * scale[None, None, :]).astype(self.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    config: DecoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, hidden, rotation, query_ids, key_ids, cache, at):
        """hidden: [B, L, D]; cache: key and value [layers, B, T, K, Dh], or None; at: layer and
        slot, int32 scalars.
        """
        config = self.config
        query = dense(self, "query", (config.heads, config.head_dim))(hidden)  # [B, L, H, Dh]
        key = dense(self, "key", (config.key_value_heads, config.head_dim))(hidden)
        value = dense(self, "value", (config.key_value_heads, config.head_dim))(hidden)
        query, key = rotate(query, rotation), rotate(key, rotation)
        if cache is not None:
            cache = write(cache[0], key, *at), write(cache[1], value, *at)
            key, value = (
                jax.lax.dynamic_index_in_dim(whole, at[0], keepdims=False) for whole in cache
            )
        mixed = attention.attend(
            query,
            key.astype(self.dtype),
            value.astype(self.dtype),
            query_ids,
            key_ids,
            scale=config.head_dim**-0.5,
            window=config.sliding_window,
        )
        return dense(self, "output", config.width, inputs=2)(mixed), cache


class Mlp(nn.Module):
    """Gated linear unit with SiLU."""

    config: DecoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """hidden: [B, L, D]."""
        gate = nn.silu(dense(self, "gate", self.config.hidden)(hidden))
        return dense(self, "down", self.config.width)(
            gate * dense(self, "up", self.config.hidden)(hidden)
        )


class Layer(nn.Module):
    """Attention and MLP, each on the normed residual stream."""

    config: DecoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, carry, layer, rotation, query_ids, key_ids, at):
        """carry: hidden [B, L, D] and the cache of all layers; returns it and None, as `nn.scan`
        expects. A carry, and no input and output of each layer, is written in place.
        """
        hidden, cache = carry
        epsilon = self.config.norm_epsilon
        normed = Norm(epsilon, self.dtype, name="attention_norm")(hidden)
        mixed, cache = Attention(self.config, self.dtype, name="attention")(
            normed, rotation, query_ids, key_ids, cache, (layer, at)
        )
        hidden = hidden + mixed
        normed = Norm(epsilon, self.dtype, name="mlp_norm")(hidden)
        return (hidden + Mlp(self.config, self.dtype, name="mlp")(normed), cache), None


class Decoder(nn.Module):
    """Tokens to the hidden states that the output matrix (`head`) turns into logits."""

    config: DecoderConfig
    # compute type
    dtype: Any = jnp.float32
    # what the backward pass computes again: none, the dots' inputs only, or each whole layer
    remat: Literal["none", "dots", "full"] = "none"

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        ids: attention.Ids,
        cache: Cache | None = None,
        at: jax.Array | int = 0,
    ) -> Any:
        """Hidden states [B, L, D] of tokens [B, L] after the final norm; with a cache, it too.

        The keys of the L tokens are written to the cache's slots from `at` (int32 scalar) on, and
        queries see the slots that their ids allow, wherever those lie.
        """
        config = self.config
        table = self.param(
            "embedding", nn.initializers.normal(0.02), (config.vocabulary_size, config.width)
        )
        if not config.tied_head:
            # Only `head` reads it; it is declared here so that `init` makes it.
            self.param("head", nn.initializers.normal(0.02), (config.width, config.vocabulary_size))
        # Cast after the look-up, so that the table's gradient is summed in float32. An id outside
        # the vocabulary gives nan, which is seen, and not the row nearest to it.
        hidden = jnp.take(table, tokens, axis=0).astype(self.dtype)
        key_ids, layer_cache = ids, None
        if cache is not None:
            key_ids = attention.Ids(
                *(
                    jax.lax.dynamic_update_slice_in_dim(old, new, at, axis=1)
                    for old, new in zip(cache.ids, ids, strict=True)
                )
            )
            layer_cache = cache.key, cache.value
        rotation = rope(jnp.asarray(ids.position), config)
        (hidden, layer_cache), _ = scan_layers(self)(
            (hidden, layer_cache), jnp.arange(config.layers), rotation, ids, key_ids, at
        )
        hidden = Norm(config.norm_epsilon, self.dtype, name="norm")(hidden)
        if layer_cache is None:
            return hidden
        return hidden, Cache(key=layer_cache[0], value=layer_cache[1], ids=key_ids)


def scan_layers(decoder: Decoder) -> nn.Module:
    """All layers as one module, compiled once, under the decoder's remat policy."""
    layer: Any = Layer
    if decoder.remat != "none":
        if decoder.remat not in REMAT_POLICIES:
            raise ValueError(f"remat is {decoder.remat!r}; it must be none, dots or full")
        # A scan's forward and backward bodies are apart, so that XLA cannot undo the recomputation.
        layer = nn.remat(layer, policy=REMAT_POLICIES[decoder.remat], prevent_cse=False)
    everywhere = nn.broadcast
    in_axes: Any = (0, everywhere, everywhere, everywhere, everywhere)
    layers = nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=in_axes,
        out_axes=0,
        length=decoder.config.layers,
    )
    return layers(decoder.config, decoder.dtype, name="layers")


def write(cache: jax.Array, new: jax.Array, layer: jax.Array, at: jax.Array) -> jax.Array:
    """The cache [layers, B, T, K, Dh] with new [B, L, K, Dh] in a layer's slots from `at` on."""
    return jax.lax.dynamic_update_slice(cache, new[None].astype(cache.dtype), (layer, 0, at, 0, 0))


def dense(module: Attention | Mlp, name: str, features: int | tuple[int, ...], *, inputs: int = 1):
    """A linear map of the last `inputs` axes; those onto the residual stream start smaller."""
    deviation = 0.02 / np.sqrt(2 * module.config.layers) if name in ONTO_RESIDUAL else 0.02
    return nn.DenseGeneral(
        features,
        axis=tuple(range(-inputs, 0)),
        use_bias=False,
        dtype=module.dtype,
        kernel_init=nn.initializers.normal(deviation),
        name=name,
    )


def rope(position: jax.Array, config: DecoderConfig) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of each position's angles: float32 [B, L, Dh / 2] both."""
    exponent = np.arange(0, config.head_dim, 2) / config.head_dim
    frequency = config.rope_theta**-exponent
    if config.rope_scaling is not None:
        frequency = stretch(frequency, config.rope_scaling)
    frequency = jnp.asarray(frequency, jnp.float32)[None, None, :]
    angle = position.astype(jnp.float32)[:, :, None] * frequency
    return jnp.cos(angle), jnp.sin(angle)


def stretch(frequency: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Frequencies under Llama 3.1's rule: the slow divided by the factor, the fast kept, a ramp."""
    turns = scaling.original_max_positions * frequency / (2 * np.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return frequency * (kept + (1 - kept) / scaling.factor)


def rotate(heads: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates dimension i of [B, L, H, Dh] with i + Dh / 2 (HF Llama's pairing), in float32."""
    cosine, sine = (array[:, :, None, :] for array in rotation)
    first, second = jnp.split(heads.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate(
        [first * cosine - second * sine, second * cosine + first * sine], axis=-1
    )
    return turned.astype(heads.dtype)


def head(params: dict, config: DecoderConfig) -> jax.Array:
    """The output matrix: float32 [D, V]."""
    return params["embedding"].T if config.tied_head else params["head"]


def init(config: DecoderConfig, key: jax.Array) -> dict:
    """Random parameters: normal, deviation 0.02, over sqrt(2 layers) onto the residual stream."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    variables = Decoder(config).init(key, tokens, attention.Ids(tokens, tokens, tokens))
    return dict(variables["params"])


def init_cache(config: DecoderConfig, batch: int, length: int, dtype: Any) -> Cache:
    """An empty cache of `length` slots for `batch` rows."""
    shape = config.layers, batch, length, config.key_value_heads, config.head_dim
    ids = attention.Ids(*(jnp.zeros((batch, length), jnp.int32) for _ in attention.Ids._fields))
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), ids)


def logical_axes(params: dict) -> dict:
    """The tree of params with the names of each one's axes as leaves.

    Raises ValueError naming a parameter that LOGICAL_AXES lacks or gives another number of axes.
    """

    def name_axes(path: tuple, leaf: Any) -> tuple[str, ...]:
        keys = tuple(entry.key for entry in path)
        axes = LOGICAL_AXES.get(keys)
        if axes is None or len(axes) != len(leaf.shape):
            raise ValueError(
                f"no rule in LOGICAL_AXES for parameter {'/'.join(keys)} of shape "
                f"{tuple(leaf.shape)}: {'not listed' if axes is None else f'its rule is {axes}'}"
            )
        return axes

    return jax.tree_util.tree_map_with_path(name_axes, params)

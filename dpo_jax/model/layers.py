"""One layer of the decoder: norms, attention, MLP or experts.

Dimensions: B rows, L tokens, T slots of the cache, D width, H heads, K key and value heads, Dh
dimensions a head, F units of the MLP, E experts, C of them a token.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dpo_jax.model import attention, rope
from dpo_jax.model.config import DecoderConfig, Kind

# Logical axes of every parameter of a layer, by path, without the layer's own.
AXES: dict[tuple[str, ...], tuple[str, ...]] = {
    **{
        (norm, leaf): ("width",)
        for norm in ("attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm")
        for leaf in ("scale", "bias")
    },
    ("attention", "query", "kernel"): ("width", "heads", "head_dim"),
    ("attention", "query", "bias"): ("heads", "head_dim"),
    ("attention", "key", "kernel"): ("width", "key_value_heads", "head_dim"),
    ("attention", "key", "bias"): ("key_value_heads", "head_dim"),
    ("attention", "value", "kernel"): ("width", "key_value_heads", "head_dim"),
    ("attention", "value", "bias"): ("key_value_heads", "head_dim"),
    ("attention", "output", "kernel"): ("heads", "head_dim", "width"),
    ("attention", "output", "bias"): ("width",),
    ("attention", "query_norm", "scale"): ("head_dim",),
    ("attention", "key_norm", "scale"): ("head_dim",),
    ("attention", "query_width_norm", "scale"): ("heads", "head_dim"),
    ("attention", "key_width_norm", "scale"): ("key_value_heads", "head_dim"),
    ("mlp", "gate", "kernel"): ("width", "hidden"),
    ("mlp", "gate", "bias"): ("hidden",),
    ("mlp", "up", "kernel"): ("width", "hidden"),
    ("mlp", "up", "bias"): ("hidden",),
    ("mlp", "down", "kernel"): ("hidden", "width"),
    ("mlp", "down", "bias"): ("width",),
    ("experts", "router"): ("width", "experts"),
    ("experts", "gate"): ("experts", "width", "hidden"),
    ("experts", "up"): ("experts", "width", "hidden"),
    ("experts", "down"): ("experts", "hidden", "width"),
}

ACTIVATIONS = {
    "silu": nn.silu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
    "relu": nn.relu,
}

ONTO_RESIDUAL = ("output", "down")


class Norm(nn.Module):
    """The config's norm over the last axes, in float32."""

    config: DecoderConfig
    dtype: Any
    # how many axes
    axes: int = 1

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """hidden: [B, L, D], or [B, L, H, Dh] of queries or keys."""
        over = tuple(range(-self.axes, 0))
        shape = hidden.shape[-self.axes :]
        lifted = (1,) * (hidden.ndim - self.axes) + shape
        plus_one = self.config.norm == "rms_plus_one"
        scale = self.param("scale", nn.initializers.constant(0.0 if plus_one else 1.0), shape)
        scale = (scale + 1 if plus_one else scale).reshape(lifted)
        hidden = hidden.astype(jnp.float32)
        if self.config.norm == "layer":
            hidden = hidden - jnp.mean(hidden, axis=over, keepdims=True)
        square = jnp.mean(jnp.square(hidden), axis=over, keepdims=True)
        normed = hidden * jax.lax.rsqrt(square + self.config.norm_epsilon) * scale
        if self.config.norm == "layer":
            normed = normed + self.param("bias", nn.initializers.zeros, shape).reshape(lifted)
        return normed.astype(self.dtype)


class Attention(nn.Module):
    """Grouped-query attention."""

    config: DecoderConfig
    kind: Kind
    dtype: Any

    @nn.compact
    def __call__(self, hidden, rotation: rope.Rotation | None, query_ids, key_ids, cache, at):
        """hidden: [B, L, D]; cache: key and value [layers, B, T, K, Dh], or None; at: layer and
        slot, int32 scalars.
        """
        config = self.config
        bias = config.attention_bias
        of_keys = config.key_value_heads, config.head_dim
        query = dense(self, "query", (config.heads, config.head_dim), bias)(hidden)  # [B, L, H, Dh]
        key = dense(self, "key", of_keys, bias)(hidden)
        value = dense(self, "value", of_keys, bias)(hidden)
        query, key = self.normalise("query", query), self.normalise("key", key)
        if rotation is not None:
            query, key = rope.rotate(query, rotation), rope.rotate(key, rotation)
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
            scale=(config.query_scalar or config.head_dim) ** -0.5,
            window=self.kind.window,
            cap=config.attention_cap,
        )
        return dense(self, "output", config.width, config.output_bias, inputs=2)(mixed), cache

    def normalise(self, name: str, heads: jax.Array) -> jax.Array:
        """Queries or keys [B, L, H, Dh] under their norm, if they have one."""
        match self.config.query_key_norm:
            case "head":
                return Norm(self.config, self.dtype, name=f"{name}_norm")(heads)
            case "width":
                return Norm(self.config, self.dtype, axes=2, name=f"{name}_width_norm")(heads)
            case _:
                return heads


class Mlp(nn.Module):
    """Two linear maps with the activation between them, or a gated linear unit."""

    config: DecoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """hidden: [B, L, D]."""
        config = self.config
        activate = ACTIVATIONS[config.activation]
        units = dense(self, "up", config.hidden, config.mlp_bias)(hidden)  # [B, L, F]
        if config.gated:
            units = activate(dense(self, "gate", config.hidden, config.mlp_bias)(hidden)) * units
        else:
            units = activate(units)
        return dense(self, "down", config.width, config.mlp_bias)(units)


class Mixture(nn.Module):
    """Gated linear units, of which each token goes through the few that a router chooses.

    Tokens are sorted by expert, so that each expert multiplies its own tokens only.
    """

    config: DecoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """hidden: [B, L, D]."""
        assert self.config.experts is not None
        count, width, units = self.config.experts.count, self.config.width, self.config.hidden
        small = nn.initializers.normal(deviation(self.config, "down"))
        gate = self.param("gate", nn.initializers.normal(0.02), (count, width, units))
        up = self.param("up", nn.initializers.normal(0.02), (count, width, units))
        down = self.param("down", small, (count, units, width))
        tokens = hidden.reshape(-1, width)  # [B L, D]
        probability, expert = self.route(tokens)
        chosen = expert.shape[-1]
        order = jnp.argsort(expert.reshape(-1))  # [B L C]
        sizes = jnp.bincount(expert.reshape(-1), length=count).astype(jnp.int32)
        routed = tokens[order // chosen]  # [B L C, D]

        def multiply(rows: jax.Array, matrices: jax.Array) -> jax.Array:
            return jax.lax.ragged_dot(rows, matrices.astype(self.dtype), sizes)

        activated = ACTIVATIONS[self.config.activation](multiply(routed, gate))
        given = multiply(activated * multiply(routed, up), down)
        back = given[jnp.argsort(order)].reshape(*expert.shape, width)  # [B L, C, D]
        mixed = jnp.sum(back * probability[..., None].astype(self.dtype), axis=1)
        return mixed.reshape(hidden.shape)

    def route(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Weights (float32) and numbers of the experts of tokens [B L, D]: [B L, C] both."""
        experts = self.config.experts
        assert experts is not None
        router = self.param(
            "router", nn.initializers.normal(0.02), (self.config.width, experts.count)
        )
        logits = jnp.dot(tokens, router.astype(self.dtype), preferred_element_type=jnp.float32)
        probability, expert = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), experts.chosen)
        if experts.normalised:
            probability = probability / jnp.sum(probability, axis=-1, keepdims=True)
        return probability, expert


class Layer(nn.Module):
    """Attention and MLP, what each gives added to the residual stream."""

    config: DecoderConfig
    kind: Kind
    dtype: Any

    @nn.compact
    def __call__(self, hidden, rotation: rope.Rotation | None, query_ids, key_ids, cache, at):
        """The residual stream [B, L, D] and the cache of all layers after this one."""
        before = self.config.norm_placement != "post"
        after = self.config.norm_placement != "pre"
        read = self.norm("attention_norm", hidden, before)
        mixed, cache = Attention(self.config, self.kind, self.dtype, name="attention")(
            read, rotation, query_ids, key_ids, cache, at
        )
        mixed = self.norm("attention_post_norm", mixed, after)
        if self.config.residual == "serial":
            hidden, mixed = hidden + mixed, None
        if self.config.residual != "parallel_one_norm":
            read = self.norm("mlp_norm", hidden, before)
        if self.config.experts is None:
            given = Mlp(self.config, self.dtype, name="mlp")(read)
        else:
            given = Mixture(self.config, self.dtype, name="experts")(read)
        given = self.norm("mlp_post_norm", given, after)
        return (hidden if mixed is None else hidden + mixed) + given, cache

    def norm(self, name: str, hidden: jax.Array, there: bool) -> jax.Array:
        """The stream under a norm where the config has one in that place."""
        return Norm(self.config, self.dtype, name=name)(hidden) if there else hidden


def write(cache: jax.Array, new: jax.Array, layer: jax.Array, at: jax.Array) -> jax.Array:
    """The cache [layers, B, T, K, Dh] with new [B, L, K, Dh] in a layer's slots from `at` on."""
    return jax.lax.dynamic_update_slice(cache, new[None].astype(cache.dtype), (layer, 0, at, 0, 0))


def deviation(config: DecoderConfig, name: str) -> float:
    """Of the initial weights of a linear map: those onto the residual stream start smaller."""
    return 0.02 / math.sqrt(2 * config.layers) if name in ONTO_RESIDUAL else 0.02


def dense(
    module: Attention | Mlp,
    name: str,
    features: int | tuple[int, ...],
    bias: bool,
    *,
    inputs: int = 1,
):
    """A linear map of the last `inputs` axes."""
    return nn.DenseGeneral(
        features,
        axis=tuple(range(-inputs, 0)),
        use_bias=bias,
        dtype=module.dtype,
        kernel_init=nn.initializers.normal(deviation(module.config, name)),
        name=name,
    )

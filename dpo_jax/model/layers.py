"""One layer of the decoder: norms, attention, MLP or experts.

Dimensions: B rows, L tokens, T slots of the cache, D width, H heads, K key and value heads, Dh
dimensions a head, F units of the MLP, E experts, C of them a token, R rank of an adapter.
"""

import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from dpo_jax.model import attention, products, residuals, rope
from dpo_jax.model.config import DecoderConfig, Kind

# Logical axes of every parameter of a layer but its adapters', by path, without the layer's own.
PLAIN_AXES: dict[tuple[str, ...], tuple[str, ...]] = {
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

# linear maps with two axes of inputs; all others have one
TWO_INPUTS = ("output",)


def adapter_axes() -> dict[tuple[str, ...], tuple[str, ...]]:
    """Logical axes of the two matrices of an adapter of each linear map."""
    found = {}
    for path, axes in PLAIN_AXES.items():
        if path[-1] == "kernel":
            inputs = input_axes(path[-2])
            found[*path[:-1], "lora_a"] = *axes[:inputs], "rank"
            found[*path[:-1], "lora_b"] = "rank", *axes[inputs:]
    return found


def input_axes(name: str) -> int:
    """How many leading axes of a linear map's kernel are its inputs."""
    return 2 if name in TWO_INPUTS else 1


AXES = {**PLAIN_AXES, **adapter_axes()}

ACTIVATIONS = {
    "silu": nn.silu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
    "relu": nn.relu,
}

ONTO_RESIDUAL = ("output", "down")


class Dropout(NamedTuple):
    """What an adapter's dropout is drawn from."""

    keys: jax.Array  # keys [B], one a row, of the step
    rate: jax.Array | float


class Places(NamedTuple):
    """Where the tokens of a layer stand, and the layer in the model."""

    rotation: rope.Rotation | None
    query_ids: attention.Ids
    key_ids: attention.Ids
    layer: jax.Array | int
    # slot of the cache that the first token's key is written to
    slot: jax.Array | int
    # None: nothing is dropped
    dropout: Dropout | None = None


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
        scale = scale.astype(jnp.float32)
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
    # of rows to themselves; keys from a cache are for `attention.attend`
    attend: Callable = attention.attend

    @nn.compact
    def __call__(self, hidden: jax.Array, cache, places: Places):
        """hidden: [B, L, D]; cache: key and value [layers, B, T, K, Dh], or None."""
        config = self.config
        bias = config.attention_bias
        of_keys = config.key_value_heads, config.head_dim
        read = hidden, places.dropout
        query = linear(self, "query", (config.heads, config.head_dim), bias)(*read)  # [B, L, H, Dh]
        key = linear(self, "key", of_keys, bias)(*read)
        value = linear(self, "value", of_keys, bias)(*read)
        query, key = self.normalise("query", query), self.normalise("key", key)
        if places.rotation is not None:
            query, key = (rope.rotate(heads, places.rotation) for heads in (query, key))
        if cache is not None:
            cache = write(cache[0], key, places), write(cache[1], value, places)
            key, value = (
                jax.lax.dynamic_index_in_dim(whole, places.layer, keepdims=False) for whole in cache
            )
        mixed = (self.attend if cache is None else attention.attend)(
            query,
            key.astype(self.dtype),
            value.astype(self.dtype),
            places.query_ids,
            places.key_ids,
            scale=(config.query_scalar or config.head_dim) ** -0.5,
            window=self.kind.window,
            cap=config.attention_cap,
        )
        output = linear(self, "output", (config.width,), config.output_bias)
        return output(mixed, places.dropout), cache

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
    def __call__(self, hidden: jax.Array, dropout: Dropout | None) -> jax.Array:
        """hidden: [B, L, D]."""
        config = self.config
        activate, bias = ACTIVATIONS[config.activation], config.mlp_bias
        units = linear(self, "up", (config.hidden,), bias)(hidden, dropout)  # [B, L, F]
        if config.gated:
            gate = linear(self, "gate", (config.hidden,), bias)(hidden, dropout)
            units = activate(gate) * units
        else:
            units = activate(units)
        return linear(self, "down", (config.width,), bias)(units, dropout)


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
        order = residuals.keep(jnp.argsort(expert.reshape(-1)))  # [B L C]
        sizes = residuals.keep(jnp.bincount(expert.reshape(-1), length=count).astype(jnp.int32))
        routed = tokens[order // chosen]  # [B L C, D]

        def multiply(rows: jax.Array, matrices: Any) -> jax.Array:
            return residuals.keep(products.ragged_product(rows, matrices, sizes))

        activated = ACTIVATIONS[self.config.activation](multiply(routed, gate))
        given = multiply(activated * multiply(routed, up), down)
        places = residuals.keep(jnp.argsort(order))
        back = given[places].reshape(*expert.shape, width)  # [B L, C, D]
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
        shares = jax.nn.softmax(residuals.keep(logits), axis=-1)
        # chosen once: a second time rounding could choose others
        _, expert = jax.lax.top_k(jax.lax.stop_gradient(shares), experts.chosen)
        expert = residuals.keep(expert)
        probability = jnp.take_along_axis(shares, expert, axis=-1)
        if experts.normalised:
            probability = probability / jnp.sum(probability, axis=-1, keepdims=True)
        return probability, expert


class Layer(nn.Module):
    """Attention and MLP, what each gives added to the residual stream."""

    config: DecoderConfig
    kind: Kind
    dtype: Any
    attend: Callable = attention.attend

    @nn.compact
    def __call__(self, hidden: jax.Array, cache, places: Places):
        """The residual stream [B, L, D] and the cache of all layers after this one."""
        if places.dropout is not None:
            keys = jax.vmap(lambda key: jax.random.fold_in(key, places.layer))(places.dropout.keys)
            places = places._replace(dropout=places.dropout._replace(keys=keys))
        before = self.config.norm_placement != "post"
        after = self.config.norm_placement != "pre"
        read = self.norm("attention_norm", hidden, before)
        mixed, cache = Attention(self.config, self.kind, self.dtype, self.attend, name="attention")(
            read, cache, places
        )
        mixed = self.norm("attention_post_norm", mixed, after)
        if self.config.residual == "serial":
            hidden, mixed = hidden + mixed, None
        if self.config.residual != "parallel_one_norm":
            read = self.norm("mlp_norm", hidden, before)
        if self.config.experts is None:
            given = Mlp(self.config, self.dtype, name="mlp")(read, places.dropout)
        else:
            given = Mixture(self.config, self.dtype, name="experts")(read)
        given = self.norm("mlp_post_norm", given, after)
        return (hidden if mixed is None else hidden + mixed) + given, cache

    def norm(self, name: str, hidden: jax.Array, there: bool) -> jax.Array:
        """The stream under a norm where the config has one in that place."""
        return Norm(self.config, self.dtype, name=name)(hidden) if there else hidden


class Linear(nn.Module):
    """A linear map of the last axes, and its adapter where the parameters have one."""

    features: tuple[int, ...]
    bias: bool
    dtype: Any
    # of the initial weights
    deviation: float

    @nn.compact
    def __call__(self, hidden: jax.Array, dropout: Dropout | None) -> jax.Array:
        """hidden: [B, L, inputs] or [B, L, H, Dh] -> [B, L, *features]."""
        inputs = input_axes(str(self.name))
        shape = *hidden.shape[-inputs:], *self.features
        kernel = self.param("kernel", nn.initializers.normal(self.deviation), shape)
        hidden = hidden.astype(self.dtype)
        mapped = products.product(hidden, kernel, inputs)
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, self.features)
            mapped = mapped + bias.astype(self.dtype).reshape((1, 1, *self.features))
        if self.has_variable("params", "lora_a"):
            mapped = mapped + self.adapt(hidden, inputs, dropout)
        return residuals.keep(mapped)

    def adapt(self, hidden: jax.Array, inputs: int, dropout: Dropout | None) -> jax.Array:
        """What the adapter adds; `lora.join` has put its scale into lora_b."""
        if dropout is not None:
            hidden = drop(hidden, dropout, str(self.name))
        down, up = (self.get_variable("params", name) for name in ("lora_a", "lora_b"))
        return products.product(residuals.keep(products.product(hidden, down, inputs)), up, 1)


def drop(hidden: jax.Array, dropout: Dropout, name: str) -> jax.Array:
    """hidden [B, ...] with a share of its numbers 0 and the rest scaled up, drawn by row."""
    number = zlib.crc32(name.encode())

    def draw(key: jax.Array) -> jax.Array:
        key = jax.random.fold_in(key, number)
        return jax.random.bernoulli(key, 1.0 - dropout.rate, hidden.shape[1:])

    kept = residuals.keep(jax.vmap(draw)(dropout.keys))
    scaled = hidden / jnp.asarray(1.0 - dropout.rate, hidden.dtype)
    return jnp.where(kept, scaled, jnp.zeros_like(hidden))


def write(cache: jax.Array, new: jax.Array, places: Places) -> jax.Array:
    """The cache [layers, B, T, K, Dh] with new [B, L, K, Dh] in the places' layer and slots."""
    new = new[None].astype(cache.dtype)
    return jax.lax.dynamic_update_slice(cache, new, (places.layer, 0, places.slot, 0, 0))


def deviation(config: DecoderConfig, name: str) -> float:
    """Of the initial weights of a linear map: those onto the residual stream start smaller."""
    return 0.02 / math.sqrt(2 * config.layers) if name in ONTO_RESIDUAL else 0.02


def linear(module: Attention | Mlp, name: str, features: tuple[int, ...], bias: bool) -> Linear:
    """A linear map of a module."""
    return Linear(features, bias, module.dtype, deviation(module.config, name), name=name)

"""The decoder: embedding, scanned layers, final norm, output matrix, and its cache of keys and
values.

Dimensions: B rows, L tokens, T slots of the cache, V vocabulary, D width, K key and value heads, Dh
dimensions a head. Parameters are float32, a plain nested dict; the layers' are stacked on axis 0:
"layers" are those of whole blocks of `config.block`, "remainder" the rest, if any.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dpo_jax.model import attention, layers, residuals, rope, shards
from dpo_jax.model.config import DecoderConfig, Kind

# Logical axes of every parameter, by path. `sharding` maps them to axes of the mesh.
LOGICAL_AXES: dict[tuple[str, ...], tuple[str, ...]] = {
    ("embedding",): ("vocabulary", "width"),
    ("positions",): ("positions", "width"),
    ("norm", "scale"): ("width",),
    ("norm", "bias"): ("width",),
    ("head",): ("width", "vocabulary"),
    ("head_bias",): ("vocabulary",),
    **{
        (stack, *path): ("layers", *axes)
        for stack in ("layers", "remainder")
        for path, axes in layers.AXES.items()
    },
}


class Cache(NamedTuple):
    """Keys and values of the tokens so far. Slots that nothing was written to are padding."""

    key: jax.Array  # [layers, B, T, K, Dh]
    value: jax.Array  # [layers, B, T, K, Dh]
    ids: attention.Ids  # int32 [B, T] each


class Head(NamedTuple):
    """What turns hidden states into logits."""

    matrix: jax.Array  # [D, V], or [V, D] where it is the embedding
    bias: jax.Array | None = None  # [V]
    cap: float | None = None  # logits x become cap tanh(x / cap)
    # an embedding is taken as it lies: turning it round would copy it
    is_embedding: bool = False


class Decoder(nn.Module):
    """Tokens to the hidden states that `head` and `logits` turn into logits."""

    config: DecoderConfig
    # compute type
    dtype: Any = jnp.float32
    # what the backward pass computes again, as config.Model has it
    remat: Literal["none", "dots", "full"] = "none"
    # where activations lie on a mesh; None: left to the compiler, which would move them to the
    # shards of the parameters and not the parameters to them
    placement: shards.Placement | None = None
    # attention of rows to themselves, with the signature of `attention.attend`
    attend: Callable = attention.attend

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        ids: attention.Ids,
        cache: Cache | None = None,
        at: jax.Array | int = 0,
        dropout: layers.Dropout | None = None,
    ) -> Any:
        """Hidden states [B, L, D] of tokens [B, L] after the final norm; with a cache, it too.

        The keys of the L tokens are written to the cache's slots from `at` (int32 scalar) on, and
        queries see the slots that their ids allow, wherever those lie. `dropout` is of adapters.
        """
        declare_head(self)
        hidden = keep_rows(self, embed(self, tokens, jnp.asarray(ids.position)))
        key_ids, layer_cache = join_rows(self, ids), None
        if cache is not None:
            key_ids = attention.Ids(
                *(
                    jax.lax.dynamic_update_slice_in_dim(old, new, at, axis=1)
                    for old, new in zip(cache.ids, ids, strict=True)
                )
            )
            layer_cache = cache.key, cache.value
        places = layers.Places(None, ids, key_ids, 0, at, dropout)
        hidden, layer_cache = run_layers(self, (hidden, layer_cache), places)
        hidden = keep_rows(self, layers.Norm(self.config, self.dtype, name="norm")(hidden))
        if layer_cache is None:
            return hidden
        return hidden, Cache(key=layer_cache[0], value=layer_cache[1], ids=key_ids)


def declare_head(decoder: Decoder) -> None:
    """Declares the parameters that only `head` reads, so that `init` makes them."""
    config = decoder.config
    if not config.tied_head:
        shape = config.width, config.vocabulary_size
        decoder.param("head", nn.initializers.normal(0.02), shape)
    if config.head_bias:
        decoder.param("head_bias", nn.initializers.zeros, (config.vocabulary_size,))


def embed(decoder: Decoder, tokens: jax.Array, position: jax.Array) -> jax.Array:
    """The residual stream [B, L, D] before the first layer, of tokens and positions [B, L]."""
    config = decoder.config
    table = decoder.param(
        "embedding", nn.initializers.normal(0.02), (config.vocabulary_size, config.width)
    )
    hidden = look_up(decoder, table, tokens)
    if config.scaled_embedding:
        # The root is rounded to the compute type, as where these models were trained.
        hidden = hidden * jnp.asarray(math.sqrt(config.width), decoder.dtype)
    if config.position_offset is not None:
        shape = config.max_positions + config.position_offset, config.width
        learned = decoder.param("positions", nn.initializers.normal(0.02), shape)
        hidden = hidden + look_up(decoder, learned, position + config.position_offset)
    return hidden


def look_up(decoder: Decoder, table: jax.Array, index: jax.Array) -> jax.Array:
    """The rows [B, L, D] of a table [V, D] in the compute type.

    On a mesh each device finds its columns, for more rows than its own, and they are exchanged:
    neither the table nor its gradient moves.
    """
    where, shape = decoder.placement, (*index.shape, table.shape[1])
    if where is not None and not shards.divides(shape, where.columns):
        where = None
    if where is not None:
        index = jax.lax.with_sharding_constraint(index, where.tokens)
    # Cast after the look-up, so that the table's gradient is summed in float32. An id outside the
    # vocabulary gives nan, which is seen, and not the row nearest to it.
    found = jnp.take(table, index, axis=0).astype(decoder.dtype)
    for place in () if where is None else (where.columns, *where.way):
        if shards.divides(shape, place):
            found = jax.lax.with_sharding_constraint(found, place)
    return found


def keep_rows(decoder: Decoder, hidden: jax.Array) -> jax.Array:
    """Hidden states [B, L, D], and their gradient, made to lie where the decoder's rows do.

    Rows that do not divide over the shards are left to the compiler.
    """
    where = decoder.placement and shards.of_rows(hidden.shape, decoder.placement.rows)
    return hidden if where is None else jax.lax.with_sharding_constraint(hidden, where)


def join_rows(decoder: Decoder, ids: attention.Ids) -> attention.Ids:
    """Ids of keys, of which each device has those of whole rows: once for all layers."""
    where = decoder.placement and shards.of_rows(ids.example.shape, decoder.placement.rows)
    if where is None:
        return ids
    whole = NamedSharding(where.mesh, P(where.spec[0]))
    return attention.Ids(*(jax.lax.with_sharding_constraint(one, whole) for one in ids))


def run_layers(decoder: Decoder, carry: tuple, places: layers.Places) -> tuple:
    """The carry, hidden [B, L, D] and the cache of all layers, after every layer.

    A block is compiled once and scanned over. A carry, and no input and output of each layer, is
    written in place.
    """
    config = decoder.config
    position = jnp.asarray(places.query_ids.position)
    rotations = {
        kind.rope: rope.make_rotation(position, kind.rope, config.head_dim)
        for kind in config.block
        if kind.rope is not None
    }

    def run(kind: Kind, carry: tuple, params: dict, layer: jax.Array | int) -> tuple:
        hidden, cache = carry
        rotation = None if kind.rope is None else rotations[kind.rope]
        module = layers.Layer(config, kind, decoder.dtype, decoder.attend, parent=None)
        own = places._replace(rotation=rotation, layer=layer)
        result: Any = module.apply({"params": params}, hidden, cache, own)
        return keep_rows(decoder, result[0]), result[1]

    def run_block(carry: tuple, inputs: tuple) -> tuple:
        params, first = inputs
        # One layer a block is scanned over as it is: a reshape would copy all gradients.
        placed = [params] if size == 1 else unstack(params, size)
        for place, (kind, layer) in enumerate(zip(config.block, placed, strict=True)):
            carry = inside(kind, carry, layer, first + place)
        return carry, None

    size = len(config.block)
    blocks = config.scanned // size
    # A scan's forward and backward bodies are apart, so that XLA cannot undo the recomputation; a
    # scan of one step is none.
    inside = residuals.rematerialise(run, decoder.remat, prevent_cse=blocks == 1)
    params = stack(decoder, "layers", config.scanned)
    if size > 1:
        params = jax.tree.map(lambda leaf: leaf.reshape(blocks, size, *leaf.shape[1:]), params)
    carry, _ = jax.lax.scan(run_block, carry, (params, jnp.arange(0, config.scanned, size)))
    count = config.layers - config.scanned
    if count:
        outside = residuals.rematerialise(run, decoder.remat, prevent_cse=True)
        rest = unstack(stack(decoder, "remainder", count), count)
        for i, (kind, layer) in enumerate(zip(config.block, rest, strict=False)):
            carry = outside(kind, carry, layer, config.scanned + i)
    return carry


def stack(decoder: Decoder, name: str, count: int) -> dict:
    """The parameters of a stack of layers, new ones where there are none yet."""
    # taken as they are: `param` would compare them, adapters and int8 scales too, with new ones
    if decoder.has_variable("params", name):
        return decoder.get_variable("params", name)
    return decoder.param(name, init_layers, decoder.config, count)


def unstack(params: dict, count: int) -> list[dict]:
    """The layers of a stack: by one split, whose gradient is one concatenation."""
    leaves, tree = jax.tree.flatten(params)
    parts = [jax.lax.split(leaf, (1,) * count) for leaf in leaves]
    return [tree.unflatten([part[i][0] for part in parts]) for i in range(count)]


def init_layers(key: jax.Array, config: DecoderConfig, count: int) -> dict:
    """Random parameters of a stack of layers; kinds do not differ in theirs."""
    hidden = jnp.zeros((1, 1, config.width))
    ids = attention.Ids(*(jnp.zeros((1, 1), jnp.int32) for _ in attention.Ids._fields))
    layer = layers.Layer(config, Kind(rope=None), jnp.float32, parent=None)

    def init_one(key: jax.Array) -> dict:
        return dict(layer.init(key, hidden, None, layers.Places(None, ids, ids, 0, 0))["params"])

    return jax.vmap(init_one)(jax.random.split(key, count))


def head(params: dict, config: DecoderConfig) -> Head:
    """What turns the decoder's hidden states into logits, in float32."""
    matrix = params["embedding"] if config.tied_head else params["head"]
    return Head(matrix, params.get("head_bias"), config.logit_cap, config.tied_head)


def vocabulary_size(head: Head) -> int:
    """V of a head."""
    return head.matrix.shape[0 if head.is_embedding else 1]


def logits(hidden: jax.Array, head: Head) -> jax.Array:
    """Logits of hidden states [..., D]: float32 [..., V]; the product is in hidden's type."""
    matrix = head.matrix.astype(hidden.dtype)
    axes = "vd" if head.is_embedding else "dv"
    found = jnp.einsum(f"...d,{axes}->...v", hidden, matrix, preferred_element_type=jnp.float32)
    if head.bias is not None:
        found = found + head.bias.reshape((1,) * (found.ndim - 1) + (-1,))
    return found if head.cap is None else head.cap * jnp.tanh(found / head.cap)


def init(config: DecoderConfig, key: jax.Array) -> dict:
    """Random parameters: normal, deviation 0.02, over sqrt(2 layers) onto the residual stream."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    variables = Decoder(config).init(key, tokens, attention.Ids(tokens, tokens, tokens))
    return dict(variables["params"])


def shapes(config: DecoderConfig) -> dict:
    """The tree of parameters as shapes and types."""
    return jax.eval_shape(functools.partial(init, config), jax.random.key(0))


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
        # quantised values and their scales lie below the name of their parameter
        keys = tuple(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))
        axes = LOGICAL_AXES.get(keys)
        if axes is None or len(axes) != len(leaf.shape):
            raise ValueError(
                f"no rule in LOGICAL_AXES for parameter {'/'.join(keys)} of shape "
                f"{tuple(leaf.shape)}: {'not listed' if axes is None else f'its rule is {axes}'}"
            )
        return axes

    return jax.tree_util.tree_map_with_path(name_axes, params)

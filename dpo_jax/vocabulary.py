"""Log-probabilities of tokens from stripes of the output matrix: never a row of logits whole.

The forward pass goes over the vocabulary as attention goes over keys. Besides the sum of
exponentials it sums the matrix's columns by softmax, which is the gradient of the hidden state but
for a factor; so the backward pass computes logits again for the matrix's gradient only, and where
nobody asks for that one, the compiler drops its loop.

Where one device has all rows, scored tokens are in blocks, and those blocks that no row has filled
are left out, as is told at run time.

Dimensions: B rows, S scored tokens, D width, V vocabulary, T parts of it (the tensor shards), w
tokens of a stripe of each part, n blocks of s scored tokens of each row.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from dpo_jax import sharding
from dpo_jax.model import decoder

# tokens of a stripe of each part, at most: its logits are about as large as an MLP's activations
STRIPE = 2048
# The same on a GPU, whose matrix units a small product leaves idle: where tokens are few a stripe
# is wider, of so many logits a device at most (256 MiB).
WIDEST_STRIPE, STRIPE_ELEMENTS = 16_384, 2**26
# widths of stripes are multiples of this, as matrix units have them
MULTIPLE = 128
# blocks of scored tokens, at most, and tokens of one over all rows, at least: smaller ones would
# leave more out, in products that are too small for a CPU. Where whole completions have no
# gradient, smaller ones pay.
BLOCKS, BLOCK, PARTLY_TRAINED_BLOCK = 8, 512, 240
# on a GPU, which waits for the host before each turn of a loop whose length is data
GPU_BLOCK = 4096
GPUS = ("gpu", "cuda", "rocm")
# parts of the names of the loops over them: of logits, and of their gradients
SCORED, TRAINED = "scored_blocks", "trained_blocks"
# below any logit and, unlike -inf, not nan when subtracted from itself
LOWEST = float(np.finfo(np.float32).min)


class Cut(NamedTuple):
    """How the stripes are cut, and what else is known of a head when it is compiled."""

    parts: int  # T: stripe i is the i-th of every part, so that each tensor shard has its share
    size: int  # V / T
    width: int  # w; the last stripe begins early enough to be as wide
    count: int  # stripes
    is_embedding: bool
    cap: float | None
    mesh: jax.sharding.AbstractMesh  # on which the matrix lies; empty where it lies on none
    block: int  # s


class Weights(NamedTuple):
    """The arrays of a head."""

    matrix: jax.Array  # [T, V / T, D] where it is the embedding, else [D, T, V / T]
    bias: jax.Array | None  # [T, V / T]


class Others(NamedTuple):
    """Of all tokens of the stripes so far but the scored one itself, for each part."""

    largest: jax.Array  # float32 [B, S, T]: logit
    total: jax.Array  # float32 [B, S, T]: sum of exp(logit - largest)
    # float32 [T, B, S, D]: sum of exp(logit - largest) times the logit's gradient; None where no
    # gradient is wanted
    slope: Any


class Own(NamedTuple):
    """Of the scored tokens themselves."""

    logit: jax.Array  # float32 [B, S]
    slope: jax.Array  # float32 [B, S, D]: the logit's gradient with respect to the hidden state


class Softmax(NamedTuple):
    """Of the whole vocabulary: probabilities are exp(logit - largest - log_total)."""

    logp: jax.Array  # float32 [B, S]: log-probability of the scored token
    largest: jax.Array  # float32 [B, S]: logit
    # float32 [B, S]: log of the sum of exp(logit - largest); apart from `largest`, which may be so
    # large that their sum in float32 would be off
    log_total: jax.Array


class Residuals(NamedTuple):
    """What the backward pass reads."""

    hidden: jax.Array  # [B, S, D]
    weights: Weights
    target: jax.Array  # [B, S]
    blocks: jax.Array  # int32 []
    slope: jax.Array  # float32 [B, S, D]: gradient of each log-probability
    softmax: Softmax


def token_logps(
    hidden: jax.Array,
    head: decoder.Head,
    target: jax.Array,
    filled: jax.Array | None = None,
    *,
    partly_trained: bool = False,
) -> jax.Array:
    """log p(target) of each scored token: hidden [B, S, D], target [B, S] -> float32 [B, S].

    Products are in hidden's type and summed in float32. An id outside the vocabulary gives nan. Of
    rows of which only the first tokens are wanted, `filled` says how many are at most, int32 []:
    what is given for others means nothing. `partly_trained` says that the last ones have no
    gradient.
    """
    cut = make_cut(head, target.shape, partly_trained=partly_trained)
    weights = Weights(
        head.matrix.reshape(whole_shape(cut, hidden.shape[-1])),
        None if head.bias is None else head.bias.reshape(cut.parts, cut.size),
    )
    scored = target.shape[1]
    filled = jnp.asarray(scored if filled is None else filled, jnp.int32)
    to_blocks = ((0, 0), (0, -scored % cut.block))
    hidden = jnp.pad(hidden, (*to_blocks, (0, 0)))
    found: Any = scores(cut, hidden, weights, jnp.pad(target, to_blocks), -(-filled // cut.block))
    return found[:, :scored]


def make_cut(head: decoder.Head, shape: tuple[int, ...], *, partly_trained: bool = False) -> Cut:
    """One part for each tensor shard, where the vocabulary divides over them, and otherwise one,
    as `sharding.parameters` has it; stripes of about equal width. Blocks for targets of a shape
    [B, S].
    """
    vocabulary, axis = decoder.vocabulary_size(head), sharding.RULES["vocabulary"]
    mesh = jax.typeof(head.matrix).sharding.mesh
    shards = dict(mesh.shape).get(axis, 1)
    parts = 1 if vocabulary % shards else shards
    size, platform = vocabulary // parts, platform_of(mesh)
    rows, scored = shape
    # Of many devices the fullest row of all would decide, and hardly anything would be left out.
    block = block_size(rows, scored, platform, partly_trained) if mesh.size <= 1 else scored
    widest = widest_stripe(rows * block * parts // max(mesh.size, 1), platform)
    count = -(-size // widest)
    width = min(-(-size // (count * MULTIPLE)) * MULTIPLE, widest, size)
    return Cut(parts, size, width, count, head.is_embedding, head.cap, mesh, block)


def platform_of(mesh: jax.sharding.AbstractMesh) -> str:
    """The platform of a mesh's devices, which may be compiled for and not here; of an empty mesh,
    the one that JAX computes on.
    """
    device = mesh.abstract_device
    return jax.default_backend() if device is None else device.platform


def widest_stripe(tokens: int, platform: str) -> int:
    """Tokens of a stripe of the vocabulary, at most, for so many scored tokens on a device."""
    if platform not in GPUS:
        return STRIPE
    fitting = STRIPE_ELEMENTS // max(tokens, 1) // MULTIPLE * MULTIPLE
    return min(max(fitting, STRIPE), WIDEST_STRIPE)


def block_size(rows: int, scored: int, platform: str, partly_trained: bool) -> int:
    """Scored tokens of a row in a block, where one device has all rows."""
    least = PARTLY_TRAINED_BLOCK if partly_trained else BLOCK
    if platform in GPUS:
        least = GPU_BLOCK
    blocks = min(max(rows * scored // least, 1), BLOCKS)
    return min(-(-scored // (blocks * 8)) * 8, scored)


def whole_shape(cut: Cut, width: int) -> tuple[int, ...]:
    """The shape of `Weights.matrix`."""
    tokens = cut.parts, cut.size
    return (*tokens, width) if cut.is_embedding else (width, *tokens)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scores(
    cut: Cut, hidden: jax.Array, weights: Weights, target: jax.Array, blocks: jax.Array
) -> jax.Array:
    """`token_logps` with the head in parts, of the first `blocks` blocks: int32 []."""
    others = sum_others(cut, hidden, weights, target, blocks, with_slope=False)
    own = find_own(cut, hidden, weights, target)
    return find_softmax(others, own).logp


def scores_forward(
    cut: Cut, hidden: jax.Array, weights: Weights, target: jax.Array, blocks: jax.Array
) -> tuple[jax.Array, Residuals]:
    """The log-probabilities, and what the backward pass reads."""
    others = sum_others(cut, hidden, weights, target, blocks, with_slope=True)
    own = find_own(cut, hidden, weights, target)
    softmax = find_softmax(others, own)
    wide = jax.tree.map(lambda leaf: leaf[None], softmax)
    shares = probability(wide, jnp.moveaxis(others.largest, -1, 0))[..., None]  # [T, B, S, 1]
    slope = rest(softmax)[..., None] * own.slope - jnp.sum(shares * others.slope, axis=0)
    return softmax.logp, Residuals(hidden, weights, target, blocks, slope, softmax)


def scores_backward(cut: Cut, kept: Residuals, cotangent: jax.Array) -> tuple:
    """Gradients of hidden states and weights; the loop is for the latter alone, and leaves out
    blocks behind the last token of which a gradient is wanted.
    """
    ends = jnp.where(cotangent != 0, jnp.arange(1, cotangent.shape[1] + 1), 0)
    blocks = jnp.minimum(kept.blocks, -(-ends.max() // cut.block))
    # the order in which a CPU multiplies them by hidden states without turning them round first
    order = "twbs" if cut.is_embedding else "bstw"

    def lift(array: jax.Array) -> jax.Array:
        return array[None, None] if cut.is_embedding else array[..., None, None]

    tokens = split(cut, (kept.hidden, kept.target, kept.softmax, cotangent))

    def one(total: Weights, number: jax.Array) -> tuple[Weights, None]:
        start = place(cut, number)
        matrix = slice_matrix(cut, kept.weights.matrix, start, kept.hidden.dtype)

        def of_block(i: jax.Array, before: Weights) -> Weights:
            hidden, target, softmax, given = take(tokens, i)
            logits = stripe_logits(cut, hidden, matrix, kept.weights.bias, start, order)
            shares = probability(jax.tree.map(lift, softmax), logits)
            is_own = stripe_ids(cut, start, order) == lift(target)
            slope = jnp.where(is_own, lift(rest(softmax)), -shares)
            slope = slope * slope_of_cap(cut, logits) * lift(given)
            found = jnp.einsum(
                f"{order},bsd->{axes(cut)}",
                slope.astype(hidden.dtype),
                hidden,
                preferred_element_type=jnp.float32,
            )
            bias = before.bias
            if bias is not None:
                bias = bias + slope.sum(axis=(order.index("b"), order.index("s")))
            return Weights(before.matrix + found, bias)

        bias = None if total.bias is None else jnp.zeros((cut.parts, cut.width))
        empty = Weights(jnp.zeros(matrix.shape, jnp.float32), bias)
        found = over_blocks(len(tokens[0]), blocks, TRAINED, of_block, empty)
        # where stripes overlap, both have the same
        update = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start)
        bias = None if total.bias is None else update(total.bias, found.bias, axis=1)
        axis = axes(cut).index("w")
        return Weights(update(total.matrix, found.matrix, axis=axis), bias), None

    hidden = (cotangent[..., None] * kept.slope).astype(kept.hidden.dtype)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), kept.weights)
    found, _ = jax.lax.scan(one, zeros, jnp.arange(cut.count))
    weights = jax.tree.map(lambda new, old: new.astype(old.dtype), found, kept.weights)
    return hidden, weights, None, None


scores.defvjp(scores_forward, scores_backward)


def sum_others(
    cut: Cut,
    hidden: jax.Array,
    weights: Weights,
    target: jax.Array,
    blocks: jax.Array,
    with_slope: bool,
) -> Others:
    """The sums over all stripes."""
    tokens = split(cut, (hidden, target))

    def one(before: Others, number: jax.Array) -> tuple[Others, None]:
        start = place(cut, number)
        matrix = slice_matrix(cut, weights.matrix, start, hidden.dtype)

        def of_block(i: jax.Array, so_far: Others) -> Others:
            own = take(tokens, i)
            added = add_others(cut, own, weights.bias, matrix, number, take(so_far, i))
            return jax.tree.map(lambda all, own: all.at[i].set(own), so_far, added)

        return over_blocks(len(tokens[0]), blocks, SCORED, of_block, before), None

    zeros = jnp.zeros((*tokens[1].shape, cut.parts), jnp.float32)
    rows, size, width = tokens[0].shape[1:]
    slope = jnp.zeros((len(zeros), cut.parts, rows, size, width)) if with_slope else None
    found, _ = jax.lax.scan(one, Others(zeros + LOWEST, zeros, slope), jnp.arange(cut.count))
    slope = found.slope
    if slope is not None:
        slope = jnp.moveaxis(slope, 0, 2).reshape(cut.parts, *hidden.shape)
    return Others(join(found.largest), join(found.total), slope)


def add_others(
    cut: Cut,
    tokens: tuple[jax.Array, jax.Array],
    bias: jax.Array | None,
    matrix: jax.Array,
    number: jax.Array,
    before: Others,
) -> Others:
    """The sums of a block of tokens, hidden states and targets, with a stripe added."""
    hidden, target = tokens
    start = place(cut, number)
    logits = stripe_logits(cut, hidden, matrix, bias, start, "bstw")
    left_out = stripe_ids(cut, start, "bstw") == target[..., None, None]
    if cut.count * cut.width > cut.size:
        # tokens of the last stripe that the one before it had
        had = start + jnp.arange(cut.width) < number * cut.width
        left_out = left_out | had.reshape(1, 1, 1, -1)
    masked = jnp.where(left_out, -jnp.inf, logits)
    largest = jnp.maximum(before.largest, masked.max(axis=-1))
    scale = jnp.exp(before.largest - largest)
    terms = jnp.exp(masked - largest[..., None])
    total = before.total * scale + terms.sum(axis=-1)
    if before.slope is None:
        return Others(largest, total, None)
    terms = (terms * slope_of_cap(cut, logits)).astype(hidden.dtype)
    added = jnp.einsum(f"bstw,{axes(cut)}->tbsd", terms, matrix, preferred_element_type=jnp.float32)
    slope = before.slope * jnp.moveaxis(scale, -1, 0)[..., None] + added
    return Others(largest, total, slope)


def split(cut: Cut, tree: Any) -> Any:
    """Arrays [B, S, ...] in blocks: [n, B, s, ...]."""

    def one(array: jax.Array) -> jax.Array:
        return array.reshape(len(array), -1, cut.block, *array.shape[2:]).swapaxes(0, 1)

    return jax.tree.map(one, tree)


def join(array: jax.Array) -> jax.Array:
    """Blocks [n, B, s, ...] in rows again: [B, S, ...]."""
    joined = array.swapaxes(0, 1)
    return joined.reshape(len(joined), -1, *array.shape[3:])


def take(tree: Any, at: jax.Array) -> Any:
    """A block of all arrays."""
    return jax.tree.map(
        lambda array: jax.lax.dynamic_index_in_dim(array, at, 0, keepdims=False), tree
    )


def over_blocks(
    count: int, blocks: jax.Array, name: str, of_block: Callable[[jax.Array, Any], Any], start: Any
) -> Any:
    """What the first `blocks` of so many blocks, one after the other, make of `start`; a single one
    is always computed.
    """
    if count == 1:
        return of_block(jnp.int32(0), start)
    with jax.named_scope(name):
        return jax.lax.fori_loop(0, blocks, of_block, start)


def find_softmax(others: Others, own: Own) -> Softmax:
    """What all parts and the token itself come to."""
    largest = others.largest.max(axis=-1)
    total = jnp.sum(others.total * jnp.exp(others.largest - largest[..., None]), axis=-1)
    # The token stands apart from the others, so that nothing cancels where it is all but certain,
    # and logits are subtracted from each other before anything is added to them.
    logp = -jax.nn.softplus(jnp.log(total) + (largest - own.logit))
    top = jnp.maximum(largest, own.logit)
    log_total = jnp.log(total * jnp.exp(largest - top) + jnp.exp(own.logit - top))
    return Softmax(logp, top, log_total)


def probability(softmax: Softmax, logits: jax.Array) -> jax.Array:
    """Of logits that broadcast against the fields of softmax."""
    return jnp.exp(logits - softmax.largest - softmax.log_total)


def rest(softmax: Softmax) -> jax.Array:
    """Probability of all other tokens: [B, S]."""
    return -jnp.expm1(softmax.logp)


def find_own(cut: Cut, hidden: jax.Array, weights: Weights, target: jax.Array) -> Own:
    """The scored tokens' columns of the matrix, and products with them."""
    width = hidden.shape[-1]
    # Each shard of D looks up its own for all rows that its part of the mesh has, and then they
    # change places. By itself XLA makes those of all rows on every device.
    target = sharding.constrain(target, cut.mesh, P("data"))
    if cut.is_embedding:
        columns = jnp.take(weights.matrix.reshape(-1, width), target, axis=0)
    else:
        columns = jnp.moveaxis(jnp.take(weights.matrix.reshape(width, -1), target, axis=1), 0, -1)
    for spec in (*sharding.COLUMNS, P(sharding.BATCH_AXES, sharding.TOKEN_AXIS)):
        columns = sharding.constrain(columns, cut.mesh, spec)
    columns = columns.astype(hidden.dtype).astype(jnp.float32)  # [B, S, D]
    logit = jnp.sum(hidden.astype(jnp.float32) * columns, axis=-1)
    if weights.bias is not None:
        logit = logit + jnp.take(weights.bias.reshape(-1), target)
    logit = capped(cut, logit)
    return Own(logit, slope_of_cap(cut, logit)[..., None] * columns)


def axes(cut: Cut) -> str:
    """The axes of a stripe of the matrix."""
    return "twd" if cut.is_embedding else "dtw"


def merged_shape(cut: Cut, width: int) -> tuple[int, int]:
    """The shape of a stripe of the matrix with all parts end to end."""
    tokens = cut.parts * cut.width
    return (tokens, width) if cut.is_embedding else (width, tokens)


def place(cut: Cut, number: jax.Array) -> jax.Array:
    """Where a stripe begins within every part."""
    return jnp.minimum(number * cut.width, cut.size - cut.width)


def slice_matrix(cut: Cut, matrix: jax.Array, start: jax.Array, dtype: Any) -> jax.Array:
    """A stripe of the matrix in a type, with the axes that `axes` names, of each part all of D."""
    axis = axes(cut).index("w")
    stripe = jax.lax.dynamic_slice_in_dim(matrix, start, cut.width, axis).astype(dtype)
    # each stripe is collected as a whole over the shards of D, once for all products, and not the
    # matrix
    names = {"t": sharding.RULES["vocabulary"], "d": sharding.RULES["width"]}
    for held in ("td", "t"):
        spec = P(*(names[axis] if axis in held else None for axis in axes(cut)))
        stripe = sharding.constrain(stripe, cut.mesh, spec)
    return stripe


def stripe_ids(cut: Cut, start: jax.Array, order: str) -> jax.Array:
    """The tokens of a stripe, to compare with logits in this order: int32 [1, 1, T, w] or [T, w, 1,
    1].
    """
    firsts = jnp.arange(cut.parts, dtype=jnp.int32)[:, None] * cut.size
    ids = firsts + (start + jnp.arange(cut.width, dtype=jnp.int32))[None, :]
    return ids[None, None] if order == "bstw" else ids[..., None, None]


def stripe_logits(
    cut: Cut,
    hidden: jax.Array,
    matrix: jax.Array,
    bias: jax.Array | None,
    start: jax.Array,
    order: str,
) -> jax.Array:
    """Logits of a stripe in float32, bstw or twbs, from its matrix and the whole bias."""
    # one axis of tokens in the product: of two, XLA makes a copy of the stripe turned round
    flat = matrix.reshape(merged_shape(cut, hidden.shape[-1]))
    sides = "vd" if cut.is_embedding else "dv"
    found = jnp.einsum(
        f"bsd,{sides}->{order.replace('tw', 'v')}",
        hidden,
        flat,
        preferred_element_type=jnp.float32,
    )
    sizes = {"b": hidden.shape[0], "s": hidden.shape[1], "t": cut.parts, "w": cut.width}
    found = found.reshape([sizes[axis] for axis in order])
    if bias is not None:
        own = jax.lax.dynamic_slice_in_dim(bias, start, cut.width, axis=1)
        found = found + (own[None, None] if order == "bstw" else own[..., None, None])
    return capped(cut, found)


def capped(cut: Cut, logits: jax.Array) -> jax.Array:
    """The logits under the head's cap."""
    return logits if cut.cap is None else cut.cap * jnp.tanh(logits / cut.cap)


def slope_of_cap(cut: Cut, logits: jax.Array) -> jax.Array:
    """The derivative of capped logits with respect to what they were before."""
    return jnp.ones_like(logits) if cut.cap is None else 1.0 - jnp.square(logits / cut.cap)

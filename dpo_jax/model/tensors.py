"""Where the tensors of HF's files go in the parameter tree, and how they lie there.

Paths are written with slashes. In a name the first {} is the layer, a second one the expert; the
stack of layers (`decoder`'s "layers" and "remainder") is "layers" here.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class Tensor(NamedTuple):
    """What a tensor of the file holds."""

    # parameters, end to end along their outputs
    paths: tuple[str, ...]
    # leading axes of a parameter that are a matrix's inputs; 0: it is a vector of outputs
    inputs: int = 0
    # whether a matrix is kept as [outputs, inputs]
    transposed: bool = True
    # whether outputs lie head by head, each of all parameters
    by_head: bool = False


Table = dict[str, Tensor]


def linear(name: str, *paths: str, inputs: int = 1, **layout: bool) -> Table:
    """The weight and the bias of a linear map, or of several fused ones."""
    bias = layout.get("by_head", False)
    return {
        f"{name}.weight": Tensor(tuple(f"{p}/kernel" for p in paths), inputs, **layout),
        f"{name}.bias": Tensor(tuple(f"{p}/bias" for p in paths), by_head=bias),
    }


def norm(name: str, path: str) -> Table:
    """The weight and the bias of a norm."""
    return {
        f"{name}.weight": Tensor((f"{path}/scale",)),
        f"{name}.bias": Tensor((f"{path}/bias",)),
    }


def norms(prefix: str, **paths: str) -> Table:
    """Norms of layers, by their names within one."""
    found: Table = {}
    for name, path in paths.items():
        found |= norm(f"{prefix}.{name}", f"layers/{path}")
    return found


def outside(embedding: str, final_norm: str, head: str) -> Table:
    """What belongs to no layer."""
    return {
        f"{embedding}.weight": Tensor(("embedding",), 1, transposed=False),
        **norm(final_norm, "norm"),
        f"{head}.weight": Tensor(("head",), 1),
        f"{head}.bias": Tensor(("head_bias",)),
    }


LAYER = "model.layers.{}"
QUERY, KEY, VALUE = (f"layers/attention/{name}" for name in ("query", "key", "value"))
OUTPUT = "layers/attention/output"
GATE, UP, DOWN = (f"layers/mlp/{name}" for name in ("gate", "up", "down"))

PLAIN_OUTSIDE = outside("model.embed_tokens", "model.norm", "lm_head")
PLAIN_INPUTS: Table = {
    **linear(f"{LAYER}.self_attn.q_proj", QUERY),
    **linear(f"{LAYER}.self_attn.k_proj", KEY),
    **linear(f"{LAYER}.self_attn.v_proj", VALUE),
}
PLAIN_ATTENTION: Table = {
    **PLAIN_INPUTS,
    **linear(f"{LAYER}.self_attn.o_proj", OUTPUT, inputs=2),
    **norms(LAYER, **{"self_attn.q_norm": "attention/query_norm"}),
    **norms(LAYER, **{"self_attn.k_norm": "attention/key_norm"}),
}
PLAIN_MLP: Table = {
    **linear(f"{LAYER}.mlp.gate_proj", GATE),
    **linear(f"{LAYER}.mlp.up_proj", UP),
    **linear(f"{LAYER}.mlp.down_proj", DOWN),
}
PRE_NORMS = norms(LAYER, input_layernorm="attention_norm", post_attention_layernorm="mlp_norm")
PLAIN: Table = {**PLAIN_OUTSIDE, **PLAIN_ATTENTION, **PLAIN_MLP, **PRE_NORMS}

SANDWICH: Table = {
    **PLAIN_OUTSIDE,
    **PLAIN_ATTENTION,
    **PLAIN_MLP,
    **norms(
        LAYER,
        input_layernorm="attention_norm",
        post_attention_layernorm="attention_post_norm",
        pre_feedforward_layernorm="mlp_norm",
        post_feedforward_layernorm="mlp_post_norm",
    ),
}

OLMO2: Table = {
    **PLAIN_OUTSIDE,
    **PLAIN_ATTENTION,
    **PLAIN_MLP,
    **norms(
        LAYER,
        post_attention_layernorm="attention_post_norm",
        post_feedforward_layernorm="mlp_post_norm",
    ),
    **norms(LAYER, **{"self_attn.q_norm": "attention/query_width_norm"}),
    **norms(LAYER, **{"self_attn.k_norm": "attention/key_width_norm"}),
}

PHI3: Table = {
    **PLAIN_OUTSIDE,
    **PRE_NORMS,
    **linear(f"{LAYER}.self_attn.qkv_proj", QUERY, KEY, VALUE),
    **linear(f"{LAYER}.self_attn.o_proj", OUTPUT, inputs=2),
    **linear(f"{LAYER}.mlp.gate_up_proj", GATE, UP),
    **linear(f"{LAYER}.mlp.down_proj", DOWN),
}

GPT2: Table = {
    **outside("transformer.wte", "transformer.ln_f", "lm_head"),
    "transformer.wpe.weight": Tensor(("positions",), 1, transposed=False),
    **norms("transformer.h.{}", ln_1="attention_norm", ln_2="mlp_norm"),
    **linear("transformer.h.{}.attn.c_attn", QUERY, KEY, VALUE, transposed=False),
    **linear("transformer.h.{}.attn.c_proj", OUTPUT, inputs=2, transposed=False),
    **linear("transformer.h.{}.mlp.c_fc", UP, transposed=False),
    **linear("transformer.h.{}.mlp.c_proj", DOWN, transposed=False),
}

NEOX = "gpt_neox.layers.{}"
GPT_NEOX: Table = {
    **outside("gpt_neox.embed_in", "gpt_neox.final_layer_norm", "embed_out"),
    **norms(NEOX, input_layernorm="attention_norm", post_attention_layernorm="mlp_norm"),
    **linear(f"{NEOX}.attention.query_key_value", QUERY, KEY, VALUE, by_head=True),
    **linear(f"{NEOX}.attention.dense", OUTPUT, inputs=2),
    **linear(f"{NEOX}.mlp.dense_h_to_4h", UP),
    **linear(f"{NEOX}.mlp.dense_4h_to_h", DOWN),
}

OPT_LAYER = "model.decoder.layers.{}"
OPT: Table = {
    **outside("model.decoder.embed_tokens", "model.decoder.final_layer_norm", "lm_head"),
    "model.decoder.embed_positions.weight": Tensor(("positions",), 1, transposed=False),
    **norms(OPT_LAYER, self_attn_layer_norm="attention_norm", final_layer_norm="mlp_norm"),
    **linear(f"{OPT_LAYER}.self_attn.q_proj", QUERY),
    **linear(f"{OPT_LAYER}.self_attn.k_proj", KEY),
    **linear(f"{OPT_LAYER}.self_attn.v_proj", VALUE),
    **linear(f"{OPT_LAYER}.self_attn.out_proj", OUTPUT, inputs=2),
    **linear(f"{OPT_LAYER}.fc1", UP),
    **linear(f"{OPT_LAYER}.fc2", DOWN),
}

PHI: Table = {
    **outside("model.embed_tokens", "model.final_layernorm", "lm_head"),
    **norms(LAYER, input_layernorm="attention_norm"),
    **PLAIN_INPUTS,
    **linear(f"{LAYER}.self_attn.dense", OUTPUT, inputs=2),
    **linear(f"{LAYER}.mlp.fc1", UP),
    **linear(f"{LAYER}.mlp.fc2", DOWN),
}


def mixture(router: str, experts: str, gate: str, up: str, down: str) -> Table:
    """A router and its experts, in layers that are otherwise like Llama's."""
    names = {f"{experts}.{gate}": "gate", f"{experts}.{up}": "up", f"{experts}.{down}": "down"}
    return {
        **PLAIN_OUTSIDE,
        **PLAIN_ATTENTION,
        **PRE_NORMS,
        f"{router}.weight": Tensor(("layers/experts/router",), 1),
        **{f"{name}.weight": Tensor((f"layers/experts/{to}",), 1) for name, to in names.items()},
    }


MIXTRAL = mixture(
    f"{LAYER}.block_sparse_moe.gate", f"{LAYER}.block_sparse_moe.experts.{{}}", "w1", "w3", "w2"
)
QWEN3_MOE = mixture(
    f"{LAYER}.mlp.gate", f"{LAYER}.mlp.experts.{{}}", "gate_proj", "up_proj", "down_proj"
)


def sizes(tensor: Tensor, shapes: Sequence[tuple[int, ...]]) -> tuple[int, list[int]]:
    """Inputs, and each parameter's outputs, as numbers of a matrix's rows and columns."""
    inputs = math.prod(shapes[0][: tensor.inputs])
    return inputs, [math.prod(shape[tensor.inputs :]) for shape in shapes]


def stored_shape(tensor: Tensor, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of a tensor in the file, of those of its parameters."""
    inputs, outputs = sizes(tensor, shapes)
    if not tensor.inputs:
        return (sum(outputs),)
    return (sum(outputs), inputs) if tensor.transposed else (inputs, sum(outputs))


class Layout(NamedTuple):
    """How parameters of these shapes lie in a tensor of the file."""

    tensor: Tensor
    # of the parameters, without layer and expert
    shapes: Sequence[tuple[int, ...]]
    heads: int


class Block(NamedTuple):
    """A contiguous range of a tensor's inputs and outputs that holds some of a parameter's."""

    inputs: slice
    outputs: slice
    # on the parameter's first axis of outputs, counted from where the wanted part starts
    place: slice


def find_blocks(layout: Layout, place: int, index: tuple[slice, ...]) -> list[Block]:
    """Where the part at `index` (start and stop of each axis) of one of the parameters lies.

    Of inputs and outputs only the first axis is narrowed: others are read whole.
    """
    tensor, shapes, heads = layout
    _, outputs = sizes(tensor, shapes)
    groups = heads if tensor.by_head else 1
    shape, first = shapes[place], tensor.inputs
    inputs = slice(0, 1)
    if tensor.inputs:
        step = math.prod(shape[1 : tensor.inputs])
        inputs = slice(index[0].start * step, index[0].stop * step)
    step, count = math.prod(shape[first + 1 :]), shape[first] // groups
    width, before = sum(outputs) // groups, sum(outputs[:place]) // groups
    found = []
    for group in range(groups):
        start = max(index[first].start, group * count)
        stop = min(index[first].stop, (group + 1) * count)
        if start < stop:
            # where the parameter would start if all of it lay as this group's part does
            origin = group * width + before - group * count * step
            found.append(
                Block(
                    inputs,
                    slice(origin + start * step, origin + stop * step),
                    slice(start - index[first].start, stop - index[first].start),
                )
            )
    return found


def read_part(
    into: np.ndarray,
    layout: Layout,
    place: int,
    index: tuple[slice, ...],
    read: Callable[[tuple[slice, ...]], np.ndarray],
) -> None:
    """Writes the part at `index` of one of the parameters; `read` gives a slice of the tensor."""
    tensor, shape = layout.tensor, layout.shapes[place]
    first = tensor.inputs
    for block in find_blocks(layout, place, index):
        if not tensor.inputs:
            matrix = read((block.outputs,))
        elif tensor.transposed:
            matrix = read((block.outputs, block.inputs)).T
        else:
            matrix = read((block.inputs, block.outputs))
        narrowed, wanted = list(shape), list(index)
        narrowed[first] = block.place.stop - block.place.start
        if tensor.inputs:
            narrowed[0] = index[0].stop - index[0].start
            wanted[0] = slice(None)
        wanted[first] = slice(None)
        target = (slice(None),) * first + (block.place,)
        into[target] = matrix.reshape(narrowed)[tuple(wanted)]


def join(parts: Sequence[np.ndarray], tensor: Tensor, heads: int) -> np.ndarray:
    """The tensor of the file that holds these parameters."""
    shapes = [part.shape for part in parts]
    inputs, _ = sizes(tensor, shapes)
    groups = heads if tensor.by_head else 1
    grouped = [part.reshape(inputs, groups, -1) for part in parts]
    fused = grouped[0] if len(grouped) == 1 else np.concatenate(grouped, axis=-1)
    matrix = fused.reshape(inputs, -1)
    stored = matrix.T if tensor.transposed else matrix
    # safetensors writes the memory as it lies, without a look at the strides.
    return np.ascontiguousarray(stored.reshape(stored_shape(tensor, shapes)))

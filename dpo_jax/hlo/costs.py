"""FLOPs of a compiled program, and the arrays that it makes, on each of its devices.

FLOPs are those of matrix products and convolutions (TPUs have products as convolutions), two for
each pair of numbers that is multiplied and added. What is done to single elements, sums, sorting
and look-ups are left out.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from dpo_jax.hlo import loops, text

# custom calls without products
FREE_CALLS = {
    *("AllocateBuffer", "AssumeGatherIndicesInBound", "AsyncCollectiveDone"),
    *("AsyncCollectiveStart", "ConcatBitcast", "GatherScatterIndicesBitpacked"),
    *("LayoutConstraint", "MoveToDevice", "PrepareAsyncCallDone", "PrepareAsyncCallStart"),
    *("MoveToHost", "PadToStatic", "Sharding", "SliceToDynamic", "TopK", "__gpu$TopK"),
    *("annotate_device_placement", "cu_threefry2x32", "cu_threefry2x32_ffi"),
}
# products that are counted nowhere here
UNKNOWN = {"cholesky", "fft", "ragged-dot", "scaled-dot", "triangular-solve"}
# instructions that give what is there already
ALIASES = {
    *("after-all", "bitcast", "call", "conditional", "constant", "get-tuple-element", "iota"),
    *("opt-barrier", "optimization-barrier", "parameter", "partition-id", "replica-id", "tuple"),
    *("while", "async-start", "async-update", "async-done"),
}


class Made(NamedTuple):
    """An array that an instruction writes to memory."""

    bytes: int
    array: text.Array
    opcode: str
    # of the instruction
    name: str
    op_name: str


def flops(program: text.Program, lengths: Mapping[str, float] = loops.NONE) -> int:
    """FLOPs of one run on one device; what `uncounted` names is not in it.

    A loop's body counts as often as it runs, where the program does not say it as `lengths` says
    of a part of its name in the traced program, a conditional as its costliest branch.
    """
    return round(flops_of(program, program.entry, lengths, {}))


def flops_of(
    program: text.Program, name: str, lengths: Mapping[str, float], known: dict[str, float]
) -> float:
    """FLOPs of one run of a computation; those `known` by name are not counted again."""
    if name not in known:
        computation, total = program.computations[name], 0.0
        for instruction in computation.instructions.values():
            called = [
                (1 if times is None else times) * flops_of(program, callee, lengths, known)
                for callee, times in loops.callees(program, computation, instruction, lengths)
            ]
            taken = max(called, default=0) if instruction.opcode == "conditional" else sum(called)
            total += taken + (flops_of_one(computation, instruction) or 0)
        known[name] = total
    return known[name]


def flops_of_one(computation: text.Computation, instruction: text.Instruction) -> int | None:
    """FLOPs of an instruction without what it calls; None where they cannot be told."""
    match instruction.opcode:
        case "dot":
            contracted = text.numbers(instruction.attributes.get("lhs_contracting_dims", ""))
            return product(computation, instruction, contracted)
        case "convolution":
            return convolution(computation, instruction)
        case "custom-call":
            return custom_call(computation, instruction)
        case opcode:
            return None if opcode in UNKNOWN else 0


def product(
    computation: text.Computation, instruction: text.Instruction, contracted: tuple[int, ...]
) -> int:
    """FLOPs of a product whose left operand is summed over the axes `contracted`."""
    left = text.inputs(computation, instruction)[0]
    summed = math.prod(left.dims[axis] for axis in contracted)
    return 2 * text.size(instruction.arrays[0]) * summed


def convolution(computation: text.Computation, instruction: text.Instruction) -> int:
    """FLOPs of a convolution: pairs of window and input, without padding and dilation's holes."""
    left, kernel = text.inputs(computation, instruction)[:2]
    result = instruction.arrays[0]
    labels, of_result = instruction.attributes["dim_labels"].split("->")
    of_left, of_kernel = labels.split("_")
    window = parse_window(instruction.attributes.get("window", "{}"))
    count = kernel.dims[of_kernel.index("i")]
    for axis, label in enumerate(of_result):
        if not label.isdigit():
            count *= result.dims[axis]
            continue
        place = int(label)
        count *= pairs(
            left.dims[of_left.index(label)],
            kernel.dims[of_kernel.index(label)],
            result.dims[axis],
            {name: values[place] for name, values in window.items() if place < len(values)},
        )
    return 2 * count


def parse_window(attribute: str) -> dict[str, list[int]]:
    """window={size=3x1 pad=0_0x1_1 ...} as numbers of each spatial axis; of pad the low one."""
    found = re.findall(r"(\w+)=([\dx_-]+)", attribute)
    return {name: [int(one.split("_")[0]) for one in values.split("x")] for name, values in found}


def pairs(inputs: int, kernel: int, outputs: int, window: dict[str, int]) -> int:
    """How many pairs of places in the output and the kernel of an axis meet a number of the
    input.
    """
    stride, low = window.get("stride", 1), window.get("pad", 0)
    spread, dilation = window.get("lhs_dilate", 1), window.get("rhs_dilate", 1)
    # output i and kernel j meet the dilated input's place i stride + j dilation - low
    period = spread // math.gcd(spread, stride)
    total = 0
    for place in range(kernel):
        offset = place * dilation - low
        first = max(0, -(offset // stride))
        last = min(outputs - 1, ((inputs - 1) * spread - offset) // stride)
        # of `period` outputs in a row one at most falls between two holes
        begins = (i for i in range(first, first + period) if (i * stride + offset) % spread == 0)
        begin = next(begins, last + 1)
        total += max(0, (last - begin) // period + 1)
    return total


def custom_call(computation: text.Computation, instruction: text.Instruction) -> int | None:
    """FLOPs of a call of the platform's own code; None where they cannot be told."""
    target = instruction.attributes.get("custom_call_target", "").strip('"')
    if target in FREE_CALLS:
        return 0
    settings = loops.json_of(instruction.attributes.get("backend_config", ""))
    # a GPU's products
    gemm = settings.get("gemm_backend_config", settings).get("dot_dimension_numbers")
    if gemm is not None:
        contracted = tuple(int(axis) for axis in gemm.get("lhs_contracting_dimensions", ()))
        return product(computation, instruction, contracted)
    # a CPU's: [..., M, K] or [..., K, M] times [..., K, N] or [..., N, K]
    if target == "__onednn$matmul":
        left, right = (text.size(array) for array in text.inputs(computation, instruction)[:2])
        result = instruction.arrays[0]
        each = math.prod(result.dims[:-2])
        return 2 * text.size(result) * math.isqrt(left * right // (text.size(result) * each))
    # a Pallas kernel that says what it costs
    call = settings.get("custom_call_config", settings)
    estimate = call.get("cost_estimate", {}) if isinstance(call, dict) else {}
    return int(estimate["flops"]) if "flops" in estimate else None


def uncounted(program: text.Program, lengths: Mapping[str, float] = loops.NONE) -> list[str]:
    """What `flops` cannot count: a description of each, without repetition.

    Loops of which neither the program nor `lengths` says how often they run, which count as if they
    ran once, and operations and calls that may hold products.
    """
    found = {}
    for place in loops.walk(program):
        computation, instruction = place.computation, place.instruction
        origin = f" ({instruction.op_name})" if instruction.op_name else ""
        if instruction.opcode == "while":
            if loops.run_count(program, computation, instruction, lengths) is None:
                found[f"loop {instruction.name} of unknown length{origin}"] = None
        elif flops_of_one(computation, instruction) is None:
            target = instruction.attributes.get("custom_call_target", "").strip('"')
            found[f"{instruction.opcode} {target or instruction.name}{origin}"] = None
    return list(found)


def largest_arrays(program: text.Program, count: int) -> list[Made]:
    """The `count` largest arrays that are written to a device's memory, the largest first.

    Not the program's arguments, nor what stays within a fusion. Several may lie in one place, one
    after another.
    """
    found = {}
    for place in loops.walk(program):
        instruction = place.instruction
        if place.fused or instruction.opcode in ALIASES:
            continue
        for number, array in enumerate(instruction.arrays):
            made = Made(
                text.bytes_of(array),
                array,
                instruction.opcode,
                instruction.name,
                instruction.op_name,
            )
            found[place.computation.name, instruction.name, number] = made
    return sorted(found.values(), key=lambda made: -made.bytes)[:count]

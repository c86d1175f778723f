"""What each instruction of a compiled program computes, and what it reads from a device's main
memory and writes there.
"""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from dpo_jax.hlo import collectives, costs, loops, text

CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
# what reads the places of its first operand that its result has, and no others
SLICES = ("dynamic-slice", "slice", "gather")
# what other instructions' reads and writes are counted with
FREE = costs.ALIASES | {"copy-done", "slice-done", "send-done", "recv-done"}


class Work(NamedTuple):
    """Of one instruction in one run of it, on one device."""

    flops: float
    # read and written
    bytes: float
    # the compiler's own estimate, which TPUs' compiler writes down for most; 0 where it does not
    cycles: int
    # runs in one run of the program
    times: float
    # in the traced program
    op_name: str


def work(program: text.Program, lengths: Mapping[str, float] = loops.NONE) -> Iterator[Work]:
    """The work of all instructions that lie in no fusion; a fusion's is all that it does.

    What devices send each other is not in it, nor what lies in a memory of its own on the chip.
    """
    known: dict[str, float] = {}
    for place in loops.walk(program, lengths):
        computation, instruction = place.computation, place.instruction
        if place.fused or instruction.opcode in FREE:
            continue
        if instruction.opcode.removesuffix("-start").removesuffix("-done") in collectives.KINDS:
            continue
        flops: float = costs.flops_of_one(computation, instruction) or 0
        if instruction.opcode == "fusion":
            (callee, _), *_ = loops.callees(program, computation, instruction)
            flops = costs.flops_of(program, callee, lengths, known)
        cycles = CYCLES.search(instruction.attributes.get("backend_config", ""))
        moved = moved_bytes(program, computation, instruction)
        yield Work(flops, moved, int(cycles[1]) if cycles else 0, place.times, instruction.op_name)


def moved_bytes(
    program: text.Program, computation: text.Computation, instruction: text.Instruction
) -> float:
    """Bytes that an instruction reads from main memory and writes to it."""
    if instruction.opcode == "copy-start":
        # its result has the operand too
        moved = [instruction.arrays[0], *text.inputs(computation, instruction)]
        return sum(stored(array) for array in moved)
    read = sum(
        read_bytes(program, computation, instruction, number)
        for number, name in enumerate(instruction.operands)
        if name in computation.instructions
    )
    return read + written_bytes(program, computation, instruction)


def stored(array: text.Array) -> int:
    """Bytes of an array that lies in main memory; 0 of another."""
    return text.bytes_of(array) if array.space == 0 else 0


def read_bytes(
    program: text.Program,
    computation: text.Computation,
    instruction: text.Instruction,
    number: int,
) -> float:
    """Bytes that an instruction reads of an operand: only the part of it that is looked at."""
    arrays = computation.instructions[instruction.operands[number]].arrays
    if len(arrays) != 1:
        # a tuple is handed on
        return 0
    whole = stored(arrays[0])
    if not whole:
        return 0
    if instruction.opcode in SLICES and number == 0:
        return min(whole, sum(text.bytes_of(array) for array in instruction.arrays))
    if instruction.opcode in ("dynamic-update-slice", "scatter") and number == 0:
        # changed in its place
        return 0
    if instruction.opcode == "fusion":
        (callee, _), *_ = loops.callees(program, computation, instruction)
        return min(whole, looked_at(program, program.computations[callee], number, whole))
    return whole


def looked_at(
    program: text.Program, computation: text.Computation, number: int, whole: float
) -> float:
    """Bytes that a fused computation reads of its parameter of this number."""
    names = {
        name
        for name, one in computation.instructions.items()
        if one.opcode == "parameter" and one.operands == (str(number),)
    }
    total = 0.0
    for name, one in computation.instructions.items():
        uses = [place for place, operand in enumerate(one.operands) if operand in names]
        if not uses:
            continue
        if one.opcode == "bitcast":
            # instructions stand behind what they read
            names.add(name)
            continue
        if one.opcode in SLICES and uses == [0]:
            total += sum(text.bytes_of(array) for array in one.arrays)
        elif one.opcode in ("dynamic-update-slice", "scatter") and uses == [0]:
            continue
        elif one.opcode == "fusion":
            (callee, _), *_ = loops.callees(program, computation, one)
            inner = program.computations[callee]
            total += sum(looked_at(program, inner, place, whole) for place in uses)
        else:
            return whole
    return total


def written_bytes(
    program: text.Program, computation: text.Computation, instruction: text.Instruction
) -> float:
    """Bytes that an instruction writes: of an array that is changed in its place, the change."""
    if instruction.opcode == "fusion":
        (callee, _), *_ = loops.callees(program, computation, instruction)
        inner = program.computations[callee]
        root = inner.instructions[inner.root]
        roots = root.operands if root.opcode == "tuple" else (root.name,)
        if len(roots) == len(instruction.arrays):
            return sum(
                changed(program, inner, name) if array.space == 0 else 0
                for name, array in zip(roots, instruction.arrays, strict=True)
            )
    if instruction.opcode == "dynamic-update-slice":
        return stored(instruction.arrays[0]) and changed(program, computation, instruction.name)
    return sum(stored(array) for array in instruction.arrays)


def changed(program: text.Program, computation: text.Computation, name: str) -> float:
    """Bytes of what an instruction gives that it has not only handed on."""
    one = computation.instructions[name]
    while one.opcode == "bitcast":
        one = computation.instructions[one.operands[0]]
    if one.opcode == "dynamic-update-slice":
        return sum(map(text.bytes_of, computation.instructions[one.operands[1]].arrays))
    if one.opcode == "parameter":
        return 0
    if one.opcode == "fusion" and len(one.arrays) == 1:
        (callee, _), *_ = loops.callees(program, computation, one)
        return changed(program, program.computations[callee], program.computations[callee].root)
    return sum(map(text.bytes_of, one.arrays))

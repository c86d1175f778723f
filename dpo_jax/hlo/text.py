"""The text of a compiled program (`compiled.as_text()`) as computations and instructions.

Read as CPUs, GPUs and TPUs print it: `%dot.1 = f32[8,16]{1,0:T(8,128)} dot(%a, %b),
lhs_contracting_dims={1}, metadata={op_name="..."}`. A program of several devices is what one of
them runs, and its shapes are of what one of them holds.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

# a string, or a bracket or comma outside of one
MARK = re.compile(r'"(?:[^"\\]|\\.)*"|[()\[\]{},]')
ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^{}]*)\})?")
SPACE = re.compile(r"S\((\d+)\)")
HEADER = re.compile(r"^(ENTRY\s+)?%?([^\s(]+)\s*\(.*->.*\{\s*$")
START = re.compile(r"^\s+(ROOT\s+)?%?(\S+)\s+=\s+")
OPCODE = re.compile(r"\s*([a-z][\w-]*)\(")
COMMENT = re.compile(r"/\*index=\d+\*/")
# elements without a size in their name
BITS = {"pred": 8, "token": 0, "opaque": 0}


class Array(NamedTuple):
    """The shape of an array."""

    # as HLO has it: f32, bf16, pred, s32
    dtype: str
    dims: tuple[int, ...]
    # the memory that it lies in, as its layout has it: 0 is the device's main one, 1 a TPU's VMEM
    space: int = 0


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    opcode: str
    # what it gives: one array, or the leaves of a tuple
    arrays: tuple[Array, ...]
    # names of instructions of the same computation, or what a constant or parameter has there
    operands: tuple[str, ...]
    # as they are written, by name; metadata and backend_config too
    attributes: dict[str, str]
    # where it comes from in the traced program; empty where it does not say
    op_name: str


class Computation(NamedTuple):
    """Instructions that run together."""

    name: str
    instructions: dict[str, Instruction]
    # the name of the one whose value the computation has
    root: str


class Program(NamedTuple):
    """All computations of a compiled program."""

    name: str
    computations: dict[str, Computation]
    # the name of the one that it starts with
    entry: str
    # how many devices run it together
    devices: int


def parse(text: str) -> Program:
    """The program of an optimized HLO text; ValueError where it has no entry computation, or an
    instruction cannot be read.
    """
    computations: dict[str, Computation] = {}
    program, entry, inside, devices = "", "", None, 1
    instructions: dict[str, Instruction] = {}
    root = ""
    for line in text.splitlines():
        if inside is None:
            if line.startswith("HloModule "):
                program = line.split()[1].rstrip(",")
                counts = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", line)
                devices = math.prod(int(count) for count in counts)
            elif header := HEADER.match(line):
                inside, instructions, root = header[2], {}, ""
                entry = inside if header[1] else entry
        elif line.startswith("}"):
            computations[inside] = Computation(inside, instructions, root)
            inside = None
        elif start := START.match(line):
            instruction = parse_instruction(line)
            instructions[instruction.name] = instruction
            root = instruction.name if start[1] else root
    if not entry:
        raise ValueError("no ENTRY computation: this is not the text of a compiled program")
    return Program(program, computations, entry, devices)


def parse_instruction(line: str) -> Instruction:
    """The instruction of a line; ValueError where it is none."""
    line = COMMENT.sub("", line)
    start = START.match(line)
    if start is None:
        raise ValueError(f"no instruction: {line.strip()[:200]!r}")
    shape_end = end_of_shape(line, start.end())
    opcode = OPCODE.match(line, shape_end)
    if opcode is None:
        raise ValueError(f"no opcode in the instruction {line.strip()[:200]!r}")
    closing = closing_bracket(line, opcode.end() - 1)
    operands = tuple(split(line[opcode.end() : closing]))
    if opcode[1] not in ("constant", "parameter"):
        # some versions write an operand's shape before its name
        operands = tuple(operand.split()[-1].lstrip("%") for operand in operands)
    attributes = dict(parse_attributes(line[closing + 1 :]))
    return Instruction(
        start[2],
        opcode[1],
        arrays(line[start.end() : shape_end]),
        operands,
        attributes,
        op_name(attributes.get("metadata", "")),
    )


def parse_attributes(written: str) -> Iterator[tuple[str, str]]:
    """Names and values of what stands behind an instruction's operands."""
    for part in split(written):
        name, equals, value = part.partition("=")
        if equals:
            yield name, value


def op_name(metadata: str) -> str:
    """The op_name of metadata={...}."""
    found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', metadata)
    return found[1] if found else ""


def end_of_shape(line: str, start: int) -> int:
    """Where the shape that starts in a place of the line ends."""
    if line[start] == "(":
        return closing_bracket(line, start) + 1
    return line.index(" ", start)


def closing_bracket(line: str, opening: int) -> int:
    """The place of the bracket that closes the one in a place of the line."""
    depth = 0
    for mark in MARK.finditer(line, opening):
        depth += (mark[0] in "([{") - (mark[0] in ")]}")
        if depth == 0:
            return mark.start()
    raise ValueError(f"a bracket is not closed in {line.strip()[:200]!r}")


def split(written: str) -> Iterator[str]:
    """What stands between the commas that are in no bracket or string, without what is empty."""
    depth, begin = 0, 0
    for mark in MARK.finditer(written):
        depth += (mark[0] in "([{") - (mark[0] in ")]}")
        if mark[0] == "," and depth == 0:
            if part := written[begin : mark.start()].strip():
                yield part
            begin = mark.end()
    if part := written[begin:].strip():
        yield part


def arrays(shape: str) -> tuple[Array, ...]:
    """The arrays of a shape as it is written; a tuple's leaves in order."""
    found = []
    for dtype, dims, layout in ARRAY.findall(shape):
        space = SPACE.search(layout)
        sizes = tuple(int(size.strip().lstrip("<=")) for size in dims.split(",") if size)
        found.append(Array(dtype, sizes, int(space[1]) if space else 0))
    return tuple(found)


def size(array: Array) -> int:
    """How many elements an array has."""
    return math.prod(array.dims)


def bytes_of(array: Array) -> int:
    """The bytes of an array's elements, without the padding of a tiled layout."""
    bits = BITS.get(array.dtype)
    if bits is None:
        found = re.search(r"\d+", array.dtype)
        if found is None:
            raise ValueError(f"the size of an element of type {array.dtype} is not known")
        bits = int(found[0])
    return -(-size(array) * bits // 8)


def numbers(attribute: str) -> tuple[int, ...]:
    """The integers of an attribute such as {0,2} or [4,2]; none of an empty one."""
    return tuple(int(number) for number in re.findall(r"-?\d+", attribute))


def inputs(computation: Computation, instruction: Instruction) -> list[Array]:
    """The arrays of an instruction's operands."""
    found = (computation.instructions[name].arrays for name in instruction.operands)
    return [array for arrays_of_one in found for array in arrays_of_one]

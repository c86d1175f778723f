"""How often each instruction of a compiled program runs.

A loop's trip count is what the compiler wrote down, or what its counter, bound and step give where
those are constants.
"""

import json
import re
import types
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from dpo_jax.hlo import text

# where nothing is known of loops whose length the program does not say
NONE: Mapping[str, float] = types.MappingProxyType({})
# what has another array's value where the value is a counter
COPIES = ("copy", "convert", "bitcast", "reshape", "copy-start", "copy-done")
ARITHMETIC = {
    "add": lambda left, right: left + right,
    "subtract": lambda left, right: left - right,
    "multiply": lambda left, right: left * right,
}


class Place(NamedTuple):
    """An instruction in its computation, and how it was reached."""

    computation: text.Computation
    instruction: text.Instruction
    # runs in one run of the program; every branch is taken
    times: float
    # whether it lies in a fusion, so that its result is not kept in memory
    fused: bool


class Scope(NamedTuple):
    """A computation, and where the values of its parameters come from."""

    computation: text.Computation
    # of each parameter the scope and name of what it has; None: not known
    arguments: "tuple[tuple[Scope, str] | None, ...]"


def walk(program: text.Program, lengths: Mapping[str, float] = NONE) -> Iterator[Place]:
    """Every instruction that runs, callees before the instructions behind their call.

    A computation that several instructions call comes several times. Loops whose length neither
    the program nor `lengths` says run once.
    """
    yield from _walk(program, program.entry, 1, lengths, fused=False)


def _walk(
    program: text.Program, name: str, times: float, lengths: Mapping[str, float], *, fused: bool
) -> Iterator[Place]:
    computation = program.computations[name]
    for instruction in computation.instructions.values():
        for callee, count in callees(program, computation, instruction, lengths):
            inside = fused or instruction.opcode == "fusion"
            runs = times * (1 if count is None else count)
            yield from _walk(program, callee, runs, lengths, fused=inside)
        yield Place(computation, instruction, times, fused)


def callees(
    program: text.Program,
    computation: text.Computation,
    instruction: text.Instruction,
    lengths: Mapping[str, float] = NONE,
) -> list[tuple[str, float | None]]:
    """The computations that an instruction runs, and how often: None where it is not known.

    Not what is applied to single elements, as by reduce, sort and all-reduce.
    """
    attributes = instruction.attributes
    match instruction.opcode.removesuffix("-start"):
        case "while":
            count = run_count(program, computation, instruction, lengths)
            return [(name_of(attributes["body"]), count)]
        case "fusion":
            return [(name_of(attributes["calls"]), 1)]
        case "call":
            return [(name_of(attributes["to_apply"]), 1)]
        case "conditional":
            return [(branch, 1) for branch in branches(instruction)]
        case "async":
            return [(name_of(attributes["calls"]), 1)]
    return []


def branches(instruction: text.Instruction) -> list[str]:
    """The computations of which a conditional runs one."""
    attributes = instruction.attributes
    if "branch_computations" in attributes:
        return [name_of(part) for part in text.split(attributes["branch_computations"][1:-1])]
    return [name_of(attributes[f"{which}_computation"]) for which in ("true", "false")]


def name_of(attribute: str) -> str:
    """The computation that an attribute names."""
    return attribute.strip().lstrip("%")


def run_count(
    program: text.Program,
    computation: text.Computation,
    loop: text.Instruction,
    lengths: Mapping[str, float],
) -> float | None:
    """How often a loop's body runs: its trip count, or where that depends on what is computed, what
    `lengths` says of a part of the loop's name in the traced program; else None.
    """
    count = trip_count(program, computation, loop)
    if count is not None:
        return count
    return next((times for part, times in lengths.items() if part in loop.op_name), None)


def trip_count(
    program: text.Program, computation: text.Computation, loop: text.Instruction
) -> int | None:
    """How often a loop's body runs; None where that depends on what is computed."""
    written = json_of(loop.attributes.get("backend_config", "")).get("known_trip_count", {})
    if "n" in written:
        return int(written["n"])
    scope = Scope(computation, ())
    condition = scope_of_loop(program, scope, loop, "condition")
    ends = comparison(program, condition)
    if ends is None:
        return None
    inside, compare = ends
    for counter, bound, direction in sides(compare):
        limit = constant(program, inside, bound)
        if limit is None:
            limit = unchanged(program, scope, loop, element(program, inside, bound))
        index = element(program, inside, counter)
        if limit is None or index is None:
            continue
        first, step = begin(program, scope, loop, index), advance(program, scope, loop, index)
        if first is not None and step:
            return count_steps(first, limit, step, direction)
    return None


def json_of(attribute: str) -> dict:
    """An attribute that is a JSON object; {} for another."""
    try:
        found = json.loads(attribute)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def sides(compare: text.Instruction) -> Iterator[tuple[str, str, str]]:
    """Counter, bound and direction of a comparison, read from the left and from the right."""
    left, right = compare.operands
    direction = compare.attributes["direction"]
    yield left, right, direction
    mirrored = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}
    yield right, left, mirrored.get(direction, direction)


def count_steps(first: int, limit: int, step: int, direction: str) -> int | None:
    """How many of first, first + step, ... come before one for which the comparison fails; None
    where none does.
    """
    match direction:
        case "LT" | "LE" if step > 0:
            return max(0, -(-(limit - first + (direction == "LE")) // step))
        case "GT" | "GE" if step < 0:
            return max(0, -(-(first - limit + (direction == "GE")) // -step))
        case "NE" if (limit - first) % step == 0 and (limit - first) // step >= 0:
            return (limit - first) // step
    return None


def comparison(program: text.Program, scope: Scope) -> tuple[Scope, text.Instruction] | None:
    """The comparison that a condition ends with, and where it stands; None where it does not."""
    root = scope.computation.instructions[scope.computation.root]
    while root.opcode in COPIES or root.opcode in ("fusion", "call"):
        if root.opcode in COPIES:
            root = scope.computation.instructions[root.operands[0]]
            continue
        scope = scope_of_call(program, scope, root)
        root = scope.computation.instructions[scope.computation.root]
    return (scope, root) if root.opcode == "compare" else None


def scope_of_call(program: text.Program, scope: Scope, call: text.Instruction) -> Scope:
    """What a fusion or call runs."""
    (callee, _), *_ = callees(program, scope.computation, call)
    return Scope(program.computations[callee], tuple((scope, operand) for operand in call.operands))


def scope_of_loop(program: text.Program, scope: Scope, loop: text.Instruction, which: str) -> Scope:
    """A loop's condition or body. Its parameter is not known."""
    return Scope(program.computations[name_of(loop.attributes[which])], (None,))


def resolve(program: text.Program, scope: Scope, name: str) -> tuple[Scope, text.Instruction]:
    """The instruction whose value a name has, behind copies and a callee's parameters."""
    instruction = scope.computation.instructions[name]
    if instruction.opcode in COPIES:
        return resolve(program, scope, instruction.operands[0])
    if instruction.opcode == "parameter":
        number = int(instruction.operands[0])
        argument = scope.arguments[number] if number < len(scope.arguments) else None
        if argument is not None:
            return resolve(program, *argument)
    if instruction.opcode == "get-tuple-element":
        source, made = resolve(program, scope, instruction.operands[0])
        if made.opcode == "tuple":
            return resolve(program, source, made.operands[int(instruction.attributes["index"])])
    if instruction.opcode in ("fusion", "call") and len(instruction.arrays) == 1:
        inner = scope_of_call(program, scope, instruction)
        return resolve(program, inner, inner.computation.root)
    return scope, instruction


def element(program: text.Program, scope: Scope, name: str) -> int | None:
    """Which element of its loop's tuple a name of a condition or body has; None: it has none."""
    inside, instruction = resolve(program, scope, name)
    if instruction.opcode != "get-tuple-element":
        return None
    _, source = resolve(program, inside, instruction.operands[0])
    return int(instruction.attributes["index"]) if source.opcode == "parameter" else None


def begin(program: text.Program, scope: Scope, loop: text.Instruction, index: int) -> int | None:
    """The constant that an element of a loop's tuple has before it; None: it is none."""
    source, made = resolve(program, scope, loop.operands[0])
    return constant(program, source, made.operands[index]) if made.opcode == "tuple" else None


def advance(program: text.Program, scope: Scope, loop: text.Instruction, index: int) -> int | None:
    """What a run of a loop's body adds to an element of its tuple; None where it is no constant."""
    body = scope_of_loop(program, scope, loop, "body")
    root = body.computation.instructions[body.computation.root]
    if root.opcode != "tuple":
        return None
    inside, made = resolve(program, body, root.operands[index])
    if made.opcode not in ("add", "subtract"):
        return None
    left, right = made.operands
    for counter, step in ((left, right), (right, left)):
        if element(program, inside, counter) == index:
            added = constant(program, inside, step)
            return added if added is None or made.opcode == "add" else -added
    return None


def unchanged(
    program: text.Program, scope: Scope, loop: text.Instruction, index: int | None
) -> int | None:
    """The constant that an element of a loop's tuple has all the time; None where it has none."""
    if index is None:
        return None
    body = scope_of_loop(program, scope, loop, "body")
    root = body.computation.instructions[body.computation.root]
    if root.opcode != "tuple" or element(program, body, root.operands[index]) != index:
        return None
    return begin(program, scope, loop, index)


def constant(program: text.Program, scope: Scope, name: str) -> int | None:
    """The integer that a name has; None where it is not constant."""
    inside, instruction = resolve(program, scope, name)
    if instruction.opcode == "constant":
        found = re.fullmatch(r"-?\d+", instruction.operands[0]) if instruction.operands else None
        return int(found[0]) if found else None
    if instruction.opcode in ARITHMETIC:
        left, right = (constant(program, inside, operand) for operand in instruction.operands)
        if left is not None and right is not None:
            return ARITHMETIC[instruction.opcode](left, right)
    return None

"""What the devices that run a compiled program send each other."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from dpo_jax.hlo import loops, text

KINDS = (
    *("all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute"),
    *("ragged-all-to-all", "reduce-scatter"),
)
# how TPUs name the fusion of an all-reduce and the choice of a device's part of it
SCATTERED = "all-reduce-scatter"


class Collective(NamedTuple):
    """One instruction by which devices exchange arrays."""

    # one of KINDS
    kind: str
    # of the whole array on one device in one run: gathered, before it is scattered, reduced
    bytes: int
    # what it is made of, on one device
    arrays: tuple[text.Array, ...]
    # the devices that exchange with each other, as places in mesh.devices.flat
    groups: tuple[tuple[int, ...], ...]
    # the axes of the mesh along which the devices of a group differ; empty without a mesh
    axes: tuple[str, ...]
    # runs in one run of the program; a loop of unknown length counts as one run
    times: float
    op_name: str


def collectives(program: text.Program, mesh: Mapping[str, int] | None = None) -> list[Collective]:
    """The collectives of a program in the order of its text; `mesh` has the sizes of its axes, as
    `jax.sharding.Mesh.shape` does.
    """
    found = []
    for place in loops.walk(program):
        instruction = place.instruction
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS or is_repeated(place):
            continue
        if kind == "all-reduce" and place.computation.name.startswith(SCATTERED):
            kind = "reduce-scatter"
        arrays = tuple(text.inputs(place.computation, instruction))
        groups = groups_of(instruction.attributes, program.devices)
        gathered = len(groups[0]) if kind == "all-gather" else 1
        found.append(
            Collective(
                kind,
                gathered * sum(text.bytes_of(array) for array in arrays),
                arrays,
                groups,
                axes_of(groups, mesh or {}),
                place.times,
                instruction.op_name,
            )
        )
    return found


def is_repeated(place: loops.Place) -> bool:
    """Whether a collective stands for a step of one that was started before.

    TPUs fuse the steps of an asynchronous one with other work and write it down in each.
    """
    instruction = place.instruction
    if "chain_id" not in instruction.attributes.get("frontend_attributes", ""):
        return False
    starts = (
        other
        for other in place.computation.instructions.values()
        if "AsyncCollectiveStart" in other.attributes.get("custom_call_target", "")
    )
    return not any(instruction.name in other.operands for other in starts)


def groups_of(attributes: Mapping[str, str], devices: int) -> tuple[tuple[int, ...], ...]:
    """The groups of a collective; for a permutation, pairs of source and target."""
    written = attributes.get("source_target_pairs") or attributes.get("replica_groups", "{}")
    if written.startswith("mesh"):
        # a comma between the mesh and the order of its devices makes them two attributes
        order = attributes.get("device_ids", "")
        return as_tuples(groups_of_mesh(written, order))
    if written.startswith("["):
        rows, _, order = written.partition("<=")
        return as_tuples(iota(order).reshape(text.numbers(rows)))
    groups = tuple(text.numbers(group) for group in re.findall(r"\{([\d,\s]+)\}", written))
    return groups or (tuple(range(devices)),)


def as_tuples(groups: np.ndarray) -> tuple[tuple[int, ...], ...]:
    """The rows of an array of device numbers."""
    return tuple(tuple(int(device) for device in group) for group in groups)


def iota(written: str) -> np.ndarray:
    """The device numbers of [2,4]T(1,0): 0, 1, ... in that shape, transposed; flat."""
    shape, _, order = written.partition("T")
    sizes = text.numbers(shape)
    devices = np.arange(np.prod(sizes)).reshape(sizes)
    return (devices.transpose(text.numbers(order)) if order else devices).reshape(-1)


def groups_of_mesh(written: str, order: str) -> np.ndarray:
    """The groups of mesh['a'=2,'b'=4] {'b'}: devices that differ along the axes in braces.

    What is in braces may be a part of an axis: 'b':(2)2 is the part of size 2 behind one of size 2.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", written)}
    braces = (order or written).rpartition("{")[2]
    spans: list[tuple[str, int, int]] = []
    for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", braces):
        start = int(before or 1)
        spans.append((name, start, start * int(part or sizes[name])))
    # every axis cut where a part begins or ends
    shape, members = [], []
    for name, size in sizes.items():
        own = [(start, stop) for other, start, stop in spans if other == name]
        cuts = sorted({1, size, *(cut for span in own for cut in span)})
        for low, high in zip(cuts, cuts[1:], strict=False):
            if any(start <= low and high <= stop for start, stop in own):
                members.append(len(shape))
            shape.append(high // low)
    devices = np.arange(np.prod(list(sizes.values())))
    if order:
        listed = order.rpartition("{")[0].strip()[1:-1]
        devices = iota(listed) if "[" in listed else np.array(text.numbers(listed))
    others = [axis for axis in range(len(shape)) if axis not in members]
    count = int(np.prod([shape[axis] for axis in members]))
    return devices.reshape(shape).transpose(*others, *members).reshape(-1, count)


def axes_of(groups: tuple[tuple[int, ...], ...], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes of the mesh along which devices of one group differ."""
    if not mesh:
        return ()
    found = set()
    for group in groups:
        places = np.stack(np.unravel_index(np.array(group), tuple(mesh.values())))
        found |= {name for name, row in zip(mesh, places, strict=True) if len(set(row)) > 1}
    return tuple(name for name in mesh if name in found)

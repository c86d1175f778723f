"""What slices of TPUs send each other through the data-centre network.

The compiler makes a program of one slice, in which devices are numbered from 0 and collectives stay
inside of it, and hands over to the hosts what goes to other slices:
`send(%x, ...), frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",
_xla_megascale_transfer_type="ALL_REDUCE"}`, where slices are numbered from 1.
"""

import re
from typing import NamedTuple

from dpo_jax.hlo import loops, text

TYPE = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
TARGET = re.compile(r"_xla_megascale_target=(\"[^\"]*\"|\{\{.*?\}\})")
# a device's number is that of its slice times this, and its own
DEVICES = 100_000


class Transfer(NamedTuple):
    """What one device sends to the devices of its number in other slices, in one instruction."""

    # as collectives have it: all-reduce, all-gather, ...
    kind: str
    # of the whole array on one device in one run: gathered, before it is scattered, reduced
    bytes: int
    # numbers, from 0, of slices that exchange with each other
    slices: tuple[int, ...]
    # runs in one run of the program
    times: float
    op_name: str


def transfers(program: text.Program) -> list[Transfer]:
    """What a program sends to other slices, in the order of its text."""
    found = []
    for place in loops.walk(program):
        instruction = place.instruction
        written = instruction.attributes.get("frontend_attributes", "")
        kind = TYPE.search(written)
        if instruction.opcode != "send" or kind is None:
            continue
        target = TARGET.search(written)
        slices = slices_of(target[1] if target else "")
        name = kind[1].lower().replace("_", "-")
        # of a tuple with the host's context and a token
        sent = text.bytes_of(instruction.arrays[0])
        gathered = len(slices) if name == "all-gather" else 1
        found.append(Transfer(name, gathered * sent, slices, place.times, instruction.op_name))
    return found


def slices_of(written: str) -> tuple[int, ...]:
    """The slices of "{1,2}x{0:3}", devices 0 to 3 of slices 1 and 2, or of the devices of
    {{100000,200000}}; of several groups, those of the first.
    """
    if written.startswith("{{"):
        devices = text.numbers(written.partition("}")[0])
        return tuple(sorted({device // DEVICES - 1 for device in devices}))
    first = written.strip('"').partition("}")[0].lstrip("{")
    found: set[int] = set()
    for part in filter(None, first.split(",")):
        low, _, high = part.partition(":")
        found |= {*range(int(low) - 1, int(high or low))}
    return tuple(sorted(found))

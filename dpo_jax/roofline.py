"""How long a compiled step takes at least, from what it computes, moves and sends, and what a
device can do. Not measured: see the assumptions, which a plan prints.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_jax import chips, slices, targets
from dpo_jax.hlo import collectives, megascale, text, work

ASSUMPTIONS = (
    "matrix products run at the peak rate of bfloat16, and memory and links at their published "
    "bandwidth; latencies are left out, and what is not matrix products costs its memory traffic",
    "each instruction takes the longer of its compute and its memory traffic; what the chip keeps "
    "in its own fast memory is free",
    "a gather over n devices receives (n - 1) / n of the array over all links of the torus axes "
    "that the group spans, an all-reduce twice that; an axis that is no ring has half its "
    "bandwidth",
    "between 'all communication hidden' and 'none hidden'; hours and cost take the latter",
)


class Seconds(NamedTuple):
    """Of one step."""

    # all FLOPs at the peak rate, all memory traffic at full bandwidth
    compute: float
    memory: float
    # instructions one after another, each the longer of both
    chip: float
    # all that devices of a slice send each other
    links: float
    # all that slices send each other
    network: float = 0.0


class Sent(NamedTuple):
    """What devices send along some axes of the mesh in one step, in one way."""

    kind: str
    axes: tuple[str, ...]
    # whole arrays on one device, over all runs
    bytes: float
    runs: float
    seconds: float
    # whether it goes to other slices, through the data-centre network
    is_between_slices: bool = False


def assumptions(target: targets.Target) -> list[str]:
    """What the times rest on."""
    if target.piece is None or target.slices == 1:
        return list(ASSUMPTIONS)
    chip = target.piece.chip
    rate = chip.network * 8 / 1e9
    source = "its maker does not say it, v5p's is taken" if chip.name == "v4" else "published"
    return [
        *ASSUMPTIONS,
        f"to other slices a chip of {chip.name} sends {rate:g} Gbit/s through the data-centre "
        f"network, its share of what its host has ({source}), while all others do; of a gather "
        "over n slices it receives (n - 1) / n of the array, of an all-reduce twice that",
    ]


def hidden(seconds: Seconds) -> float:
    """The step where all communication goes on beside computation."""
    return max(seconds.chip, seconds.links, seconds.network)


def exposed(seconds: Seconds) -> float:
    """The step where computation waits for all communication."""
    return seconds.chip + seconds.links + seconds.network


def seconds_of(done: Sequence[work.Work], sent: Sequence[Sent], target: targets.Target) -> Seconds:
    """The step's time by what is its bound."""
    flops = sum(one.flops * one.times for one in done)
    moved = sum(one.bytes * one.times for one in done)
    chip = sum(
        max(one.flops / target.flops, one.bytes / target.bandwidth) * one.times for one in done
    )
    links = sum(one.seconds for one in sent if not one.is_between_slices)
    network = sum(one.seconds for one in sent if one.is_between_slices)
    return Seconds(flops / target.flops, moved / target.bandwidth, chip, links, network)


def sent_by(program: text.Program, mesh: Any, target: targets.Target) -> list[Sent]:
    """What the devices of a mesh send each other, by kind and axes, the slowest first."""
    devices, shape = slices.inside(mesh)
    found = []
    for one in collectives.collectives(program, shape):
        group = [devices[place] for place in one.groups[0]]
        rate = group_rate(group, target)
        took = one.times * seconds_of_one(one.kind, one.bytes, len(group), rate)
        found.append(Sent(one.kind, one.axes, one.bytes * one.times, one.times, took))
    for one in megascale.transfers(program):
        axes = collectives.axes_of((one.slices,), slices.outside(mesh))
        took = one.times * seconds_between(one.kind, one.bytes, len(one.slices), target.network)
        found.append(Sent(one.kind, axes, one.bytes * one.times, one.times, took, True))
    return sorted(add_up(found), key=lambda one: -one.seconds)


def add_up(sent: Sequence[Sent]) -> list[Sent]:
    """One of each kind, axes and network."""
    totals: dict[tuple, Sent] = {}
    for one in sent:
        key = one.kind, one.axes, one.is_between_slices
        so_far = totals.get(key, one._replace(bytes=0, runs=0, seconds=0))
        totals[key] = one._replace(
            bytes=so_far.bytes + one.bytes,
            runs=so_far.runs + one.runs,
            seconds=so_far.seconds + one.seconds,
        )
    return list(totals.values())


def seconds_between(kind: str, size: float, members: int, rate: float) -> float:
    """Of one transfer among so many slices, in each of which a device receives `rate` bytes per
    second; `size` is that of the whole array on one device.
    """
    if members < 2 or not size:
        return 0.0
    if not rate:
        return float("inf")
    share = 1.0 if kind == "collective-permute" else (members - 1) / members
    return (2 if kind == "all-reduce" else 1) * share * size / rate


def seconds_of_one(kind: str, size: float, members: int, rate: float) -> float:
    """Of one collective over so many devices, each of which receives `rate` bytes per second.

    `size` is that of the whole array on one device.
    """
    if members < 2 or not size:
        return 0.0
    if not rate:
        return float("inf")
    share = (members - 1) / members
    match kind:
        case "all-reduce":
            return 2 * share * size / rate
        case "all-to-all" | "ragged-all-to-all":
            # a message passes a quarter of a ring on average
            return max(share, members / 4) * size / rate
        case "collective-permute":
            # between neighbours, whose link the compiler uses in both directions at once
            return size / (2 * rate)
        case _:
            return share * size / rate


def group_rate(group: Sequence[Any], target: targets.Target) -> float:
    """Bytes per second that each device of a group receives over its links to the others."""
    one_way = target.links / 2
    if target.piece is None:
        return one_way
    chip, shape = target.piece.chip, target.piece.shape
    coordinates = np.array([device.coords[: len(shape)] for device in group])
    rate, each = 0.0, one_way / chip.axes
    for axis, length in enumerate(shape):
        places = np.unique(coordinates[:, axis])
        if len(places) > 1:
            whole = len(places) == length and chips.is_ring(chip, length)
            # a line has half, and a group with gaps shares its links with those in the gaps
            stride = (places[-1] - places[0]) / (len(places) - 1)
            rate += each / stride * (1 if whole else 0.5)
    # the halves of one chip are linked better than chips are
    return rate or one_way


def by_name(seconds: Seconds) -> Mapping[str, float]:
    """The parts by which a table names them."""
    return {
        "compute": seconds.compute,
        "memory": seconds.memory,
        "chip": seconds.chip,
        "interconnect": seconds.links,
        "data-centre network": seconds.network,
        "all communication hidden": hidden(seconds),
        "none hidden": exposed(seconds),
    }

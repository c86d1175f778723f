"""What accelerators there are, and how a topology of TPU chips and Google's accelerator type name
one slice. Imports no jax, since launchers use it.

A topology counts chips: v5p:4x4x4 has 64. An accelerator type counts TensorCores where a chip has
two of them: the same slice is v5p-128, 64 chips of v5e are v5litepod-64.
"""

import itertools
import math
import re
from typing import NamedTuple

from dpo_jax import checks


class Chip(NamedTuple):
    """What a kind of chip can do, as its maker says it. GB are 10^9 bytes, GiB 2^30."""

    # as topologies name it
    name: str
    # FLOP/s of products of bfloat16
    flops: float
    # GiB of HBM
    hbm: float
    # bytes/s of HBM
    bandwidth: float
    # bytes/s of the links to other chips, both directions of all links together; 0: it has none
    links: float
    # how Google's accelerator types begin; empty: it is no TPU
    accelerator: str = ""
    # GiB of HBM that a program may use on a device, as TPUs' compiler says where one needs more
    usable: float = 0
    # what an accelerator type counts of each chip
    counted: int = 1
    # devices of a chip, as JAX shows them
    devices: int = 1
    # axes of the torus in which chips are linked
    axes: int = 0
    # chips of a pod
    most: int = 1
    # products and sums of its matrix units a cycle, as many as its maker says; 0: not said
    products: int = 0
    # bytes/s through the data-centre network to other slices, one way; 0: not said
    network: float = 0


class Slice(NamedTuple):
    """TPU chips that are linked with each other."""

    chip: Chip
    # chips along each axis
    shape: tuple[int, ...]


TPUS = (
    # https://cloud.google.com/tpu/docs/v4: 275 TFLOP/s, 32 GiB, 1200 GB/s; 2400 Gbit/s of links one
    # way; nothing is said of its network, for which v5p's is taken
    Chip("v4", 275e12, 32, 1200e9, 600e9, "v4", 30.75, 2, 1, 3, 4096, 8 * 128**2, 6.25e9),
    # https://cloud.google.com/tpu/docs/v5e: 197 TFLOP/s, 16 GB, 819 GB/s, 400 GB/s of links, a
    # network of 6.4 Tbit/s for a pod of 256, which is 2 x 100 Gbit/s for a host of 8
    Chip("v5e", 197e12, 16, 819e9, 400e9, "v5litepod", 15.75, 1, 1, 2, 256, 4 * 128**2, 3.125e9),
    # https://cloud.google.com/tpu/docs/v5p: 459 TFLOP/s, 95 GiB, 2765 GB/s, 1200 GB/s of links, a
    # network of 50 Gbit/s
    Chip("v5p", 459e12, 95, 2765e9, 1200e9, "v5p", 95.74, 2, 1, 3, 6144, 8 * 128**2, 6.25e9),
    # https://cloud.google.com/tpu/docs/v6e: 918 TFLOP/s, 32 GB, 1638 GB/s, 800 GB/s of links, a
    # network of 25.6 Tbit/s for a pod of 256, which is 4 x 200 Gbit/s for a host of 8
    Chip("v6e", 918e12, 32, 1638e9, 800e9, "v6e", 31.25, 1, 1, 2, 256, network=12.5e9),
    # https://cloud.google.com/tpu/docs/tpu7x: 2307 TFLOP/s, 192 GiB, 7380 GB/s, 1200 GB/s of links,
    # a network of 100 Gbit/s; its two halves are two devices
    Chip("7x", 2307e12, 192, 7380e9, 1200e9, "tpu7x", 94.75, 2, 2, 3, 9216, network=12.5e9),
)
# by a word of what JAX calls the device; dense products, both directions of NVLink, or of PCIe
# where there is none
GPUS = {
    # https://www.nvidia.com/en-us/data-center/a100/
    "A100-SXM4-40GB": Chip("A100 40 GB", 312e12, 40, 1555e9, 600e9),
    "A100-SXM4-80GB": Chip("A100 80 GB", 312e12, 80, 2039e9, 600e9),
    # https://www.nvidia.com/en-us/data-center/h100/
    "H100 80GB HBM3": Chip("H100", 989e12, 80, 3350e9, 900e9),
    # https://www.nvidia.com/en-us/data-center/h200/
    "H200": Chip("H200", 989e12, 141, 4800e9, 900e9),
    # https://www.nvidia.com/en-us/data-center/l4/
    "L4": Chip("L4", 121e12, 24, 300e9, 64e9),
}
# other names of TPUs that are in use
ALIASES = {"tpu7x": "7x", "v7x": "7x", "v5litepod": "v5e", "v5lite": "v5e", "v6": "v6e"}
# slices of a 2D torus, and those smaller than a cube of 4x4x4 of a 3D one
FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
SMALL = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
# chips along each axis of a cube
CUBE = 4


def parse(name: str) -> Slice:
    """The slice of a topology (v5p:4x4x4) or accelerator type (v5p-128); ValueError says what there
    is.
    """
    found = re.fullmatch(r"([a-z0-9]+)(?::(\d+(?:x\d+)*)|-(\d+))", name.strip().lower())
    if found is None:
        raise ValueError(
            f"{name!r} names no TPU slice: take a topology in chips, such as v5p:4x4x4, or an "
            f"accelerator type, such as v5p-128; the chips are {', '.join(names())}"
        )
    chip = find_chip(found[1], name)
    if found[3] is not None:
        return of_accelerator(chip, int(found[3]), name)
    shape = tuple(int(size) for size in found[2].split("x"))
    if not is_slice(chip, shape):
        near = describe_shapes(chip)
        raise ValueError(f"{name!r} is no slice of {chip.name} that can be had: {near}")
    return Slice(chip, shape)


def names() -> list[str]:
    """Names of the TPUs."""
    return [chip.name for chip in TPUS]


def find_chip(name: str, whole: str) -> Chip:
    """The TPU of a name; ValueError shows the whole of which it is a part."""
    known = {chip.name: chip for chip in TPUS}
    chip = known.get(ALIASES.get(name, name))
    if chip is None:
        near = checks.nearest(name, known)
        raise ValueError(f"{whole!r}: there is no TPU {name!r}, only {', '.join(known)}{near}")
    return chip


def is_slice(chip: Chip, shape: tuple[int, ...]) -> bool:
    """Whether a chip can be had in such a slice."""
    if chip.axes == 2:
        return shape in FLAT
    cubes = len(shape) == 3 and all(size > 0 and size % CUBE == 0 for size in shape)
    return shape in SMALL or (cubes and math.prod(shape) <= chip.most)


def describe_shapes(chip: Chip) -> str:
    """The slices of a chip, for an error."""
    listed = FLAT if chip.axes == 2 else SMALL
    text = ", ".join("x".join(map(str, shape)) for shape in listed)
    return text if chip.axes == 2 else f"{text}, and three multiples of {CUBE}"


def of_accelerator(chip: Chip, number: int, name: str) -> Slice:
    """The slice of so many counted cores or chips, of several the most compact; ValueError where
    there is none.
    """
    count, rest = divmod(number, chip.counted)
    shapes = [shape for shape in (FLAT if chip.axes == 2 else SMALL) if math.prod(shape) == count]
    if chip.axes == 3 and count % CUBE**3 == 0:
        shapes += cubes(count // CUBE**3)
    shapes = [shape for shape in shapes if rest == 0 and is_slice(chip, shape)]
    if not shapes:
        counts = "TensorCores, two a chip" if chip.counted == 2 else "chips"
        raise ValueError(
            f"{name!r}: an accelerator type {chip.accelerator}-N counts {counts}, and no slice has "
            f"{number}; slices in chips: {describe_shapes(chip)}"
        )
    return Slice(chip, min(shapes, key=sum))


def cubes(count: int) -> list[tuple[int, ...]]:
    """Shapes in chips of so many cubes, each axis at least as long as the one before."""
    found = itertools.combinations_with_replacement(
        [size for size in range(1, count + 1) if count % size == 0], 3
    )
    return [tuple(CUBE * size for size in shape) for shape in found if math.prod(shape) == count]


def count(piece: Slice) -> int:
    """How many chips a slice has."""
    return math.prod(piece.shape)


def topology(piece: Slice) -> str:
    """A slice's name in chips, v5p:4x4x4."""
    return f"{piece.chip.name}:{'x'.join(map(str, piece.shape))}"


def accelerator(piece: Slice) -> str:
    """Google's accelerator type of a slice, v5p-128."""
    return f"{piece.chip.accelerator}-{count(piece) * piece.chip.counted}"


def describe(piece: Slice, slices: int = 1) -> str:
    """Both names of a slice: v5p:4x4x4 (64 chips, accelerator type v5p-128); of several, 2 slices
    of v5p:4x4x4 (64 chips, accelerator type v5p-128 each), 128 chips in all.
    """
    number = count(piece)
    chips = "1 chip" if number == 1 else f"{number} chips"
    names = f"{topology(piece)} ({chips}, accelerator type {accelerator(piece)}"
    if slices == 1:
        return f"{names})"
    return f"{slices} slices of {names} each), {slices * number} chips in all"


def is_ring(chip: Chip, length: int) -> bool:
    """Whether the chips along an axis of a slice are linked in a ring: of 4, 8, ... in a 3D torus,
    of 16 in a 2D one.
    """
    return length % CUBE == 0 if chip.axes == 3 else length == 16


def clock(chip: Chip) -> float | None:
    """Cycles per second at which a chip's matrix units reach its FLOP/s; None: not known."""
    return chip.flops / (2 * chip.products) if chip.products else None


def find_gpu(kind: str) -> Chip | None:
    """The GPU that JAX calls so; None where its figures are not in the table."""
    # an L4 is no L40S, and an H200 no GH200
    found = (chip for name, chip in GPUS.items() if re.search(rf"\b{name}\b", kind))
    return next(found, None)

"""Which devices lie where on a mesh, where some are linked better than others.

A slice is a set of devices that fast links connect: chips of a TPU slice (ICI), GPUs of a host or
of several that share NVLink. Slices reach each other through the data-centre network (DCN), which
is tens of times slower. JAX says of each device in which slice it is.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

# axes that may lie across slices, the best first: along them go gradients of each microbatch, and
# parameters of each layer; along all others its activations
ACROSS = ("data", "fsdp")


def arrange(shape: Sequence[int], names: Sequence[str], devices: Sequence[Any]) -> Mesh:
    """The mesh of this shape, the outermost axes across slices and all others inside of one.

    ValueError where the axes do not divide over the slices.
    """
    types = (AxisType.Auto,) * len(names)
    counts = across(shape, names, sizes(devices))
    if math.prod(counts) == 1 and devices[0].platform != "cpu":
        try:
            return jax.make_mesh(shape, names, axis_types=types, devices=devices)
        except NotImplementedError:
            return Mesh(place(shape, counts, devices, is_split=True), names, axis_types=types)
    try:
        placed = place(shape, counts, devices, is_split=False)
    except NotImplementedError:
        placed = place(shape, counts, devices, is_split=True)
    return Mesh(placed, names, axis_types=types)


def place(
    shape: Sequence[int], counts: Sequence[int], devices: Sequence[Any], *, is_split: bool
) -> np.ndarray:
    """The devices in this shape, with so many slices along each axis; NotImplementedError where an
    axis is no product of whole axes of a TPU's torus, unless those may be split.
    """
    if math.prod(counts) == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=is_split)
    inside = [size // count for size, count in zip(shape, counts, strict=True)]
    return mesh_utils.create_hybrid_device_mesh(
        inside, counts, devices, allow_split_physical_axes=is_split
    )


def slice_of(device: Any) -> int:
    """The number of a device's slice. CPUs are all alike."""
    return 0 if device.platform == "cpu" else getattr(device, "slice_index", None) or 0


def sizes(devices: Sequence[Any]) -> list[int]:
    """How many devices there are of each slice."""
    _, found = np.unique([slice_of(device) for device in devices], return_counts=True)
    return found.tolist()


def across(shape: Sequence[int], names: Sequence[str], found: Sequence[int]) -> list[int]:
    """How many slices lie along each axis of a mesh: the outermost axis takes as many as divide it,
    and the next one the rest.

    `found` has the devices of each slice. ValueError where slices are left over.
    """
    left = len(found)
    if left > 1 and len(set(found)) > 1:
        listed = ", ".join(map(str, found))
        raise ValueError(f"{left} slices have {listed} devices; a mesh needs as many of each")
    counts = []
    for size, name in zip(shape, names, strict=True):
        counts.append(math.gcd(size, left) if name in ACROSS else 1)
        left //= counts[-1]
    if left > 1:
        axes = " x ".join(
            f"mesh.{name} {size}" for size, name in zip(shape, names, strict=True) if name in ACROSS
        )
        raise ValueError(
            f"{axes} does not divide over {len(found)} slices of {found[0]} devices, and no other "
            f"axis may lie across slices: take --mesh.data {len(found)} (or --mesh.fsdp a multiple "
            f"of {len(found)}), and at most {found[0]} for the product of all other axes"
        )
    return counts


def inside(mesh: Mesh) -> tuple[list[Any], dict[str, int]]:
    """The devices of one slice in the order of a mesh, and how many lie along each axis."""
    devices = list(mesh.devices.flat)
    counts = across(mesh.devices.shape, mesh.axis_names, sizes(devices))
    first = min(map(slice_of, devices))
    shape = {
        name: mesh.shape[name] // count for name, count in zip(mesh.shape, counts, strict=True)
    }
    return [device for device in devices if slice_of(device) == first], shape


def outside(mesh: Mesh) -> dict[str, int]:
    """How many slices lie along each axis of a mesh."""
    counts = across(mesh.devices.shape, mesh.axis_names, sizes(list(mesh.devices.flat)))
    return dict(zip(mesh.axis_names, counts, strict=True))

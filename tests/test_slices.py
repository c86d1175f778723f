"""Meshes whose devices belong to several slices: stand-ins for devices, and TPUs that are not
there.
"""

import dataclasses

import numpy as np
import pytest

from dpo_jax import config, sharding, slices, targets


@dataclasses.dataclass(frozen=True)
class Device:
    """What an arrangement reads of a device: a GPU's, whose places are its numbers."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "gpu"
    device_kind: str = "stand-in"


class Unplaced:
    """A device of a platform that knows no slices."""

    platform = "gpu"


def cluster(count: int, each: int) -> list[Device]:
    """So many devices in each slice, in an order in which the slices are mixed."""
    found = [Device(100 * part + n, part, part) for part in range(count) for n in range(each)]
    return found[::2] + found[1::2]


def slices_of(axes: config.Mesh, devices: list[Device]) -> np.ndarray:
    """The slice of each device of a mesh, in its shape."""
    mesh = sharding.make_mesh(axes, devices)
    assert {device.id for device in mesh.devices.flat} == {device.id for device in devices}
    return np.vectorize(slices.slice_of)(mesh.devices)


def test_data_lies_across_slices_and_all_else_inside_of_one():
    found = slices_of(config.Mesh(data=2, fsdp=2, tensor=2), cluster(2, 4))
    assert found.reshape(2, 4).tolist() == [[0, 0, 0, 0], [1, 1, 1, 1]]
    # four copies, two of them in each slice
    found = slices_of(config.Mesh(data=4, fsdp=2), cluster(2, 4))
    assert found.reshape(4, 2).tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]


def test_fsdp_lies_across_slices_where_data_does_not_divide():
    found = slices_of(config.Mesh(tensor=2), cluster(2, 4))
    assert found.reshape(4, 2).tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]
    found = slices_of(config.Mesh(data=3, fsdp=4), cluster(2, 6))
    assert found.reshape(3, 4).tolist() == 3 * [[0, 0, 1, 1]]


def test_data_takes_as_many_slices_as_divide_it_and_fsdp_the_rest():
    found = slices_of(config.Mesh(data=2, fsdp=4), cluster(4, 2))
    assert found.reshape(2, 4).tolist() == [[0, 0, 1, 1], [2, 2, 3, 3]]


def test_axes_that_do_not_divide_over_the_slices_are_refused_with_the_flags():
    with pytest.raises(ValueError) as error:
        sharding.make_mesh(config.Mesh(data=1, fsdp=1, tensor=8), cluster(2, 4))
    message = str(error.value)
    assert "mesh.data 1 x mesh.fsdp 1 does not divide over 2 slices of 4 devices" in message
    assert "--mesh.data 2" in message and "--mesh.fsdp" in message
    with pytest.raises(ValueError, match="2 slices have 4, 2 devices"):
        sharding.make_mesh(config.Mesh(), cluster(2, 4)[:6])


def test_cpus_of_several_hosts_and_devices_of_no_slice_are_all_alike():
    devices = [dataclasses.replace(one, platform="cpu") for one in cluster(2, 4)]
    mesh = sharding.make_mesh(config.Mesh(fsdp=1, tensor=8), devices)
    assert list(mesh.devices.flat) == devices
    assert slices.sizes(devices) == [8]
    assert slices.slice_of(Device(0, 3)) == 3
    assert slices.slice_of(Unplaced()) == 0


def test_one_slices_part_of_a_mesh_has_the_axes_that_lie_inside_of_it():
    mesh = sharding.make_mesh(config.Mesh(data=2, fsdp=4), cluster(4, 2))
    devices, shape = slices.inside(mesh)
    assert [device.id for device in devices] == [0, 1]
    assert {name: size for name, size in shape.items() if size > 1} == {"fsdp": 2}
    outside = slices.outside(mesh)
    assert {name: size for name, size in outside.items() if size > 1} == {"data": 2, "fsdp": 2}
    assert list(shape) == list(outside) == list(mesh.axis_names)


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("topology", "axes"),
    [
        ("v5e:4x4", config.Mesh(data=2)),
        # of the axes of the torus neither is 8 or 2 long
        ("v5e:4x4", config.Mesh(data=2, fsdp=8, tensor=2)),
        ("v5p:2x2x2", config.Mesh(data=1, fsdp=8, tensor=2)),
        ("v5p:4x4x4", config.Mesh(data=4, fsdp=32)),
    ],
)
def test_slices_of_tpus_are_laid_out_as_they_are_linked(libtpu, topology, axes):
    target = targets.find(topology, 2)
    mesh = sharding.make_mesh(axes, target.devices)
    found = np.vectorize(slices.slice_of)(mesh.devices)
    assert len({device.id for device in mesh.devices.flat}) == target.chip_count
    first, second = np.split(found, 2, axis=0 if axes.data > 1 else 1)
    assert set(first.flat) == {0} and set(second.flat) == {1}

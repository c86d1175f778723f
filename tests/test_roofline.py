"""Bounds of a step's time, against numbers computed by hand."""

from types import SimpleNamespace
from typing import Any

import pytest

from dpo_jax import chips, roofline, targets
from dpo_jax.hlo import work


def make_target(**changes: Any) -> targets.Target:
    base = targets.Target("a machine", [], 1, 100.0, 10.0, 8.0, 1e9, 1e9)
    return base._replace(**changes)


def at(*places: tuple[int, ...]) -> list[Any]:
    """Devices at these coordinates."""
    return [SimpleNamespace(coords=place) for place in places]


def test_an_instruction_takes_the_longer_of_compute_and_memory():
    # 3 s of compute and 1 s of memory, four times; 1 s and 5 s, once
    done = [
        work.Work(300.0, 10.0, 0, 4, "product"),
        work.Work(100.0, 50.0, 0, 1, "sum"),
    ]
    sent = [roofline.Sent("all-reduce", ("fsdp",), 1.0, 1, 2.5)]
    found = roofline.seconds_of(done, sent, make_target())
    assert found == roofline.Seconds(13.0, 9.0, 17.0, 2.5)
    assert roofline.hidden(found) == 17.0
    assert roofline.exposed(found) == 19.5
    assert roofline.hidden(found._replace(links=18.0)) == 18.0
    # the network between slices is one of its own
    sent.append(roofline.Sent("all-reduce", ("data",), 1.0, 1, 20.0, True))
    found = roofline.seconds_of(done, sent, make_target())
    assert found == roofline.Seconds(13.0, 9.0, 17.0, 2.5, 20.0)
    assert roofline.hidden(found) == 20.0
    assert roofline.exposed(found) == 39.5


@pytest.mark.parametrize(
    ("kind", "members", "seconds"),
    [
        # three quarters of 800 bytes arrive, at 100 bytes per second
        ("all-gather", 4, 6.0),
        ("reduce-scatter", 4, 6.0),
        ("all-reduce", 4, 12.0),
        # two directions at once
        ("collective-permute", 2, 4.0),
        ("all-to-all", 4, 8.0),
        ("all-to-all", 16, 32.0),
        ("all-gather", 1, 0.0),
    ],
)
def test_a_collective_takes_its_bytes_over_the_links(kind, members, seconds):
    assert roofline.seconds_of_one(kind, 800.0, members, 100.0) == pytest.approx(seconds)


def test_without_links_nothing_arrives():
    assert roofline.seconds_of_one("all-gather", 8.0, 2, 0.0) == float("inf")


# one way, each axis of v5p has 1200 / 2 / 3 GB/s, and each of v5e 400 / 2 / 2
@pytest.mark.parametrize(
    ("slice_name", "group", "rate"),
    [
        # a ring of four
        ("v5p:4x4x4", at((0, 0, 0), (1, 0, 0), (2, 0, 0), (3, 0, 0)), 200e9),
        # a part of it is a line, with half
        ("v5p:4x4x4", at((0, 0, 0), (1, 0, 0)), 100e9),
        # every other chip shares its links with those between, and is no ring
        ("v5p:4x4x4", at((0, 0, 0), (2, 0, 0)), 50e9),
        # two axes, the second a ring
        ("v5p:4x4x4", at(*((x, y, 0) for x in (0, 1) for y in range(4))), 300e9),
        # four in a row are no ring in a 2D torus, sixteen are
        ("v5e:4x4", at(*((x, 0, 0) for x in range(4))), 50e9),
        ("v5e:16x16", at(*((x, 0, 0) for x in range(16))), 100e9),
        # two halves of a chip
        ("7x:2x2x1", at((0, 0, 0), (0, 0, 0)), 300e9),
    ],
)
def test_a_group_has_the_links_of_the_axes_that_it_spans(slice_name, group, rate):
    piece = chips.parse(slice_name)
    links = piece.chip.links / piece.chip.devices
    found = roofline.group_rate(group, make_target(links=links, piece=piece))
    assert found == pytest.approx(rate)


def test_a_gpu_receives_at_half_of_both_directions():
    assert roofline.group_rate(at((0,), (1,)), make_target(links=900e9)) == 450e9


@pytest.mark.parametrize(
    ("kind", "slices", "seconds"),
    [
        # three quarters of 800 bytes arrive, at 100 bytes per second
        ("all-gather", 4, 6.0),
        ("reduce-scatter", 4, 6.0),
        ("all-to-all", 4, 6.0),
        ("all-reduce", 4, 12.0),
        ("collective-permute", 2, 8.0),
        ("all-gather", 1, 0.0),
    ],
)
def test_between_slices_each_device_has_its_share_of_the_network(kind, slices, seconds):
    assert roofline.seconds_between(kind, 800.0, slices, 100.0) == pytest.approx(seconds)


def test_what_is_sent_is_added_up_by_kind_axes_and_network():
    one = roofline.Sent("all-reduce", ("data",), 8.0, 2, 1.0)
    far = one._replace(is_between_slices=True)
    found = roofline.add_up([one, far, one])
    assert found == [one._replace(bytes=16.0, runs=4, seconds=2.0), far]


@pytest.mark.parametrize(
    ("name", "assumed"),
    [
        # 2 x 100 Gbit/s for 8 chips, 200 for 4, 4 x 200 for 8, 400 for 4
        ("v5e:4x4", "25 Gbit/s through the data-centre network, its share of what its host has (p"),
        ("v5p:4x4x4", "50 Gbit/s through"),
        ("v6e:4x4", "100 Gbit/s through"),
        ("7x:2x2x1", "100 Gbit/s through"),
        ("v4:2x2x1", "its maker does not say it, v5p's is taken"),
    ],
)
def test_the_network_between_slices_is_among_the_assumptions(name, assumed):
    piece = chips.parse(name)
    assert not any("slices" in line for line in roofline.assumptions(make_target(piece=piece)))
    assert assumed in roofline.assumptions(make_target(piece=piece, slices=2))[-1]

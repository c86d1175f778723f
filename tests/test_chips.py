"""One table of TPU slices: topologies in chips, and Google's accelerator types."""

import pytest

from dpo_jax import chips

# as https://cloud.google.com/tpu/docs lists them for each chip
PUBLISHED = [
    ("v4:2x2x1", 4, "v4-8"),
    ("v4:4x4x4", 64, "v4-128"),
    ("v4:8x8x8", 512, "v4-1024"),
    ("v5e:1x1", 1, "v5litepod-1"),
    ("v5e:2x4", 8, "v5litepod-8"),
    ("v5e:4x4", 16, "v5litepod-16"),
    ("v5e:8x8", 64, "v5litepod-64"),
    ("v5e:16x16", 256, "v5litepod-256"),
    ("v5p:2x2x2", 8, "v5p-16"),
    ("v5p:2x4x4", 32, "v5p-64"),
    ("v5p:4x4x4", 64, "v5p-128"),
    ("v5p:4x4x8", 128, "v5p-256"),
    ("v5p:4x8x8", 256, "v5p-512"),
    ("v5p:8x8x8", 512, "v5p-1024"),
    ("v5p:16x16x24", 6144, "v5p-12288"),
    ("v6e:2x4", 8, "v6e-8"),
    ("v6e:16x16", 256, "v6e-256"),
    ("7x:2x2x1", 4, "tpu7x-8"),
    ("7x:4x4x4", 64, "tpu7x-128"),
]


@pytest.mark.parametrize(("topology", "count", "accelerator"), PUBLISHED)
def test_a_topology_counts_chips_and_an_accelerator_type_may_count_cores(
    topology, count, accelerator
):
    piece = chips.parse(topology)
    assert chips.topology(piece) == topology
    assert chips.count(piece) == count
    assert chips.accelerator(piece) == accelerator
    assert chips.parse(accelerator) == piece
    assert f"{accelerator})" in chips.describe(piece)
    assert topology in chips.describe(piece)


def test_several_slices_are_named_with_all_their_chips():
    assert chips.describe(chips.parse("v5p-128"), 2) == (
        "2 slices of v5p:4x4x4 (64 chips, accelerator type v5p-128 each), 128 chips in all"
    )


def test_of_several_slices_with_one_accelerator_type_the_most_compact_is_meant():
    long = chips.parse("v5p:4x4x32")
    assert chips.accelerator(long) == "v5p-1024"
    assert chips.topology(chips.parse("v5p-1024")) == "v5p:8x8x8"
    assert chips.topology(chips.parse("v5p-768")) == "v5p:4x8x12"
    assert chips.topology(chips.parse("v5p-2048")) == "v5p:8x8x16"


def test_other_names_of_a_chip_are_known():
    assert chips.parse("tpu7x:4x4x4") == chips.parse("7x:4x4x4")
    assert chips.parse("v5litepod:4x4") == chips.parse("v5e:4x4") == chips.parse("V5E-16")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5p", "names no TPU slice"),
        ("v5p:4x4x4x", "names no TPU slice"),
        ("v9:4x4x4", "no TPU 'v9', only v4, v5e, v5p, v6e, 7x"),
        ("v5e:3x5", "no slice of v5e that can be had: 1x1, 2x2, "),
        ("v5p:8x8", "2x2x1, 2x2x2, 2x2x4, 2x4x4, and three multiples of 4"),
        ("v6e:16x32", "no slice of v6e"),
        ("v5p-64x", "names no TPU slice"),
        ("v5p-7", "counts TensorCores, two a chip, and no slice has 7"),
        ("v6e-12", "counts chips, and no slice has 12"),
        ("v5p-999936", "no slice has 999936"),
    ],
)
def test_a_name_of_no_slice_is_an_error_that_says_what_there_is(name, message):
    with pytest.raises(ValueError, match=message):
        chips.parse(name)


@pytest.mark.parametrize(
    ("name", "rings"),
    [("v5e:8x16", [False, True]), ("v5p:2x4x4", [False, True, True]), ("7x:4x4x8", [True] * 3)],
)
def test_which_axes_of_a_slice_are_rings(name, rings):
    piece = chips.parse(name)
    assert [chips.is_ring(piece.chip, length) for length in piece.shape] == rings


@pytest.mark.parametrize(("name", "gigahertz"), [("v4", 1.05), ("v5e", 1.5), ("v5p", 1.75)])
def test_the_clock_is_that_at_which_the_matrix_units_reach_the_peak(name, gigahertz):
    chip = chips.find_chip(name, name)
    assert chips.clock(chip) == pytest.approx(gigahertz * 1e9, rel=0.01)


def test_a_gpu_is_found_by_what_jax_calls_it():
    found = chips.find_gpu("NVIDIA H100 80GB HBM3")
    assert found is not None
    assert (found.name, found.hbm) == ("H100", 80)
    assert chips.find_gpu("NVIDIA L4") is chips.GPUS["L4"]
    assert chips.find_gpu("NVIDIA A100-SXM4-80GB") is chips.GPUS["A100-SXM4-80GB"]


@pytest.mark.parametrize("kind", ["NVIDIA GeForce GT 710", "NVIDIA L40S", "NVIDIA GH200 480GB"])
def test_a_gpu_whose_name_only_holds_anothers_is_not_taken_for_it(kind):
    assert chips.find_gpu(kind) is None

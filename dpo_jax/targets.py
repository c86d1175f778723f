"""The devices that a step is compiled for: TPUs that are not there, this machine's GPUs, or its
CPUs.
"""

import contextlib
import importlib.util
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import benchmark_layouts, chips


class Target(NamedTuple):
    """Devices to compile for, and what one of them can do."""

    # both names of a slice, or what the machine's devices are
    name: str
    devices: Sequence[Any]
    # a GPU, or a machine of CPUs, is one
    chip_count: int
    # of one device: FLOP/s, bytes/s of memory and of links (both directions), bytes that a program
    # may use
    flops: float
    bandwidth: float
    links: float
    capacity: float
    # bytes that the chip has, by its maker
    published: float
    # of TPUs: one slice, and how many of it there are
    piece: chips.Slice | None = None
    slices: int = 1
    # bytes/s of one device to other slices, one way
    network: float = 0


def find(topology: str, slices: int = 1) -> Target:
    """The target of v5p:4x4x4, v5p-128, cpu, cpu:8 or gpu; ValueError says what is missing. Of TPUs
    there may be several slices.

    Call it before anything else uses JAX: it chooses the platform.
    """
    name, _, number = topology.partition(":")
    if slices < 1 or (slices > 1 and name in ("cpu", "gpu")):
        raise ValueError(f"--slices is {slices}: it must be > 0, and 1 but for TPUs")
    if name == "cpu":
        return local_cpus(number, topology)
    if name == "gpu":
        return local_gpus(topology)
    return tpus(chips.parse(topology), slices)


def tpus(piece: chips.Slice, slices: int = 1) -> Target:
    """One or more slices of TPUs; ValueError where libtpu is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"{chips.describe(piece, slices)} is compiled for by libtpu, which needs no TPU and "
            'is not installed: pip install "jax[tpu]", or take --topology cpu'
        )
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    # do not ask the network for a TPU
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # several processes that only compile do not get in each other's way
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # programs of devices that are not there cannot be read back from the disk's cache
    jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)
    chip = piece.chip
    options: dict[str, Any] = {} if slices == 1 else {"num_slices": slices}
    if chips.count(piece) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if chip.name == "v4":
        # one device a chip, as on a machine that has it
        options["chip_config_name"] = "megacore"
    prefix = "tpu7x" if chip.name == "7x" else chip.name
    shape = "x".join(map(str, piece.shape))
    with quiet():
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{prefix}:{shape}", **options
        )
    return Target(
        chips.describe(piece, slices),
        found.devices,
        slices * chips.count(piece),
        chip.flops / chip.devices,
        chip.bandwidth / chip.devices,
        chip.links / chip.devices,
        chip.usable * 2**30,
        chip.hbm * 2**30,
        piece,
        slices,
        chip.network / chip.devices,
    )


def local_cpus(number: str, topology: str) -> Target:
    """This machine's CPU as so many devices, which share what it was measured to do."""
    if not re.fullmatch(r"[1-9]\d*|", number):
        raise ValueError(
            f"{topology!r}: take cpu, or cpu:8 for eight devices of this machine's CPU"
        )
    jax.config.update("jax_platforms", "cpu")
    with contextlib.suppress(RuntimeError):
        # which says that JAX is running already
        jax.config.update("jax_num_cpu_devices", int(number or 1))
    devices = jax.devices()
    if number and len(devices) != int(number):
        raise ValueError(f"{topology!r}: JAX is running with {len(devices)} CPU devices already")
    count = len(devices)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    bandwidth = copy_rate() / count
    devices_named = "1 device" if count == 1 else f"{count} devices"
    return Target(
        f"this machine's CPU ({os.cpu_count()} cores, {devices_named}, rates measured now)",
        devices,
        1,
        benchmark_layouts.matmul_rate(jnp.float32, 1024) / count,
        bandwidth,
        bandwidth,
        memory / count,
        memory,
    )


def local_gpus(topology: str) -> Target:
    """This machine's GPUs; ValueError where JAX finds none, or one whose figures are not known."""
    try:
        devices = jax.devices("gpu")
    except RuntimeError as error:
        raise ValueError(
            f"{topology!r}: JAX finds no GPU here. A step is compiled for a GPU on a machine that "
            'has one, with pip install "jax[cuda13]"'
        ) from error
    kind = devices[0].device_kind
    chip = chips.find_gpu(kind)
    if chip is None:
        known = ", ".join(chip.name for chip in chips.GPUS.values())
        raise ValueError(
            f"{topology!r}: what {kind} can do is not in dpo_jax/chips.py, which has "
            f"{known}: add a line there"
        )
    # JAX takes three quarters of a GPU's memory unless it is told otherwise
    share = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75"))
    stats = devices[0].memory_stats() or {}
    capacity = stats.get("bytes_limit", chip.hbm * 1e9 * share)
    return Target(
        f"{len(devices)} x {kind}",
        devices,
        len(devices),
        chip.flops,
        chip.bandwidth,
        chip.links,
        capacity,
        chip.hbm * 1e9,
    )


def copy_rate(size: int = 2**26, repeats: int = 5) -> float:
    """Bytes per second that this machine's CPU reads and writes: the median."""
    array = jnp.ones(size // 4, jnp.float32)
    double = jax.jit(lambda value: value * 2.0)
    double(array).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        double(array).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2.0 * size / float(np.median(seconds))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what libraries write to this process's standard error to themselves, unless it ends
    with an exception.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as noise:
        os.dup2(noise.fileno(), 2)
        try:
            yield
        except ValueError:
            raise
        except BaseException:
            noise.seek(0)
            os.write(kept, noise.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)

"""Several processes that make one run: how they find each other, wait, and end together.

Every process runs the same program on the same config. What they compute together is one program
over the devices of all; what is written is written by the first of them, into folders that all of
them see. How many there are changes no result, and is therefore no part of a run's config.
"""

import contextlib
import functools
import glob
import hashlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import filelock
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dpo_jax import addresses

T = TypeVar("T")
# seconds without a sign of life after which a process is taken for dead, and all end
HEARTBEAT = 30
# seconds that a process which ends waits for the others to end too
FAREWELL = 20
# seconds that a process waits for what another one makes: nothing but its death ends that before
PATIENCE = 7 * 24 * 3600
TPU_DEVICES = ("/dev/accel*", "/dev/vfio/[0-9]*")
# waits are numbered through the whole life of a process, all points of a sweep
_waits = itertools.count()


def start(address: addresses.Address) -> None:
    """Joins the other processes, if there are any; to be called before JAX looks for devices.

    Where the address says nothing, SLURM or a TPU's metadata may; where they do not, this process
    is alone. All but the first write nothing to standard output.
    """
    join(address)
    if not is_first():
        sys.stdout = open(os.devnull, "w")


def join(address: addresses.Address) -> None:
    """Joins the processes of this address, or those that SLURM or a TPU's metadata tell of."""
    # JAX would catch SIGTERM itself, and stop at a step number that a resumed run never has
    jax.config.update("jax_enable_preemption_service", False)
    initialize = functools.partial(
        jax.distributed.initialize,
        heartbeat_timeout_seconds=HEARTBEAT,
        shutdown_timeout_seconds=FAREWELL,
    )
    if address.coordinator is not None:
        initialize(*address, local_device_ids=[])
    elif address.count is not None:
        return
    elif int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_STEP_NODELIST" in os.environ:
        # JAX gives each task one device; one that is alone on its node needs all of them
        alone = os.environ["SLURM_NTASKS"] == os.environ.get("SLURM_STEP_NUM_NODES")
        initialize(cluster_detection_method="slurm", local_device_ids=[] if alone else None)
    elif os.environ.get("JAX_PLATFORMS") != "cpu" and any(map(glob.glob, TPU_DEVICES)):
        try:
            initialize()
        except ValueError as error:
            # nothing tells of other hosts
            if "should be defined" not in str(error):
                raise


def is_first() -> bool:
    """Whether this is the process that writes, and prints."""
    return jax.process_index() == 0


def wait(what: str, seconds: int = PATIENCE) -> None:
    """Returns once all processes are here; `what` names the place in the error where they are not.

    Every process must come by the same places in the same order.
    """
    if jax.process_count() > 1:
        meet = ocp.multihost.get_barrier_sync_fn()
        meet(key=f"dpo_jax {next(_waits)} {what}", timeout_ms=1000 * seconds)


def in_turn(what: str, make: Callable[[], T]) -> T:
    """What `make` gives: to the first process, then to the others, which find in a cache that they
    share what the first one left there. What goes wrong goes wrong in all.
    """
    try:
        if is_first():
            return make()
    finally:
        wait(what)
    return make()


def first(value: bool) -> bool:
    """The first process's value, on all of them."""
    return bool(multihost_utils.broadcast_one_to_all(np.bool_(value)))


def everywhere(values: np.ndarray) -> Any:
    """Where the bools, of one shape, are true on all processes."""
    if jax.process_count() == 1:
        return values
    return np.all(multihost_utils.process_allgather(values), axis=0)


def check_same(values: Mapping[str, str]) -> None:
    """Raises ValueError, on all processes, that names the texts which are not the same on all."""
    if jax.process_count() == 1:
        return
    hashes = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in values.values()]
    digests = np.array([list(one) for one in hashes], np.uint8)
    found = np.asarray(multihost_utils.process_allgather(digests))  # [processes, values, 16]
    same = (found == found[0]).all(axis=(0, 2))
    differing = [name for name, is_same in zip(values, same, strict=True) if not is_same]
    if differing:
        raise ValueError(
            f"the processes have other {' and '.join(differing)} than the first one: each must be "
            "started with the same command and find the same files"
        )


def make_once(folder: Path, last: str, make: Callable[[], Any]) -> None:
    """Makes what belongs into a local folder, unless its `last` file is there: all processes
    together, of which the first one writes.

    Programs that make the same folder wait for each other. ValueError where a process does not see
    what the first one wrote.
    """
    with filelock.FileLock(f"{folder}.lock") if is_first() else contextlib.nullcontext():
        wait(f"{folder} is locked")
        if not first((folder / last).exists()):
            make()
        wait(f"{folder} is made")
    if not everywhere(np.array((folder / last).exists())):
        raise ValueError(
            f"{folder} is not there on all hosts: set DPO_JAX_CACHE to a folder that all of them "
            "share"
        )


def make_agreement(mesh: Mesh) -> Callable[[bool, jax.Array], bool]:
    """A function that all processes call after each step with whether they are asked to stop, and
    with an array that the step computes; it says to all of them alike whether they stop.

    One process stops at once. Of several, each hears with a step what all were asked after the step
    before: that answer is there by then, so that nobody waits for the devices.
    """
    if jax.process_count() == 1:
        return lambda is_asked, computed: is_asked
    each = NamedSharding(mesh, P(mesh.axis_names))
    combine = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, P()))
    # XLA's CPU devices run programs side by side, and their collectives must not meet
    waits = mesh.devices.flat[0].platform == "cpu"
    answers: list[jax.Array] = []

    def agree(is_asked: bool, computed: jax.Array) -> bool:
        own = np.array([is_asked])
        if waits:
            jax.block_until_ready(computed)
        answers.append(combine(jax.make_array_from_callback((mesh.size,), each, lambda index: own)))
        if waits:
            jax.block_until_ready(answers)
        return len(answers) > 1 and bool(answers.pop(0))

    return agree


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Where a point of a sweep fails on this process and not on all, this process ends, and all
    others with it; where it fails on all alike, they may go on with the next.
    """
    try:
        yield
    except Exception:
        try:
            wait("a point has failed", FAREWELL)
        except Exception as error:
            raise SystemExit(f"this process alone has failed, so all end: {error}") from error
        raise

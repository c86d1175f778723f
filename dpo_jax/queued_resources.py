"""Google's queued resources, through gcloud: the exact commands, and what their answers mean.

A queued resource is a request for TPU VMs. Its nodes are slices: a single one has the resource's
own name, several have that with their number. Imports no jax.
"""

import asyncio
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Sequence
from typing import IO, NamedTuple

from dpo_jax import chips

# https://cloud.google.com/tpu/docs/runtimes
RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5e": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
# states out of which a resource does not come back by itself; None: it is not there
LOST = (None, "SUSPENDING", "SUSPENDED", "FAILED", "DELETING")
# the state of a node that works
READY = "READY"
# what ssh itself exits with, and gcloud with it, where there is no connection
UNREACHABLE = 255
# seconds after which a command of gcloud's that only asks or asks for something is given up
PATIENCE = 600
QUEUED = ["gcloud", "compute", "tpus", "queued-resources"]
NODE = ["gcloud", "compute", "tpus", "tpu-vm"]
LOGIN = "run 'gcloud auth login' and 'gcloud config set project PROJECT' first"


class Refused(Exception):
    """gcloud says no, and would again: quota, permission, no login, a name that is taken."""


class Resource(NamedTuple):
    """A request for one or more TPU slices, which make one run together."""

    name: str
    # Google's accelerator type
    accelerator: str
    runtime: str
    zone: str
    # None: the one that gcloud is configured for
    project: str | None
    # whether it may be preempted, and costs less
    spot: bool
    # how long it may wait for capacity
    wait_hours: float
    slices: int = 1


class Done(NamedTuple):
    """What a command has ended with."""

    code: int
    output: str
    errors: str


def runtime(piece: chips.Slice) -> str:
    """The runtime version of TPU VMs with such chips; ValueError where there is none."""
    if piece.chip.name not in RUNTIMES:
        raise ValueError(
            f"{chips.describe(piece)} cannot be had as a queued resource, only through Google "
            "Kubernetes Engine; queued resources have " + ", ".join(RUNTIMES)
        )
    return RUNTIMES[piece.chip.name]


def place(resource: Resource) -> list[str]:
    """The flags that say where a resource is."""
    project = [] if resource.project is None else [f"--project={resource.project}"]
    return [f"--zone={resource.zone}", *project, "--quiet"]


def create(resource: Resource) -> list[str]:
    """The command that asks for it. A request that nobody waits for any more runs out by itself."""
    nodes = [f"--node-count={resource.slices}", f"--node-prefix={resource.name}"]
    return [
        *(*QUEUED, "create", resource.name),
        *(nodes if resource.slices > 1 else [f"--node-id={resource.name}"]),
        f"--accelerator-type={resource.accelerator}",
        f"--runtime-version={resource.runtime}",
        f"--valid-until-duration={round(3600 * (resource.wait_hours + 1))}s",
        *(["--spot"] if resource.spot else []),
        *place(resource),
    ]


def describe(resource: Resource) -> list[str]:
    """The command that tells its state."""
    return [*QUEUED, "describe", resource.name, "--format=json", *place(resource)]


def delete(resource: Resource) -> list[str]:
    """The command that deletes it and its VMs."""
    return [*QUEUED, "delete", resource.name, "--force", *place(resource)]


def describe_nodes(resource: Resource) -> list[list[str]]:
    """The commands that tell the states of several nodes; of a single one, its resource tells."""
    names = [f"{resource.name}-{i}" for i in range(resource.slices)]
    commands = [[*NODE, "describe", name, "--format=json", *place(resource)] for name in names]
    return commands if resource.slices > 1 else []


def copy(resource: Resource, file: str, name: str) -> list[str]:
    """The command that copies a local file into the home folder of all workers."""
    return [*reach(resource, "scp", file, f"{resource.name}:{name}"), *place(resource)]


def ssh(resource: Resource, command: str) -> list[str]:
    """The command that runs a shell command on all workers at once and shows what they print.

    Its exit code is that of the first worker that has failed, or UNREACHABLE.
    """
    # of several slices, gcloud would start 64 workers and wait for their end before it starts more
    at_once = ["--batch-size=all"] if resource.slices > 1 else []
    reached = reach(resource, "ssh", resource.name)
    return [*reached, *at_once, f"--command={command}", *place(resource)]


def reach(resource: Resource, *words: str) -> list[str]:
    """The start of a command for all workers."""
    if resource.slices > 1:
        return [*QUEUED, *words, "--worker=all", "--node=all"]
    return [*NODE, *words, "--worker=all"]


async def run(
    command: Sequence[str], log: IO[bytes] | None = None, patience: float | None = PATIENCE
) -> Done:
    """Runs a command; with a log, what it prints goes there. It is killed where this is cancelled
    and where `patience`, in seconds, is over (TimeoutError).

    It has a session of its own, so that a terminal's Ctrl-C reaches this process alone.
    """
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=subprocess.DEVNULL,
        stdout=log or subprocess.PIPE,
        stderr=log or subprocess.PIPE,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(patience):
            output, errors = await process.communicate()
    except TimeoutError:
        raise TimeoutError(f"no answer within {patience} s to: {shlex.join(command)}") from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    assert process.returncode is not None
    return Done(process.returncode, (output or b"").decode(), (errors or b"").decode())


async def ask(command: Sequence[str], attempts: int, pause: float) -> Done:
    """Runs a command that may fail for a moment until it does not, a number of times; what no
    retry helps with is returned at once.
    """
    for left in reversed(range(attempts)):
        try:
            done = await run(command)
        except TimeoutError as error:
            done = Done(1, "", str(error))
        if done.code == 0 or is_final(done.errors) or left == 0:
            return done
        await asyncio.sleep(pause)
    raise ValueError(f"attempts is {attempts}; it must be > 0")


async def state(resource: Resource, attempts: int, pause: float) -> tuple[str | None, str]:
    """(state, reason that Google gives); the state is None where the resource is not there.

    Raises Refused where gcloud does not tell.
    """
    done = await ask(describe(resource), attempts, pause)
    if done.code != 0:
        if is_missing(done.errors):
            return None, "it is not there any more"
        raise Refused(explain(done.errors))
    record = json.loads(done.output)["state"]
    details = [part for part in record.values() if isinstance(part, dict)]
    messages = [part["error"]["message"] for part in details if "error" in part]
    initiator = record.get("stateInitiator")
    by = [] if initiator is None else [f"by {initiator}"]
    return record["state"], "; ".join([*messages, *by])


async def lost_node(resource: Resource, attempts: int, pause: float) -> str | None:
    """The node of several that does not work, and its state; None: all do.

    Where one is preempted or repaired, what runs on all of them ends. Raises Refused where gcloud
    does not tell.
    """
    for command in describe_nodes(resource):
        done = await ask(command, attempts, pause)
        if done.code != 0 and not is_missing(done.errors):
            raise Refused(explain(done.errors))
        found = json.loads(done.output).get("state", READY) if done.code == 0 else "missing"
        if found != READY:
            return f"{command[len(NODE) + 1]} is {found}"
    return None


def is_missing(errors: str) -> bool:
    """Whether gcloud says that there is no such thing."""
    return re.search(r"NOT_FOUND|was not found|matched no objects", errors) is not None


def is_taken(errors: str) -> bool:
    """Whether gcloud says that the name is in use."""
    return re.search(r"ALREADY_EXISTS|already exists", errors) is not None


def is_final(errors: str) -> bool:
    """Whether gcloud says what it would say again."""
    final = r"PERMISSION_DENIED|INVALID_ARGUMENT|active account|gcloud auth login|unrecognized arg"
    final += r"|HTTPError 412"
    return (
        is_missing(errors)
        or is_taken(errors)
        or is_quota(errors)
        or re.search(final, errors) is not None
    )


def is_quota(errors: str) -> bool:
    """Whether a quota is what is missing, which is not capacity."""
    return re.search(r"quota", errors, re.IGNORECASE) is not None


def explain(errors: str) -> str:
    """gcloud's error in a line, with what to do about it."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    found = next((line for line in lines if line.startswith("ERROR")), (lines or ["no reason"])[-1])
    if re.search(r"active account|gcloud auth login", errors):
        return f"gcloud is not logged in: {LOGIN}"
    if is_quota(errors):
        return (
            f"{found} (a project's quota for these chips in this zone is asked for at "
            "https://console.cloud.google.com/iam-admin/quotas)"
        )
    return found

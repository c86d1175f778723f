"""Several queued resources side by side, on which the jobs of a sweep are run. Imports no jax.

A job is taken by the next resource that is ready. A resource that is lost (preempted) is asked for
again, and its job goes on in the same run folder; a job that fails by itself is not tried again.
Every resource that was asked for is deleted, whatever happens.
"""

import asyncio
import collections
import contextlib
import dataclasses
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dpo_jax import queued_resources
from dpo_jax.queued_resources import Refused, Resource

# times that a command of gcloud's is tried which fails for no reason that would stay
ATTEMPTS = 5
# exit code of a command that SIGTERM has ended, after it has saved a checkpoint
TERMINATED = 143


class Lost(Exception):
    """The resource is gone or going: another one may go on."""


class Unreachable(Exception):
    """The resource is there, and ssh does not get to it."""


class Bounds(NamedTuple):
    """How often and how long."""

    # times that a job is tried again after its resource was lost, and a resource asked for again
    retries: int
    # times that ssh is tried again
    ssh_retries: int
    # seconds between two questions
    poll: float


class Orders(NamedTuple):
    """What is done on a resource."""

    # local file with the code
    archive: str
    # shell command that unpacks and installs it
    prepare: str
    # shell command of a job's so-manieth try
    command: Callable[["Job", int], str]
    # local folder of the logs
    logs: Path


@dataclasses.dataclass
class Job:
    """Points that one command runs, and what has become of them."""

    # names its logs
    key: str
    # for the reader
    name: str
    # flags that choose the points
    selection: tuple[str, ...]
    tries: int = 0
    outcome: Literal["waiting", "running", "done", "failed"] = "waiting"
    reason: str = ""


@dataclasses.dataclass
class Work:
    """The jobs, and what is known of the resources that they run on."""

    jobs: list[Job]
    orders: Orders
    bounds: Bounds
    pending: collections.deque[Job] = dataclasses.field(default_factory=collections.deque)
    # why a resource was given up, by its name
    given_up: dict[str, str] = dataclasses.field(default_factory=dict)
    # resources that could not be deleted
    left: list[Resource] = dataclasses.field(default_factory=list)


async def run(resources: Sequence[Resource], work: Work) -> None:
    """Runs all jobs that can be run; `work` then says what has become of them."""
    work.pending.extend(work.jobs)
    async with asyncio.TaskGroup() as group:
        for resource in resources:
            group.create_task(serve(resource, work))


async def serve(resource: Resource, work: Work) -> None:
    """Holds a resource, and again after it was lost, as long as there are jobs."""
    losses = 0
    while work.pending:
        try:
            async with held(resource, work):
                await use(resource, work)
            return
        except (Refused, Unreachable) as error:
            work.given_up[resource.name] = str(error)
            say(resource, f"given up: {error}")
            return
        except Lost as error:
            losses += 1
            say(resource, f"lost ({losses} of at most {1 + work.bounds.retries}): {error}")
            if losses > work.bounds.retries:
                work.given_up[resource.name] = f"lost {losses} times, at last: {error}"
                return


async def use(resource: Resource, work: Work) -> None:
    """Waits for a resource, makes it ready and runs jobs on it, until there is none left."""
    if not await is_granted(resource, work):
        return
    await prepare(resource, work)
    while work.pending:
        await attend(resource, work.pending.popleft(), work)


@contextlib.asynccontextmanager
async def held(resource: Resource, work: Work) -> AsyncIterator[None]:
    """Asks for the resource, and deletes it in the end; one that another program has asked for
    under this name raises Refused and stays.
    """
    is_ours = True
    try:
        for attempt in range(ATTEMPTS):
            done = await queued_resources.ask(queued_resources.create(resource), 1, 0)
            if done.code == 0:
                break
            if queued_resources.is_taken(done.errors):
                # a first request may have been granted although its answer was lost
                if attempt > 0:
                    break
                is_ours = False
                raise Refused(
                    f"a queued resource of this name exists in {resource.zone} already, of another "
                    "launcher or left behind by one: --take-over deletes it"
                )
            if queued_resources.is_final(done.errors) or attempt == ATTEMPTS - 1:
                raise Refused(queued_resources.explain(done.errors))
            await asyncio.sleep(work.bounds.poll)
        yield
    finally:
        if is_ours:
            await finish(remove(resource, work))


async def finish(work: Coroutine[Any, Any, None]) -> None:
    """Waits for the end of something that goes on where this is cancelled, and is cancelled after
    it: a signal may come while a resource is being deleted.
    """
    task, cancelled = asyncio.ensure_future(work), False
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            cancelled = True
    task.result()
    if cancelled:
        raise asyncio.CancelledError


async def remove(resource: Resource, work: Work) -> None:
    """Deletes the resource; one that cannot be is noted in `work.left`."""
    say(resource, "deleting")
    command = queued_resources.delete(resource)
    done = await queued_resources.ask(command, ATTEMPTS, work.bounds.poll)
    if done.code == 0 or queued_resources.is_missing(done.errors):
        say(resource, "deleted")
    else:
        work.left.append(resource)
        say(resource, f"NOT DELETED: {queued_resources.explain(done.errors)}")


async def is_granted(resource: Resource, work: Work) -> bool:
    """Whether it is active in the end; False where the jobs have run out meanwhile.

    Raises Lost where the request has failed, and Refused where no capacity comes in time.
    """
    deadline = time.monotonic() + 3600 * resource.wait_hours
    before = None
    while work.pending:
        found, reason = await ask_state(resource, work)
        if found != before:
            say(resource, f"{found or 'missing'}{reason and f' ({reason})'}")
        before = found
        if found == "ACTIVE":
            return True
        if queued_resources.is_quota(reason):
            raise Refused(queued_resources.explain(reason))
        if found in queued_resources.LOST:
            raise Lost(f"{found or 'missing'} {reason}".strip())
        if time.monotonic() > deadline:
            raise Refused(f"no capacity within {resource.wait_hours:g} hours (--wait-hours)")
        await asyncio.sleep(work.bounds.poll)
    return False


async def prepare(resource: Resource, work: Work) -> None:
    """Copies and installs the code on all workers."""
    log = work.orders.logs / f"{resource.name}.log"
    steps = {
        "copying the code": queued_resources.copy(
            resource, work.orders.archive, Path(work.orders.archive).name
        ),
        "installing": queued_resources.ssh(resource, work.orders.prepare),
    }
    for name, command in steps.items():
        say(resource, name)
        code = await persist(resource, command, log, work)
        if code != 0:
            raise Refused(f"{name} ends with exit code {code}: {reason_in(log)} ({log})")


async def attend(resource: Resource, job: Job, work: Work) -> None:
    """Runs a job until it has ended. Where it has not by itself, it waits for its next try."""
    job.tries += 1
    job.outcome = "running"
    log = work.orders.logs / f"{job.key}-try-{job.tries}.log"
    say(resource, f"running {job.name}, try {job.tries}; its log is {log}")
    command = queued_resources.ssh(resource, work.orders.command(job, job.tries))
    try:
        code = await persist(resource, command, log, work)
    except (Lost, Unreachable) as error:
        put_back(job, str(error), work)
        raise Lost(str(error)) from None
    except Refused as error:
        # gcloud does not tell what has become of the resource: others may run the job
        put_back(job, str(error), work)
        raise
    if code == 0:
        job.outcome = "done"
    elif code == TERMINATED:
        put_back(job, "the command was terminated (exit code 143)", work)
    else:
        job.outcome, job.reason = "failed", f"exit code {code}: {reason_in(log)} ({log})"
    say(resource, f"{job.name} {job.outcome}{job.reason and f': {job.reason}'}")


def put_back(job: Job, reason: str, work: Work) -> None:
    """Lets a job wait for its next try, the first of all, unless that would be too many."""
    job.reason = reason
    if job.tries > work.bounds.retries:
        job.outcome, job.reason = "failed", f"given up after {job.tries} tries: {reason}"
    else:
        job.outcome = "waiting"
        work.pending.appendleft(job)


async def persist(resource: Resource, command: Sequence[str], log: Path, work: Work) -> int:
    """The exit code of a command on the workers, which is asked for again where ssh fails.

    Raises Lost where the resource is, and Unreachable where ssh fails too often.
    """
    for attempt in range(1 + work.bounds.ssh_retries):
        if attempt > 0:
            await asyncio.sleep(work.bounds.poll)
        with open(log, "ab") as file:
            start = file.tell()
            done = await queued_resources.run(command, file, None)
        if done.code == 0:
            return 0
        await raise_if_lost(resource, work)
        if not is_connection(done.code, log.read_bytes()[start:].decode(errors="replace")):
            # a preemption may be told of a moment after it has killed the command
            await asyncio.sleep(work.bounds.poll)
            await raise_if_lost(resource, work)
            return done.code
        say(resource, f"ssh fails ({attempt + 1} of at most {1 + work.bounds.ssh_retries})")
    raise Unreachable(
        f"ssh has failed {1 + work.bounds.ssh_retries} times: {reason_in(log)} ({log}); does a "
        "firewall rule allow port 22, and may this account log in?"
    )


async def ask_state(resource: Resource, work: Work) -> tuple[str | None, str]:
    """queued_resources.state, tried as often as everything is."""
    return await queued_resources.state(resource, ATTEMPTS, work.bounds.poll)


async def raise_if_lost(resource: Resource, work: Work) -> None:
    """Raises Lost where the resource, or one of its slices, does not come back by itself."""
    found, reason = await ask_state(resource, work)
    if found in queued_resources.LOST:
        raise Lost(f"{found or 'missing'} {reason}".strip())
    node = await queued_resources.lost_node(resource, ATTEMPTS, work.bounds.poll)
    if node is not None:
        raise Lost(node)


def is_connection(code: int, printed: str) -> bool:
    """Whether it is ssh or gcloud that has failed, and not the command on the workers."""
    failed = re.search(r"^ERROR: \(gcloud\.", printed, re.MULTILINE) is not None
    return code == queued_resources.UNREACHABLE or failed


def reason_in(log: Path) -> str:
    """The last line of a log that says what went wrong."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    lines = [line for line in lines if line and not line.startswith("#####")]
    errors = [line for line in lines if re.search(r"\b\w*(Error|Exception|error)\b.*:", line)]
    return (errors or lines or ["it printed nothing"])[-1]


def say(resource: Resource, text: str) -> None:
    """Prints a line about a resource, with the time."""
    print(f"{time.strftime('%H:%M:%S')} {resource.name}: {text}", flush=True)

"""Runs a sweep's points on TPU VMs through queued resources, or writes the job files of a cluster.

Imports no jax; an experiment file that is loaded may.
"""

import argparse
import asyncio
import functools
import hashlib
import json
import math
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from dpo_jax import (
    buckets,
    chips,
    finished,
    flags,
    fleet,
    job_files,
    launch_flags,
    queued_resources,
    shipment,
    sweep,
)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(arguments: Sequence[str], program: str) -> int:
    """Runs a command line. The exit code is 1 where a point has not finished or something is left
    behind, 2 for a wrong command line, 128 + n after signal n.
    """
    file = flags.experiment_argument(arguments, program)
    parser = launch_flags.make_parser(f"{program} {arguments[0]}")
    own, rest = parser.parse_known_args(arguments[1:])
    if "-h" in rest or "--help" in rest:
        print(parser.format_help() + "\nthen the flags of a sweep:\n")
    kind = next((name for name in job_files.KINDS if getattr(own, name) is not None), None)
    try:
        launch_flags.check(own, parser, kind, rest)
        points = sweep.from_command_line(
            [str(file), *(["--workdir", own.workdir] if own.workdir else []), *rest], program
        ).points
        chosen, passed = sweep.make_parser(program).parse_known_args(rest)
        if own.by_shard and (chosen.index, chosen.shard) != (None, None):
            raise ValueError("--by-shard shares out all points: leave out --index and --shard")
        commit = shipment.commit_of(own.ref)
        path = shipment.check(commit, file, points)
        load = shipment.Shipment(commit, path, str(own.workdir), tuple(passed), tuple(own.env))
        if kind is not None:
            return write_job_file(own, kind, load, points)
        return launch(own, load, points)
    except (ValueError, queued_resources.Refused) as error:
        flags.stop(error)


def write_job_file(
    own: argparse.Namespace, kind: str, load: shipment.Shipment, points: Sequence[sweep.Point]
) -> int:
    """Writes a cluster's job file, or prints it in a dry run."""
    name = sweep_name(load)
    text = job_files.make(kind, own, load, name, [point.index for point in points])
    file = getattr(own, kind)
    if own.dry_run:
        print(text, end="")
        return 0
    Path(file).write_text(text)
    print(f"{file}: {len(points)} points. Next: {job_files.next_command(kind, file)}")
    return 0


def launch(own: argparse.Namespace, load: shipment.Shipment, points: Sequence[sweep.Point]) -> int:
    """Runs points on queued resources, or prints how."""
    piece = chips.parse(own.tpu)
    resource = queued_resources.Resource(
        name=sweep_name(load),
        accelerator=chips.accelerator(piece),
        runtime=own.runtime_version or queued_resources.runtime(piece),
        zone=own.zone,
        project=own.project,
        spot=own.spot,
        wait_hours=own.wait_hours,
        slices=own.slices,
    )
    logs = Path(own.logs or flags.ROOT / "runs" / "launch" / resource.name)
    person = None if own.dry_run else buckets.who()
    done = set() if own.dry_run else buckets.finished(sweep_folder(load))
    finished.check([point for point in points if point.name in done])
    left = [point for point in points if point.name not in done]
    jobs = make_jobs(own, left)
    count = min(own.resources, len(jobs))
    resources = [resource._replace(name=f"{resource.name}-{i}") for i in range(count)]
    print(plan(own, piece, resource, len(points), len(left), count), flush=True)
    if person is None:
        print("\n".join(dry_run(own, load, resources, jobs, logs)))
        return 0
    return run_alone(own, load, resources, jobs, logs, person) if jobs else 0


def run_alone(
    own: argparse.Namespace,
    load: shipment.Shipment,
    resources: Sequence[queued_resources.Resource],
    jobs: list[fleet.Job],
    logs: Path,
    person: str,
) -> int:
    """Runs the jobs while this is the only launcher of the sweep; returns the exit code."""
    # where the event loop does not handle them, so that the lock is removed
    for number in SIGNALS[1:]:
        signal.signal(number, end)
    with buckets.held(sweep_folder(load), person, take_over=own.take_over):
        logs.mkdir(parents=True, exist_ok=True)
        file = str(logs / shipment.ARCHIVE)
        subprocess.run(shipment.archive(load.commit, file), check=True)
        command = functools.partial(shipment.job_command, load)
        orders = fleet.Orders(file, shipment.prepare(own.setup), command, logs)
        bounds = fleet.Bounds(own.retries, own.ssh_retries, own.poll_seconds)
        return run(resources, fleet.Work(jobs, orders, bounds), take_over=own.take_over)


def sweep_folder(load: shipment.Shipment) -> str:
    """The folder of the sweep's run folders."""
    return f"{load.workdir.rstrip('/')}/{Path(load.experiment).stem}"


def sweep_name(load: shipment.Shipment) -> str:
    """A name for a sweep that clouds take, which depends on its folder only."""
    stem = re.sub(r"[^a-z0-9]+", "-", Path(load.experiment).stem.lower()).strip("-")
    digest = hashlib.sha256(sweep_folder(load).encode()).hexdigest()[:8]
    return f"dpo-jax-{stem[:20]}-{digest}"


def make_jobs(own: argparse.Namespace, left: Sequence[sweep.Point]) -> list[fleet.Job]:
    """A job a point that is left, or with --by-shard one for each resource."""
    if not own.by_shard:
        return [
            fleet.Job(f"point-{p.index}", f"{p.index} {p.name}", ("--index", str(p.index)))
            for p in left
        ]
    count = min(own.resources, len(left))
    shards = [f"{i}/{count}" for i in range(count)]
    return [
        fleet.Job(f"shard-{i}-of-{count}", f"shard {shard}", ("--shard", shard))
        for i, shard in enumerate(shards)
    ]


def plan(
    own: argparse.Namespace,
    piece: chips.Slice,
    resource: queued_resources.Resource,
    total: int,
    left: int,
    count: int,
) -> str:
    """What will be done, and what it will cost."""
    kind = "spot" if resource.spot else "on demand"
    lines = [f"points: {total}, of which {left} are to be run"]
    if left == 0:
        return f"{lines[0]}: all have finished"
    lines += [
        f"resources: {count} x {chips.describe(piece, own.slices)}, {kind}, in {resource.zone}, "
        f"runtime {resource.runtime}",
        f"bounds: {own.wait_hours:g} hours of waiting for each; a preempted point is tried again "
        f"{own.retries} times",
    ]
    number, price = own.slices * chips.count(piece), own.price_per_chip_hour
    if own.hours_per_point is None:
        return "\n".join(
            [*lines, f"cost: not known without --hours-per-point; {number} chips each"]
        )
    spent = left * own.hours_per_point * number
    text = f"{left} points x {own.hours_per_point:g} hours x {number} chips = {spent:g} chip-hours"
    money = "at no known --price-per-chip-hour" if price is None else f"= {spent * price:,.2f} USD"
    wall = math.ceil(left / count) * own.hours_per_point
    return "\n".join([*lines, f"cost: {text} {money}, in {wall:g} hours, without retries"])


def dry_run(
    own: argparse.Namespace,
    load: shipment.Shipment,
    resources: Sequence[queued_resources.Resource],
    jobs: Sequence[fleet.Job],
    logs: Path,
) -> list[str]:
    """The commands, in the order in which they would be run."""
    folder, file = sweep_folder(load), str(logs / shipment.ARCHIVE)
    lock = json.dumps({"account": "...", "host": "...", "process": 0, "since": "..."})
    lines = ["# what is there", shlex.join(buckets.account())]
    lines += [shlex.join(buckets.list_finished(folder))]
    lines += ["# of each point that has finished", *map(shlex.join, finished.reads(folder))]
    lines += ["# the lock"]
    lines += [f"echo {shlex.quote(lock)} | {shlex.join(buckets.write_lock(folder))}"]
    lines += ["# the code", shlex.join(["mkdir", "-p", str(logs)])]
    lines += [shlex.join(shipment.archive(load.commit, file))]
    for number, resource in enumerate(resources):
        asked = [queued_resources.create(resource), queued_resources.describe(resource)]
        asked += [queued_resources.copy(resource, file, shipment.ARCHIVE)]
        asked += [queued_resources.ssh(resource, shipment.prepare(own.setup))]
        # in truth the next job goes to the resource that is free first
        for job in jobs[number :: len(resources)]:
            asked += [queued_resources.ssh(resource, shipment.job_command(load, job, 1))]
        asked += [queued_resources.delete(resource)]
        lines += [f"# {resource.name}", *map(shlex.join, asked)]
    return [*lines, "# in the end", shlex.join(buckets.remove_lock(folder))]


def run(
    resources: Sequence[queued_resources.Resource], work: fleet.Work, *, take_over: bool
) -> int:
    """Runs the jobs, prints what has become of them, and returns the exit code."""
    received: list[int] = []
    try:
        asyncio.run(run_until_signal(resources, work, received, take_over=take_over))
    finally:
        print(summary(work), flush=True)
        for resource in work.left:
            command = shlex.join(queued_resources.delete(resource))
            print(f"NOT DELETED, and it costs: {command}", file=sys.stderr)
    if received:
        return 128 + received[0]
    return 1 if work.left or any(job.outcome != "done" for job in work.jobs) else 0


async def run_until_signal(
    resources: Sequence[queued_resources.Resource],
    work: fleet.Work,
    received: list[int],
    *,
    take_over: bool,
) -> None:
    """Runs the jobs; the first signal ends that, and the resources are then deleted."""
    task = asyncio.current_task()
    assert task is not None

    def stop(number: int) -> None:
        if not received:
            task.cancel()
        received.append(number)
        print("stopping: the resources are being deleted, wait", flush=True)

    for number in SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    try:
        if take_over:
            await asyncio.gather(*(fleet.remove(resource, work) for resource in resources))
        await fleet.run(resources, work)
    except asyncio.CancelledError:
        if not received:
            raise


def end(number: int, frame: FrameType | None) -> None:
    """Ends the process as Ctrl-C does, so that the lock is removed."""
    raise SystemExit(128 + number)


def summary(work: fleet.Work) -> str:
    """How many jobs are done, and a line for each that is not, and for each resource given up."""
    done = sum(job.outcome == "done" for job in work.jobs)
    lines = [f"{done} of {len(work.jobs)} done"]
    for job in work.jobs:
        if job.outcome != "done":
            outcome = "failed" if job.outcome == "failed" else "not finished"
            lines += [f"  {outcome}: {job.name}", f"      {job.reason or 'was not run to the end'}"]
    for name, reason in sorted(work.given_up.items()):
        lines += [f"  given up: {name}", f"      {reason}"]
    return "\n".join(lines)

"""The points of a sweep: a run each, in a folder with a stable name; listed, shared out, run.

Imports no jax: the function that trains arrives as an argument.
"""

import argparse
import gc
import sys
import traceback
import types
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dpo_jax import config, flags, origins, paths

PREPARED = ("model.source:", "data.source:", "data.evaluation_source:", "data.tokenizer:")
LONGEST_NAME = 200  # bytes; file systems allow 255


class Point(NamedTuple):
    """One run of a sweep."""

    index: int
    # its overrides, which are also its folder's name: loss.beta=0.1,seed=0
    name: str
    experiment: config.Experiment
    experiment_file: Path


class Failure(NamedTuple):
    """A point that did not finish, and why."""

    point: Point
    reason: str


class Training(NamedTuple):
    """How the points are trained."""

    train: Callable[[config.Experiment, Path], None]
    # what to say of it once all are done
    describe: Callable[[], str]


class Command(NamedTuple):
    """What a command line asks for: these points, to be listed only or to be run."""

    points: list[Point]
    list_only: bool


def from_command_line(arguments: Sequence[str], program: str) -> Command:
    """The points that a command line names: EXPERIMENT.py --workdir ROOT [--index i] [flags].

    What is wrong is printed and ends the process (SystemExit 2), as does `--help` (0).
    """
    file = flags.experiment_argument(arguments, program)
    parser = make_parser(f"{program} {arguments[0]}")
    own, rest = parser.parse_known_args(arguments[1:])
    if "-h" in rest or "--help" in rest:
        print(parser.format_help() + "\nand, for all points alike, the flags of the experiment:\n")
    elif own.workdir is None:
        parser.error("--workdir ROOT is missing: the folder below which the runs' folders lie")
    try:
        module = flags.load_module(file)
        experiment = flags.parse(flags.built(module, file), rest, parser.prog)
        changes = overrides(module, file)
        refuse_flags_that_vary(rest, changes, file)
        found = points(experiment, changes, file, own.workdir)
        if own.index is not None:
            found = [at_index(found, own.index)]
        if own.shard is not None:
            found = found[own.shard[0] :: own.shard[1]]
    except ValueError as error:
        flags.stop(error)
    return Command(found, own.list)


def make_parser(program: str) -> argparse.ArgumentParser:
    """The flags of a sweep itself."""
    parser = argparse.ArgumentParser(
        prog=program, usage=f"{program} --workdir ROOT [flags]", add_help=False, allow_abbrev=False
    )
    parser.add_argument("--workdir", metavar="ROOT", help="folder of the runs' folders; gs:// too")
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--list", action="store_true", help="print the points and run none")
    one.add_argument("--index", type=int, metavar="i", help="run this point only; 0 is the first")
    one.add_argument(
        "--shard", type=shard, metavar="i/n", help="run every n-th point from the i-th on, i < n"
    )
    return parser


def shard(text: str) -> tuple[int, int]:
    """(i, n) of "i/n"; argparse names the flag in the error."""
    first, slash, second = text.partition("/")
    if slash and first.isdecimal() and second.isdecimal() and int(first) < int(second):
        return int(first), int(second)
    raise argparse.ArgumentTypeError(f"{text!r} was given; it must be i/n with 0 <= i < n")


def at_index(found: Sequence[Point], index: int) -> Point:
    """The point of this index; ValueError outside of the sweep."""
    if not 0 <= index < len(found):
        last = len(found) - 1
        raise ValueError(f"--index is {index}; the sweep's points are 0 to {last}")
    return found[index]


def overrides(module: types.ModuleType, file: Path) -> list[dict[str, Any]]:
    """What sweep() of an experiment file returns; ValueError unless it is a list of dicts."""
    if not hasattr(module, "sweep"):
        raise ValueError(
            f"{file} has no function sweep(); "
            "it has to return a list of overrides, as config.grid does"
        )
    try:
        found = module.sweep()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise flags.BrokenFile(f"sweep() of {file} fails: {reason}") from error
    if not isinstance(found, list) or not all(isinstance(point, dict) for point in found):
        raise ValueError(
            f"sweep() of {file} returns {found!r:.100}; it must return a list of dicts"
        )
    if not found:
        raise ValueError(f"sweep() of {file} has no points")
    return found


def refuse_flags_that_vary(
    arguments: Sequence[str], changes: Sequence[Mapping[str, Any]], file: Path
) -> None:
    """Raises ValueError where a flag sets what the sweep varies; one would be ignored."""
    given = {a[2:].partition("=")[0].replace("-", "_") for a in arguments if a.startswith("--")}
    for name in sorted({name for point in changes for name in point}):
        section, dot, field = name.rpartition(".")
        if given & {name, f"{section}{dot}no_{field}"}:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} is set for all points, and sweep() of {file} varies it")


def points(
    experiment: config.Experiment, changes: Sequence[Mapping[str, Any]], file: Path, root: str
) -> list[Point]:
    """The points of the overrides, each with its folder ROOT/<experiment>/<name>.

    Raises ValueError for overrides that are wrong, and for two that are the same.
    """
    found: list[Point] = []
    for index, change in enumerate(changes):
        if "workdir" in change:
            raise ValueError(f"point {index} sets workdir, which the sweep chooses: {root}/...")
        try:
            run = config.override(experiment, change)
        except ValueError as error:
            raise ValueError(f"point {index} of the sweep, {dict(change)}: {error}") from None
        flat = config.flatten(run)
        name = folder_name({name: flat[name] for name in change})
        folder = paths.join(root, file.stem, name)
        found.append(Point(index, name, run.replace(workdir=folder), file))
    for point in found:
        first = next(other for other in found if other.name == point.name)
        if first is not point:
            raise ValueError(f"points {first.index} and {point.index} are the same: {point.name}")
    return found


def folder_name(change: Mapping[str, Any]) -> str:
    """A name for a point that depends on its overrides only: 'loss.beta=0.1,seed=0'.

    Characters that some file system does not take are written %XX, as in URLs.
    """
    texts = []
    for name, value in sorted(change.items()):
        text = value.__name__ if callable(value) else str(value)
        texts.append(f"{name}={urllib.parse.quote(text, safe='+')}")
    found = ",".join(texts) or "default"
    if len(found) > LONGEST_NAME:
        raise ValueError(
            f"a point's overrides make a folder name of {len(found)} characters, and at most "
            f"{LONGEST_NAME} are allowed: {found}"
        )
    return found


def status(point: Point) -> Literal["new", "started", "done"]:
    """How far the point's run folder has come."""
    folder = str(point.experiment.workdir)
    if paths.exists(paths.join(folder, "DONE")):
        return "done"
    return "started" if paths.exists(paths.join(folder, "config.json")) else "new"


def listing(found: Sequence[Point]) -> str:
    """A line a point: index, status, name."""
    return "\n".join(f"{p.index:>4}  {status(p):<8} {p.name}" for p in found)


def run(found: Sequence[Point], train: Callable[[config.Experiment, Path], None]) -> list[Failure]:
    """Trains the points one after the other and returns those that failed.

    Finished ones are skipped, started ones handed to `train` as new ones are: it resumes them. An
    exception of one does not stop the rest; KeyboardInterrupt and SystemExit do.
    """
    failures = []
    for number, point in enumerate(found, start=1):
        state = status(point)
        words = {"new": "starting", "started": "resuming", "done": "finished before, skipping"}
        print(f"[{number}/{len(found)}] {words[state]} {point.name}", flush=True)
        try:
            if state == "done":
                refuse_another_run(point, flags.load_run(str(point.experiment.workdir)))
            else:
                train(point.experiment, point.experiment_file)
        except Exception as error:
            traceback.print_exc()
            failures.append(Failure(point, f"{type(error).__name__}: {error}"))
        # a traceback holds on to all that its functions had, the arrays of a run among them
        gc.collect()
    return failures


def refuse_another_run(point: Point, found: config.Experiment) -> None:
    """Raises ValueError where the point's folder holds a finished run of another config than the
    point's.
    """
    differences = flags.compare(found, origins.with_absolute_sources(point.experiment))
    if "builtin" in (point.experiment.data.source, point.experiment.model.source):
        # the built-in task has put the files that it made in their place
        differences = [line for line in differences if not line.startswith(PREPARED)]
    if differences:
        listed = "; ".join(differences)
        raise ValueError(
            f"{point.experiment.workdir} holds a finished run of another config: {listed}"
        )


def summary(failures: Sequence[Failure], total: int) -> str:
    """How many points finished, and a line for each that did not."""
    lines = [f"{total - len(failures)} of {total} points finished"]
    if failures:
        lines.append("failed:")
    for point, reason in failures:
        lines += [f"{point.index:>4}  {point.name}", f"      {reason}"]
    return "\n".join(lines)


def main(arguments: Sequence[str], program: str, make_training: Callable[[], Training]) -> int:
    """Runs a command line; the exit code is 1 where a point failed.

    `make_training` is called once there is something to run, so that listing imports no jax.
    """
    command = from_command_line(arguments, program)
    if command.list_only:
        try:
            print(listing(command.points))
        except ValueError as error:
            flags.stop(error)
        return 0
    training = make_training()
    failures = run(command.points, training.train)
    if described := training.describe():
        print(described, flush=True)
    out = sys.stderr if failures else sys.stdout
    print(summary(failures, len(command.points)), file=out)
    return 1 if failures else 0

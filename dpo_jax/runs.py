"""What run folders hold, read back for a report. Imports no jax."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dpo_jax import flags, paths

# fields that make no run another one: where it lies, what it logs
SILENT = ("workdir", "log.")


class Run(NamedTuple):
    """What a run folder holds."""

    folder: str
    # stem of its experiment file
    experiment: str
    # name of its loss function
    loss: str
    # its config's fields by dotted name
    fields: dict[str, Any]
    # the lines of its metrics.jsonl: step, then metrics
    lines: list[dict[str, Any]]
    finished: bool


def read(root: str) -> list[Run]:
    """The runs below a folder, and the folder's own, in the order of their names.

    Raises ValueError where none has finished.
    """
    pattern = paths.join(root, "**", "metrics.jsonl")
    folders = [path.removesuffix("/metrics.jsonl") for path in paths.listing(pattern)]
    runs = [read_run(folder) for folder in folders if has_config(folder)]
    if not any(run.finished for run in runs):
        there = ", ".join(f"{relative(run, root)} (step {step_of(run)})" for run in runs)
        raise ValueError(
            f"no run below {root} has finished; "
            + (f"unfinished: {there}" if runs else "there is none that has written metrics.jsonl")
        )
    return runs


def has_config(folder: str) -> bool:
    """Whether a folder is a run's, by its config.json."""
    return paths.exists(paths.join(folder, "config.json"))


def read_run(folder: str) -> Run:
    """What a run folder holds; ValueError names the file and line that cannot be read."""
    config = flags.read_config(folder)
    fields = dict(flatten(config["experiment"]))
    file = config.get("experiment_file", {}).get("path", folder)
    loss = str(fields.pop("loss.function", "")).rpartition(":")[2]
    lines = read_lines(paths.join(folder, "metrics.jsonl"))
    finished = paths.exists(paths.join(folder, "DONE"))
    return Run(folder, Path(file).stem, loss, fields, lines, finished)


def flatten(record: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """(dotted name, value) of every field of a config's JSON."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{inner}", part) for inner, part in value.items())
        else:
            yield name, value


def read_lines(path: str) -> list[dict[str, Any]]:
    """The objects of a JSONL file; a last line without its end, being written just now, is none."""
    lines = []
    for number, text in enumerate(paths.read_text(path).splitlines(keepends=True), start=1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            if not text.endswith("\n"):
                break
            raise ValueError(f"{path}:{number} is not JSON: {error}") from None
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            raise ValueError(f"{path}:{number} is {text.strip()!r:.100}; it must have a step")
        lines.append(line)
    return lines


def final(run: Run, name: str) -> float | None:
    """The last value of a metric; None where the run has none."""
    for line in reversed(run.lines):
        if isinstance(line.get(name), int | float):
            return line[name]
    return None


def step_of(run: Run) -> int:
    """The last step that the run has written."""
    return run.lines[-1]["step"] if run.lines else 0


def relative(run: Run, root: str) -> str:
    """The run's folder as seen from root."""
    start = run.folder.find(root.rstrip("/"))
    rest = run.folder[start + len(root.rstrip("/")) :].strip("/") if start >= 0 else run.folder
    return rest or "."


def differing(runs: Sequence[Run]) -> list[str]:
    """The fields that are not the same in all runs, but for those that make no run another one."""
    names = dict.fromkeys(name for run in runs for name in run.fields)
    missing = object()
    return [
        name
        for name in names
        if not name.startswith(SILENT)
        and any(run.fields.get(name, missing) != runs[0].fields.get(name, missing) for run in runs)
    ]


def overrides(run: Run, runs: Sequence[Run], without: Sequence[str] = ()) -> str:
    """What tells a run from the others of its experiment: 'loss.beta=0.1, seed=0'."""
    names = differing([other for other in runs if other.experiment == run.experiment])
    shown = [name for name in names if name in run.fields and name not in without]
    return ", ".join(f"{name}={run.fields[name]}" for name in shown)

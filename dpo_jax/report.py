"""Run folders -> a Markdown table, a CSV and figures. Imports no jax."""

import csv
import io
import json
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from dpo_jax import figures, paths, runs
from dpo_jax.runs import Run

# the table's metrics, with their digits after the point
DIGITS = {
    "eval/loss": 4,
    "eval/rewards/accuracies": 3,
    "samples/reward": 3,
    "samples/kl": 2,
    "samples/length": 1,
}


class Report(NamedTuple):
    """What was written."""

    table: str
    files: list[str]


def write(root: str, out: str | None = None) -> Report:
    """Writes report.md, report.csv, curves.png and frontier.png of the runs below root.

    They go to `out`, or to root itself. Unfinished runs are marked as such. frontier.png is left
    out where no run has sampled. Raises ValueError where no run has finished.
    """
    found = runs.read(root)
    folder = out or root
    contents = {"report.csv": csv_text(found, root).encode()}
    pictures = {"curves.png": figures.curves(found), "frontier.png": figures.frontier(found)}
    contents |= {name: figures.png(p) for name, p in pictures.items() if p is not None}
    text = markdown(found, root)
    shown = [f"![{name}]({name})" for name in contents if name.endswith(".png")]
    contents["report.md"] = "\n\n".join(["# Report", text, *shown]).encode() + b"\n"
    for name, content in contents.items():
        paths.write_bytes(paths.join(folder, name), content)
    return Report(text, [paths.join(folder, name) for name in contents])


def markdown(found: Sequence[Run], root: str) -> str:
    """The table of the runs and, where there are several seeds, that of their means."""
    parts = [run_table(found)]
    seeds = seed_table(found)
    if seeds:
        parts.append(
            "Mean ± sample standard deviation over the seeds of finished runs:\n\n" + seeds
        )
    unfinished = [runs.relative(run, root) for run in found if not run.finished]
    if unfinished:
        parts.append(f"Not finished: {', '.join(unfinished)}")
    return "\n\n".join(parts)


def run_table(found: Sequence[Run]) -> str:
    """A row a run, and one for the model that they start from where it was sampled from."""
    names = measured(found)
    rows = [["experiment", "overrides", "steps", *names]]
    for run in found:
        steps = str(runs.step_of(run)) + ("" if run.finished else f" of {run.fields['steps']}")
        numbers = [written(runs.final(run, name), DIGITS[name]) for name in names]
        rows.append([run.experiment, runs.overrides(run, found), steps, *numbers])
    firsts = [run.lines[0] for run in found if run.lines and run.lines[0]["step"] == 0]
    # a run without a KL starts from random weights, and not where the others do
    starts = [line for line in firsts if "samples/kl" in line]
    if any("samples/reward" in line for line in starts):
        row = ["before training", "", "0"]
        for name in names:  # a held-out loss means another thing for each run
            values = [line[name] for line in starts if name in line and name.startswith("samples/")]
            row.append(written(statistics.fmean(values), DIGITS[name]) if values else "")
        rows.append(row)
    return aligned(rows, left=2)


def seed_table(found: Sequence[Run]) -> str:
    """A row for each config that finished with several seeds; '' where there is none."""
    groups: dict[str, list[Run]] = {}
    for run in found:
        same = {
            k: v for k, v in run.fields.items() if k != "seed" and not k.startswith(runs.SILENT)
        }
        key = json.dumps([run.experiment, run.loss, same], sort_keys=True)
        if run.finished:
            groups.setdefault(key, []).append(run)
    several = [group for group in groups.values() if len(group) > 1]
    names = measured(found)
    rows = [["experiment", "overrides", "seeds", *names]]
    for group in several:
        numbers = []
        for name in names:
            values = [value for run in group if (value := runs.final(run, name)) is not None]
            numbers.append(mean_and_deviation(values, DIGITS[name]))
        what = runs.overrides(group[0], found, without=["seed"])
        rows.append([group[0].experiment, what, str(len(group)), *numbers])
    return aligned(rows, left=2) if several else ""


def measured(found: Sequence[Run]) -> list[str]:
    """The table's metrics that some run has."""
    return [name for name in DIGITS if any(runs.final(run, name) is not None for run in found)]


def mean_and_deviation(values: Sequence[float], digits: int) -> str:
    """'0.87 ± 0.02', the deviation with n - 1; the number alone where there is one."""
    if not values:
        return ""
    mean = written(statistics.fmean(values), digits)
    if len(values) == 1:
        return f"{mean} (n = 1)"
    return f"{mean} ± {written(statistics.stdev(values), digits)}"


def written(value: float | None, digits: int) -> str:
    """A number with this many digits after the point; '' for None."""
    return "" if value is None else f"{value:.{digits}f}"


def aligned(rows: Sequence[Sequence[str]], left: int) -> str:
    """A Markdown table whose columns line up; the first `left` of them to the left."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(3, *(len(cell) for cell in column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(f"| {' | '.join(cells)} |")
    rule = [f"{'-' * (w - 1)}{'-' if i < left else ':'}" for i, w in enumerate(widths)]
    return "\n".join([lines[0], f"| {' | '.join(rule)} |", *lines[1:]])


def csv_text(found: Sequence[Run], root: str) -> str:
    """A row a run: the fields in which runs differ, and the last value of every metric."""
    fields = runs.differing(found)
    metrics = sorted({name for run in found for line in run.lines for name in line} - {"step"})
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(["folder", "experiment", "loss.function", "finished", "step", *fields, *metrics])
    for run in found:
        row = [runs.relative(run, root), run.experiment, run.loss, run.finished, runs.step_of(run)]
        row += ["" if (value := run.fields.get(name)) is None else value for name in fields]
        row += ["" if (value := runs.final(run, name)) is None else value for name in metrics]
        table.writerow(row)
    return out.getvalue()

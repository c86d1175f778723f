"""The examples of a run's two sides, training and held out, read row by row as often as needed."""

import collections
import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from dpo_jax import config
from dpo_jax.data import formats, labels, sources

Counts = collections.Counter[str]


@dataclasses.dataclass(frozen=True)
class Side:
    """The examples of one side, none of which is held."""

    # reads the source from its start and counts the rows that give no example, by reason
    read: Callable[[Counts], Iterator[formats.Example]]
    source: str
    rows: int
    label_noise: float = 0.0


def wants_held_out(data: config.Data) -> bool:
    """Whether the config asks for held-out examples; ValueError where it asks for them twice."""
    if data.evaluation_source is not None and data.held_out:
        raise ValueError(
            f"data.held_out is {data.held_out} and data.evaluation_source is "
            f"{data.evaluation_source!r}; held-out examples come from one of them: set "
            "data.held_out to 0 or leave out the other"
        )
    return data.evaluation_source is not None or data.held_out > 0


def sides(data: config.Data, kind: str) -> dict[str, Side]:
    """The sides that the config asks for: train, held_out.

    Rows that are held out of the training source are drawn from those that can be used, which are
    counted first.
    """
    train = of_source(data.source, data.split, data, kind)
    train = dataclasses.replace(train, label_noise=data.label_noise)
    if data.evaluation_source is not None:
        return {"train": train, "held_out": evaluation_side(data, kind)}
    if not data.held_out:
        return {"train": train}
    drops: Counts = collections.Counter()
    usable = sum(1 for _ in by_row(train.read(drops)))
    if not usable:
        raise nothing_left(train.source, report(train, drops))
    held = labels.held_out(usable, data.held_out, data.seed)
    rest = functools.partial(some_rows, train.read, ~held)
    # of its rows none is dropped: they were drawn from those that can be used
    own = functools.partial(some_rows, lambda _: train.read(collections.Counter()), held)
    return {
        "train": dataclasses.replace(train, read=rest, rows=train.rows - data.held_out),
        "held_out": Side(own, data.source, data.held_out),
    }


def evaluation_side(data: config.Data, kind: str) -> Side:
    """The held-out side; the training source is read only where it lies in that."""
    if data.evaluation_source is None:
        return sides(data, kind)["held_out"]
    return of_source(data.evaluation_source, data.evaluation_split, data, kind)


def of_source(source: str, split: str, data: config.Data, kind: str) -> Side:
    """All examples of a source."""
    rows = sources.read(source, split)
    return Side(functools.partial(formats.examples, rows, data, kind), source, len(rows))


def some_rows(
    read: Callable[[Counts], Iterator[formats.Example]], chosen: np.ndarray, drops: Counts
) -> Iterator[formats.Example]:
    """The examples of those usable rows that are chosen: bool [usable rows]."""
    for is_chosen, row in zip(chosen, by_row(read(drops)), strict=True):
        if is_chosen:
            yield from row


def by_row(found: Iterator[formats.Example]) -> Iterator[Iterator[formats.Example]]:
    """The examples of each row."""
    return (own for _, own in itertools.groupby(found, operator.attrgetter("where")))


def report(side: Side, drops: Mapping[str, int]) -> Counts:
    """The rows of a side, and how many of them were dropped, by reason."""
    dropped = {f"dropped {name}": count for name, count in drops.items()}
    return collections.Counter({"rows": side.rows, **dropped})


def nothing_left(where: str, report: Mapping[str, int]) -> ValueError:
    """What to raise where no example is left."""
    counted = describe({**report, "examples": 0})
    return ValueError(f"{where}: no example is left; {counted}")


def describe(report: Mapping[str, int]) -> str:
    """A report in one line."""
    parts = [f"{report['rows']} rows gave {report['examples']} examples"]
    for verb in ("dropped", "cut", "flipped"):
        counts = [
            f"{count} {name.removeprefix(verb).strip()}"
            for name, count in report.items()
            if name.startswith(verb) and count
        ]
        if counts:
            parts.append(f"{verb} {', '.join(counts)}")
    return "; ".join(parts)

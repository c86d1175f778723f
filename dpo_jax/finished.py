"""Whether the finished runs of a sweep's folder on gs:// are those that its points ask for now.

Files are read through gcloud, which a launcher needs anyway. Imports no jax; an experiment file
that is loaded may.
"""

import concurrent.futures
import dataclasses
import functools
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_jax import buckets, config, flags, functions, origins, paths, shipment, sweep

# programs of gcloud's side by side
READERS = 8
# what is read of a run: its config and its copy of the experiment file
READ = (origins.RECORD, functions.COPY)


def reads(folder: str) -> list[list[str]]:
    """The commands that read a point's files, POINT in the place of its name."""
    return [buckets.cat(f"{folder}/POINT/{name}") for name in READ]


def check(points: Sequence[sweep.Point]) -> None:
    """Raises ValueError that names the points, all finished, whose folder holds another run."""
    with (
        tempfile.TemporaryDirectory(prefix="dpo_jax_") as here,
        concurrent.futures.ThreadPoolExecutor(READERS) as readers,
    ):
        fetched = readers.map(functools.partial(fetch, here=Path(here)), points)
        reasons = [
            reason
            for point, folder in zip(points, fetched, strict=True)
            if (reason := another_run(point, folder)) is not None
        ]
    if reasons:
        raise ValueError(
            "\n".join(reasons) + "\ngive another --workdir, or remove what is not needed any more: "
            "gcloud storage rm -r FOLDER"
        )


def fetch(point: sweep.Point, here: Path) -> Path:
    """A local folder with what is read of the point's run."""
    folder = here / str(point.index)
    folder.mkdir()
    for name in READ:
        text = buckets.read(f"{point.experiment.workdir}/{name}")
        if text is not None:
            (folder / name).write_text(text)
    return folder


def another_run(point: sweep.Point, folder: Path) -> str | None:
    """Why the run in the local folder is not the point's; None where it is."""
    try:
        sweep.refuse_another_run(point, as_here(flags.load_run(str(folder)), point.experiment))
    except ValueError as error:
        return str(error).replace(str(folder), str(point.experiment.workdir))
    return None


def as_here(found: config.Experiment, given: config.Experiment) -> config.Experiment:
    """A worker's experiment with this machine's paths of the folders that are sent with the
    code.
    """
    return found.replace(
        model=dataclasses.replace(
            found.model, source=path_here(found.model.source, given.model.source)
        ),
        reference=dataclasses.replace(
            found.reference, source=path_here(found.reference.source, given.reference.source)
        ),
    )


def path_here(found: Any, given: str | None) -> Any:
    """The given path from this machine's root, where the one that was found is the same in the
    folder to which code is sent.
    """
    if not found or not given or not paths.is_local(found):
        return found
    if found.endswith(f"/{shipment.FOLDER}/{os.path.normpath(given)}"):
        return origins.absolute(given)
    return found

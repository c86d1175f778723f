"""What is sent to the machines of a sweep: the code at one commit, and the command of each job.

Imports no jax.
"""

import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dpo_jax import flags, sweep
from dpo_jax.fleet import Job

ARCHIVE = "dpo_jax.tar.gz"
# the folder of the code in a worker's home
FOLDER = "dpo_jax"
# shows what a command prints that goes on without its connection
ATTACH = "scripts/attach.sh"
# git asks for an author even where nothing is kept
AUTHOR = ["-c", "user.name=dpo_jax", "-c", "user.email=dpo_jax@localhost"]
# fields that may name a local file or folder
SOURCES = ("data.source", "data.evaluation_source", "data.tokenizer", "model.source")
SOURCES += ("reference.source",)


class Shipment(NamedTuple):
    """The code of a commit, and what is run with it."""

    commit: str
    # experiment file, relative to the code's folder
    experiment: str
    workdir: str
    # flags of the experiment, for all points alike
    flags: tuple[str, ...]
    # NAME=VALUE
    environment: tuple[str, ...]


def commit_of(ref: str | None) -> str:
    """The commit of a git ref, or for None of the tracked files as they are in the working tree,
    for which git makes a commit that no branch has.

    Raises ValueError where there is none.
    """
    if ref is None:
        made = git(*AUTHOR, "stash", "create")
        return made or git("rev-parse", "HEAD")
    return git("rev-parse", "--verify", f"{ref}^{{commit}}")


def git(*arguments: str) -> str:
    """What git prints in the project; ValueError where it fails."""
    command = ["git", "-C", str(flags.ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise ValueError("the code is taken from git, and there is no git on PATH") from None
    except subprocess.CalledProcessError as error:
        raise ValueError(
            f"the code is taken from git, and it fails: {shlex.join(command)}: "
            f"{error.stderr.strip()}"
        ) from None
    return done.stdout.strip()


def archive(commit: str, file: str) -> list[str]:
    """The command that writes the files of a commit into an archive."""
    return ["git", "-C", str(flags.ROOT), "archive", "--format=tar.gz", f"--output={file}", commit]


def check(commit: str, file: Path, points: Sequence[sweep.Point]) -> str:
    """The experiment file's path within the code; ValueError where a file that the sweep needs and
    that is on this machine is not in the commit.
    """
    shipped = set(git("ls-tree", "-r", "--name-only", commit).splitlines())
    for path in (str(flags.ROOT / ATTACH), str(file)):
        if not is_shipped(Path(path), shipped):
            raise ValueError(
                f"{path} is not in what is sent, the files that git tracks: git add it (and with "
                "--ref, commit it)"
            )
    for point in points:
        for name in SOURCES:
            section, _, field = name.partition(".")
            value = getattr(getattr(point.experiment, section), field)
            here = isinstance(value, str) and "://" not in value and Path(value).exists()
            if here and (Path(value).is_absolute() or not is_shipped(Path(value), shipped)):
                raise ValueError(
                    f"{name} is {value!r}, which is on this machine and not in what is sent: copy "
                    "it to gs://, or track it with git and name it relative to the project"
                )
    return file.resolve().relative_to(flags.ROOT).as_posix()


def is_shipped(path: Path, shipped: set[str]) -> bool:
    """Whether a file, or a file of a folder, is among those that are sent."""
    full = path.resolve()
    if not full.is_relative_to(flags.ROOT):
        return False
    name = full.relative_to(flags.ROOT).as_posix()
    return name in shipped or any(other.startswith(f"{name}/") for other in shipped)


def prepare(setup: str) -> str:
    """The shell command that unpacks the code in a worker's home and installs what it needs.

    gcloud runs a command again where its connection breaks: this one then goes on.
    """
    command = shlex.join(["bash", ATTACH, "setup", "bash", "-c", setup])
    return f"mkdir -p {FOLDER} && tar -xzf {ARCHIVE} -C {FOLDER} && cd {FOLDER} && {command}"


def sweep_command(shipment: Shipment, selection: Sequence[str]) -> list[str]:
    """The command that runs the chosen points, from the code's folder."""
    environment = ["env", *shipment.environment] if shipment.environment else []
    return [
        *(*environment, ".venv/bin/python", "-m", "scripts.sweep", shipment.experiment),
        *("--workdir", shipment.workdir, *selection, *shipment.flags),
    ]


def job_command(shipment: Shipment, job: Job, number: int) -> str:
    """The shell command that runs a job's so-manieth try on a worker, or goes on showing it."""
    name = f"{job.key}-try-{number}"
    command = ["bash", ATTACH, name, *sweep_command(shipment, job.selection)]
    return f"cd {FOLDER} && {shlex.join(command)}"

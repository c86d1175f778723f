"""The launcher's own flags, and which of them go together. Imports no jax."""

import argparse
import math
import re
from collections.abc import Sequence

from dpo_jax import job_files

# TPU VMs come with Ubuntu 22.04, whose own Python is too old
SETUP = "bash scripts/setup_tpu_vm.sh"
# flags that not every way of running reads, and those that do
READERS = {
    "resources": ("tpu", "slurm", "kubernetes"),
    "retries": ("tpu", "kubernetes"),
    "spot": ("tpu", "skypilot"),
    "gpus": ("slurm", "kubernetes"),
    "nodes": ("slurm",),
    "hours_limit": ("slurm",),
    "image": ("kubernetes",),
    "image_folder": ("kubernetes",),
    "accelerators": ("skypilot",),
} | dict.fromkeys(
    (
        "slices",
        "zone",
        "project",
        "runtime_version",
        "ssh_retries",
        "wait_hours",
        "poll_seconds",
        "logs",
    )
    + ("by_shard", "hours_per_point", "price_per_chip_hour", "ref", "setup", "take_over"),
    ("tpu",),
)


def make_parser(program: str) -> argparse.ArgumentParser:
    """The flags of the launcher itself."""
    parser = argparse.ArgumentParser(
        prog=program,
        usage=f"{program} --workdir ROOT (--tpu TYPE --zone ZONE | --slurm FILE | "
        "--kubernetes FILE | --skypilot FILE) [--index i | --shard i/n] [flags]",
        add_help=False,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--workdir", metavar="ROOT", help="folder of the runs' folders, gs:// for --tpu")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--tpu", metavar="TYPE", help="v5p-128, or v5p:4x4x4 for the same chips")
    for name, what in job_files.KINDS.items():
        where.add_argument(f"--{name}", metavar="FILE", help=f"write {what}, and run nothing")
    add("--dry-run", action="store_true", help="print the commands and run none")
    add("--resources", type=positive, default=1, metavar="N", help="how many run side by side")
    add("--slices", type=positive, default=1, metavar="N", help="of --tpu, which make one run")
    add("--by-shard", action="store_true", help="a resource runs its points in one process")
    add("--spot", action="store_true", help="machines that cost less and may be preempted")
    add("--zone", help="of the TPUs, such as us-east5-a")
    add("--project", help="by default the one that gcloud is configured for")
    add("--runtime-version", metavar="NAME", help="by default the one that fits the chips")
    add("--retries", type=natural, default=3, metavar="N", help="of a point that was preempted")
    add("--ssh-retries", type=natural, default=5, metavar="N", help="where ssh fails")
    add("--wait-hours", type=hours, default=24, metavar="H", help="for capacity, at most")
    add("--poll-seconds", type=hours, default=30, metavar="S", help="between two questions")
    add("--hours-per-point", type=hours, metavar="H", help="for the predicted cost only")
    add("--price-per-chip-hour", type=hours, metavar="USD", help="for the predicted cost only")
    add("--logs", metavar="FOLDER", help="by default runs/launch/NAME of the resources")
    add("--ref", help="git ref of the code; by default tracked files as they are")
    add("--setup", default=SETUP, metavar="COMMAND", help="makes .venv on every worker")
    add("--env", action="append", default=[], type=variable, metavar="NAME=VALUE")
    add("--take-over", action="store_true", help="from a launcher that is no more")
    job_files.add_flags(parser)
    return parser


def positive(text: str) -> int:
    """A whole number above zero; argparse names the flag in the error."""
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} was given; it must be a whole number > 0")


def natural(text: str) -> int:
    """A whole number, zero too."""
    if text.isdecimal():
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} was given; it must be a whole number >= 0")


def hours(text: str) -> float:
    """A finite number above zero, of hours, seconds or dollars."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if 0 < number < math.inf:
        return number
    raise argparse.ArgumentTypeError(f"{text!r} was given; it must be a number > 0")


def variable(text: str) -> str:
    """NAME=VALUE of an environment variable."""
    if re.match(r"[A-Za-z_]\w*=", text):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} was given; it must be NAME=VALUE")


def check(
    own: argparse.Namespace, parser: argparse.ArgumentParser, kind: str | None, rest: Sequence[str]
) -> None:
    """Raises ValueError for flags that do not go together, or that nothing would read."""
    if "-h" in rest or "--help" in rest:
        return
    if own.workdir is None:
        raise ValueError("--workdir ROOT is missing: the folder below which the runs' folders lie")
    if kind is None and own.tpu is None:
        raise ValueError("say where: --tpu TYPE --zone ZONE, or --slurm, --kubernetes, --skypilot")
    if "--list" in rest:
        raise ValueError("--list is a flag of scripts.sweep, which lists the points")
    if own.tpu is not None and own.zone is None:
        raise ValueError("--zone is missing: where the TPUs are, such as us-east5-a")
    if own.tpu is not None and not own.workdir.startswith("gs://"):
        raise ValueError(
            f"--workdir is {own.workdir!r}; it must be on gs://, since a TPU VM's disk goes with "
            "it, and a preempted point goes on from its folder"
        )
    where = kind or "tpu"
    for name, readers in READERS.items():
        if where not in readers and getattr(own, name) != parser.get_default(name):
            flag = "--" + name.replace("_", "-")
            listed = " and ".join(f"--{reader}" for reader in readers)
            raise ValueError(f"{flag} is read by {listed} only, and --{where} is given")

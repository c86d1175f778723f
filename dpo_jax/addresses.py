"""Which process of a run this is, as flags or the environment say it. Imports no jax.

How many processes make a run changes no result, so that this is no part of its config.
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import NamedTuple

PREFIX = "--processes."
# the same in the environment; a flag goes before
VARIABLES = {
    "coordinator": "DPO_JAX_COORDINATOR",
    "count": "DPO_JAX_PROCESS_COUNT",
    "id": "DPO_JAX_PROCESS_ID",
}


class Address(NamedTuple):
    """Where the first process listens, how many there are, and which this is; all None: unsaid."""

    coordinator: str | None = None
    count: int | None = None
    id: int | None = None


def parse(arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[Address, list[str]]:
    """What flags --processes.* and the environment say, and the arguments without those flags.

    ValueError where only a part of it is said, or it contradicts itself.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name, variable in VARIABLES.items():
        kind = str if name == "coordinator" else int
        # argparse reads the text of a default as it reads a flag's
        parser.add_argument(PREFIX + name, type=kind, default=environment.get(variable))
    try:
        found, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None
    address = Address(*(getattr(found, f"processes.{name}") for name in VARIABLES))
    check(address)
    return address, rest


def check(address: Address) -> None:
    """Raises ValueError for an address that does not say which process this is of which."""
    coordinator, count, number = address
    # a count of 1 alone keeps SLURM and TPUs from being asked
    if address in (Address(), Address(count=1)):
        return
    if coordinator is None or count is None or number is None:
        missing = [name for name in VARIABLES if getattr(address, name) is None]
        named = " and ".join(f"{PREFIX}{name} ({VARIABLES[name]})" for name in missing)
        raise ValueError(f"coordinator, count and id of a process go together: give {named} too")
    if not 0 <= number < count:
        raise ValueError(f"{PREFIX}id is {number}; it must be from 0 to {PREFIX}count - 1")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"{PREFIX}coordinator is {coordinator!r}; it must be HOST:PORT")

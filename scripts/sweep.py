"""Runs the points of an experiment file's sweep().

python -m scripts.sweep experiments/dpo.py --workdir ROOT [--list | --index i | --shard i/n] [flags]

With several processes, each is started with the same command, as with scripts.train.
"""

import functools
import os
import sys
from collections.abc import Callable

from dpo_jax import addresses, flags, sweep


def main() -> int:
    """The process's exit code: 1 where a point failed, 2 for a wrong command line."""
    try:
        address, arguments = addresses.parse(sys.argv[1:], os.environ)
    except ValueError as error:
        flags.stop(error)
    return sweep.main(arguments, "python -m scripts.sweep", functools.partial(make_train, address))


def make_train(address: addresses.Address) -> Callable[..., None]:
    """The function that trains a point, imported now: it imports jax."""
    from dpo_jax import processes, task

    processes.start(address)
    return processes.ending_together()(task.run)


if __name__ == "__main__":
    sys.exit(main())

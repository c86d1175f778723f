"""Runs the points of an experiment file's sweep().

python -m scripts.sweep experiments/dpo.py --workdir ROOT [--list | --index i | --shard i/n] [flags]

With several processes, each is started with the same command, as with scripts.train.
"""

import functools
import gc
import os
import sys

from dpo_jax import addresses, flags, sweep


def main() -> int:
    """The process's exit code: 1 where a point failed, 2 for a wrong command line."""
    try:
        address, arguments = addresses.parse(sys.argv[1:], os.environ)
    except ValueError as error:
        flags.stop(error)
    start = functools.partial(make_training, address)
    return sweep.main(arguments, "python -m scripts.sweep", start)


def make_training(address: addresses.Address) -> sweep.Training:
    """How this process trains the points, imported now: it imports jax."""
    from dpo_jax import processes, sweep_process

    # as scripts.train
    gc.freeze()
    processes.start(address)
    training = sweep_process.make_training()
    return training._replace(train=processes.ending_together()(training.train))


if __name__ == "__main__":
    sys.exit(main())

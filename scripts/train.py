"""Trains one experiment: python -m scripts.train experiments/dpo.py --workdir runs/dpo [--help].

With several processes, each is started with the same command. A TPU and SLURM tell them of each
other; elsewhere --processes.coordinator HOST:PORT --processes.count N --processes.id I do.
"""

import gc
import os
import sys

from dpo_jax import addresses, flags


def main() -> None:
    """Parses the command line and runs."""
    try:
        address, arguments = addresses.parse(sys.argv[1:], os.environ)
    except ValueError as error:
        flags.stop(error)
    experiment, experiment_file = flags.from_command_line(arguments, "python -m scripts.train")
    if experiment.workdir is None:
        experiment = experiment.replace(workdir=f"runs/{experiment_file.stem}")
    from dpo_jax import processes, task

    # what is imported stays: not looked at again and again while a step is traced, which takes a
    # fifth longer then
    gc.freeze()
    processes.start(address)
    try:
        task.run(experiment, experiment_file)
    except (ValueError, FloatingPointError) as error:
        flags.stop(error)


if __name__ == "__main__":
    main()

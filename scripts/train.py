"""Trains one experiment: python -m scripts.train experiments/dpo.py --workdir runs/dpo [--help]."""

import sys

from dpo_jax import flags


def main() -> None:
    """Parses the command line and runs."""
    experiment, experiment_file = flags.from_command_line(sys.argv[1:], "python -m scripts.train")
    if experiment.workdir is None:
        experiment = experiment.replace(workdir=f"runs/{experiment_file.stem}")
    from dpo_jax import task

    try:
        task.run(experiment, experiment_file)
    except (ValueError, FloatingPointError) as error:
        flags.stop(error)


if __name__ == "__main__":
    main()

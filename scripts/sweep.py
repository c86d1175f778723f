"""Runs the points of an experiment file's sweep().

python -m scripts.sweep experiments/dpo.py --workdir ROOT [--list | --index i | --shard i/n] [flags]
"""

import sys

from dpo_jax import sweep


def main() -> int:
    """The process's exit code: 1 where a point failed, 2 for a wrong command line."""
    return sweep.main(sys.argv[1:], "python -m scripts.sweep", make_training)


def make_training() -> sweep.Training:
    """How this process trains the points, imported now: it imports jax."""
    from dpo_jax import sweep_process

    return sweep_process.make_training()


if __name__ == "__main__":
    sys.exit(main())

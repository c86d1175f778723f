"""Runs the points of an experiment file's sweep().

python -m scripts.sweep experiments/dpo.py --workdir ROOT [--list | --index i | --shard i/n] [flags]
"""

import importlib
import sys

from dpo_jax import sweep


def main() -> int:
    """The process's exit code: 1 where a point failed, 2 for a wrong command line."""
    return sweep.main(
        sys.argv[1:],
        "python -m scripts.sweep",
        # imported by then only: it imports jax
        lambda: importlib.import_module("dpo_jax.run").run,
    )


if __name__ == "__main__":
    sys.exit(main())

"""Writes docs/losses.md and its pictures: python -m scripts.losses [--check].

With --check nothing is written, and the exit code is 1 where the page is not current.
"""

import argparse
import sys
from pathlib import Path

from dpo_jax import catalogue, flags, losses

DOCS = Path(__file__).resolve().parent.parent / "docs"


def main() -> int:
    """Parses the command line, and writes or compares."""
    parser = argparse.ArgumentParser(prog="python -m scripts.losses", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether it is current")
    parser.add_argument("--out", metavar="FOLDER", default=DOCS, help="default: docs")
    options = parser.parse_args()
    try:
        if not options.check:
            print(*catalogue.write(losses, options.out), sep="\n")
        elif not catalogue.is_current(losses, options.out):
            print(f"{catalogue.PAGE} is not current: run {catalogue.COMMAND}", file=sys.stderr)
            return 1
    except ValueError as error:
        flags.stop(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Writes the table, the CSV and the pictures of the runs below a folder.

python -m scripts.report ROOT [--out FOLDER]
"""

import argparse
import sys

from dpo_jax import flags, report


def main() -> None:
    """Prints the table and the paths of what was written."""
    parser = argparse.ArgumentParser(prog="python -m scripts.report", description=__doc__)
    parser.add_argument("root", metavar="ROOT", help="a folder with run folders; gs:// too")
    parser.add_argument("--out", metavar="FOLDER", help="where the files go; default: ROOT")
    arguments = parser.parse_args()
    try:
        written = report.write(arguments.root, arguments.out)
    except ValueError as error:
        flags.stop(error)
    print(written.table + "\n")
    print(*written.files, sep="\n")


if __name__ == "__main__":
    sys.exit(main())

"""Writes a run's model as a folder that transformers, vLLM and lm-eval load.

python -m scripts.export RUN OUT [--dtype bfloat16] [--max-file-gigabytes 5]
"""

import argparse
import sys

from dpo_jax import flags


def main() -> None:
    """Parses the command line, and prints what was written."""
    parser = argparse.ArgumentParser(prog="python -m scripts.export", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="a run folder, a model in HF format or a preset")
    parser.add_argument("out", metavar="OUT", help="a new folder")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the weights; default: float32, as they are trained",
    )
    parser.add_argument(
        "--max-file-gigabytes",
        type=float,
        default=5.0,
        metavar="GB",
        help="most that a file of weights holds; default: 5",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="SOURCE",
        help="a folder, a tokenizer.json or a hub name; default: the one beside the model",
    )
    parser.add_argument(
        "--eos-token", metavar="TOKEN", help="ends a completion; default: the tokenizer's own"
    )
    parser.add_argument(
        "--adapter",
        action="store_true",
        help="of a run with an adapter: write it alone, in PEFT's form; default: merged",
    )
    parser.add_argument(
        "--base-model",
        metavar="NAME",
        help="base that an adapter's files name; default: the one that it was trained on",
    )
    parsed = parser.parse_args()
    from dpo_jax import export

    options = export.Options(**{name: getattr(parsed, name) for name in export.Options._fields})
    try:
        print(export.describe(export.export(parsed.run, parsed.out, options)))
    except ValueError as error:
        flags.stop(error)


if __name__ == "__main__":
    sys.exit(main())

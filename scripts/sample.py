"""Prints text from a trained run: python -m scripts.sample RUN --prompt TEXT [--count 4].

A sample ends with the tokenizer's EOS, with those of the generation_config.json of the HF model
that the run started from, and with each --stop TOKEN.
"""

import argparse
import sys

from dpo_jax import flags, sample


def main() -> None:
    """Parses the command line and prints."""
    parser = argparse.ArgumentParser(prog="python -m scripts.sample", description=__doc__)
    parser.add_argument("run", help="folder of a run, or of a model in HF format")
    parser.add_argument("--prompt", required=True, help="text that is continued")
    parser.add_argument("--count", type=int, default=4, help="samples")
    parser.add_argument("--max-tokens", type=int, default=128, help="most tokens of a sample")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the softmax; 0: greedy")
    parser.add_argument("--top-k", type=int, default=None, help="only the k likeliest tokens")
    parser.add_argument("--top-p", type=float, default=None, help="only the likeliest tokens")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument(
        "--stop", metavar="TOKEN", action="append", default=[], help="ends a sample too; repeatable"
    )
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's message")
    options = parser.parse_args()
    try:
        for text in sample.sample(
            options.run, options.prompt, sample.Options(**options_of(options))
        ):
            print(text)
            print()
    except ValueError as error:
        flags.stop(error)


def options_of(parsed: argparse.Namespace) -> dict:
    """The flags that sample.Options has."""
    return {name: getattr(parsed, name) for name in sample.Options._fields}


if __name__ == "__main__":
    sys.exit(main())

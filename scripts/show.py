"""Prints examples as the model sees them: python -m scripts.show EXPERIMENT [--count 3] [flags]."""

import argparse
import sys

from dpo_jax import flags


def main() -> None:
    """Parses the command line and prints."""
    program = "python -m scripts.show"
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--count", type=int, default=3)
    own, rest = parser.parse_known_args()
    experiment, _ = flags.from_command_line(rest, program)
    from dpo_jax import origins, task
    from dpo_jax.data import show, tokenise, tokenizer

    try:
        experiment = task.prepare(experiment)
        data = experiment.data
        words = tokenizer.load_tokenizer(data, origins.tokenizer_of(experiment.model.source))
        tokenised, _ = tokenise.load(data, words, data.examples)
        print(show.examples(data, words, own.count), end="\n\n")
        print(show.rows(tokenised, experiment))
    except ValueError as error:
        flags.stop(error)


if __name__ == "__main__":
    sys.exit(main())

"""Compiles a run's train step for devices that need not be there, and says what it would take.

python -m scripts.plan EXPERIMENT --topology v5p:4x4x4 [--slices 2] [--search]
    [--price-per-chip-hour 4.2] [--prompt-tokens 200 --completion-tokens 300 --examples 160000]
    [--layout packed|padded] [--tries 8 --minutes 60] [--json FILE] [flags of the run]

A topology is a slice of TPUs in chips (v5p:4x4x4) or Google's accelerator type (v5p-128), cpu,
cpu:8, or gpu; with --slices several slices of TPUs that a data-centre network connects. The lengths
are medians, of rows that cannot be read here. The padded layout is for comparison: a row for each
completion, padded to the longest, with all logits. A search compiles up to 8 settings, and no
further ones after an hour.
"""

import argparse
import json
import sys
from pathlib import Path

from dpo_jax import flags

PROGRAM = "python -m scripts.plan"


def main() -> int:
    """The process's exit code: 1 where the step does not fit, 2 for a wrong command line."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--topology")
    parser.add_argument("--slices", type=int, default=1)
    parser.add_argument("--layout", choices=("packed", "padded"), default="packed")
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--tries", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--price-per-chip-hour", type=float)
    parser.add_argument("--prompt-tokens", type=int)
    parser.add_argument("--completion-tokens", type=int)
    parser.add_argument("--examples", type=int)
    parser.add_argument("--json")
    own, rest = parser.parse_known_args()
    if {"-h", "--help"} & {*rest}:
        print(__doc__)
    experiment, _ = flags.from_command_line(rest, PROGRAM)
    try:
        if own.topology is None:
            raise ValueError("give --topology: v5p:4x4x4 (in chips), v5p-128, cpu, cpu:8 or gpu")
        from dpo_jax import targets

        target = targets.find(own.topology, own.slices)
        from dpo_jax import abstract_step, plan, plan_text

        examples = abstract_step.read_examples(experiment, lengths_of(own))
        print(f"compiling for {target.name}, which may take minutes", flush=True)
        if own.search:
            from dpo_jax import plan_search

            bounds = plan_search.Bounds(own.tries, own.minutes)
            records = plan_search.search(
                experiment, examples, target, bounds, own.price_per_chip_hour
            )
            print(plan_search.describe(records))
            record = records[0]
        else:
            make = abstract_step.make_padded if own.layout == "padded" else abstract_step.make
            record = plan.plan(experiment, examples, target, own.price_per_chip_hour, make)
        print(plan_text.describe(record))
        if own.json is not None:
            Path(own.json).write_text(json.dumps(record, indent=1))
    except ValueError as error:
        flags.stop(error)
    return 0 if record["fits"] else 1


def lengths_of(own: argparse.Namespace):
    """The planned lengths that the flags give; None where they give none."""
    from dpo_jax.data import made_up

    given = {
        "--prompt-tokens": own.prompt_tokens,
        "--completion-tokens": own.completion_tokens,
        "--examples": own.examples,
    }
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return None
    if missing:
        raise ValueError(
            f"lengths are planned, and {' and '.join(missing)} not given: give all three"
        )
    return made_up.Lengths(own.prompt_tokens, own.completion_tokens, own.examples)


if __name__ == "__main__":
    sys.exit(main())

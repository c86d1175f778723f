"""Times training steps of this project's layouts, and of other trainers, on the same examples.

python -m scripts.benchmark EXPERIMENT [--layouts packed cached plain padded]
    [--peer trl-fast=PYTHON --peer tunix=PYTHON ...] [--rounds 5] [--steps 3] [--json FILE]
    [--random-weights] [--once] [flags of the run]: with random weights each contender draws those
    of a preset itself, and no file of them is written; once leaves out the second start
python -m scripts.benchmark --scaling [EXPERIMENT [flags of the run]] [--lengths 256 ... 8192]
    [--examples 1 ... 64] [--rounds 5] [--steps 3] [--json FILE] [--figure FILE.png]: seconds a step
    over the length of examples and over their number; with EXPERIMENT of its model and its data's
    lengths
python -m scripts.benchmark --logps [--rounds 5]: log-probabilities from stripes of the vocabulary
    and from all logits
python -m scripts.benchmark --flops EXPERIMENT [--json FILE] [flags of the run]: FLOPs of an epoch's
    compiled steps against those needed at least; nothing is timed
python -m scripts.benchmark --sweep EXPERIMENT [--json FILE] [flags of the run]: eight points over
    losses and betas, an epoch each, as a sweep and each alone
"""

import argparse
import dataclasses
import gc
import json
import os
import sys
from pathlib import Path

from dpo_jax import config, flags

PROGRAM = "python -m scripts.benchmark"


def main() -> None:
    """Runs a command line; errors of the user's are printed and end the process (SystemExit 2)."""
    own, rest = make_parser().parse_known_args()
    refuse_unread(own)
    if own.logps:
        from dpo_jax import benchmark_logps

        print(benchmark_logps.HEADER, flush=True)
        for result in benchmark_logps.run(own.rounds):
            print(benchmark_logps.describe(result), flush=True)
        return
    if own.scaling:
        scale(own, rest)
        return
    experiment, file = flags.from_command_line(rest, PROGRAM)
    try:
        if own.worker is None:
            race(own, experiment, file, rest[1:])
        else:
            work(own, experiment, file)
    except ValueError as error:
        flags.stop(error)


def refuse_unread(own: argparse.Namespace) -> None:
    """Ends the process for a flag of a race where there is none."""
    kinds = [name for name in ("logps", "scaling", "flops", "sweep") if getattr(own, name)]
    unread = [name for name in ("once", "random_weights", "peer") if getattr(own, name)]
    if kinds and unread:
        name = unread[0].replace("_", "-")
        flags.stop(ValueError(f"--{name} is of a race, and --{kinds[0]} is none: leave one out"))


def make_parser() -> argparse.ArgumentParser:
    """The flags of the program itself."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--layouts", nargs="+", default=["packed", "cached", "plain", "padded"])
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--random-weights", action="store_true")
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--json")
    parser.add_argument("--logps", action="store_true")
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--lengths", nargs="+", type=int)
    parser.add_argument("--examples", nargs="+", type=int)
    parser.add_argument("--figure")
    parser.add_argument("--flops", action="store_true")
    parser.add_argument("--sweep", action="store_true")
    # of a contender, which this program starts itself
    parser.add_argument("--worker")
    parser.add_argument("--folder")
    parser.add_argument("--count", type=int)
    parser.add_argument("--points", nargs="+", type=int)
    return parser


def race(
    own: argparse.Namespace, experiment: config.Experiment, file: Path, rest: list[str]
) -> None:
    """Times contenders, or a sweep against its points, or counts FLOPs, and prints the table."""
    from dpo_jax import (
        benchmark,
        benchmark_counts,
        benchmark_peers,
        benchmark_sweep,
        benchmark_table,
    )

    if own.flops:
        record = benchmark_counts.count(experiment)
        print(benchmark_counts.describe(record))
    elif own.sweep:
        record = benchmark_sweep.run(experiment, file, rest)
        print(benchmark_sweep.describe(record))
    else:
        peers = benchmark_peers.parse(own.peer)
        os.environ.update(benchmark.OWN_MEMORY)
        settings = benchmark.Settings(
            tuple(own.layouts), peers, own.rounds, own.steps, own.random_weights, not own.once
        )
        record = benchmark.run(experiment, file, rest, settings)
        print(benchmark_table.describe(record))
    if own.json is not None:
        Path(own.json).write_text(json.dumps(record, indent=1))


def work(own: argparse.Namespace, experiment: config.Experiment, file: Path) -> None:
    """What the process of a contender does."""
    import jax

    from dpo_jax import (
        benchmark,
        benchmark_layouts,
        benchmark_sweep,
        benchmark_worker,
        initial,
        inputs,
        paths,
        sharding,
    )

    # as scripts.train
    gc.freeze()
    if own.points is not None:
        experiment = benchmark.trimmed(experiment, own.count)
        benchmark_sweep.work(experiment, file, Path(own.folder), own.points)
        return
    experiment = benchmark.trimmed(experiment, benchmark.LONG_RUN)
    if not own.random_weights:
        # where an adapter that lay on it is merged
        model = dataclasses.replace(experiment.model, source=f"{own.folder}/model")
        lora = dataclasses.replace(experiment.lora, start="continue")
        experiment = experiment.replace(model=model, lora=lora)
    inputs.enable_compile_cache(paths.join(paths.cache_folder(), "compiled"))
    mesh = sharding.make_mesh(experiment.mesh, jax.devices())
    stepper = benchmark_layouts.make(own.worker, experiment, mesh, own.folder)
    dtype = initial.compute_type(experiment.model)
    benchmark_worker.work(stepper, iter(sys.stdin), dtype, own.count)


def scale(own: argparse.Namespace, rest: list[str]) -> None:
    """Times steps over lengths and numbers of examples; `rest` is an experiment and its flags, or
    nothing.
    """
    from dpo_jax import benchmark_scaling, figures

    sizes = benchmark_scaling.Sizes()
    named = {"lengths": own.lengths, "examples": own.examples}
    named |= {"rounds": own.rounds, "steps": own.steps}
    sizes = sizes._replace(**{name: value for name, value in named.items() if value})
    try:
        experiment = flags.from_command_line(rest, PROGRAM)[0] if rest else None
        record = benchmark_scaling.run(sizes, experiment)
    except ValueError as error:
        flags.stop(error)
    print(benchmark_scaling.describe(record))
    if own.json is not None:
        Path(own.json).write_text(json.dumps(record, indent=1))
    if own.figure is not None:
        Path(own.figure).write_bytes(figures.png(benchmark_scaling.draw(record)))


if __name__ == "__main__":
    sys.exit(main())

"""Times training steps of this project's layouts, and of other trainers, on the same examples.

python -m scripts.benchmark EXPERIMENT [--layouts packed cached plain padded] [--peer trl=PYTHON]
    [--rounds 5] [--steps 3] [--json FILE] [flags of the run]
python -m scripts.benchmark --logps [--rounds 5]: log-probabilities from stripes of the vocabulary
    and from all logits
python -m scripts.benchmark --sweep EXPERIMENT [--json FILE] [flags of the run]: eight points over
    losses and betas, an epoch each, as a sweep and each alone
"""

import argparse
import json
import sys
from pathlib import Path

from dpo_jax import flags

PROGRAM = "python -m scripts.benchmark"


def main() -> None:
    """Parses the command line; races, or is one of the contenders."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--layouts", nargs="+", default=["packed", "cached", "plain", "padded"])
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json")
    parser.add_argument("--logps", action="store_true")
    parser.add_argument("--sweep", action="store_true")
    # of a contender, which this program starts itself
    parser.add_argument("--worker")
    parser.add_argument("--folder")
    parser.add_argument("--count", type=int)
    parser.add_argument("--points", nargs="+", type=int)
    own, rest = parser.parse_known_args()
    if own.logps:
        from dpo_jax import benchmark_logps

        print(benchmark_logps.HEADER, flush=True)
        for result in benchmark_logps.run(own.rounds):
            print(benchmark_logps.describe(result), flush=True)
        return
    experiment, file = flags.from_command_line(rest, PROGRAM)
    from dpo_jax import benchmark, benchmark_layouts, benchmark_sweep, sharding

    try:
        if own.points is not None:
            experiment = benchmark.trimmed(experiment, own.count)
            benchmark_sweep.work(experiment, file, Path(own.folder), own.points)
            return
        if own.worker is not None:
            import dataclasses

            import jax

            model = dataclasses.replace(experiment.model, source=f"{own.folder}/model")
            experiment = benchmark.trimmed(experiment, own.count).replace(model=model)
            mesh = sharding.make_mesh(experiment.mesh, jax.devices())
            benchmark.work(benchmark_layouts.LAYOUTS[own.worker](experiment, mesh), iter(sys.stdin))
            return
        if own.sweep:
            record = benchmark_sweep.run(experiment, file, rest[1:])
            print(benchmark_sweep.describe(record))
        else:
            peers = dict(one.split("=", 1) for one in own.peer)
            settings = benchmark.Settings(tuple(own.layouts), peers, own.rounds, own.steps)
            record = benchmark.run(experiment, file, rest[1:], settings)
            print(benchmark.describe(record))
        if own.json is not None:
            Path(own.json).write_text(json.dumps(record, indent=1))
    except ValueError as error:
        flags.stop(error)


if __name__ == "__main__":
    sys.exit(main())

"""A run of a tiny model that takes seconds, for the tests of whole runs."""

from pathlib import Path

from dpo_jax import config, losses, paths, runs

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "experiments" / "dpo.py"


def experiment(folder: Path, workdir: Path, **changes) -> config.Experiment:
    base = config.Experiment(
        loss=config.Loss(losses.dpo, beta=0.1),
        steps=6,
        batch_size=8,
        workdir=str(workdir),
        checkpoint_every=2,
        evaluate_every=3,
        model=config.Model(source="tiny"),
        data=config.Data(
            source=str(folder / "train.jsonl"),
            evaluation_source=str(folder / "held_out.jsonl"),
            tokenizer=str(folder / "tokenizer"),
            max_length=128,
        ),
        optimizer=config.Optimizer(learning_rate=1e-3),
        # all devices on one axis, and no other
        mesh=config.Mesh(fsdp=8),
        log=config.Log(progress=False, tensorboard=False),
    )
    loss = changes.pop("loss", base.loss)
    return config.override(base.replace(loss=loss), changes)


def metrics(workdir: Path | str) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return runs.read_lines(paths.join(str(workdir), "metrics.jsonl"))

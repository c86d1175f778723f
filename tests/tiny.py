"""What several tests run: a tiny model that trains in seconds, and a decoder smaller yet."""

from functools import partial
from pathlib import Path

import jax
import numpy as np

from dpo_jax import config, losses, paths, runs
from dpo_jax.model import decoder
from dpo_jax.model.config import DecoderConfig

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "experiments" / "dpo.py"
DECODER = DecoderConfig(
    vocabulary_size=40,
    width=24,
    layers=2,
    heads=4,
    key_value_heads=2,
    head_dim=6,
    hidden=32,
    max_positions=64,
)


def draw_params(model: DecoderConfig, seed: int = 0, scale: float = 0.1) -> dict:
    """A decoder's parameters, float32 on the host: normal, those of norms around 1.

    Large enough that tokens are far from equally likely and that every part matters.
    """
    generator = np.random.default_rng(seed)
    shapes = jax.eval_shape(partial(decoder.init, model), jax.random.key(0))

    def one(path, leaf) -> np.ndarray:
        drawn = generator.normal(size=leaf.shape, scale=scale)
        return np.asarray(drawn + ("scale" in jax.tree_util.keystr(path)), np.float32)

    return jax.tree_util.tree_map_with_path(one, shapes)


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

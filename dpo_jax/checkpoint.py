"""Orbax checkpoints of a run: the newest and the best are kept, and parameters can be loaded alone.

All of Orbax that the project uses is in this module, since its names still move. The position in
the data is the step.
"""

from typing import Any

import jax
import orbax.checkpoint.experimental.v1 as ocp

from dpo_jax import config, paths

# arrays that an error names
LISTED = 5


def make_checkpointer(folder: str, settings: config.Checkpoint) -> ocp.training.Checkpointer:
    """Saves to and restores from folder/checkpoints; half-written checkpoints are never seen."""
    policies = ocp.training.preservation_policies
    kept: list[Any] = [policies.LatestN(settings.keep)]
    if settings.keep_best:
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics[settings.metric],
            reverse=settings.best == "smallest",
            n=settings.keep_best,
            keep_checkpoints_without_metrics=False,
        )
        kept.append(best)
    always: Any = ocp.training.save_decision_policies.FixedIntervalPolicy(1)
    both: Any = policies.AnyPreservationPolicy(kept)
    return ocp.training.Checkpointer(
        checkpoints(folder),
        preservation_policy=both,
        # when to save is the train loop's to say
        save_decision_policy=always,
        cleanup_tmp_directories=True,
    )


def checkpoints(folder: str) -> str:
    """Where a run folder's checkpoints lie; Orbax takes no relative path and no file://."""
    path = paths.join(folder, "checkpoints")
    return paths.locate(path)[1] if paths.is_local(path) else path


def save(
    checkpointer: ocp.training.Checkpointer, step: int, items: dict, metrics: dict[str, Any]
) -> None:
    """Saves trees by name (`params` by itself, so that it can be loaded alone); returns when they
    are on disk.
    """
    checkpointer.save_checkpointables(step, items, metrics=metrics or None, overwrite=True)


def latest_step(checkpointer: ocp.training.Checkpointer) -> int | None:
    """Step of the newest finished checkpoint."""
    latest = checkpointer.latest
    return None if latest is None else latest.step


def restore(checkpointer: ocp.training.Checkpointer, step: int, abstract: dict) -> dict:
    """The trees of a step, in the shapes, types and shardings of `abstract` (ShapeDtypeStruct
    leaves). ValueError names the arrays of other shapes, before anything is read.
    """
    metadata = checkpointer.checkpointables_metadata(step).metadata
    saved = shapes({name: tree for name, tree in metadata.items() if name in abstract})
    wanted = shapes(abstract)
    differing = [
        f"{path} is {saved.get(path, 'not in it')}, and the run has {wanted.get(path, 'none')}"
        for path in sorted(saved.keys() | wanted.keys())
        if saved.get(path) != wanted.get(path)
    ]
    if differing:
        listed = "\n  ".join(differing[:LISTED])
        raise ValueError(
            f"checkpoint {step} of {checkpointer.directory} does not fit this run, in "
            f"{len(differing)} arrays:\n  {listed}"
        )
    return checkpointer.load_checkpointables(step, abstract)


def shapes(tree) -> dict[str, tuple[int, ...]]:
    """The shape of each array of a tree by its path."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def load_params(folder: str, abstract) -> tuple[int, dict]:
    """Step and parameters of a run folder's newest checkpoint, on the devices that `abstract` says.

    ValueError where there is none.
    """
    with ocp.training.Checkpointer(checkpoints(folder)) as checkpointer:
        step = latest_step(checkpointer)
        if step is None:
            raise ValueError(f"{folder} has no finished checkpoint: let the run save one first")
        return step, restore(checkpointer, step, {"params": abstract})["params"]


def abstract(tree):
    """Shapes, types and shardings of a tree's arrays, for `restore`."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
    )

"""The pictures of a report, training curves, and ground-truth reward against KL.

matplotlib is imported when something is drawn.
"""

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dpo_jax.runs import Run

# Okabe and Ito's palette, told apart by colour-blind readers too
COLOURS = {"dpo": "#0072B2", "ipo": "#E69F00", "kto": "#009E73", "orpo": "#CC79A7"}
OTHERS = ["#D55E00", "#56B4E9", "#8C6D31", "#7F3C8D", "#555555"]
ACCURACY = "eval/rewards/accuracies"
REWARD, KL = "samples/reward", "samples/kl"


def colours(runs: Sequence[Run]) -> dict[str, str]:
    """A colour for each loss of the runs; the four of the papers keep theirs in every report."""
    losses = sorted({run.loss for run in runs}, key=lambda loss: (loss not in COLOURS, loss))
    others = [loss for loss in losses if loss not in COLOURS]
    cycle = {loss: OTHERS[i % len(OTHERS)] for i, loss in enumerate(others)}
    return {loss: COLOURS.get(loss) or cycle[loss] for loss in losses}


def shown(loss: str) -> str:
    """A loss's name as papers write it."""
    return loss.upper() if loss in COLOURS else loss


def series(run: Run, *names: str) -> np.ndarray:
    """The values of these metrics on the lines that have them all, finite: [lines, names]."""
    rows = [[line[name] for name in names] for line in run.lines if has(line, names)]
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(names))


def has(line: dict[str, Any], names: Sequence[str]) -> bool:
    """Whether a line of metrics.jsonl has a finite number for each name."""
    return all(isinstance(line.get(n), int | float) and math.isfinite(line[n]) for n in names)


def curves(runs: Sequence[Run]) -> Any:
    """Figure of the training loss (a panel a loss: their scales differ) and held-out accuracy.

    None where no run has either.
    """
    from matplotlib import figure

    palette = colours(runs)
    losses = [
        loss for loss in palette if any(len(series(r, "step", "loss")) for r in of(runs, loss))
    ]
    judged = any(len(series(run, "step", ACCURACY)) for run in runs)
    panels = len(losses) + judged
    if not panels:
        return None
    across = min(panels, 3)
    down = -(-panels // across)
    picture = figure.Figure(figsize=(4.2 * across + 0.4, 3.3 * down + 0.6), layout="constrained")
    axes = list(picture.subplots(down, across, squeeze=False).flat)
    for empty in axes[panels:]:
        empty.remove()
    for axis, loss in zip(axes, losses, strict=False):
        draw_loss(axis, of(runs, loss), palette[loss])
        axis.set(title=f"{shown(loss)}: training loss", xlabel="optimizer step", ylabel="loss")
    if judged:
        draw_accuracy(axes[panels - 1], runs, palette)
        picture.legend(loc="outside right center", frameon=False)
    several = ", one line a run" if len(runs) > len(palette) else ""
    picture.suptitle(f"Training curves{several}", fontsize=13)
    return picture


def of(runs: Sequence[Run], loss: str) -> list[Run]:
    """The runs with this loss."""
    return [run for run in runs if run.loss == loss]


def draw_loss(axis: Any, runs: Sequence[Run], colour: str) -> None:
    """The losses of the runs, each step's faintly under their running mean."""
    for run in runs:
        values = series(run, "step", "loss")
        if not len(values):
            continue
        window = max(1, len(values) // 40)
        if len(runs) <= 3 and window > 1:
            axis.plot(*values.T, color=colour, alpha=0.25, linewidth=0.7)
        axis.plot(*running_mean(values, window).T, color=colour, alpha=0.9, linewidth=1.4)
    quiet(axis)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Means over windows of consecutive rows: [rows - window + 1, columns]."""
    sums = np.cumsum(np.concatenate([np.zeros((1, values.shape[1])), values]), axis=0)
    return (sums[window:] - sums[:-window]) / window


def draw_accuracy(axis: Any, runs: Sequence[Run], palette: dict[str, str]) -> None:
    """Held-out accuracy of the runs over their steps, labelled by their losses."""
    drawn = set()
    for run in runs:
        values = series(run, "step", ACCURACY)
        if len(values):
            label = None if run.loss in drawn else shown(run.loss)
            drawn.add(run.loss)
            axis.plot(*values.T, ".-", color=palette[run.loss], linewidth=1.2, label=label)
    axis.axhline(0.5, color="grey", linestyle=":", linewidth=1)
    chance = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom"}
    axis.annotate("chance", (1, 0.5), color="grey", fontsize=8, **chance)
    axis.set(title="Held-out accuracy", xlabel="optimizer step")
    axis.set_ylabel("share of held-out pairs whose\nchosen text has the higher reward")
    quiet(axis)


def frontier(runs: Sequence[Run]) -> Any:
    """Figure of samples' ground-truth reward against KL to the SFT model; None without samples."""
    from matplotlib import figure

    sampled = [run for run in runs if len(series(run, KL, REWARD))]
    if not sampled:
        return None
    palette = colours(sampled)
    picture = figure.Figure(figsize=(8.2, 5), layout="constrained")
    axis = picture.subplots()
    drawn = set()
    for run in sampled:
        values = series(run, KL, REWARD)
        colour = palette[run.loss]
        axis.plot(*values.T, ".-", color=colour, linewidth=0.8, markersize=4, alpha=0.6)
        label = None if run.loss in drawn else shown(run.loss)
        drawn.add(run.loss)
        style = {"color": colour, "edgecolor": "white", "linewidth": 0.8, "zorder": 3}
        axis.scatter(*values[-1:].T, s=90, label=label, **style)
    starts = [line[REWARD] for r in sampled for line in r.lines if start_of(line)]
    if starts:
        star = {"marker": "*", "s": 260, "color": "black", "zorder": 4}
        axis.scatter([0.0], [np.mean(starts)], label="SFT model (start)", **star)
    axis.set(xlabel="sequence-level KL to the SFT model (nats)")
    axis.set(ylabel="ground-truth reward of sampled reviews")
    axis.set_title("Reward gained for the distance moved from the SFT model")
    legend = picture.legend(loc="outside right center", frameon=False, labelspacing=0.8)
    legend.set_title("large: end of a run\nsmall: evaluations on the way")
    legend.get_title().set_fontsize(8)
    quiet(axis)
    return picture


def start_of(line: dict[str, Any]) -> bool:
    """Whether a line has the samples of the model before any update."""
    return line["step"] == 0 and has(line, [REWARD])


def quiet(axis: Any) -> None:
    """Takes away what distracts from the data."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)


def png(picture: Any) -> bytes:
    """A figure as the bytes of a PNG file."""
    content = io.BytesIO()
    picture.savefig(content, format="png", dpi=130)
    return content.getvalue()

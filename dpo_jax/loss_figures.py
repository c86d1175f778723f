"""The pictures of docs/losses.md: every loss that is a function of a margin, and the scores.

matplotlib is imported when something is drawn.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_jax import figures, loss_curves
from dpo_jax.loss_curves import Curve, Reads

ACROSS = 4
# characters of a title's line
TITLE = 30
# told apart by dashes and in grey too
LOSS = {"color": "#000000", "linestyle": "-", "linewidth": 1.6}
SLOPE = {"color": "#0072B2", "linestyle": (0, (4, 1.5)), "linewidth": 1.4}
DESIRABLE = {"color": "#0072B2", "linestyle": "-", "linewidth": 1.8}
UNDESIRABLE = {"color": "#D55E00", "linestyle": (0, (4, 1.5)), "linewidth": 1.8}
SCORES = ("#000000", "#0072B2", "#D55E00", "#009E73")
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))
# a score's picture goes so far, in nats
SCORE_EXTENT = 3.0
# a panel shows what lies within half of the margins where the rest is this many times as high
FAR = 10.0
# dots an inch, and shades of each of red, green and blue, so that the files stay small
DOTS, SHADES = 120, 16


class Line(NamedTuple):
    """A curve and how its loss and its slope are drawn."""

    curve: Curve
    loss: Mapping[str, Any]
    slope: Mapping[str, Any]


class Panel(NamedTuple):
    """One or several losses with the same curves."""

    names: tuple[str, ...]
    lines: tuple[Line, ...]


def is_drawn(read: Reads, meets_others: bool) -> str | None:
    """The picture that has a loss: 'pairs', 'without_reference', 'unpaired'; None: none has it."""
    if "desirable" in read.columns:
        return "unpaired"
    if meets_others or not {"chosen", "completion_0"} & set(read.completions):
        return None
    return "pairs" if read.has_reference else "without_reference"


def pairs(losses: Sequence[Callable]) -> Any:
    """Figure of losses of pairs with a reference, a panel for each distinct curve."""
    picture = grid(pair_panels(losses), "margin $r_w - r_l$ (nats)")
    key(picture, {"loss": LOSS, "slope: d loss / d margin": SLOPE})
    return picture


def without_reference(losses: Sequence[Callable]) -> Any:
    """Figure of losses of pairs without a reference, a panel for each distinct curve."""
    picture = grid(pair_panels(losses), "margin $p_w - p_l$ (nats)")
    key(picture, {"loss": LOSS, "slope: d loss / d margin": SLOPE})
    return picture


def unpaired(losses: Sequence[Callable]) -> Any:
    """Figure of losses of labelled completions."""
    ratio, panels = loss_curves.margins(), []
    for loss in losses:
        good, bad = loss_curves.unpaired_curves(loss, ratio)
        lines = Line(good, DESIRABLE, DESIRABLE), Line(bad, UNDESIRABLE, UNDESIRABLE)
        panels.append(Panel((loss.__name__,), lines))
    picture = grid(merged(panels), "log-ratio $r$ (nats)")
    key(picture, {"desirable completion": DESIRABLE, "undesirable completion": UNDESIRABLE})
    return picture


def scores(functions: Mapping[str, Callable[[np.ndarray], Curve]]) -> Any:
    """Figure of scores and their slopes against a log-ratio, each a name and its curve's maker."""
    from matplotlib import figure

    picture = figure.Figure(figsize=(8.5, 3.6), layout="constrained")
    left, right = picture.subplots(1, 2)
    ratio = np.linspace(-SCORE_EXTENT, SCORE_EXTENT, 201)
    for (name, make), colour, dashes in zip(functions.items(), SCORES, DASHES, strict=True):
        curve = make(ratio)
        style = {"color": colour, "linestyle": dashes, "linewidth": 1.8}
        left.plot(curve.margin, curve.loss, label=name, **style)
        right.plot(curve.margin, curve.slope, **style)
    left.set(ylim=(-2 * SCORE_EXTENT, SCORE_EXTENT + 0.5), ylabel="score $s(r)$ (nats)")
    right.set(ylim=(0, SCORE_EXTENT), ylabel="slope $ds / dr$")
    for axis in (left, right):
        axis.set(xlabel="log-ratio $r$ (nats)", xlim=(-SCORE_EXTENT, SCORE_EXTENT))
        axis.axvline(0, color="0.8", linewidth=0.8, zorder=0)
        figures.quiet(axis)
    left.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    picture.legend(loc="outside upper center", ncols=len(functions), frameon=False)
    return picture


def pair_panels(losses: Sequence[Callable]) -> list[Panel]:
    """The panels of losses of pairs."""
    margin = loss_curves.margins()
    lines = {loss.__name__: loss_curves.pair_curve(loss, margin) for loss in losses}
    return merged([Panel((n,), (Line(curve, LOSS, SLOPE),)) for n, curve in lines.items()])


def merged(panels: Sequence[Panel]) -> list[Panel]:
    """The panels with those of the same curves made one."""
    found: list[Panel] = []
    for panel in panels:
        same = [i for i, other in enumerate(found) if alike(panel, other)]
        if same:
            found[same[0]] = found[same[0]]._replace(names=found[same[0]].names + panel.names)
        else:
            found.append(panel)
    return found


def alike(one: Panel, other: Panel) -> bool:
    """Whether two panels show the same curves, to what the eye sees."""
    return all(
        np.allclose(a, b, rtol=1e-4, atol=1e-5)
        for mine, theirs in zip(one.lines, other.lines, strict=True)
        for a, b in zip(mine.curve, theirs.curve, strict=True)
    )


def grid(panels: Sequence[Panel], label: str) -> Any:
    """Figure of panels, each the loss above its slope, over a margin of this label."""
    from matplotlib import figure

    across = min(ACROSS, len(panels))
    down = -(-len(panels) // across)
    width, height = 1.0 + 2.35 * across, 0.6 + 2.7 * down
    picture = figure.Figure(figsize=(width, height))
    # rows of a panel: room for its title, the loss, its slope, room for the label of its axis
    cells = picture.add_gridspec(
        *(4 * down, across),
        height_ratios=(0.28, 1.6, 1.0, 0.4) * down,
        **{"left": 0.92 / width, "right": 1 - 0.12 / width, "wspace": 0.36},
        **{"bottom": 0.15 / height, "top": 1 - 0.32 / height, "hspace": 0.09},
    )
    for number, panel in enumerate(panels):
        row, column = divmod(number, across)
        top = picture.add_subplot(cells[4 * row + 1, column])
        bottom = picture.add_subplot(cells[4 * row + 2, column], sharex=top)
        draw(top, bottom, panel)
        top.set_title(title(panel.names), fontsize=9.5, fontweight="bold")
        if column == 0:
            for axis, name in ((top, "loss"), (bottom, "slope\n(per nat)")):
                axis.set_ylabel(name, fontsize=9, linespacing=1.1)
                axis.yaxis.set_label_coords(-0.33, 0.5)
        if number + across >= len(panels):
            bottom.set_xlabel(label, fontsize=9, labelpad=2)
    return picture


def title(names: Sequence[str]) -> str:
    """Names of losses as a panel's title, with the values of hyperparameters without default."""
    lines = [""]
    for name in names:
        given = loss_curves.VALUES.get(name, {})
        values = ", ".join(f"{key} {value:g}" for key, value in given.items())
        word = f"{name} ({values})" if values else name
        comma = ", " if lines[-1] else ""
        if comma and len(lines[-1] + comma + word) > TITLE:
            lines[-1] += ","
            lines.append(word)
        else:
            lines[-1] += comma + word
    return "\n".join(lines)


def draw(top: Any, bottom: Any, panel: Panel) -> None:
    """The losses of a panel into the upper axes, their slopes into the lower ones."""
    extent = loss_curves.EXTENT
    for line in panel.lines:
        top.plot(line.curve.margin, line.curve.loss, **line.loss)
        bottom.plot(line.curve.margin, line.curve.slope, **line.slope)
    losses = np.stack([line.curve.loss for line in panel.lines])
    slopes = np.stack([line.curve.slope for line in panel.lines])
    for axis, values in ((top, losses), (bottom, slopes)):
        axis.set_ylim(*limits(values, panel.lines[0].curve.margin))
        axis.axhline(0, color="0.6", linewidth=0.8, zorder=0)
        axis.axvline(0, color="0.6", linewidth=0.8, zorder=0)
        axis.locator_params(axis="y", nbins=4)
        axis.tick_params(labelsize=8)
        figures.quiet(axis)
    bottom.set(xlim=(-extent, extent), xticks=[-extent, -extent / 2, 0, extent / 2, extent])
    top.tick_params(labelbottom=False)


def limits(values: np.ndarray, margin: np.ndarray) -> tuple[float, float]:
    """Vertical limits with 0 in them; of half of the margins where the rest is FAR higher."""
    near = values[:, np.abs(margin) <= np.abs(margin).max() / 2]
    shown = near if np.ptp(values) > FAR * np.ptp(near) > 0 else values
    low, high = min(0.0, float(shown.min())), max(0.0, float(shown.max()))
    edge = 0.06 * (high - low)
    return low - edge, high + edge


def key(picture: Any, styles: Mapping[str, Mapping[str, Any]]) -> None:
    """The one legend of a picture, above it."""
    from matplotlib import lines

    handles = [lines.Line2D([], [], label=label, **style) for label, style in styles.items()]
    picture.legend(handles=handles, loc="upper center", ncols=len(handles), frameon=False)


def png(picture: Any) -> bytes:
    """A figure as the bytes of a PNG file, half as large as figures.png for its fewer shades."""
    from matplotlib import image
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    picture.set_dpi(DOTS)
    canvas = FigureCanvasAgg(picture)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    step = 255 // (SHADES - 1)
    content = io.BytesIO()
    rounded = (np.round(pixels / step) * step).astype(np.uint8)
    image.imsave(content, rounded, format="png", pil_kwargs={"optimize": True})
    return content.getvalue()

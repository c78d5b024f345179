"""Figures of how anchors cover objects: maps and curves, and anchors drawn on real pictures; each one a PNG in memory.

No name of a user is drawn, so no letter can be missing from the font.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, Patch, Rectangle
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray
from PIL import Image

from refinedet_cli.core.anchor_coverage import best_ious
from refinedet_cli.core.config import AnchorConfig
from refinedet_cli.engine.anchors import MATCHED, MISSED, AnchorReport
from refinedet_cli.engine.charts import (
    LIGHT,
    PERCENT,
    Theme,
    colour_bar,
    finish_axis,
    legend_below,
    log_axis,
    new_figure,
    to_png,
)

_DOTS = 4000
_MAP_STEPS, _MAP_PLACES, _MAP_FROM = 44, 20, 4.0
_FEW = 5  # objects; a share of fewer says nothing
_ANCHORS_SHOWN = 12

_STYLES = ("-", "--", "-.")
# Of objects in pictures: bright enough for any photograph, with a dark rim.
_STATES = ("#4cc2ff", "#ffc20a", "#ff4fa3")
STATE_NAMES = (
    f"matched: IoU {MATCHED:g} or more",
    f"only forced: IoU {MISSED:g} to {MATCHED:g}",
    f"as good as missed: below {MISSED:g}",
)


class Series(NamedTuple):
    """Overlaps of objects with the best of some boxes; what is compared has the objects in common."""

    name: str
    best_iou: NDArray[np.float64]


class Panel(NamedTuple):
    """One view of a picture.

    Attributes:
        title: what is shown.
        best_iou: float64[N], of each object with the box that covers it best.
        anchors: float64[N, 4], xyxy, px-img, where that box began.
        moved: where the network has moved it to; None where nothing moves.
    """

    title: str
    best_iou: NDArray[np.float64]
    anchors: NDArray[np.floating]
    moved: NDArray[np.floating] | None = None


class ReachMap(NamedTuple):
    """Which sizes of objects anchors reach.

    Attributes:
        widths, heights: centres of the bins, ascending, evenly spaced in their logarithm, px-in.
        share: float64[heights, widths], in [0, 1]: of places in the picture where such an object reaches IoU 0.5.
    """

    widths: NDArray[np.float64]
    heights: NDArray[np.float64]
    share: NDArray[np.float64]


def map_reach(anchors: AnchorConfig, input_size: tuple[int, int]) -> ReachMap:
    """Put objects of every size at the same places all over the picture and see what covers them.

    Args:
        anchors: their shapes and strides.
        input_size: (height, width), px-in.

    Returns:
        `ReachMap`; an object as large as the input has a single place.
    """
    height, width = input_size
    widths = np.geomspace(_MAP_FROM, width, _MAP_STEPS)
    heights = np.geomspace(_MAP_FROM, height, _MAP_STEPS)
    # Two sequences of irrational steps fill the unit square evenly, and alike on every run.
    turn = np.arange(1, _MAP_PLACES + 1)
    u, v = (turn * 0.7548776662466927) % 1, (turn * 0.5698402909980532) % 1
    h, w, place = (a.ravel() for a in np.meshgrid(heights, widths, np.arange(_MAP_PLACES), indexing="ij"))
    left, top = u[place] * (width - w), v[place] * (height - h)
    boxes = np.stack([left, top, left + w, top + h], axis=1)
    reached = best_ious(boxes, anchors, input_size) >= MATCHED
    return ReachMap(widths, heights, reached.reshape(_MAP_STEPS, _MAP_STEPS, _MAP_PLACES).mean(axis=2))


def draw_reach(
    named: Sequence[tuple[str, AnchorReport]], sides: NDArray[np.float64], theme: Theme, *, seed: int = 0
) -> bytes:
    """Draw which widths and heights are reached, with the objects (dots) and the anchors (squares) on top.

    Args:
        named: one map for each, side by side.
        sides: float64[N, 2], width and height of the objects, px-in; some are drawn where there are many.
        theme: colours.
        seed: of the choice of dots.
    """
    figure = new_figure(4.6 * len(named) + 1.0, 5.4, theme)
    axes: list[Axes] = list(np.atleast_1d(figure.subplots(1, len(named), sharex=True, sharey=True)))
    if len(sides) > _DOTS:
        sides = sides[np.random.default_rng(seed).choice(len(sides), _DOTS, replace=False)]
    for axis, (name, report) in zip(axes, named, strict=True):
        found = map_reach(report.anchors, report.input_size)
        colours = LinearSegmentedColormap.from_list("reach", theme.reach)
        mesh = axis.pcolormesh(
            found.widths, found.heights, found.share, cmap=colours, vmin=0, vmax=1, shading="gouraud"
        )
        wide, high = np.maximum(sides, _MAP_FROM).T
        axis.scatter(wide, high, s=3, color=theme.ink, alpha=0.4, linewidths=0)
        shapes = np.array([shape for level in report.anchors.shapes for shape in level])
        height, width = report.input_size
        across, down = np.minimum(shapes, [width, height]).T
        for colour, line in ((theme.paper, 3.4), (theme.series[1], 1.8)):
            axis.plot(across, down, "s", ms=6, mfc="none", mec=colour, mew=line, clip_on=False, zorder=3)
        finish_axis(axis, theme, f"{name}: {100 * report.share:.1f} % reach IoU {MATCHED:g}")
        log_axis(axis, "x", _MAP_FROM, width)
        log_axis(axis, "y", _MAP_FROM, height)
        axis.set_xlabel("width, px of the input")
        axis.set_box_aspect(1)
    axes[0].set_ylabel("height, px of the input")
    bar = colour_bar(figure, mesh, axes, "places where an object of this size is reached", theme)
    bar.ax.yaxis.set_major_formatter(PERCENT)
    keys = [
        Line2D([], [], marker="o", ls="", ms=3, color=theme.ink, label="objects"),
        Line2D([], [], marker="s", ls="", ms=6, mfc="none", mec=theme.series[1], mew=1.8, label="anchors"),
    ]
    legend_below(figure, keys, theme)
    return to_png(figure)


def draw_recall_by_size(
    series: Sequence[Series], sides: NDArray[np.float64], theme: Theme, *, limit: float | None = None
) -> bytes:
    """Draw the share of objects that reach IoU 0.5 against their size, over a histogram of the sizes.

    Args:
        series: up to three, of the same objects.
        sides: float64[N, 2], width and height of these objects, px-in.
        theme: colours.
        limit: the size below which no anchor can reach an object, drawn as a line.
    """
    figure = new_figure(7.2, 4.2, theme)
    axis = figure.subplots()
    size = np.sqrt(sides.prod(axis=1))
    low, high = np.floor(2 * np.log2(max(1.0, size.min()))) / 2, np.ceil(2 * np.log2(size.max()) + 1e-9) / 2
    edges = 2.0 ** np.arange(low, max(high, low + 0.5) + 0.25, 0.5)
    place = np.clip(np.digitize(size, edges) - 1, 0, len(edges) - 2)
    counts = np.bincount(place, minlength=len(edges) - 1)
    centres = np.sqrt(edges[:-1] * edges[1:])
    behind = axis.twinx()
    behind.bar(edges[:-1], counts, width=np.diff(edges), align="edge", color=theme.faint, edgecolor=theme.paper)
    behind.set_facecolor(theme.paper)
    behind.set_ylim(0, counts.max() * 2.6)
    behind.yaxis.set_visible(False)
    behind.spines[:].set_visible(False)
    axis.set_zorder(behind.get_zorder() + 1)
    axis.patch.set_visible(False)
    enough = counts >= min(_FEW, counts.max())
    for i, one in enumerate(series):
        sums = np.bincount(place, weights=one.best_iou >= MATCHED, minlength=len(counts))
        axis.plot(
            centres[enough], sums[enough] / counts[enough], _STYLES[i], color=theme.series[i], lw=2.4, marker="o", ms=4
        )
    keys: list[Any] = [
        Line2D([], [], ls=_STYLES[i], color=theme.series[i], lw=2.4, label=one.name) for i, one in enumerate(series)
    ]
    keys.append(Patch(color=theme.faint, label="objects of this size"))
    if limit is not None and edges[0] < limit < edges[-1]:
        axis.axvline(limit, color=theme.ink, lw=1, ls=":")
        keys.append(Line2D([], [], color=theme.ink, lw=1, ls=":", label=f"smallest reachable: {limit:.1f} px"))
    axis.set_ylim(0, 1.03)
    axis.yaxis.set_major_formatter(PERCENT)
    log_axis(axis, "x", float(edges[0]), float(edges[-1]))
    axis.set_xlabel("square root of the object's area, px of the input")
    axis.set_ylabel(f"reach IoU {MATCHED:g}")
    finish_axis(axis, theme, f"Objects that reach IoU {MATCHED:g}, by size")
    legend_below(figure, keys, theme)
    return to_png(figure)


def draw_recall_by_iou(series: Sequence[Series], theme: Theme) -> bytes:
    """Draw the share of objects whose best overlap is at least so much, for every overlap."""
    figure = new_figure(7.2, 4.2, theme)
    axis = figure.subplots()
    levels = np.linspace(0, 1, 201)
    for i, one in enumerate(series):
        ascending = np.sort(one.best_iou)
        share = 1 - np.searchsorted(ascending, levels, side="left") / len(ascending)
        axis.plot(levels, share, _STYLES[i], color=theme.series[i], lw=2.4)
    axis.axvline(MATCHED, color=theme.ink, lw=1, ls=":")
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1.03)
    axis.yaxis.set_major_formatter(PERCENT)
    axis.set_xlabel("IoU of an object with the box that covers it best")
    axis.set_ylabel("objects that reach it")
    finish_axis(axis, theme, "Objects that reach an IoU")
    keys = [Line2D([], [], ls=_STYLES[i], color=theme.series[i], lw=2.4, label=s.name) for i, s in enumerate(series)]
    keys.append(Line2D([], [], color=theme.ink, lw=1, ls=":", label=f"matched from IoU {MATCHED:g}"))
    legend_below(figure, keys, theme)
    return to_png(figure)


def draw_levels(named: Sequence[tuple[str, AnchorReport]], theme: Theme) -> bytes:
    """Draw how many objects have their best anchor on each level, and how many of these are matched."""
    strides = [level.stride for level in named[0][1].levels]
    figure = new_figure(7.2, 0.9 + 0.55 * len(strides) * max(1.4, len(named)), theme)
    axis = figure.subplots()
    thick = 0.8 / len(named)
    highest = 0.0
    for i, (_, report) in enumerate(named):
        total = report.overall.objects
        for level, group in enumerate(report.by_level):
            y = level + (i - (len(named) - 1) / 2) * thick
            share, reached = group.objects / total, group.objects * group.shares[1] / total
            axis.barh(y, reached, 0.9 * thick, color=theme.series[i])
            axis.barh(
                y,
                share - reached,
                0.9 * thick,
                left=reached,
                color=theme.paper,
                edgecolor=theme.series[i],
                hatch="////",
            )
            axis.text(share, y, f"  {100 * share:.1f} %", va="center", color=theme.ink, fontsize=8)
            highest = max(highest, share)
    axis.set_yticks(range(len(strides)), [f"stride {stride}" for stride in strides])
    axis.invert_yaxis()
    axis.set_xlim(0, highest * 1.16)
    axis.xaxis.set_major_formatter(PERCENT)
    axis.set_xlabel("share of all objects")
    finish_axis(axis, theme, "Which level has the best anchor")
    axis.grid(visible=False, axis="y")
    keys: list[Any] = [Patch(color=theme.series[i], label=name) for i, (name, _) in enumerate(named)]
    keys.append(Patch(facecolor=theme.paper, edgecolor=theme.ink, hatch="////", label=f"below IoU {MATCHED:g}"))
    legend_below(figure, keys, theme)
    return to_png(figure)


def draw_picture(image: NDArray[np.uint8], boxes: NDArray[np.float64], panels: Sequence[Panel]) -> bytes:
    """Draw objects in the colour of what becomes of them, and the anchors that cover them best.

    Args:
        image: uint8[H, W, 3], RGB.
        boxes: float64[N, 4], the objects, xyxy, px-img.
        panels: one view each, side by side.
    """
    height, width = image.shape[:2]
    across = 5.6
    figure = new_figure(across * len(panels), across * min(1.6, max(0.45, height / width)) + 0.75, LIGHT)
    axes: list[Axes] = list(np.atleast_1d(figure.subplots(1, len(panels))))
    for axis, panel in zip(axes, panels, strict=True):
        axis.imshow(image, interpolation="lanczos", extent=(0, width, height, 0))
        states = np.where(panel.best_iou >= MATCHED, 0, np.where(panel.best_iou >= MISSED, 1, 2))
        # In a crowd not all anchors: they would hide the picture. Those of objects that go short come first.
        told = np.lexsort((-(boxes[:, 2:] - boxes[:, :2]).prod(axis=1), -states))[:_ANCHORS_SHOWN]
        for i in told[::-1]:
            _draw_box(axis, panel.anchors[i], _STATES[states[i]], 1.3, (0, (2, 1.6)))
        for i in np.argsort(states, kind="stable"):
            _draw_box(axis, boxes[i], _STATES[states[i]], 2.0, "-", rim=1.4)
        if panel.moved is not None:
            for i in told[::-1]:
                _draw_arrow(axis, panel.anchors[i], panel.moved[i], _STATES[states[i]])
        counts = np.bincount(states, minlength=3)
        summary = ", ".join(f"{n} {w}" for n, w in zip(counts, ("matched", "forced", "missed"), strict=True) if n)
        axis.set_title(f"{panel.title}: {summary}", fontsize=10, color=LIGHT.ink)
        axis.set_xlim(0, width)
        axis.set_ylim(height, 0)
        axis.set_axis_off()
    keys = [Line2D([], [], color=c, lw=4, label=n) for c, n in zip(_STATES, STATE_NAMES, strict=True)]
    moves = any(panel.moved is not None for panel in panels)
    label = "its anchor, and where the network moves its centre" if moves else "the anchor that covers it best"
    keys.append(Line2D([], [], color="#707070", lw=1.4, ls=(0, (2, 1.6)), label=label))
    legend_below(figure, keys, LIGHT, columns=2 if len(panels) == 1 else 3)
    return to_png(figure)


def as_jpeg(png: bytes) -> bytes:
    """Encode a drawn photograph for a page, a fifth as large."""
    stream = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").save(stream, format="JPEG", quality=88)
    return stream.getvalue()


def _draw_box(
    axis: Axes, box: NDArray[np.floating], colour: str, width: float, style: Any, *, rim: float = 0.0
) -> None:
    left, top, right, bottom = (float(v) for v in box)
    effects = [withStroke(linewidth=width + rim, foreground="#00000099")] if rim else []
    axis.add_patch(
        Rectangle(
            (left, top), right - left, bottom - top, fill=False, ec=colour, lw=width, ls=style, path_effects=effects
        )
    )


def _draw_arrow(axis: Axes, start: NDArray[np.floating], end: NDArray[np.floating], colour: str) -> None:
    tail, head = ((box[:2] + box[2:]) / 2 for box in (start, end))
    rim = withStroke(linewidth=3.0, foreground="#00000099")
    axis.add_patch(
        FancyArrowPatch(
            tuple(tail), tuple(head), arrowstyle="->", mutation_scale=10, color=colour, lw=1.5, shrinkA=0, shrinkB=0,
            path_effects=[rim],
        )
    )  # fmt: skip

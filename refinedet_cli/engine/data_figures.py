"""Charts of what is in a data set, in the style of the charts of anchors; each one a PNG in memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from refinedet_cli.core.words import counted
from refinedet_cli.engine.charts import (
    LIGHT,
    Theme,
    can_write,
    colour_bar,
    finish_axis,
    legend_below,
    log_axis,
    new_figure,
    to_png,
)
from refinedet_cli.engine.data_stats import DataStats

_CLASSES_DRAWN = 60
_LONGEST_NAME = 32
_BINS = 48
_BARS = 40


def draw_stats(stats: DataStats, theme: Theme = LIGHT) -> Iterator[tuple[str, bytes]]:
    """Draw all charts that the data have something for.

    Returns:
        file name and PNG of each.
    """
    yield "pictures.png", draw_picture_sizes(stats, theme)
    yield "objects_per_picture.png", draw_objects_each(stats, theme)
    if len(stats.sides):
        yield "classes.png", draw_classes(stats, theme)
        yield "sizes.png", draw_sizes(stats, theme)


def draw_classes(stats: DataStats, theme: Theme) -> bytes:
    """Draw the objects of each class, most first, and the pictures that show it."""
    ordered = sorted(stats.by_class, key=lambda one: -one.objects)
    shown = ordered[:_CLASSES_DRAWN]
    figure = new_figure(7.2, 1.5 + 0.26 * len(shown), theme)
    axis = figure.subplots()
    places = np.arange(len(shown))
    axis.barh(places, [one.objects for one in shown], 0.72, color=theme.series[0])
    drawn = [(one.pictures, place) for place, one in enumerate(shown) if one.objects]
    axis.plot(*zip(*drawn, strict=True), "D", ms=4.5, mfc=theme.paper, mec=theme.series[1], mew=1.6)
    for place, one in enumerate(shown):
        axis.annotate(
            f"{one.objects:,}", (one.objects, place), xytext=(7, 0), textcoords="offset points", va="center",
            color=theme.ink, fontsize=8,
        )  # fmt: skip
    number = {one.name: label for label, one in enumerate(stats.by_class, start=1)}
    labels = [_drawable(one.name, number[one.name]) for one in shown]
    axis.set_yticks(places, labels, parse_math=False)
    axis.set_ylim(len(shown) - 0.4, -0.6)
    axis.set_xlim(0, 1.14 * max(one.objects for one in shown))
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    left_out = len(ordered) - len(shown)
    title = f"Classes, the {len(shown)} largest of {len(ordered)}" if left_out else "Classes"
    finish_axis(axis, theme, title)
    axis.grid(visible=False, axis="y")
    keys = [
        Line2D([], [], color=theme.series[0], lw=7, label="objects"),
        Line2D(
            [], [], ls="", marker="D", ms=5, mfc=theme.paper, mec=theme.series[1], mew=1.6, label="pictures with it"
        ),
    ]
    legend_below(figure, keys, theme)
    return to_png(figure)


def draw_sizes(stats: DataStats, theme: Theme) -> bytes:
    """Draw how many objects have which width and height, as the detector sees them."""
    figure = new_figure(6.4, 5.8, theme)
    axis = figure.subplots()
    height, width = stats.input_size
    wide, high = np.maximum(stats.input_sides, 1.0).T
    edges = [np.geomspace(1.0, side, _BINS + 1) for side in (width, height)]
    counts, *_ = np.histogram2d(np.minimum(wide, width), np.minimum(high, height), bins=edges)
    colours = LinearSegmentedColormap.from_list("count", [theme.reach[0], theme.reach[1], theme.series[0], "#0b2239"])
    found = np.ma.masked_equal(counts.T, 0)
    mesh = axis.pcolormesh(*edges, found, cmap=colours, norm=LogNorm(1, max(2, counts.max())))
    log_axis(axis, "x", 1.0, width)
    log_axis(axis, "y", 1.0, height)
    for side in (16, 32, 96):
        edge = np.geomspace(max(1.0, side**2 / height), min(width, side**2), 2)
        axis.plot(edge, side**2 / edge, ls=":", lw=1.1, color=theme.ink)
        axis.annotate(
            f"{side} x {side}", (edge[1], side**2 / edge[1]), xytext=(-3, 4), textcoords="offset points",
            fontsize=8, color=theme.ink, ha="right",
        )  # fmt: skip
    axis.set_xlabel(f"width, px of the {width} x {height} input")
    axis.set_ylabel("height, px of the input")
    axis.set_box_aspect(1)
    finish_axis(axis, theme, f"Sizes of {counted(len(stats.sides), 'object')}")
    bar = colour_bar(figure, mesh, axis, "objects of about this size", theme)
    bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    legend_below(figure, [Line2D([], [], color=theme.ink, lw=1.1, ls=":", label="equal area")], theme)
    return to_png(figure)


def draw_objects_each(stats: DataStats, theme: Theme) -> bytes:
    """Draw how many pictures have how many objects."""
    figure = new_figure(7.2, 3.8, theme)
    axis = figure.subplots()
    most = int(stats.objects_each.max())
    step = max(1, -(-(most + 1) // _BARS))
    counts = np.bincount(stats.objects_each // step)
    centres = np.arange(len(counts)) * step + (step - 1) / 2
    axis.bar(centres, counts, 0.86 * step, color=theme.series[0])
    if stats.objects_each.min() < step and step == 1:
        axis.bar(centres[:1], counts[:1], 0.86 * step, color=theme.series[1])
    mean = float(stats.objects_each.mean())
    axis.axvline(mean, color=theme.ink, lw=1, ls=":")
    axis.set_xlim(-0.7, centres[-1] + step / 2 + 0.2)
    axis.set_xlabel("objects in a picture" + (f", {step} to a bar" if step > 1 else ""))
    axis.set_ylabel("pictures")
    _whole_ticks(axis)
    finish_axis(axis, theme, "Objects in a picture")
    axis.grid(visible=False, axis="x")
    keys = [Line2D([], [], color=theme.ink, lw=1, ls=":", label=f"mean: {mean:.1f}")]
    if stats.objects_each.min() == 0 and step == 1:
        keys.append(Line2D([], [], color=theme.series[1], lw=7, label="without objects"))
    legend_below(figure, keys, theme)
    return to_png(figure)


def draw_picture_sizes(stats: DataStats, theme: Theme) -> bytes:
    """Draw the sizes of pictures as dots as large as there are many of them, and the shape of the input."""
    figure = new_figure(6.4, 5.6, theme)
    axis = figure.subplots()
    sizes = np.array(stats.common_sizes, dtype=np.float64)
    top = 1.12 * sizes[:, :2].max()
    height, width = stats.input_size
    axis.plot([0, top], [0, top * height / width], ls="--", lw=1.2, color=theme.series[1])
    axis.scatter(
        sizes[:, 0], sizes[:, 1], s=16 + 500 * sizes[:, 2] / sizes[:, 2].sum(), color=theme.series[0], alpha=0.45,
        edgecolors=theme.series[0], linewidths=1,
    )  # fmt: skip
    _name_largest(axis, sizes[0], stats.total.pictures, theme)
    axis.set_xlim(0, top)
    axis.set_ylim(0, top)
    axis.set_box_aspect(1)
    axis.set_xlabel("width, px")
    axis.set_ylabel("height, px")
    finish_axis(axis, theme, f"Sizes of {counted(stats.total.pictures, 'picture')}")
    keys = [
        Line2D([], [], ls="", marker="o", ms=8, mfc=theme.series[0], mec=theme.series[0], alpha=0.5, label="pictures"),
        Line2D([], [], ls="--", lw=1.2, color=theme.series[1], label=f"shape of the {width} x {height} input"),
    ]
    legend_below(figure, keys, theme)
    return to_png(figure)


def _name_largest(axis: Axes, size: NDArray[np.float64], total: int, theme: Theme) -> None:
    width, height, count = size
    axis.annotate(
        f"{width:.0f} x {height:.0f}: {100 * count / total:.0f} %", (width, height), xytext=(0, -22),
        textcoords="offset points", fontsize=9, color=theme.ink, ha="center",
        path_effects=[withStroke(linewidth=3, foreground=theme.paper)],
    )  # fmt: skip


def _whole_ticks(axis: Axes) -> None:
    axis.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(6, integer=True))


def _drawable(name: str, number: int) -> str:
    """A class name, cut where it is long, or its number where the font lacks a letter."""
    if not can_write(name):
        return f"class {number}"
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"

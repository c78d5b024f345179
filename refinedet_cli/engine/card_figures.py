"""Figures of a model card: how accuracy rose in training, and how it differs between classes; PNGs in memory."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.ticker import MaxNLocator

from refinedet_cli.engine.charts import LIGHT, can_write, finish_axis, new_figure, to_png
from refinedet_cli.engine.run_log import METRICS_FILE
from refinedet_cli.zoo.inventory import Model
from refinedet_cli.zoo.model_card import Figure

_MOST_CLASSES = 40


def card_figures(model: Model) -> tuple[Figure, ...]:
    """Draw what there is to draw: classes with known scores, and the run that the checkpoint lies in."""
    figures = []
    of_class = model.scores.of_class if model.scores else ()
    # Where the font lacks a letter of a name, the card's table has to do.
    if 1 < len(of_class) <= _MOST_CLASSES and all(can_write(name) for name, _ in of_class):
        figures.append(Figure("classes.png", "AP50 of each class", draw_classes(of_class)))
    points = _evaluations(model.path.parent / METRICS_FILE)
    if len(points) > 1:
        figures.append(Figure("training.png", "AP on the validation data over the epochs", draw_training(points)))
    return tuple(figures)


def draw_classes(of_class: Sequence[tuple[str, float]]) -> bytes:
    """Draw AP50 of each class as bars, the best on top."""
    ranked = sorted(of_class, key=lambda entry: entry[1])
    figure = new_figure(7, 1.0 + 0.24 * len(ranked), LIGHT)
    axis = figure.add_subplot()
    # A dollar sign would begin a formula.
    names = [name.replace("$", r"\$") for name, _ in ranked]
    bars = axis.barh(names, [value for _, value in ranked], color=LIGHT.series[0], height=0.7)
    axis.bar_label(bars, fmt="%.2f", padding=3, color=LIGHT.ink, fontsize=8)
    axis.set_xlim(0, min(1.0, max(value for _, value in ranked) * 1.1 + 0.05))
    finish_axis(axis, LIGHT, "AP50 of each class")
    axis.grid(visible=False, axis="y")
    return to_png(figure)


def draw_training(points: Sequence[tuple[float, float, float]]) -> bytes:
    """Draw AP and AP50 over epochs; ``points`` are (epoch, AP, AP50)."""
    figure = new_figure(7, 3.4, LIGHT)
    axis = figure.add_subplot()
    epochs = [epoch for epoch, _, _ in points]
    for place, (name, style) in enumerate((("AP", "-"), ("AP50", "--"))):
        values = [point[place + 1] for point in points]
        axis.plot(epochs, values, style, color=LIGHT.series[place], lw=1.8, label=name)
    axis.set_xlabel("epochs")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_ylim(bottom=0)
    finish_axis(axis, LIGHT, "Validation during training")
    axis.legend(frameon=False, fontsize=9, labelcolor=LIGHT.ink)
    return to_png(figure)


def _evaluations(path: Path) -> list[tuple[float, float, float]]:
    """Read the evaluations of a run; none where there is no such file, or another program wrote it."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [(float(row["epoch"]), float(row["AP"]), float(row["AP50"])) for row in csv.DictReader(file)]
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        return []
    return [row for row in rows if all(map(math.isfinite, row))]

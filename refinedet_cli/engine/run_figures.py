"""Charts of a run: what was logged over the epochs, laid out for the page, which draws them in any size and colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from refinedet_cli.engine.run_log import Table

# More points than a chart is wide in pixels would only make the page heavy: rows are put together beyond it.
MOST_POINTS = 480
# Points of a running median: enough to look through the noise of single batches, few enough to show what changes.
_WINDOW_SHARE, _LEAST_WINDOW = 1 / 20, 5
# A chart is as high as nearly all of its values, so that the first steps do not flatten all others.
_SHOWN_PER_CENT = 98.0
_FIGURES = 5


class Tick(NamedTuple):
    """A labelled place on an axis, in per cent of it: from the left, or from the top."""

    place: float
    text: str


class Point(NamedTuple):
    """A marked point of a chart, in per cent from the left and from the top."""

    left: float
    top: float
    text: str


@dataclass(frozen=True)
class Line:
    """One curve of a chart.

    Attributes:
        name: in the key.
        points: SVG points in a square of 100 x 100, y downwards.
        behind: those of the single values where ``points`` are a running median of them; may be empty.
        dots: SVG path with a dot at each value, where there are few; may be empty.
        values: what is read off at each of the chart's places; None where there is no number.
    """

    name: str
    points: str
    behind: str
    dots: str
    values: tuple[float | None, ...]


@dataclass(frozen=True)
class Chart:
    """A chart over epochs.

    Attributes:
        title: of the chart.
        note: what to know to read it; may be empty.
        lines: at most three, for more cannot be told apart.
        steps, epochs: of the places that ``Line.values`` belong to.
        places: of the same, in per cent from the left.
        x_ticks, y_ticks: of the axes.
        resumed: where the run was resumed, in per cent from the left.
        best: the best value, where there is one to be marked.
        rows_each: rows of the file that were put together to one place.
    """

    title: str
    note: str
    lines: tuple[Line, ...]
    steps: tuple[int, ...]
    epochs: tuple[float, ...]
    places: tuple[float, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    resumed: tuple[float, ...]
    best: Point | None
    rows_each: int


def best_row(evaluations: Table) -> int | None:
    """Find the evaluation with the highest AP, the first of equals; None where there is none."""
    ap = evaluations.columns.get("AP")
    if ap is None or not np.isfinite(ap).any():
        return None
    return int(np.nanargmax(ap))


def draw_validation(evaluations: Table, epochs: float, resumed: Sequence[float]) -> list[Chart]:
    """Lay out average precision over the epochs: of all objects by overlap, and by size.

    Args:
        evaluations: metrics.csv.
        epochs: how far the axis goes.
        resumed: where the run was resumed, in epochs.
    """
    groups = (
        ("Average precision on the validation data", ("AP", "AP50", "AP75")),
        ("AP by size of the objects", ("AP_small", "AP_medium", "AP_large")),
    )
    best = best_row(evaluations)
    charts = []
    for title, names in groups:
        known = [name for name in names if name in evaluations.columns]
        if known and len(evaluations):
            view = _View(evaluations, epochs, resumed, smooth=False)
            charts.append(view.chart(title, "", known, best=best if "AP" in known else None))
    return charts


def draw_training(steps: Table, epochs: float, resumed: Sequence[float]) -> list[Chart]:
    """Lay out what the steps wrote down: loss and its terms, learning rate, positives, gradient norm and speed.

    Args:
        steps: log.csv.
        epochs: how far the axis goes.
        resumed: where the run was resumed, in epochs.
    """
    if not len(steps):
        return []
    noisy, plain = (_View(steps, epochs, resumed, smooth=smooth) for smooth in (True, False))
    charts = [noisy.chart("Loss", "all terms together", ["total"])] if "total" in steps.columns else []
    charts += [noisy.chart(f"Loss: {term}", "", [term]) for term in steps.terms]
    if "lr" in steps.columns:
        charts.append(plain.chart("Learning rate", "of the heads", ["lr"]))
    if steps.positives:
        names = [f"positives_{module}" for module in steps.positives[:3]]
        charts.append(noisy.chart("Positives", "matched anchors a picture", names))
    for title, note, name in (
        ("Gradient norm", "before clipping", "gradient_norm"),
        ("Speed", "pictures a second", "pictures_per_second"),
    ):
        if name in steps.columns:
            charts.append(noisy.chart(title, note, [name]))
    return charts


class _View:
    """Lays out columns of a table over its epochs."""

    def __init__(self, table: Table, epochs: float, resumed: Sequence[float], *, smooth: bool) -> None:
        self.table, self.smooth = table, smooth
        self.rows_each = max(1, -(-len(table) // MOST_POINTS))
        self.right = max(epochs, 1e-9)
        # The last row of each place, so that the curve ends where the file does.
        ends = [*range(self.rows_each - 1, len(table) - 1, self.rows_each), len(table) - 1]
        self.ends = np.array(ends)
        self.resumed = tuple(round(100 * epoch / self.right, 2) for epoch in resumed if 0 < epoch < self.right)

    def chart(self, title: str, note: str, names: Sequence[str], best: int | None = None) -> Chart:
        """Lay out columns together on one pair of axes; ``best`` is the row to mark in the first of them."""
        columns = [self.table.columns[name] for name in names]
        top, ticks = self._height(columns)
        highest = max((float(np.nanmax(c)) for c in columns if np.isfinite(c).any()), default=0.0)
        notes = [note] if note else []
        if highest > top:
            notes.append(f"highest {highest:.4g}")
        epochs = self.table.columns["epoch"][self.ends]
        lines = [self._line(n.removeprefix("positives_"), c, top) for n, c in zip(names, columns, strict=True)]
        return Chart(
            title=title,
            note="; ".join(notes),
            lines=tuple(lines),
            steps=tuple(int(step) for step in self.table.columns["step"][self.ends]),
            epochs=tuple(round(float(epoch), 2) for epoch in epochs),
            places=tuple(np.round(self._across(epochs), 2).tolist()),
            x_ticks=tuple(Tick(100 * v / self.right, f"{v:g}") for v in _ticks(self.right) if v <= self.right),
            y_ticks=tuple(Tick(100 - 100 * v / top, _tick_text(v)) for v in ticks),
            resumed=self.resumed,
            best=None if best is None else self._best(best, names[0], top),
            rows_each=self.rows_each,
        )

    def _height(self, columns: Sequence[NDArray[np.float64]]) -> tuple[float, list[float]]:
        finite = np.concatenate([c[np.isfinite(c)] for c in columns])
        if not len(finite):
            return 1.0, [0.0, 1.0]
        high = float(np.percentile(finite, _SHOWN_PER_CENT) * 1.05) if self.smooth else float(finite.max())
        ticks = _ticks(high if high > 0 else 1.0)
        return ticks[-1], ticks

    def _across(self, epochs: NDArray[np.float64]) -> NDArray[np.float64]:
        return 100 * epochs / self.right

    def _line(self, name: str, column: NDArray[np.float64], top: float) -> Line:
        parts = np.split(column, self.ends[:-1] + 1)
        middles = np.array([_of_finite(np.median, part) for part in parts])
        across = self._across(self.table.columns["epoch"][self.ends])
        behind = ""
        if self.smooth and len(middles) > _LEAST_WINDOW:
            lows, highs = (np.array([_of_finite(f, part) for part in parts]) for f in (np.min, np.max))
            both = np.stack([lows, highs], axis=1).ravel() if self.rows_each > 1 else middles
            behind = _points(np.repeat(across, len(both) // len(across)), both, top)
        drawn = running_median(middles) if behind else middles
        dots = "" if self.smooth or len(middles) > MOST_POINTS // 8 else _dots(across, middles, top)
        values = tuple(None if np.isnan(v) else float(f"{v:.{_FIGURES}g}") for v in middles)
        return Line(name, _points(across, drawn, top), behind, dots, values)

    def _best(self, row: int, name: str, top: float) -> Point:
        value, epoch = (float(self.table.columns[n][row]) for n in (name, "epoch"))
        return Point(100 * epoch / self.right, 100 - 100 * value / top, f"best {name} {value:.3f}, epoch {epoch:g}")


def running_median(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Smooth a curve by the median of the values around each one.

    Args:
        values: float64[N]; NaN where there is no number.

    Returns:
        float64[N]; windows are cut off at both ends, so that the first and last values count as well. NaN where there
        is no number around.
    """
    half = max(_LEAST_WINDOW, int(len(values) * _WINDOW_SHARE)) // 2
    return np.array([_of_finite(np.median, values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def _of_finite(function: np.ufunc | object, values: NDArray[np.float64]) -> float:
    finite = values[np.isfinite(values)]
    return float(function(finite)) if len(finite) else float("nan")  # type: ignore[operator]


def _ticks(high: float) -> list[float]:
    """Choose round numbers from 0 to at least ``high``."""
    values = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(0.0, high)
    return [float(f"{value:.10g}") for value in values if value >= 0]


def _tick_text(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:g}"


def _points(across: NDArray[np.float64], values: NDArray[np.float64], top: float) -> str:
    known = np.isfinite(values) & np.isfinite(across)
    return " ".join(f"{x:.2f},{100 - 100 * y / top:.2f}" for x, y in zip(across[known], values[known], strict=True))


def _dots(across: NDArray[np.float64], values: NDArray[np.float64], top: float) -> str:
    """Draw lines of no length, which round ends make into dots that stay round in a stretched chart."""
    known = np.isfinite(values)
    return "".join(f"M{x:.2f} {100 - 100 * y / top:.2f}h0" for x, y in zip(across[known], values[known], strict=True))

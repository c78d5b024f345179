"""What a run writes down step by step: averages in log.csv, evaluations in metrics.csv, the best's in classes.csv."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from refinedet_cli.core.structures import LossParts
from refinedet_cli.data.files import write_whole
from refinedet_cli.data.loading import Batch, Plan
from refinedet_cli.engine.watch import HealthReport
from refinedet_cli.files import append_whole
from refinedet_cli.metrics.coco import CocoResult

LOG_FILE = "log.csv"
METRICS_FILE = "metrics.csv"
CLASSES_FILE = "classes.csv"
HEALTH_FILE = "health.csv"
REPORT_EVERY_SECONDS = 2.0
# So many in log.csv, however long a run is; by steps and not by time, so that equal runs have equal rows.
ROWS = 2000

_FIRST = "step"
_POSITIVES = "positives_"
_SPEED = "pictures_per_second"
_CLASS_NUMBERS = ("AP", "AP50", "AP75", "AR100", "objects", "detections")


@dataclass(frozen=True)
class StepReport:
    """Where training is; averages are over the steps since the last report.

    Attributes:
        step, steps: done and in all.
        epoch: passes done.
        lr: rate of the heads.
        input_size: height and width of this step's pictures, px-in.
        total: the loss.
        parts: its terms.
        positives: matched anchors per picture, by module.
        gradient_norm: before clipping.
        pictures_per_second: over the last report's steps.
        seconds_left: at that speed, evaluations not counted.
    """

    step: int
    steps: int
    epoch: float
    lr: float
    input_size: tuple[int, int]
    total: float
    parts: dict[str, float]
    positives: dict[str, float]
    gradient_norm: float
    pictures_per_second: float
    seconds_left: float


@dataclass(frozen=True, eq=False)
class Table:
    """The numbers of a CSV file of a run.

    Attributes:
        columns: float64[N] by heading, in the file's order; NaN where there is no number.
        unread: rows that are left out because they are broken.
    """

    columns: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    unread: int = 0

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    @property
    def terms(self) -> tuple[str, ...]:
        """The terms of the loss, as log.csv has them: what stands behind the gradient norm."""
        names = list(self.columns)
        if "gradient_norm" not in names:
            return ()
        behind = names[names.index("gradient_norm") + 1 :]
        end = next((i for i, name in enumerate(behind) if name == _SPEED or name.startswith(_POSITIVES)), len(behind))
        return tuple(behind[:end])

    @property
    def positives(self) -> tuple[str, ...]:
        """The modules that log.csv counts matched anchors of."""
        return tuple(name.removeprefix(_POSITIVES) for name in self.columns if name.startswith(_POSITIVES))


class ClassScores(NamedTuple):
    """What the best weights reach on the validation objects of one class; None where there is nothing to reach."""

    name: str
    AP: float | None
    AP50: float | None
    AP75: float | None
    AR100: float | None
    objects: int
    detections: int


@dataclass
class _Span:
    """What is added up over some steps."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0
    pictures: int = 0
    seconds: float = 0.0

    def add(self, values: Mapping[str, Tensor], pictures: int, seconds: float) -> None:
        """Take one step in."""
        self.sums = {name: self.sums[name] + value if self.steps else value for name, value in values.items()}
        self.steps += 1
        self.pictures += pictures
        self.seconds += seconds

    def means(self) -> dict[str, float]:
        """Divide by the steps."""
        return {name: float(value) / self.steps for name, value in self.sums.items()}


class RunLog:
    """Averages of the steps since the last report and since the last row, and the run's CSV files."""

    def __init__(self, out: Path) -> None:
        self.steps, self.metrics, self.classes = out / LOG_FILE, out / METRICS_FILE, out / CLASSES_FILE
        self.health = out / HEALTH_FILE
        self._shown, self._row = _Span(), _Span()
        self._since = time.monotonic()

    def restart(self) -> None:
        """Drop what an earlier run wrote."""
        for path in (self.steps, self.metrics, self.classes, self.health):
            path.unlink(missing_ok=True)

    def pending(self) -> dict[str, Any]:
        """What is added up for the next row, as plain data for `restore`."""
        return vars(self._row)

    def restore(self, pending: Mapping[str, Any], step: int, evaluated: int) -> None:
        """Go on after a step: rows beyond it, which will be written again, are dropped, as are rows that are broken.

        Args:
            pending: what `pending` gave after that step, or nothing.
            step: optimiser steps done.
            evaluated: the last step whose evaluation is done for good.

        Raises:
            DataError: a file cannot be written.
        """
        self._row = _Span(**pending)
        cuts = ((self.steps, step), (self.health, step), (self.metrics, evaluated), (self.classes, evaluated))
        for path, last in cuts:
            header, rows = _read(path)
            kept = [row for row in rows if _is_whole(row, header) and int(row[0]) <= last]
            if kept:
                _rewrite(path, header, kept)
            else:
                path.unlink(missing_ok=True)

    def add(
        self, loss: LossParts, norm: Tensor, batch: Batch, *, step: int, plan: Plan, lr: float, size: torch.Size
    ) -> StepReport | None:
        """Take one step in; a report every `REPORT_EVERY_SECONDS` and at the end of the run."""
        values = {"total": loss.total.detach(), "gradient_norm": norm.detach(), **loss.parts}
        values |= {f"{_POSITIVES}{name}": n / plan.batch for name, n in loss.positives.items()}
        now = time.monotonic()
        for span in (self._shown, self._row):
            span.add(values, plan.batch, now - self._since)
        self._since = now
        if step % max(1, plan.steps // ROWS) == 0 or step == plan.steps:
            self._write_row(step, plan, lr, size)
        shown = self._shown
        if shown.seconds < REPORT_EVERY_SECONDS and step < plan.steps:
            return None
        self._shown = _Span()
        means = shown.means()
        return StepReport(
            step=step,
            steps=plan.steps,
            epoch=step / plan.steps_per_epoch,
            lr=lr,
            input_size=(size[0], size[1]),
            total=means["total"],
            parts={name: means[name] for name in loss.parts},
            positives={name: means[f"{_POSITIVES}{name}"] for name in loss.positives},
            gradient_norm=means["gradient_norm"],
            pictures_per_second=shown.pictures / max(shown.seconds, 1e-9),
            seconds_left=(plan.steps - step) * shown.seconds / shown.steps,
        )

    def _write_row(self, step: int, plan: Plan, lr: float, size: torch.Size) -> None:
        span, self._row = self._row, _Span()
        row = {
            "step": step,
            "epoch": round(step / plan.steps_per_epoch, 4),
            "lr": f"{lr:.6g}",
            "input": f"{size[0]}x{size[1]}",
            **{name: f"{value:.5g}" for name, value in span.means().items()},
            _SPEED: round(span.pictures / max(span.seconds, 1e-9), 2),
        }
        _append(self.steps, row)

    def evaluation(self, step: int, epoch: float, result: CocoResult) -> None:
        """Write an evaluation down."""
        numbers = {k: v for k, v in vars(result).items() if isinstance(v, float) or v is None}
        _append(self.metrics, {"step": step, "epoch": round(epoch, 4), **numbers})
        self._since = time.monotonic()

    def warning(self, report: HealthReport) -> None:
        """Write down what began to go wrong."""
        _append(self.health, {name: " ".join(str(value).splitlines()) for name, value in vars(report).items()})

    def best_classes(self, step: int, names: Sequence[str], result: CocoResult) -> None:
        """Write down what the best weights so far reach for each class, in place of those before them.

        Args:
            step: of these weights.
            names: of the classes, in the order of ``result.per_class``.
            result: of their evaluation.

        Raises:
            DataError: the file cannot be written.
        """
        rows = [
            [
                str(step),
                " ".join(name.splitlines()),
                *("" if v is None else str(v) for v in (getattr(scored, n) for n in _CLASS_NUMBERS)),
            ]
            for name, scored in zip(names, result.per_class, strict=True)
        ]
        _rewrite(self.classes, ["step", "class", *_CLASS_NUMBERS], rows)


def read_table(path: Path) -> Table:
    """Read log.csv or metrics.csv, whatever state it is in.

    Returns:
        `Table` with as many steps as epochs, in the file's order; empty where there is no such file.
    """
    header, rows = _read(path)
    if "epoch" not in header:
        return Table(unread=len(rows))
    whole = [[_float(cell) for cell in row] for row in rows if _is_whole(row, header)]
    array = np.array(whole, dtype=np.float64).reshape(-1, len(header))
    placed = np.isfinite(array[:, header.index("epoch")])
    columns = dict(zip(header, array[placed].T, strict=True))
    return Table(columns, unread=len(rows) - int(placed.sum()))


def read_classes(path: Path) -> tuple[ClassScores, ...]:
    """Read classes.csv, in its order; what is broken is left out."""
    header, rows = _read(path)
    if header != ["step", "class", *_CLASS_NUMBERS]:
        return ()
    scores = []
    for row in rows:
        if _is_whole(row, header) and row[-1].isdecimal() and row[-2].isdecimal():
            rates = [None if math.isnan(value) else value for value in map(_float, row[2:6])]
            ap, ap50, ap75, recall = rates
            scores.append(ClassScores(row[1], ap, ap50, ap75, recall, int(row[6]), int(row[7])))
    return tuple(scores)


def read_warnings(path: Path) -> tuple[HealthReport, ...]:
    """Read health.csv, in its order; what is broken is left out."""
    header, rows = _read(path)
    if header != ["step", "kind", "message", "cure"]:
        return ()
    return tuple(HealthReport(int(row[0]), *row[1:]) for row in rows if _is_whole(row, header))


def _read(path: Path) -> tuple[list[str], list[list[str]]]:
    """Read headings and rows as they stand there, broken or not; without headings of ours there are none."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return [], []
    rows = [row for row in _cells(text) if row]
    return (rows[0], rows[1:]) if rows and rows[0][0] == _FIRST else ([], rows)


def _cells(text: str) -> Iterator[list[str]]:
    # One line at a time: a stray quote must not swallow the lines behind it.
    for line in text.split("\n"):
        yield next(csv.reader([line.rstrip("\r").replace("\0", "\ufffd")]), [])


def _is_whole(row: Sequence[str], header: Sequence[str]) -> bool:
    return len(row) == len(header) and row[0].isdecimal()


def _float(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan


def _rewrite(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    write_whole(path, text.getvalue())


def _append(path: Path, row: Mapping[str, Any]) -> None:
    header, names = _header(path), list(row)
    if set(names) - set(header):
        # A new file, or one of an older version of this tool that lacks a column.
        before, rows = _read(path)
        header = [*before, *(name for name in names if name not in before)]
        _rewrite(path, header, [[*cells, *[""] * (len(header) - len(cells))] for cells in rows if before])
    line = io.StringIO()
    csv.DictWriter(line, header, restval="", lineterminator="\n").writerow(row)
    append_whole(path, line.getvalue())


def _header(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            return next(_cells(file.readline().rstrip("\n")), [])
    except FileNotFoundError:
        return []

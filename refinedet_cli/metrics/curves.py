"""Precision, recall, F1 and calibration over scores, by class and by kind of object, at one IoU threshold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from refinedet_cli.metrics.coco import PictureDetections, PictureTruth
from refinedet_cli.metrics.matched import Matched, match_pictures, overlaps

# The recalls at which the COCO metric reads precision.
_RECALLS = np.linspace(0.0, 1.0, 101)


@dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """How precision and recall of one class follow the score threshold.

    Attributes:
        label: the class.
        scores: float64[K], descending; a threshold at each keeps the detections up to there.
        precision, recall: float64[K]; recall is NaN where there is no object.
        objects: objects to be found.
    """

    label: int
    scores: NDArray[np.float64]
    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    objects: int

    @property
    def f1(self) -> NDArray[np.float64]:
        """float64[K], harmonic mean of precision and recall; 0 where both are 0 or there is no object."""
        total = np.nan_to_num(self.precision + self.recall)
        product = np.nan_to_num(2 * self.precision * self.recall)
        return np.divide(product, total, out=np.zeros_like(total), where=total > 0)

    @property
    def average_precision(self) -> float | None:
        """The COCO metric's AP at this IoU; None without an object."""
        if not self.objects:
            return None
        return interpolated_precision(self.precision, self.recall)

    def best_threshold(self) -> Threshold | None:
        """Find the score threshold with the highest F1, the highest of several; None where F1 is always 0."""
        f1 = self.f1
        if not len(f1) or f1.max() == 0:
            return None
        # A threshold keeps all detections of its score: only the last of equals can be reached.
        reachable = np.append(np.diff(self.scores) < 0, True)
        i = int(np.where(reachable, f1, -1.0).argmax())
        return Threshold(float(self.scores[i]), float(self.precision[i]), float(self.recall[i]), float(f1[i]))


class Threshold(NamedTuple):
    """A score threshold and what it gives."""

    score: float
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class CalibrationBin:
    """Detections whose scores are alike.

    Attributes:
        low, high: their scores are in (low, high].
        count: how many.
        mean_score: what the detector says.
        precision: how many were right.
    """

    low: float
    high: float
    count: int
    mean_score: float
    precision: float


class Kind(NamedTuple):
    """Boxes whose value is in [low, high)."""

    name: str
    low: float
    high: float

    def holds(self, values: NDArray[np.float64]) -> NDArray[np.bool_]:
        """bool[N]: whether each value is of this kind."""
        return (values >= self.low) & (values < self.high)


class Part(NamedTuple):
    """AP of the objects of one kind, and how many there are."""

    name: str
    objects: int
    average_precision: float | None


def interpolated_precision(precision: NDArray[np.float64], recall: NDArray[np.float64]) -> float:
    """Average the best precision at or beyond each of 101 recalls, 0 where the recall is not reached.

    Args:
        precision: float64[K], after each detection.
        recall: float64[K], ascending.

    Source: pycocotools ``COCOeval.accumulate``.
    """
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(recall, _RECALLS, side="left")
    return float(np.append(envelope, 0.0)[places].mean())


def class_curve(matched: Matched, label: int) -> Curve:
    """Follow precision and recall of a class down its scores; detections that count neither way are left out."""
    chosen = (matched.labels == label) & ~matched.ignored
    right = matched.right[chosen]
    found = np.cumsum(right, dtype=np.float64)
    objects = int(((matched.objects.labels == label) & ~matched.objects.ignored).sum())
    return Curve(
        label=label,
        scores=matched.scores[chosen],
        # As pycocotools divides, so that the numbers are equal to the bit.
        precision=found / (np.cumsum(~right, dtype=np.float64) + found + np.spacing(1)),
        recall=found / objects if objects else np.full(len(found), np.nan),
        objects=objects,
    )


def calibration(matched: Matched, bins: int = 10) -> tuple[CalibrationBin, ...]:
    """Compare scores with how often detections of such scores are right; empty bins are left out."""
    counted = ~matched.ignored
    scores, right = matched.scores[counted], matched.right[counted]
    place = np.clip(np.ceil(scores * bins).astype(np.int64) - 1, 0, bins - 1)
    return tuple(
        CalibrationBin(
            i / bins,
            (i + 1) / bins,
            int((place == i).sum()),
            float(scores[place == i].mean()),
            float(right[place == i].mean()),
        )
        for i in np.unique(place).tolist()
    )


def calibration_error(bins: Sequence[CalibrationBin]) -> float | None:
    """Average the distance of score and precision over all detections; None without any."""
    total = sum(b.count for b in bins)
    return sum(b.count * abs(b.mean_score - b.precision) for b in bins) / total if total else None


def confusion(
    truths: Sequence[PictureTruth],
    detections: Sequence[PictureDetections],
    class_count: int,
    thresholds: NDArray[np.float64],
    *,
    iou: float = 0.5,
) -> NDArray[np.int64]:
    """Count which class objects were taken for, whatever their own.

    Args:
        truths: the pictures.
        detections: those of the same pictures, in the same order.
        class_count: labels are 1..class_count.
        thresholds: float64[class_count + 1], the lowest score of each label that counts; entry 0 is not read.
        iou: overlap from which an object counts as found.

    Returns:
        int64[class_count + 1, class_count + 1], object's class by detection's class; row 0 holds detections of nothing,
        column 0 objects that nothing found. Pairs are made by descending overlap, each object and detection in one at
        most; crowds and detections in them are not counted.
    """
    table = np.zeros((class_count + 1, class_count + 1), dtype=np.int64)
    for truth, found in zip(truths, detections, strict=True):
        chosen = found.scores >= thresholds[found.labels]
        boxes, labels = found.boxes[chosen], found.labels[chosen]
        real = ~truth.crowd
        values = overlaps(boxes, truth.boxes[real], truth.crowd[real])
        in_crowd = (overlaps(boxes, truth.boxes[~real], truth.crowd[~real]) >= iou).any(axis=1)
        wanted = truth.labels[real]
        free_row, free_column = np.ones(len(labels), bool), np.ones(len(wanted), bool)
        rows, columns = np.nonzero(values >= iou)
        for k in np.argsort(-values[rows, columns], kind="stable"):
            i, j = rows[k], columns[k]
            if free_row[i] and free_column[j]:
                free_row[i] = free_column[j] = False
                table[wanted[j], labels[i]] += 1
        np.add.at(table, (np.zeros(1, np.int64), labels[free_row & ~in_crowd]), 1)
        np.add.at(table, (wanted[free_column], np.zeros(1, np.int64)), 1)
    return table


def by_kind(
    truths: Sequence[PictureTruth],
    detections: Sequence[PictureDetections],
    class_count: int,
    measure: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    kinds: Sequence[Kind],
    *,
    iou: float = 0.5,
) -> tuple[Part, ...]:
    """Score objects by a value of their boxes, such as size or aspect ratio, as the COCO metric does by area.

    Args:
        truths: the pictures.
        detections: those of the same pictures, in the same order.
        class_count: labels are 1..class_count.
        measure: gives the values float64[N] of boxes float64[N, 4], xyxy, px-img.
        kinds: ranges of that value.
        iou: overlap from which an object counts as found.

    Returns:
        one `Part` a kind, with the mean AP over the classes that have such objects. A detection that finds no such
        object is wrong only if its own value is of the kind.
    """
    parts = []
    for kind in kinds:
        matched = match_pictures(truths, detections, iou=iou, left_out=[~kind.holds(measure(t.boxes)) for t in truths])
        elsewhere = (matched.target < 0) & ~kind.holds(measure(matched.boxes))
        matched = matched._replace(ignored=matched.ignored | elsewhere)
        curves = [class_curve(matched, label) for label in range(1, class_count + 1)]
        numbers = [c.average_precision for c in curves if c.average_precision is not None]
        mean = float(np.mean(numbers)) if numbers else None
        parts.append(Part(kind.name, sum(c.objects for c in curves), mean))
    return tuple(parts)

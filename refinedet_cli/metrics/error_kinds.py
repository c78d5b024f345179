"""Why detections are wrong and objects missed, and what mending each kind of error would gain.

Source: the idea and the six kinds are those of TIDE (Bolya et al., arXiv:2008.08115); the numbers here are made with
the COCO metric's own matching and interpolation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from refinedet_cli.metrics.coco import PictureDetections, PictureTruth
from refinedet_cli.metrics.curves import class_curve
from refinedet_cli.metrics.matched import Matched, match_pictures, overlaps

Kind = Literal["class", "place", "both", "duplicate", "background", "missed"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# Below this overlap with every object a detection is of background (TIDE).
BACKGROUND_IOU = 0.1


@dataclass(frozen=True)
class ErrorKind:
    """One kind of error.

    Attributes:
        kind: "class" (right place, wrong class), "place" (right class, overlap too small), "both", "duplicate" (object
            already found by a better one), "background" (nothing there), "missed" (object that no detection comes
            close to).
        count: such detections at or above the score thresholds; for "missed", objects that none of those found or came
            close to.
        gain: what AP at this IoU would gain if these errors alone were mended, whatever their scores; None without an
            object.
    """

    kind: Kind
    count: int
    gain: float | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Errors:
    """All errors of a set of detections.

    Attributes:
        kinds: one entry for each of `KINDS`.
        average_precision: AP at this IoU as it is, mean over the classes with objects.
        matched: the detections, by descending score.
        of_detection: int64[D], place in `KINDS` of each detection's error, -1 where it is right or does not count.
        nearest: int64[D], the object that an error of class, place or both is about, or the one found twice; -1 else.
        missed: bool[N], objects that count and that no detection found or came close to, whatever its score.
    """

    kinds: tuple[ErrorKind, ...]
    average_precision: float | None
    matched: Matched
    of_detection: NDArray[np.int64]
    nearest: NDArray[np.int64]
    missed: NDArray[np.bool_]


def explain_errors(
    truths: Sequence[PictureTruth],
    detections: Sequence[PictureDetections],
    class_count: int,
    thresholds: NDArray[np.float64],
    *,
    iou: float = 0.5,
) -> Errors:
    """Sort every wrong detection and every missed object into its kind.

    Mending a class or place error makes the best detection of an object that nothing found right, and drops the others
    of that object; mending both, duplicate and background errors drops them; mending misses takes those objects out of
    the count.

    Args:
        truths: the pictures.
        detections: those of the same pictures, in the same order.
        class_count: labels are 1..class_count.
        thresholds: float64[class_count + 1], the lowest score of each label that is counted (gains regard all).
        iou: overlap from which an object counts as found.
    """
    matched = match_pictures(truths, detections, iou=iou)
    kinds, nearest = _sort_errors(matched, truths, iou)
    missed = _missed(matched, kinds, nearest, np.ones(len(matched.labels), dtype=bool))
    before = _mean_precision(matched, class_count)
    counted = matched.scores >= thresholds[matched.labels]
    missed_there = _missed(matched, kinds, nearest, counted)
    found = []
    for i, kind in enumerate(KINDS):
        after = _mean_precision(_mended(matched, kinds == i, nearest, missed, kind), class_count)
        count = int(missed_there.sum()) if kind == "missed" else int(((kinds == i) & counted).sum())
        gain = None if before is None else (before if after is None else after) - before
        found.append(ErrorKind(kind, count, gain))
    return Errors(
        kinds=tuple(found),
        average_precision=before,
        matched=matched,
        of_detection=kinds,
        nearest=nearest,
        missed=missed,
    )


def _sort_errors(
    matched: Matched, truths: Sequence[PictureTruth], iou: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The kind of each detection's error and the object it is about, -1 where there is none."""
    objects = matched.objects
    kinds = np.full(len(matched.labels), -1, dtype=np.int64)
    nearest = np.full(len(matched.labels), -1, dtype=np.int64)
    wrong = np.flatnonzero((matched.target < 0) & ~matched.ignored)
    wrong = wrong[np.argsort(matched.picture[wrong], kind="stable")]
    starts = np.searchsorted(matched.picture[wrong], np.arange(len(truths) + 1))
    firsts = np.searchsorted(objects.picture, np.arange(len(truths)))
    for place, truth in enumerate(truths):
        rows = wrong[starts[place] : starts[place + 1]]
        values = overlaps(matched.boxes[rows], truth.boxes, np.zeros(len(truth.labels), dtype=bool))
        if not values.shape[1]:
            kinds[rows] = KINDS.index("background")
            continue
        same = matched.labels[rows][:, None] == truth.labels
        real = ~objects.ignored[firsts[place] : firsts[place] + len(truth.labels)]
        own = np.where(same & real, values, -1.0)
        other = np.where(~same & real, values, -1.0)
        best_own, best_other = own.max(axis=1), other.max(axis=1)
        kind = np.select(
            [best_own >= iou, best_other >= iou, best_own >= BACKGROUND_IOU, best_other >= BACKGROUND_IOU],
            [KINDS.index("duplicate"), KINDS.index("class"), KINDS.index("place"), KINDS.index("both")],
            KINDS.index("background"),
        )
        about = np.where(best_own >= iou, own.argmax(axis=1), other.argmax(axis=1))
        about = np.where(kind == KINDS.index("place"), own.argmax(axis=1), about)
        kinds[rows] = kind
        nearest[rows] = np.where(kind == KINDS.index("background"), -1, firsts[place] + about)
    return kinds, nearest


def _missed(
    matched: Matched, kinds: NDArray[np.int64], nearest: NDArray[np.int64], counted: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """bool[N]: objects that count and that no counted detection found or came close to."""
    objects = matched.objects
    found = (objects.found_by >= 0) & np.append(counted, False)[objects.found_by]
    touched = np.zeros(len(objects.labels), dtype=bool)
    touched[nearest[np.isin(kinds, [KINDS.index("class"), KINDS.index("place")]) & counted]] = True
    missed: NDArray[np.bool_] = ~found & ~objects.ignored & ~touched
    return missed


def _mended(
    matched: Matched, wrong: NDArray[np.bool_], nearest: NDArray[np.int64], missed: NDArray[np.bool_], kind: Kind
) -> Matched:
    """The detections as they would be without one kind of error."""
    objects = matched.objects
    if kind == "missed":
        return matched._replace(objects=objects._replace(ignored=objects.ignored | missed))
    dropped = wrong
    labels, target = matched.labels.copy(), matched.target.copy()
    if kind in ("class", "place"):
        rows = np.flatnonzero(wrong)
        rows = rows[objects.found_by[nearest[rows]] < 0]
        # Rows are by descending score: the first of an object is its best.
        about, first = np.unique(nearest[rows], return_index=True)
        winners = rows[first]
        labels[winners], target[winners] = objects.labels[about], about
        dropped = wrong.copy()
        dropped[winners] = False
    return matched._replace(labels=labels, target=target, ignored=matched.ignored | dropped)


def _mean_precision(matched: Matched, class_count: int) -> float | None:
    numbers = [class_curve(matched, label).average_precision for label in range(1, class_count + 1)]
    present = [n for n in numbers if n is not None]
    return float(np.mean(present)) if present else None

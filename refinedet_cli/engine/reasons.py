"""What lies behind a score: error kinds, curves, confusions, calibration, and what a user could do about it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from refinedet_cli.core.words import counted
from refinedet_cli.metrics.coco import PictureDetections, PictureTruth
from refinedet_cli.metrics.curves import (
    CalibrationBin,
    Curve,
    Kind,
    Part,
    Threshold,
    by_kind,
    calibration,
    calibration_error,
    class_curve,
    confusion,
)
from refinedet_cli.metrics.error_kinds import ErrorKind, Errors, explain_errors

# Sides of a square of the same area, px-img; the borders of COCO's small, medium and large among them.
SIZES = (
    Kind("below 16 px", 0.0, 16.0),
    Kind("16 to 32 px", 16.0, 32.0),
    Kind("32 to 64 px", 32.0, 64.0),
    Kind("64 to 96 px", 64.0, 96.0),
    Kind("96 to 192 px", 96.0, 192.0),
    Kind("192 px and up", 192.0, np.inf),
)
# Width by height.
ASPECTS = (
    Kind("taller than 1:3", 0.0, 1 / 3),
    Kind("1:3 to 2:3", 1 / 3, 2 / 3),
    Kind("2:3 to 3:2", 2 / 3, 3 / 2),
    Kind("3:2 to 3:1", 3 / 2, 3.0),
    Kind("wider than 3:1", 3.0, np.inf),
)
# Objects of a size or class from which a figure says something of it: below, one more or less moves it by 5 % and more.
_ENOUGH_OBJECTS = 20
# Above every score: no detection of such a class is worth keeping.
_NEVER = 2.0

# What is counted, and which.
_MEANINGS = {
    "class": ("object", "well placed but given the wrong class"),
    "place": ("object", "of the right class with a box that overlaps too little"),
    "both": ("object", "with the wrong class and a box that overlaps too little"),
    "duplicate": ("second detection", "of an object"),
    "background": ("detection", "where there is nothing"),
    "missed": ("object", "that no detection comes near"),
}


def told(kind: ErrorKind) -> str:
    """Write how many errors of a kind there are, and what they are."""
    noun, which = _MEANINGS[kind.kind]
    return f"{counted(kind.count, noun)} {which}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Reasons:
    """Why a detector scores what it scores, at IoU 0.5.

    Attributes:
        names: the scored classes; label i is ``names[i - 1]``.
        curves: precision and recall of each class.
        thresholds: the score of each class with the best F1; None where nothing of it is found.
        errors: every error and its kind; counted at those thresholds, while gains regard every score.
        confusion: int64[K + 1, K + 1], object's class by detection's class at those thresholds; 0 is background.
        calibration: how often detections of a score are right.
        calibration_error: their mean distance; None without detections.
        sizes, aspects: AP50 by object size and by aspect ratio.
        findings: what stands out, one sentence each, the most rewarding first.
    """

    names: tuple[str, ...]
    curves: tuple[Curve, ...]
    thresholds: tuple[Threshold | None, ...]
    errors: Errors
    confusion: NDArray[np.int64]
    calibration: tuple[CalibrationBin, ...]
    calibration_error: float | None
    sizes: tuple[Part, ...]
    aspects: tuple[Part, ...]
    findings: tuple[str, ...]

    def counted(self) -> NDArray[np.bool_]:
        """bool[D]: which detections of ``errors.matched`` reach the threshold of their class."""
        lowest = _lowest(self.thresholds)
        matched = self.errors.matched
        return matched.scores >= lowest[matched.labels]


def find_reasons(
    truths: Sequence[PictureTruth], detections: Sequence[PictureDetections], names: Sequence[str]
) -> Reasons:
    """Explain detections.

    Args:
        truths: the pictures, ordered by image id.
        detections: those of the same pictures, in the same order.
        names: of the classes that labels 1..K stand for.
    """
    count = len(names)
    errors = explain_errors(truths, detections, count, np.zeros(count + 1))
    curves = tuple(class_curve(errors.matched, label) for label in range(1, count + 1))
    thresholds = tuple(curve.best_threshold() for curve in curves)
    lowest = _lowest(thresholds)
    errors = explain_errors(truths, detections, count, lowest)
    bins = calibration(errors.matched)
    reasons = Reasons(
        names=tuple(names),
        curves=curves,
        thresholds=thresholds,
        errors=errors,
        confusion=confusion(truths, detections, count, lowest),
        calibration=bins,
        calibration_error=calibration_error(bins),
        sizes=by_kind(truths, detections, count, _side, SIZES),
        aspects=by_kind(truths, detections, count, _aspect, ASPECTS),
        findings=(),
    )
    return Reasons(**{**vars(reasons), "findings": tuple(_findings(reasons))})


def _lowest(thresholds: Sequence[Threshold | None]) -> NDArray[np.float64]:
    """float64[K + 1]: the score from which detections of each label are kept."""
    return np.array([_NEVER, *(_NEVER if t is None else t.score for t in thresholds)])


def _side(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    sides = boxes[:, 2:] - boxes[:, :2]
    return np.sqrt(sides[:, 0] * sides[:, 1])


def _aspect(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    sides = boxes[:, 2:] - boxes[:, :2]
    return sides[:, 0] / np.maximum(sides[:, 1], 1e-9)


def _findings(reasons: Reasons) -> Iterator[str]:
    if reasons.errors.average_precision is None:
        return
    yield from _costliest(reasons)
    yield from _weak_sizes(reasons)
    yield from _weak_classes(reasons)
    yield from _confused(reasons)
    yield from _thresholds(reasons)


def _costliest(reasons: Reasons) -> Iterator[str]:
    gains = sorted((k for k in reasons.errors.kinds if k.gain and k.gain > 0), key=lambda k: -(k.gain or 0))
    for kind in gains[:1]:
        noun, which = _MEANINGS[kind.kind]
        yield (f"Over all scores, most is lost to {noun}s {which}: without them AP50 would be {kind.gain:.3f} higher.")


def _weak_sizes(reasons: Reasons) -> Iterator[str]:
    total = sum(p.objects for p in reasons.sizes)
    parts = [p for p in reasons.sizes if p.average_precision is not None and p.objects >= _ENOUGH_OBJECTS]
    if len(parts) < 2:
        return
    worst = min(parts, key=lambda p: ((p.average_precision or 0) - 1) * p.objects)
    best = max(parts, key=lambda p: p.average_precision or 0)
    if worst is not best:
        yield (
            f"Objects of {worst.name} ({100 * worst.objects / total:.0f} % of all) have an AP50 of "
            f"{worst.average_precision:.3f}, those of {best.name} {best.average_precision:.3f}: "
            f"{_size_cure(worst, reasons)}."
        )


def _size_cure(worst: Part, reasons: Reasons) -> str:
    small = [p.name for p in reasons.sizes[:3]]
    return (
        "a larger input, or anchors fitted to the data, would serve them"
        if worst.name in small
        else "more training pictures of such objects would serve them"
    )


def _weak_classes(reasons: Reasons) -> Iterator[str]:
    present = [c for c in reasons.curves if c.objects]
    weak = [c for c in present if (c.average_precision or 0) < 0.1]
    if weak:
        named = [
            f"{reasons.names[c.label - 1]} ({counted(c.objects, 'object')})"
            for c in sorted(weak, key=lambda c: -c.objects)
        ]
        listed = ", ".join(named[:5]) + (f" and {len(named) - 5} more" if len(named) > 5 else "")
        lost = sum(1 - (c.average_precision or 0) for c in weak) / len(present)
        yield f"Hardly anything is found of {listed}: that alone takes {lost:.3f} off the AP50."


def _confused(reasons: Reasons) -> Iterator[str]:
    pairs = reasons.confusion[1:, 1:].copy()
    np.fill_diagonal(pairs, 0)
    if pairs.max(initial=0) < 3:
        return
    i, j = np.unravel_index(int(pairs.argmax()), pairs.shape)
    objects = int(reasons.confusion[i + 1].sum())
    yield (
        f"{reasons.names[i]} is taken for {reasons.names[j]} most often: {pairs[i, j]:,} of {objects:,} objects "
        "at the best thresholds."
    )


def _thresholds(reasons: Reasons) -> Iterator[str]:
    pairs = zip(reasons.curves, reasons.thresholds, strict=True)
    # With a few objects the best threshold is wherever one of them happens to be found.
    scores = [t.score for curve, t in pairs if t is not None and curve.objects >= _ENOUGH_OBJECTS]
    if len(scores) > 1:
        yield (
            f"The score with the best F1 runs from {min(scores):.2f} to {max(scores):.2f} between classes, median "
            f"{float(np.median(scores)):.2f}: one --score for all gives some of it away."
        )

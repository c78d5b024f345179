"""How sure a number is: intervals by drawing the pictures anew, for one set of detections or the difference of two.

The bootstrap over pictures: as many pictures as there are get drawn with repetition, many times over, and each drawing
is scored. The spread of the scores tells how far the number would move had other pictures of the same kind been taken,
not how far another training run would move it. A class with few objects has an interval that is too narrow: what the
pictures do not show, drawing them again cannot show.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from refinedet_cli.metrics.coco import PictureDetections, PictureTruth, match_coco
from refinedet_cli.metrics.outcomes import Outcomes
from refinedet_cli.metrics.voc import VocRules, average_precision, match_voc

# Part of the drawings that an interval holds.
CONFIDENCE = 0.95
# With fewer, the outermost 2.5 % are two drawings or less.
MIN_ROUNDS = 100

# As pycocotools has them: the recalls at which precision is read, and what keeps it from dividing by 0.
_RECALLS = np.linspace(0.0, 1.00, 101)
_EPS = np.spacing(1)
_IOU_50, _IOU_75 = 0, 5
# Drawings that are scored at a time: enough to be quick, few enough to stay small in memory.
_CHUNK = 64


class Estimate(NamedTuple):
    """A number and its interval; None where there is none.

    Attributes:
        name: such as "AP50".
        value: the number itself.
        low, high: the interval that holds 95 % of the drawings; each may lie on the same side of ``value``.
        rounds: drawings with a number. A class may be missing from some.
    """

    name: str
    value: float | None
    low: float | None
    high: float | None
    rounds: int

    @property
    def excludes_zero(self) -> bool:
        """Whether all of the interval lies on one side of 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Estimates:
    """Numbers with their intervals.

    Attributes:
        overall: those of all classes together.
        per_class: for each class, by ascending label, its own.
        rounds: drawings.
    """

    overall: tuple[Estimate, ...]
    per_class: tuple[tuple[Estimate, ...], ...]
    rounds: int


@dataclass(frozen=True, eq=False)
class Rounds:
    """The numbers of one set of detections, for the pictures as they are and for every drawing; NaN is "no number".

    Attributes:
        names: of the numbers of all classes together.
        class_names: of the numbers of each class.
        overall: float64[1 + R, len(names)]; row 0 is of the pictures as they are.
        classes: float64[1 + R, K, len(class_names)].
    """

    names: tuple[str, ...]
    class_names: tuple[str, ...]
    overall: NDArray[np.float64]
    classes: NDArray[np.float64]


def draw_pictures(pictures: int, rounds: int, seed: int) -> NDArray[np.int64]:
    """Draw as many pictures as there are, with repetition.

    Args:
        pictures: how many there are.
        rounds: how often to draw them.
        seed: decides the drawings, together with the number of pictures.

    Returns:
        int64[rounds, pictures], how often each picture was drawn; every row adds up to ``pictures``.
    """
    random = np.random.default_rng(seed)
    counts = np.zeros((rounds, pictures), dtype=np.int64)
    for row in counts:
        row += np.bincount(random.integers(0, max(pictures, 1), pictures), minlength=pictures)
    return counts


def resample_coco(
    truths: Sequence[PictureTruth],
    detections: Sequence[PictureDetections],
    class_count: int,
    drawn: NDArray[np.int64],
) -> Rounds:
    """Score drawings of the pictures with the COCO metric.

    Args:
        truths: as for `evaluate_coco`.
        detections: as for `evaluate_coco`.
        class_count: labels are 1..class_count.
        drawn: int64[R, P], how often each picture was drawn, by ascending image id.

    Returns:
        AP, AP50 and AP75, and AP and AP50 of each class: in row 0 equal to the bit to those of `evaluate_coco`, in the
        others to what it would say of the drawn pictures, a picture drawn twice being two pictures of the same score.

    Raises:
        ValueError: as `evaluate_coco`, or ``drawn`` is not of these pictures.
    """
    _check_drawn(drawn, len(truths))
    curves = [_Hits.of(outcomes) for outcomes in match_coco(truths, detections, class_count)]
    overall, classes = np.full((len(drawn) + 1, 3), np.nan), np.full((len(drawn) + 1, class_count, 2), np.nan)
    for rows, weights in _chunks(drawn):
        precision = np.stack([_coco_precision(c, weights) for c in curves], axis=1)  # [B, K, T, R]
        for row, values in zip(rows, precision, strict=True):
            present = values[~np.isnan(values[:, 0, 0])].transpose(1, 2, 0)  # [T, R, classes with objects]
            if present.size:
                # In the order in which pycocotools lays its numbers out, for a mean that is equal to the last bit.
                overall[row] = [np.ascontiguousarray(p).mean() for p in (present, present[_IOU_50], present[_IOU_75])]
        flat = np.ascontiguousarray(precision).reshape(len(weights), class_count, -1)
        classes[rows, :, 0] = flat.mean(axis=2)
        classes[rows, :, 1] = np.ascontiguousarray(precision[:, :, _IOU_50]).mean(axis=2)
    return Rounds(("AP", "AP50", "AP75"), ("AP", "AP50"), overall, classes)


def resample_voc(
    truths: Sequence[PictureTruth],
    detections: Sequence[PictureDetections],
    class_count: int,
    drawn: NDArray[np.int64],
    *,
    difficult: Sequence[NDArray[np.bool_]],
    rules: VocRules,
) -> Rounds:
    """Score drawings of the pictures with the VOC metric.

    Args:
        truths: as for `evaluate_voc`.
        detections: as for `evaluate_voc`.
        class_count: labels are 1..class_count.
        drawn: int64[R, P], how often each picture was drawn, by ascending image id.
        difficult: as for `evaluate_voc`.
        rules: as for `evaluate_voc`.

    Returns:
        mAP, and AP of each class: in row 0 equal to the bit to those of `evaluate_voc`.

    Raises:
        ValueError: as `evaluate_voc`, or ``drawn`` is not of these pictures.
    """
    _check_drawn(drawn, len(truths))
    matched = match_voc(truths, detections, class_count, difficult=difficult, rules=rules)
    curves = [_Hits.of(outcomes) for outcomes in matched]
    overall, classes = np.full((len(drawn) + 1, 1), np.nan), np.full((len(drawn) + 1, class_count, 1), np.nan)
    for rows, weights in _chunks(drawn):
        for k, curve in enumerate(curves):
            found, reported = next(curve.counts(weights))
            classes[rows, k, 0] = average_precision(found, reported, weights @ curve.objects, rules.average)
        for row in rows:
            present = classes[row, :, 0][~np.isnan(classes[row, :, 0])]
            overall[row] = present.mean() if present.size else np.nan
    return Rounds(("mAP",), ("AP",), overall, classes)


def estimates(rounds: Rounds) -> Estimates:
    """Put an interval around each number.

    Returns:
        for each number the interval that holds 95 % of the drawings, corrected for their bias.
    """
    return _summarized(rounds, rounds.overall, rounds.classes)


def differences(rounds: Rounds, other: Rounds) -> Estimates:
    """Put an interval around each difference between two sets of detections on the same drawings.

    Each drawing scores both, so what makes some pictures harder than others falls out of the difference.

    Args:
        rounds: of the one set of detections.
        other: of the other, for the same pictures, classes and drawings.

    Returns:
        ``rounds`` minus ``other``; all 0 where the two are equal, and of opposite sign when they change places.

    Raises:
        ValueError: the two do not have the same numbers.
    """
    if rounds.names != other.names or rounds.classes.shape != other.classes.shape:
        raise ValueError(f"expected the same numbers, got {rounds.classes.shape} and {other.classes.shape}")
    return _summarized(rounds, rounds.overall - other.overall, rounds.classes - other.classes)


class _Counts(NamedTuple):
    """Objects found and detections counted down to each hit, int64[B, H]."""

    found: NDArray[np.int64]
    reported: NDArray[np.int64]


class _Hits(NamedTuple):
    """The outcomes of one class where the curve can rise.

    Attributes:
        picture: of every detection.
        right: for each of T overlaps the detections that are right.
        passed_over: for each of T overlaps those that are neither right nor wrong.
        objects: of each picture.
    """

    picture: NDArray[np.int64]
    right: tuple[NDArray[np.int64], ...]
    passed_over: tuple[NDArray[np.int64], ...]
    objects: NDArray[np.int64]

    @classmethod
    def of(cls, outcomes: Outcomes) -> _Hits:
        return cls(
            outcomes.picture,
            tuple(np.flatnonzero(right) for right in outcomes.right),
            tuple(np.flatnonzero(~counted) for counted in outcomes.counted),
            outcomes.objects,
        )

    def counts(self, weights: NDArray[np.int64]) -> Iterator[_Counts]:
        """Count for int64[B, P], how often each picture was drawn, at one overlap after the other."""
        down_to = np.cumsum(weights[:, self.picture], axis=1)
        for right, passed_over in zip(self.right, self.passed_over, strict=True):
            found = np.cumsum(weights[:, self.picture[right]], axis=1)
            reported = down_to[:, right]
            if len(passed_over):
                skipped = np.cumsum(weights[:, self.picture[passed_over]], axis=1)
                reported -= np.pad(skipped, ((0, 0), (1, 0)))[:, np.searchsorted(passed_over, right)]
            yield _Counts(found, reported)


def _coco_precision(curve: _Hits, weights: NDArray[np.int64]) -> NDArray[np.float64]:
    """Precision at the 101 recalls, float64[B, T, 101]; NaN where there is no object."""
    objects = weights @ curve.objects
    needed = _least_counts(objects)
    values = np.empty((len(weights), len(curve.right), len(_RECALLS)))
    for t, (found, reported) in enumerate(curve.counts(weights)):
        precision = found / (reported + _EPS)
        best_after = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        padded = np.pad(best_after, ((0, 0), (0, 1)))  # a recall that is not reached has precision 0
        values[:, t] = np.take_along_axis(padded, _first_reaching(found, needed), axis=1)
    values[objects == 0] = np.nan
    return values


def _least_counts(objects: NDArray[np.int64]) -> NDArray[np.int64]:
    """The least number of found objects that reaches each recall, int64[B, 101], as floats compare."""
    total = np.maximum(objects, 1)[:, None]
    least = np.floor(_RECALLS * total).astype(np.int64)
    return least + (least / total < _RECALLS)


def _first_reaching(found: NDArray[np.int64], needed: NDArray[np.int64]) -> NDArray[np.int64]:
    """Search each row of int64[B, H], not descending, for the first place that reaches each of int64[B, R]."""
    # One search for all rows: each row lies above the one before.
    step = 1 + max(int(found.max(initial=0)), int(needed.max(initial=0)))
    rows, hits = np.arange(len(found))[:, None], found.shape[1]
    places: NDArray[np.int64] = np.searchsorted((found + rows * step).ravel(), needed + rows * step) - rows * hits
    return places


def _chunks(drawn: NDArray[np.int64]) -> Iterator[tuple[range, NDArray[np.int64]]]:
    """Yield rows and how often they take each picture; first the pictures as they are, in row 0."""
    yield range(1), np.ones((1, drawn.shape[1]), dtype=np.int64)
    for start in range(0, len(drawn), _CHUNK):
        part = drawn[start : start + _CHUNK]
        yield range(start + 1, start + 1 + len(part)), part


def _summarized(kind: Rounds, overall: NDArray[np.float64], classes: NDArray[np.float64]) -> Estimates:
    return Estimates(
        overall=tuple(_estimate(name, overall[:, i]) for i, name in enumerate(kind.names)),
        per_class=tuple(
            tuple(_estimate(name, classes[:, k, i]) for i, name in enumerate(kind.class_names))
            for k in range(classes.shape[1])
        ),
        rounds=len(overall) - 1,
    )


def _estimate(name: str, values: NDArray[np.float64]) -> Estimate:
    value = None if np.isnan(values[0]) else float(values[0])
    drawn = values[1:][~np.isnan(values[1:])]
    if value is None or not len(drawn):
        return Estimate(name, value, None, None, 0)
    low, high = np.percentile(drawn, 100 * _corrected(values[0], drawn))
    return Estimate(name, value, float(low), float(high), len(drawn))


def _corrected(value: float, drawn: NDArray[np.float64]) -> NDArray[np.float64]:
    """Shift the two quantiles by how far the drawings lie to one side of the number itself.

    AP rises a little when pictures are drawn twice; uncorrected, its interval sits too high.

    Source: the bias-corrected percentile interval (Efron and Tibshirani, An Introduction to the Bootstrap, Sec. 14.3,
    without acceleration).
    """
    tails = np.array([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    below = float((drawn < value).mean() + (drawn == value).mean() / 2)
    if not 0 < below < 1:  # all on one side: there is no telling how far
        return tails
    shifted: NDArray[np.float64] = ndtr(2 * ndtri(below) + ndtri(tails))
    return shifted


def _check_drawn(drawn: NDArray[np.int64], pictures: int) -> None:
    if drawn.ndim != 2 or drawn.shape[1] != pictures:
        raise ValueError(f"expected drawn [R, {pictures}], got {list(drawn.shape)}")

"""Mean average precision as PASCAL VOC computes it, on arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from refinedet_cli.metrics.coco import PictureDetections, PictureTruth, check_pictures
from refinedet_cli.metrics.outcomes import Outcomes

Average = Literal["11-point", "area"]
Pixels = Literal["inclusive", "continuous"]
Overlap = Literal["at-least", "above"]

IOU = 0.5

# As the published evaluators compute 0:0.1:1. The fourth is 0.30000000000000004, so that a recall of exactly 3/10 falls
# short of it, in the devkit as here.
_ELEVEN_RECALLS = tuple(0.1 * i for i in range(11))

# What a box is wide beyond the difference of its first and last pixel.
_EXTRA: dict[Pixels, float] = {"inclusive": 1.0, "continuous": 0.0}


@dataclass(frozen=True, kw_only=True)
class VocRules:
    """The choices that tell one VOC number from another.

    Attributes:
        average: "11-point" is the mean of the best precision at recalls 0, 0.1, ..., 1, as until VOC 2009; "area" is
            the area under the precision curve made monotone, as from VOC 2010 on.
        pixels: how large a box is whose first and last pixel are xmin and xmax. "inclusive", the devkit's: both pixels
            belong to it, so it is xmax - xmin + 1 wide. "continuous": xmax - xmin, as in evaluators that drop the + 1.
        overlap: the IoU with which an object is found. "at-least" 0.5 is the devkit's; "above" 0.5 is that of the
            Python evaluator that the paper's numbers come from.
    """

    average: Average
    pixels: Pixels = "inclusive"
    overlap: Overlap = "at-least"


VOC2007 = VocRules(average="11-point")
VOC2012 = VocRules(average="area")


@dataclass(frozen=True, kw_only=True, eq=False)
class VocClassResult:
    """One class by itself.

    Attributes:
        label: the class, in 1..class_count.
        AP: average precision; None where there is no object to be found.
        objects: objects to be found.
        difficult: objects that count neither as found nor as missed.
        detections: all, ``right + wrong + passed_over``.
        right, wrong: those that found an object, and the others: at nothing, or at an object that was found before.
        passed_over: those on a difficult object, neither right nor wrong.
        scores: float64[D], of all detections, descending.
        precision, recall: float64[D], of the detections down to each; recall is NaN where there is no object.
    """

    label: int
    AP: float | None
    objects: int
    difficult: int
    detections: int
    right: int
    wrong: int
    passed_over: int
    scores: NDArray[np.float64]
    precision: NDArray[np.float64]
    recall: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class VocResult:
    """The VOC number and what it comes from.

    Attributes:
        mAP: mean AP of the classes that have an object to be found; None where none has.
        per_class: one entry a class, by ascending label.
        pictures: number of pictures scored.
        rules: what it was computed by.
    """

    mAP: float | None
    per_class: tuple[VocClassResult, ...]
    pictures: int
    rules: VocRules


def evaluate_voc(
    truths: Sequence[PictureTruth],
    detections: Sequence[PictureDetections],
    class_count: int,
    *,
    difficult: Sequence[NDArray[np.bool_]],
    rules: VocRules,
) -> VocResult:
    """Score detections against the objects of the same pictures.

    Boxes are edges in pixels, as everywhere here: an annotation of the pixels xmin to xmax, counted from 1, is the box
    from xmin - 1 to xmax. For the overlap, objects and detections alike are taken back to pixels counted from 1, so
    that the numbers are those of the devkit on the annotation as it was written. Its + 1 is in our boxes already;
    ``rules.pixels`` of "continuous" takes it out.

    Args:
        truths: the pictures, in any order.
        detections: one entry for every picture of ``truths`` and none besides, in any order.
        class_count: labels are 1..class_count.
        difficult: bool[N] for each of ``truths``, objects that count neither as found nor as missed. Crowds of
            ``truths``, which VOC does not know, are taken for difficult too.
        rules: see `VocRules`.

    Returns:
        The result, whatever the order of the pictures. Of equal scores that of the lower image id comes first, and in a
        picture the earlier row.

    Raises:
        ValueError: the pictures of the two differ or repeat, a label is out of range, or ``difficult`` does not fit.

    Source: development kit of the PASCAL VOC challenge (Everingham et al.), ``VOCevaldet`` and ``VOCap``.
    Differs: where all detections so far lie on difficult objects, precision is 0 and not 0/0; Matlab's maximum passes
        over these too, unless there is nothing else, when its AP is NaN and ours 0.
    """
    outcomes = match_voc(truths, detections, class_count, difficult=difficult, rules=rules)
    left_out = np.concatenate([np.zeros(0, np.int64), *(t.labels[o] for t, o in zip(truths, difficult, strict=True))])
    crowds = [t.labels[t.crowd & ~o] for t, o in zip(truths, difficult, strict=True)]
    left_out_of = np.bincount(np.concatenate([left_out, *crowds]), minlength=class_count + 1)
    per_class = tuple(
        _class_result(label, matched, int(left_out_of[label]), rules.average)
        for label, matched in enumerate(outcomes, start=1)
    )
    return VocResult(
        mAP=mean_of_classes([c.AP for c in per_class]), per_class=per_class, pictures=len(truths), rules=rules
    )


def match_voc(
    truths: Sequence[PictureTruth],
    detections: Sequence[PictureDetections],
    class_count: int,
    *,
    difficult: Sequence[NDArray[np.bool_]],
    rules: VocRules,
) -> tuple[Outcomes, ...]:
    """Tell what became of every detection; the arguments are those of `evaluate_voc`.

    A detection is compared with one object alone, that of its class and picture with which it overlaps most (the first
    of equals), found before or not.

    Returns:
        the outcomes of each class, by ascending label, at the one overlap that VOC asks for.

    Raises:
        ValueError: as `evaluate_voc`.
    """
    check_pictures(truths, detections, class_count)
    for truth, out in zip(truths, difficult, strict=True):
        if out.shape != truth.labels.shape:
            raise ValueError(
                f"expected difficult [{len(truth.labels)}], got {list(out.shape)} for picture {truth.image_id}"
            )
    left_out = {t.image_id: o | t.crowd for t, o in zip(truths, difficult, strict=True)}
    found_in = {d.image_id: d for d in detections}
    ordered = sorted(truths, key=lambda t: t.image_id)
    pairs = [(t, left_out[t.image_id], found_in[t.image_id]) for t in ordered]
    return tuple(_match_class(pairs, label, rules) for label in range(1, class_count + 1))


def average_precision(
    found: NDArray[np.int64], reported: NDArray[np.int64], objects: NDArray[np.int64], average: Average
) -> NDArray[np.float64]:
    """Compute AP from counts, for B sets of pictures at a time.

    Precision and recall change for the better only where an object is found, so the curve is given there alone.

    Args:
        found: int64[B, H], objects found down to each of H hits, not descending along H.
        reported: int64[B, H], detections that count down to each hit, itself included; 0 only where ``found`` is 0.
        objects: int64[B], objects to be found.
        average: how.

    Returns:
        float64[B] in [0, 1]; NaN where there is no object.
    """
    precision = found / np.maximum(reported, 1)
    best_after = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]  # [B, H]
    recall = found / np.maximum(objects, 1)[:, None]
    if average == "area":
        values = (np.diff(recall, axis=1, prepend=0.0) * best_after).sum(axis=1)
    else:
        values = np.zeros(len(found))
        padded = np.pad(best_after, ((0, 0), (0, 1)))  # a recall that is not reached has precision 0
        rows = np.arange(len(found))
        for least in _ELEVEN_RECALLS:
            values += padded[rows, (recall < least).sum(axis=1)] / 11
    return np.where(objects > 0, values, np.nan)


def mean_of_classes(values: Sequence[float | None]) -> float | None:
    """Average the classes that have a number; None where none has."""
    present = [value for value in values if value is not None]
    return float(np.mean(present)) if present else None


def _match_class(
    pairs: Sequence[tuple[PictureTruth, NDArray[np.bool_], PictureDetections]], label: int, rules: VocRules
) -> Outcomes:
    """Match the detections of one class; objects are numbered through all pictures."""
    picture: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
    scores, best, overlap = [np.zeros(0)], [np.zeros(0, np.int64)], [np.zeros(0)]
    left_out, counts = [np.zeros(0, np.bool_)], np.zeros(len(pairs), dtype=np.int64)
    total = 0
    for place, (truth, out, found) in enumerate(pairs):
        mine, theirs = truth.labels == label, found.labels == label
        if not mine.any() and not theirs.any():
            continue
        values = _overlaps(found.boxes[theirs], truth.boxes[mine], rules.pixels)  # [D, N]
        # A first column of nothing keeps the maximum defined where there is no object.
        values = np.pad(values, ((0, 0), (1, 0)))
        nearest = values.argmax(axis=1)
        picture.append(np.full(len(values), place))
        scores.append(found.scores[theirs].astype(np.float64))
        best.append(total + nearest - 1)
        overlap.append(values[np.arange(len(values)), nearest])
        left_out.append(out[mine])
        counts[place] = np.count_nonzero(mine & ~out)
        total += int(mine.sum())
    all_scores = np.concatenate(scores)
    order = np.argsort(-all_scores, kind="stable")
    nearest, reached = np.concatenate(best)[order], np.concatenate(overlap)[order]
    hit = reached >= IOU if rules.overlap == "at-least" else reached > IOU
    ignored = np.zeros(len(hit), dtype=np.bool_)
    ignored[hit] = np.concatenate(left_out)[nearest[hit]]
    right = np.zeros(len(hit), dtype=np.bool_)
    candidates = np.flatnonzero(hit & ~ignored)
    # Who comes first takes the object; the others are second findings.
    right[candidates[np.unique(nearest[candidates], return_index=True)[1]]] = True
    return Outcomes(
        picture=np.concatenate(picture)[order],
        scores=all_scores[order],
        right=right[None],
        counted=~ignored[None],
        objects=counts,
    )


def _overlaps(boxes: NDArray[np.floating[Any]], objects: NDArray[np.float64], pixels: Pixels) -> NDArray[np.float64]:
    """Compute float64[D, N], the IoU of boxes given by their edges; 0 where they do not meet."""
    extra = _EXTRA[pixels]
    (left, top), (right, bottom) = boxes.astype(np.float64).T[:2, :, None] + 1, boxes.astype(np.float64).T[2:, :, None]
    (xmin, ymin), (xmax, ymax) = objects.T[:2, None] + 1, objects.T[2:, None]
    width = np.minimum(right, xmax) - np.maximum(left, xmin) + extra
    height = np.minimum(bottom, ymax) - np.maximum(top, ymin) + extra
    shared = np.maximum(width, 0.0) * np.maximum(height, 0.0)
    both = (right - left + extra) * (bottom - top + extra) + (xmax - xmin + extra) * (ymax - ymin + extra) - shared
    values: NDArray[np.float64] = np.divide(shared, both, out=np.zeros_like(shared), where=shared > 0)
    return values


def _class_result(label: int, matched: Outcomes, difficult: int, average: Average) -> VocClassResult:
    right, counted = matched.right[0], matched.counted[0]
    found, reported = np.cumsum(right), np.cumsum(counted)
    objects = np.array([matched.objects.sum()])
    ap = float(average_precision(found[None, right], reported[None, right], objects, average)[0])
    return VocClassResult(
        label=label,
        AP=ap if objects[0] else None,
        objects=int(objects[0]),
        difficult=difficult,
        detections=len(right),
        right=int(right.sum()),
        wrong=int((counted & ~right).sum()),
        passed_over=int((~counted).sum()),
        scores=matched.scores,
        precision=found / np.maximum(reported, 1),
        recall=found / objects[0] if objects[0] else np.full(len(found), np.nan),
    )

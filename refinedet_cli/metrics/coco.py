"""The COCO detection metric on arrays, computed by pycocotools itself."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.cocoeval import COCOeval

from refinedet_cli.metrics.outcomes import Outcomes

# Places in pycocotools' arrays: area ranges, at most 1, 10 and 100 detections, IoU 0.5 and 0.75; and how many IoUs.
_ALL_AREAS, _SMALL, _MEDIUM, _LARGE = 0, 1, 2, 3
_MAX_1, _MAX_10, _MAX_100 = 0, 1, 2
_IOU_50, _IOU_75, _IOUS = 0, 5, 10

# Best detections of a class in a picture that count.
MAX_DETECTIONS = 100


@dataclass(frozen=True, eq=False)
class PictureTruth:
    """The objects of one picture.

    pycocotools overwrites an ``ignore`` key with ``iscrowd``, so crowd is the only flag that the COCO metric knows: an
    object that VOC calls difficult counts like any other.

    Attributes:
        image_id: unique among the pictures; ties between scores of two pictures are ordered by it.
        boxes: float64[N, 4], xyxy, px-img.
        labels: int64[N], in 1..class_count.
        areas: float64[N], px-img squared; decides between small, medium and large. A mask's area where there is one.
        crowd: bool[N]; a crowd region is not looked for, and any number of detections may lie in it unpunished.
    """

    image_id: int
    boxes: NDArray[np.float64]
    labels: NDArray[np.int64]
    areas: NDArray[np.float64]
    crowd: NDArray[np.bool_]

    def __post_init__(self) -> None:
        count = _check_boxes(self.boxes, self.image_id)
        for name in ("labels", "areas", "crowd"):
            _check_shape(getattr(self, name), name, count, self.image_id)
        _check_finite(self.areas, "areas", self.image_id)


@dataclass(frozen=True, eq=False)
class PictureDetections:
    """What was found in one picture, in any order; of equal scores the first counts as the better.

    Attributes:
        image_id: that of the picture's `PictureTruth`.
        boxes: float[N, 4], xyxy, px-img.
        scores: float[N].
        labels: int64[N], in 1..class_count.
    """

    image_id: int
    boxes: NDArray[np.floating[Any]]
    scores: NDArray[np.floating[Any]]
    labels: NDArray[np.int64]

    def __post_init__(self) -> None:
        count = _check_boxes(self.boxes, self.image_id)
        for name in ("scores", "labels"):
            _check_shape(getattr(self, name), name, count, self.image_id)
        _check_finite(self.scores, "scores", self.image_id)


@dataclass(frozen=True, kw_only=True)
class ClassResult:
    """One class by itself; None where the class has no object to be found.

    Attributes:
        label: the class, in 1..class_count.
        AP, AP50, AP75: average precision over IoU 0.50 to 0.95, at 0.50 and at 0.75.
        AR100: the largest recall with 100 detections a picture, averaged over IoU.
        objects: objects to be found (crowds are none).
        detections: all detections of the class, counted or not.
    """

    label: int
    AP: float | None
    AP50: float | None
    AP75: float | None
    AR100: float | None
    objects: int
    detections: int


@dataclass(frozen=True, kw_only=True, eq=False)
class CocoResult:
    """The twelve numbers of the COCO metric and what they come from; None where no object is of that kind.

    Attributes:
        AP, AP50, AP75: mean average precision over IoU 0.50 to 0.95, at 0.50 and at 0.75, of the best 100 detections of
            each class in each picture.
        AP_small, AP_medium, AP_large: AP of objects below 32^2, from 32^2 to 96^2 and above 96^2 px-img.
        AR1, AR10, AR100: mean largest recall with the best so many detections of each class in each picture.
        AR_small, AR_medium, AR_large: AR100 by the size of objects.
        per_class: one entry a class, by ascending label.
        pictures: number of pictures scored.
        precision: float64[T, R, K, A, M], at 10 IoUs, 101 recalls, K classes, 4 area ranges and 3 limits; -1 is "no
            object".
        recall: float64[T, K, A, M].
        scores: float64[T, R, K, A, M], the score at which each precision was reached.
    """

    AP: float | None
    AP50: float | None
    AP75: float | None
    AP_small: float | None
    AP_medium: float | None
    AP_large: float | None
    AR1: float | None
    AR10: float | None
    AR100: float | None
    AR_small: float | None
    AR_medium: float | None
    AR_large: float | None
    per_class: tuple[ClassResult, ...]
    pictures: int
    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    scores: NDArray[np.float64]


def evaluate_coco(
    truths: Sequence[PictureTruth], detections: Sequence[PictureDetections], class_count: int
) -> CocoResult:
    """Score detections against the objects of the same pictures.

    Args:
        truths: the pictures, in any order.
        detections: one entry for every picture of ``truths`` and none besides, in any order.
        class_count: labels are 1..class_count.

    Returns:
        The result, whatever the order of the pictures, equal to the bit to that of ``pycocotools`` on the same boxes in
        JSON files whose annotation ids start at 1 (it takes an object with id 0 for one that is never found).

    Raises:
        ValueError: the pictures of the two differ or repeat, or a label is out of range.

    Source: Lin et al., Microsoft COCO (arXiv:1405.0312), and its evaluation page; pycocotools ``COCOeval``.
    """
    evaluator = _evaluator(truths, detections, class_count)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints what it does
        evaluator.evaluate()
        evaluator.accumulate()
    arrays = evaluator.eval
    return assemble(truths, detections, class_count, arrays["precision"], arrays["recall"], arrays["scores"])


def assemble(
    truths: Sequence[PictureTruth],
    detections: Sequence[PictureDetections],
    class_count: int,
    precision: NDArray[np.float64],
    recall: NDArray[np.float64],
    scores: NDArray[np.float64],
) -> CocoResult:
    """Sum up the three arrays that the COCO metric comes to, whoever computed them.

    Args:
        truths: as for `evaluate_coco`.
        detections: as for `evaluate_coco`.
        class_count: labels are 1..class_count.
        precision: as in `CocoResult`.
        recall: as in `CocoResult`.
        scores: as in `CocoResult`.

    Returns:
        the result; its twelve numbers are to the bit those that ``pycocotools`` prints for these arrays.
    """
    counted = np.concatenate([np.zeros(0, np.int64), *(t.labels[~t.crowd] for t in truths)])
    reported = np.concatenate([np.zeros(0, np.int64), *(d.labels for d in detections)])
    objects_of = np.bincount(counted, minlength=class_count + 1)
    detections_of = np.bincount(reported, minlength=class_count + 1)
    best = precision[:, :, :, _ALL_AREAS, _MAX_100]  # [T, R, K]
    return CocoResult(
        AP=_mean(best),
        AP50=_mean(best[_IOU_50]),
        AP75=_mean(best[_IOU_75]),
        AP_small=_mean(precision[:, :, :, _SMALL, _MAX_100]),
        AP_medium=_mean(precision[:, :, :, _MEDIUM, _MAX_100]),
        AP_large=_mean(precision[:, :, :, _LARGE, _MAX_100]),
        AR1=_mean(recall[:, :, _ALL_AREAS, _MAX_1]),
        AR10=_mean(recall[:, :, _ALL_AREAS, _MAX_10]),
        AR100=_mean(recall[:, :, _ALL_AREAS, _MAX_100]),
        AR_small=_mean(recall[:, :, _SMALL, _MAX_100]),
        AR_medium=_mean(recall[:, :, _MEDIUM, _MAX_100]),
        AR_large=_mean(recall[:, :, _LARGE, _MAX_100]),
        per_class=tuple(
            _class_result(label, precision, recall, int(objects_of[label]), int(detections_of[label]))
            for label in range(1, class_count + 1)
        ),
        pictures=len(truths),
        precision=precision,
        recall=recall,
        scores=scores,
    )


def match_coco(
    truths: Sequence[PictureTruth], detections: Sequence[PictureDetections], class_count: int
) -> tuple[Outcomes, ...]:
    """Tell what became of the detections that AP, AP50 and AP75 are computed from: all areas, at most 100.

    Args:
        truths: as for `evaluate_coco`.
        detections: as for `evaluate_coco`.
        class_count: labels are 1..class_count.

    Returns:
        the outcomes of each class, by ascending label, at the 10 IoUs from 0.50 to 0.95; in the order in which
        ``pycocotools`` goes through them, so that `evaluate_coco`'s precision follows from them to the bit.

    Raises:
        ValueError: the pictures of the two differ or repeat, or a label is out of range.
    """
    evaluator = _evaluator(truths, detections, class_count)
    params = evaluator.params
    params.areaRng, params.areaRngLbl, params.maxDets = [params.areaRng[_ALL_AREAS]], ["all"], [MAX_DETECTIONS]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator.evaluate()
    places, count = {int(image_id): i for i, image_id in enumerate(params.imgIds)}, len(truths)
    matched: list[dict[str, Any] | None] = evaluator.evalImgs  # class by class, of each class all pictures
    return tuple(
        _outcomes([m for m in matched[k * count : (k + 1) * count] if m is not None], places)
        for k in range(class_count)
    )


def _outcomes(matched: list[dict[str, Any]], places: dict[int, int]) -> Outcomes:
    """Join what pycocotools says of the pictures that have objects or detections of one class."""
    scores = np.concatenate([np.zeros(0), *(m["dtScores"] for m in matched)])
    found = np.concatenate([np.zeros((_IOUS, 0), bool), *(m["dtMatches"] > 0 for m in matched)], axis=1)
    ignored = np.concatenate([np.zeros((_IOUS, 0), bool), *(m["dtIgnore"] for m in matched)], axis=1)
    of_picture = [places[int(m["image_id"])] for m in matched]
    objects = np.zeros(len(places), dtype=np.int64)
    objects[of_picture] = [np.count_nonzero(m["gtIgnore"] == 0) for m in matched]
    order = np.argsort(-scores, kind="stable")
    return Outcomes(
        picture=np.repeat(np.array(of_picture, dtype=np.int64), [len(m["dtScores"]) for m in matched])[order],
        scores=scores[order],
        right=(found & ~ignored)[:, order],
        counted=~ignored[:, order],
        objects=objects,
    )


def check_pictures(truths: Sequence[PictureTruth], detections: Sequence[PictureDetections], class_count: int) -> None:
    """Refuse what cannot be scored.

    Raises:
        ValueError: the pictures of the two differ or repeat, or a label is not in 1..class_count.
    """
    expected, received = {t.image_id for t in truths}, {d.image_id for d in detections}
    if len(expected) != len(truths) or len(received) != len(detections):
        raise ValueError("a picture appears twice")
    if expected != received:
        raise ValueError(f"pictures {sorted(expected ^ received)[:5]} are in one of truths and detections, not in both")
    for picture in truths:
        _check_labels(picture.labels, picture.image_id, class_count)
    for found in detections:
        _check_labels(found.labels, found.image_id, class_count)


def _evaluator(truths: Sequence[PictureTruth], detections: Sequence[PictureDetections], class_count: int) -> COCOeval:
    check_pictures(truths, detections, class_count)
    return COCOeval(
        _Index([t.image_id for t in truths], class_count, _truth_entries(truths)),
        _Index([d.image_id for d in detections], class_count, _detection_entries(detections)),
        iouType="bbox",
    )


class _Index:
    """The part of ``pycocotools.coco.COCO`` that COCOeval reads, without its file, its prints and its copies."""

    def __init__(self, image_ids: Sequence[int], class_count: int, entries: list[dict[str, Any]]) -> None:
        self._image_ids = list(image_ids)
        self._category_ids = list(range(1, class_count + 1))
        self._entries = entries

    def getImgIds(self) -> list[int]:
        return self._image_ids

    def getCatIds(self) -> list[int]:
        return self._category_ids

    def getAnnIds(self, imgIds: Sequence[int], catIds: Sequence[int]) -> range:
        """All entries: the pictures and classes that COCOeval asks for are those it got from here."""
        return range(len(self._entries))

    def loadAnns(self, ids: range) -> list[dict[str, Any]]:
        return [self._entries[i] for i in ids]


def _truth_entries(truths: Sequence[PictureTruth]) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for truth in truths:
        rows = zip(_xywh(truth.boxes), truth.labels.tolist(), truth.areas.tolist(), truth.crowd.tolist(), strict=True)
        for box, label, area, crowd in rows:
            entry = {"image_id": truth.image_id, "category_id": label, "bbox": box, "area": area}
            entries.append({"id": len(entries) + 1, "iscrowd": int(crowd), **entry})
    return entries


def _detection_entries(detections: Sequence[PictureDetections]) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for found in detections:
        rows = zip(_xywh(found.boxes), found.labels.tolist(), found.scores.tolist(), strict=True)
        for box, label, score in rows:
            entry = {"image_id": found.image_id, "category_id": label, "bbox": box, "area": box[2] * box[3]}
            entries.append({"id": len(entries) + 1, "score": score, **entry})
    return entries


def _xywh(boxes: NDArray[np.floating[Any]]) -> list[list[float]]:
    wide = boxes.astype(np.float64)
    rows: list[list[float]] = np.concatenate([wide[:, :2], wide[:, 2:] - wide[:, :2]], axis=1).tolist()
    return rows


def _class_result(
    label: int, precision: NDArray[np.float64], recall: NDArray[np.float64], objects: int, detections: int
) -> ClassResult:
    curves = precision[:, :, label - 1, _ALL_AREAS, _MAX_100]  # [T, R]
    return ClassResult(
        label=label,
        AP=_mean(curves),
        AP50=_mean(curves[_IOU_50]),
        AP75=_mean(curves[_IOU_75]),
        AR100=_mean(recall[:, label - 1, _ALL_AREAS, _MAX_100]),
        objects=objects,
        detections=detections,
    )


def _mean(values: NDArray[np.float64]) -> float | None:
    present = values[values > -1]
    return float(present.mean()) if present.size else None


def _check_boxes(boxes: NDArray[Any], image_id: int) -> int:
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"expected boxes [N, 4], got {list(boxes.shape)} for picture {image_id}")
    _check_finite(boxes, "boxes", image_id)
    return len(boxes)


def _check_shape(values: NDArray[Any], name: str, count: int, image_id: int) -> None:
    if values.shape != (count,):
        raise ValueError(f"expected {name} [{count}], got {list(values.shape)} for picture {image_id}")


def _check_finite(values: NDArray[Any], name: str, image_id: int) -> None:
    if not np.isfinite(values).all():
        raise ValueError(f"{name} of picture {image_id} hold a value that is not finite")


def _check_labels(labels: NDArray[np.int64], image_id: int, class_count: int) -> None:
    wrong = labels[(labels < 1) | (labels > class_count)]
    if len(wrong):
        raise ValueError(f"label {wrong[0]} of picture {image_id} is not in 1..{class_count}")

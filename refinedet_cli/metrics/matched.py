"""Which detection found which object, at one IoU threshold: what error kinds and curves are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask

from refinedet_cli.metrics.coco import MAX_DETECTIONS, PictureDetections, PictureTruth


class Objects(NamedTuple):
    """The objects of all pictures, N in all.

    Attributes:
        picture: int64[N], place of the picture in the sequence that was matched.
        boxes: float64[N, 4], xyxy, px-img.
        labels: int64[N].
        areas: float64[N], px-img squared.
        ignored: bool[N], crowds, and what the caller left out of the count.
        found_by: int64[N], the detection that found it, or -1.
    """

    picture: NDArray[np.int64]
    boxes: NDArray[np.float64]
    labels: NDArray[np.int64]
    areas: NDArray[np.float64]
    ignored: NDArray[np.bool_]
    found_by: NDArray[np.int64]


class Matched(NamedTuple):
    """The detections of all pictures, D in all, by descending score; of equal scores in the order of the pictures.

    Attributes:
        picture: int64[D], place of the picture in the sequence that was matched.
        boxes: float64[D, 4], xyxy, px-img.
        labels: int64[D].
        scores: float64[D].
        target: int64[D], the object it found, or -1.
        ignored: bool[D], neither right nor wrong: it found an object that does not count.
        objects: what was to be found.
    """

    picture: NDArray[np.int64]
    boxes: NDArray[np.float64]
    labels: NDArray[np.int64]
    scores: NDArray[np.float64]
    target: NDArray[np.int64]
    ignored: NDArray[np.bool_]
    objects: Objects

    @property
    def right(self) -> NDArray[np.bool_]:
        """bool[D]: found an object that counts."""
        return (self.target >= 0) & ~self.ignored


def match_pictures(
    truths: Sequence[PictureTruth],
    detections: Sequence[PictureDetections],
    *,
    iou: float = 0.5,
    left_out: Sequence[NDArray[np.bool_]] | None = None,
) -> Matched:
    """Match the detections of each class and picture to its objects, best score first, as the COCO metric does.

    Args:
        truths: the pictures.
        detections: those of the same pictures, in the same order.
        iou: overlap from which an object counts as found.
        left_out: for each picture bool[N], objects that count neither as found nor as missed, besides crowds.

    Returns:
        `Matched`, holding at most `MAX_DETECTIONS` of a class and picture. An object that counts has at most one
        detection; one that does not may swallow many only if it is a crowd.

    Raises:
        ValueError: the pictures of the two differ.

    Source: pycocotools ``COCOeval.evaluateImg``, area range "all".
    """
    if [t.image_id for t in truths] != [d.image_id for d in detections]:
        raise ValueError("truths and detections are not of the same pictures in the same order")
    firsts = np.cumsum([0, *(len(t.labels) for t in truths)])
    places: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
    boxes: list[NDArray[np.floating[Any]]] = [np.zeros((0, 4))]
    labels: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
    scores: list[NDArray[np.floating[Any]]] = [np.zeros(0)]
    targets: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
    ignored = np.concatenate([np.zeros(0, bool), *(t.crowd for t in truths)])
    if left_out is not None:
        ignored |= np.concatenate([np.zeros(0, bool), *left_out])
    for place, (truth, found) in enumerate(zip(truths, detections, strict=True)):
        out = ignored[firsts[place] : firsts[place + 1]]
        for label in np.unique(found.labels):
            chosen = np.flatnonzero(found.labels == label)
            chosen = chosen[np.argsort(-found.scores[chosen], kind="stable")][:MAX_DETECTIONS]
            mine = np.flatnonzero(truth.labels == label)
            hits = _match(found.boxes[chosen], truth.boxes[mine], truth.crowd[mine], out[mine], iou)
            targets.append(np.where(hits >= 0, firsts[place] + np.append(mine, 0)[hits], -1))
            places.append(np.full(len(chosen), place))
            boxes.append(found.boxes[chosen])
            labels.append(found.labels[chosen])
            scores.append(found.scores[chosen])
    order = np.argsort(-np.concatenate(scores), kind="stable")
    target = np.concatenate(targets)[order]
    found_by = np.full(firsts[-1], -1, dtype=np.int64)
    for rank in np.flatnonzero(target >= 0)[::-1]:
        found_by[target[rank]] = rank
    objects = Objects(
        picture=np.repeat(np.arange(len(truths)), [len(t.labels) for t in truths]),
        boxes=np.concatenate([np.zeros((0, 4)), *(t.boxes for t in truths)]),
        labels=np.concatenate([np.zeros(0, np.int64), *(t.labels for t in truths)]),
        areas=np.concatenate([np.zeros(0), *(t.areas for t in truths)]),
        ignored=ignored,
        found_by=found_by,
    )
    return Matched(
        picture=np.concatenate(places)[order],
        boxes=np.concatenate(boxes)[order],
        labels=np.concatenate(labels)[order],
        scores=np.concatenate(scores)[order],
        target=target,
        ignored=(target >= 0) & np.append(ignored, False)[target],
        objects=objects,
    )


def overlaps(
    boxes: NDArray[np.floating[Any]], others: NDArray[np.floating[Any]], crowd: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Compute IoU as the COCO metric does.

    Args:
        boxes: float[D, 4], xyxy, of detections.
        others: float[N, 4], xyxy, of objects.
        crowd: bool[N]; the overlap with a crowd is the part of the detection that lies in it.

    Returns:
        float64[D, N].
    """
    if not len(boxes) or not len(others):
        return np.zeros((len(boxes), len(others)))
    values: NDArray[np.float64] = mask.iou(_xywh(boxes), _xywh(others), crowd.astype(np.uint8))
    return values


def _match(
    boxes: NDArray[np.floating[Any]],
    objects: NDArray[np.floating[Any]],
    crowd: NDArray[np.bool_],
    ignored: NDArray[np.bool_],
    iou: float,
) -> NDArray[np.int64]:
    """The object of each detection, best first, or -1; of equal overlaps the later object, as in pycocotools."""
    hits = np.full(len(boxes), -1, dtype=np.int64)
    if not len(objects) or not len(boxes):
        return hits
    values = overlaps(boxes, objects, crowd)
    values[values < min(iou, 1 - 1e-10)] = -1.0
    free = np.ones(len(objects), dtype=bool)
    for i in np.flatnonzero(values.max(axis=1) >= 0):
        for group in (~ignored & free, ignored & (free | crowd)):
            open_values = np.where(group, values[i], -1.0)
            if open_values.max() >= 0:
                hits[i] = len(open_values) - 1 - int(open_values[::-1].argmax())
                free[hits[i]] = False
                break
    return hits


def _xywh(boxes: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    wide = np.asarray(boxes, dtype=np.float64)
    return np.concatenate([wide[:, :2], wide[:, 2:] - wide[:, :2]], axis=1)

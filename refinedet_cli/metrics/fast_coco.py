"""The COCO detection metric by hotcoco, over a hundred times as fast as pycocotools and equal to it to the bit.

It is used only where it proves that it is equal, on the machine and with the versions at hand.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refinedet_cli.metrics.coco import (
    CocoResult,
    PictureDetections,
    PictureTruth,
    assemble,
    check_pictures,
    evaluate_coco,
)

_PROBES = 24


def evaluate_coco_fast(
    truths: Sequence[PictureTruth], detections: Sequence[PictureDetections], class_count: int
) -> CocoResult:
    """Score detections as `evaluate_coco` does, with the same arguments, result and errors.

    Raises:
        ModuleNotFoundError: hotcoco, the extra "fast-eval", is not installed.
    """
    from hotcoco import COCO, COCOeval

    check_pictures(truths, detections, class_count)
    ids, labels, boxes = _columns(truths)
    wanted = COCO.from_arrays(
        [{"id": int(t.image_id)} for t in truths],
        [{"id": label, "name": str(label)} for label in range(1, class_count + 1)],
        ids,
        labels,
        boxes,
        area=np.concatenate([np.zeros(0), *(t.areas for t in truths)]),
        iscrowd=np.concatenate([np.zeros(0, np.bool_), *(t.crowd for t in truths)]),
    )
    ids, labels, boxes = _columns(detections)
    scores = np.concatenate([np.zeros(0), *(d.scores for d in detections)])
    found = wanted.load_res(np.column_stack([ids, boxes, scores, labels]).astype(np.float64))
    evaluator = COCOeval(wanted, found, "bbox")
    evaluator.evaluate()
    evaluator.accumulate()
    arrays: Any = evaluator.eval
    return assemble(
        truths, detections, class_count, *(np.asarray(arrays[name]) for name in ("precision", "recall", "scores"))
    )


def is_installed() -> bool:
    """Tell whether hotcoco is there."""
    return importlib.util.find_spec("hotcoco") is not None


@lru_cache(maxsize=1)
def distrust() -> str | None:
    """Say why the fast engine is not to be used here: it is not installed, or gives other numbers than pycocotools.

    Returns:
        None where it gave equal arrays on every one of a set of random cases with ties, crowds and empty pictures.
    """
    if not is_installed():
        return "hotcoco is not installed; pip install 'refinedet[fast-eval]'"
    for seed in range(_PROBES):
        truths, detections = probe(seed)
        slow, fast = evaluate_coco(truths, detections, 3), evaluate_coco_fast(truths, detections, 3)
        for name in ("precision", "recall", "scores"):
            expected, got = getattr(slow, name), getattr(fast, name)
            if expected.shape != got.shape or expected.tobytes() != got.tobytes():
                return f"hotcoco {version('hotcoco')} computes another {name} than pycocotools {version('pycocotools')}"
    return None


def probe(seed: int) -> tuple[list[PictureTruth], list[PictureDetections]]:
    """Make a small case of three classes in which ties of score and of overlap, crowds and empty pictures are common.

    Args:
        seed: another gives another case.
    """
    draw = np.random.default_rng(seed)
    truths, detections = [], []
    for image_id in range(1, 6):
        wanted, boxes = _drawn_boxes(draw, int(draw.integers(0, 8)))
        crowd = draw.random(len(wanted)) < 0.15
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) * draw.choice([1.0, 0.6], len(wanted))
        truths.append(PictureTruth(image_id, boxes, wanted, areas, crowd))
        labels, boxes = _drawn_boxes(draw, int(draw.choice([0, 5, 20, 140])))
        detections.append(PictureDetections(image_id, boxes, draw.integers(1, 9, len(labels)) / 9, labels))
    return truths, detections


def _drawn_boxes(draw: np.random.Generator, count: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    corner = draw.integers(0, 8, (count, 2)) * 15.0
    side = draw.choice([8.0, 20.0, 31.0, 33.0, 60.0, 97.0], (count, 2))
    return draw.integers(1, 4, count), np.concatenate([corner, corner + side], axis=1)


def _columns(
    pictures: Sequence[PictureTruth] | Sequence[PictureDetections],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Join the pictures' image ids, labels and boxes (xywh)."""
    ids: list[Any] = [np.full(len(p.labels), p.image_id, np.int64) for p in pictures]
    boxes = np.concatenate([np.zeros((0, 4)), *(p.boxes for p in pictures)])
    boxes[:, 2:] -= boxes[:, :2]
    return (
        np.concatenate([np.zeros(0, np.int64), *ids]),
        np.concatenate([np.zeros(0, np.int64), *(p.labels for p in pictures)]),
        boxes,
    )

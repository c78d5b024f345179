from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from refinedet_cli.metrics.coco import CocoResult, PictureDetections, PictureTruth, evaluate_coco

NAMES = (
    "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
    "AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large",
)  # fmt: skip


def truth(image_id: int, *rows: tuple[float, ...], crowd: tuple[bool, ...] | None = None) -> PictureTruth:
    """Rows are (label, x1, y1, x2, y2)."""
    table = np.array(rows, dtype=np.float64).reshape(-1, 5)
    boxes = table[:, 1:]
    return PictureTruth(
        image_id=image_id,
        boxes=boxes,
        labels=table[:, 0].astype(np.int64),
        areas=(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]),
        crowd=np.array(crowd if crowd is not None else [False] * len(table), dtype=np.bool_),
    )


def found(image_id: int, *rows: tuple[float, ...]) -> PictureDetections:
    """Rows are (label, score, x1, y1, x2, y2)."""
    table = np.array(rows, dtype=np.float64).reshape(-1, 6)
    return PictureDetections(
        image_id=image_id, boxes=table[:, 2:], scores=table[:, 1], labels=table[:, 0].astype(np.int64)
    )


def close(actual: object, expected: object) -> None:
    np.testing.assert_allclose(np.array(actual, dtype=np.float64), np.array(expected), rtol=0, atol=1e-12)


def summary(result: CocoResult) -> dict[str, float | None]:
    return {name: getattr(result, name) for name in NAMES}


def random_case(
    seed: int, *, pictures: int = 6, classes: int = 3
) -> tuple[list[PictureTruth], list[PictureDetections]]:
    """Jittered copies of the objects and stray boxes, with tied scores, crowds, all sizes, and empty pictures."""
    draw = np.random.default_rng(seed)
    truths, detections = [], []
    for image_id in draw.permutation(1000)[:pictures].tolist():
        count = int(draw.integers(0, 8)) if draw.random() > 0.2 else 0
        corner = draw.integers(0, 200, (count, 2)).astype(np.float64)
        size = draw.choice([8, 20, 31, 32, 33, 60, 96, 97, 150], (count, 2)).astype(np.float64)
        boxes = np.concatenate([corner, corner + size], axis=1)
        labels = draw.integers(1, classes + 1, count)
        shrunk = draw.choice([1.0, 0.6], count)  # as a mask's area is
        crowd = draw.random(count) < 0.15
        truths.append(PictureTruth(image_id, boxes, labels, size.prod(axis=1) * shrunk, crowd))

        copies = np.repeat(np.arange(count), draw.integers(0, 4, count)) if count else np.zeros(0, np.int64)
        near = boxes[copies] + draw.choice([0.0, 1.0, -2.0, 5.5], (len(copies), 4))
        stray = draw.uniform(0, 100, (int(draw.integers(0, 5)), 4))
        stray[:, 2:] += stray[:, :2] + 1
        everything = np.concatenate([near, stray]) if draw.random() > 0.1 else np.zeros((0, 4))
        kinds = np.concatenate([labels[copies], draw.integers(1, classes + 1, len(stray))])[: len(everything)]
        scores = draw.choice([0.1, 0.3, 0.5, 0.5000001, 0.9], len(everything))
        detections.append(PictureDetections(image_id, everything, scores, kinds))
    return truths, detections


def crowded_case(seed: int) -> tuple[list[PictureTruth], list[PictureDetections]]:
    """More than 100 detections of one class in a picture, so that all three limits on their number bite."""
    draw = np.random.default_rng(seed)
    corner = draw.integers(0, 600, (130, 2)).astype(np.float64)
    boxes = np.concatenate([corner, corner + 30], axis=1)
    labels = np.ones(130, dtype=np.int64)
    crowd = np.zeros(130, dtype=np.bool_)
    objects = PictureTruth(7, boxes, labels, np.full(130, 900.0), crowd)
    return [objects], [PictureDetections(7, boxes + draw.normal(0, 3, (130, 4)), draw.random(130), labels)]


def official(
    truths: list[PictureTruth], detections: list[PictureDetections], classes: int, folder: Path
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What pycocotools says of the same boxes when they come from files, in the order of the picture ids."""
    truths = sorted(truths, key=lambda t: t.image_id)
    detections = sorted(detections, key=lambda d: d.image_id)
    annotations = []
    for t in truths:
        for (x1, y1, x2, y2), label, area, crowd in zip(t.boxes.tolist(), t.labels, t.areas, t.crowd, strict=True):
            box = [x1, y1, x2 - x1, y2 - y1]
            annotations.append({"id": len(annotations) + 1, "image_id": t.image_id, "category_id": int(label)})
            annotations[-1].update(bbox=box, area=float(area), iscrowd=int(crowd))
    results = []
    for d in detections:
        for (x1, y1, x2, y2), label, score in zip(d.boxes.tolist(), d.labels, d.scores.tolist(), strict=True):
            box = [x1, y1, x2 - x1, y2 - y1]
            results.append({"image_id": d.image_id, "category_id": int(label), "bbox": box, "score": score})
    document = {
        "info": {},
        "images": [{"id": t.image_id} for t in truths],
        "categories": [{"id": i, "name": str(i)} for i in range(1, classes + 1)],
        "annotations": annotations,
    }
    (folder / "truth.json").write_text(json.dumps(document))
    (folder / "found.json").write_text(json.dumps(results))
    with contextlib.redirect_stdout(io.StringIO()):
        data = COCO(str(folder / "truth.json"))
        if results:
            predictions = data.loadRes(str(folder / "found.json"))
        else:  # loadRes trips over an empty list
            predictions = COCO()
            predictions.dataset = {**document, "annotations": []}
            predictions.createIndex()
        evaluator = COCOeval(data, predictions, "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator.stats, evaluator.eval["precision"], evaluator.eval["recall"], evaluator.eval["scores"]


def check_equal(truths: list[PictureTruth], detections: list[PictureDetections], classes: int, folder: Path) -> None:
    ours = evaluate_coco(truths, detections, classes)
    stats, precision, recall, scores = official(truths, detections, classes, folder)
    assert [-1.0 if v is None else v for v in summary(ours).values()] == stats.tolist()
    np.testing.assert_array_equal(ours.precision, precision)
    np.testing.assert_array_equal(ours.recall, recall)
    np.testing.assert_array_equal(ours.scores, scores)


@pytest.mark.parametrize("seed", range(40))
def test_equal_to_pycocotools_through_files(seed: int, tmp_path: Path) -> None:
    truths, detections = random_case(seed)
    check_equal(truths, detections, 3, tmp_path)


@pytest.mark.parametrize("seed", range(2))
def test_equal_to_pycocotools_beyond_100_detections(seed: int, tmp_path: Path) -> None:
    truths, detections = crowded_case(seed)
    check_equal(truths, detections, 1, tmp_path)


def test_random_cases_cover_what_they_promise() -> None:
    cases = [random_case(seed) for seed in range(40)]
    truths = [t for case in cases for t in case[0]]
    detections = [d for case in cases for d in case[1]]
    assert any(t.crowd.any() for t in truths)
    assert any(len(t.labels) == 0 for t in truths)
    assert any(len(d.scores) == 0 for d in detections)
    assert any(len(set(d.scores.tolist())) < len(d.scores) for d in detections)
    results = [evaluate_coco(*case, 3) for case in cases]
    assert len({r.AP for r in results}) > 30
    assert {r.AP_large is None for r in results} == {True, False}


@pytest.mark.parametrize("seed", range(5))
def test_order_of_pictures_does_not_matter(seed: int) -> None:
    truths, detections = random_case(seed, pictures=12)
    draw = np.random.default_rng(seed)
    shuffled = evaluate_coco(
        [truths[i] for i in draw.permutation(12)], [detections[i] for i in draw.permutation(12)], 3
    )
    plain = evaluate_coco(truths, detections, 3)
    assert summary(shuffled) == summary(plain)
    assert shuffled.per_class == plain.per_class
    np.testing.assert_array_equal(shuffled.scores, plain.scores)


def test_perfect_detections_score_one() -> None:
    truths = [truth(1, (1, 0, 0, 20, 20), (2, 50, 50, 100, 100)), truth(2, (1, 0, 0, 200, 200)), truth(3)]
    detections = [
        found(1, (1, 0.9, 0, 0, 20, 20), (2, 0.8, 50, 50, 100, 100)),
        found(2, (1, 0.7, 0, 0, 200, 200)),
        found(3),
    ]
    result = evaluate_coco(truths, detections, 2)
    close(result.AP, 1)
    close([result.AP_small, result.AP_medium, result.AP_large], [1, 1, 1])
    assert result.AR1 == result.AR100 == 1
    assert [(c.label, c.objects, c.detections) for c in result.per_class] == [(1, 2, 2), (2, 1, 1)]
    close([c.AP for c in result.per_class], [1, 1])
    assert result.pictures == 3


def test_hand_computed_table() -> None:
    # Four objects of 40 x 40; by falling score: a hit, a miss, a hit of IoU 0.6, a second box on the first object.
    truths = [truth(5, *((1, x, 0, x + 40, 40) for x in (0, 100, 200, 300)))]
    detections = [
        found(
            5,
            (1, 0.9, 0, 0, 40, 40),
            (1, 0.8, 500, 0, 540, 40),
            (1, 0.7, 110, 0, 150, 40),  # 30 of 50 wide: IoU 0.6
            (1, 0.6, 0, 0, 40, 40),
        )
    ]
    result = evaluate_coco(truths, detections, 1)
    # Recall 0.25 at precision 1: 26 of the 101 places. Up to IoU 0.60, recall 0.5 at 2/3: 25 places more.
    low, high = (26 + 25 * 2 / 3) / 101, 26 / 101
    close(result.AP50, low)
    close(result.AP75, high)
    at_60 = result.precision[2, :, 0, 0, 2].mean()  # exactly on the threshold: it counts as a hit
    close(at_60, low)
    close(result.AP, (3 * low + 7 * high) / 10)
    close(result.AR100, (3 * 0.5 + 7 * 0.25) / 10)
    close(result.AR1, 0.25)
    assert (result.AP_small, result.AP_medium, result.AP_large) == (None, result.AP, None)
    only = result.per_class[0]
    assert (only.AP, only.AP50, only.AP75, only.AR100) == (result.AP, result.AP50, result.AP75, result.AR100)
    assert (only.objects, only.detections) == (4, 4)


def test_crowds_are_neither_objects_nor_traps() -> None:
    truths = [truth(1, (1, 0, 0, 50, 50), (1, 100, 0, 400, 300), crowd=(False, True))]
    one = (1, 0.3, 0, 0, 50, 50)
    in_crowd = [(1, 0.9, 100 + 10 * i, 10, 140 + 10 * i, 60) for i in range(5)]
    result = evaluate_coco(truths, [found(1, one, *in_crowd)], 1)
    close(result.AP, 1)
    assert (result.per_class[0].objects, result.per_class[0].detections) == (1, 6)
    outside = evaluate_coco(truths, [found(1, one, (1, 0.9, 500, 0, 540, 50))], 1)
    close(outside.AP, 0.5)


def test_class_without_objects_has_no_number_and_does_not_count() -> None:
    result = evaluate_coco([truth(1, (1, 0, 0, 40, 40))], [found(1, (1, 0.9, 0, 0, 40, 40), (2, 0.9, 0, 0, 9, 9))], 3)
    first, second, third = result.per_class
    close([first.AP, result.AP], [1, 1])
    assert (second.AP, second.AP50, second.AP75, second.AR100) == (None, None, None, None)
    assert (second.objects, second.detections) == (0, 1)
    assert (third.AP, third.objects, third.detections) == (None, 0, 0)


def test_class_with_only_crowds_has_no_number() -> None:
    result = evaluate_coco([truth(1, (1, 0, 0, 40, 40), crowd=(True,))], [found(1, (1, 0.9, 0, 0, 40, 40))], 1)
    assert (result.AP, result.per_class[0].AP, result.per_class[0].objects) == (None, None, 0)


def test_no_detections_score_zero() -> None:
    result = evaluate_coco([truth(1, (1, 0, 0, 40, 40)), truth(2)], [found(1), found(2)], 1)
    assert (result.AP, result.AR100, result.AP_medium, result.AP_small) == (0, 0, 0, None)


@pytest.mark.parametrize("pictures", [0, 1])
def test_nothing_to_find_has_no_number(pictures: int) -> None:
    result = evaluate_coco([truth(1)][:pictures], [found(1, (1, 0.5, 0, 0, 9, 9))][:pictures], 2)
    assert set(summary(result).values()) == {None}
    assert result.pictures == pictures
    assert result.precision.shape == (10, 101, 2, 4, 3)


def test_first_object_can_be_found() -> None:
    # Ids from 0, as some files have them, would make pycocotools take the first object for one that nothing matched.
    assert evaluate_coco([truth(0, (1, 0, 0, 40, 40))], [found(0, (1, 0.9, 0, 0, 40, 40))], 1).AR1 == 1


def test_inputs_stay_as_they_are_and_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    truths, detections = random_case(3)
    before = [a.copy() for t in truths for a in (t.boxes, t.labels, t.areas, t.crowd)]
    before += [a.copy() for d in detections for a in (d.boxes, d.scores, d.labels)]
    evaluate_coco(truths, detections, 3)
    after = [a for t in truths for a in (t.boxes, t.labels, t.areas, t.crowd)]
    after += [a for d in detections for a in (d.boxes, d.scores, d.labels)]
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)
    assert capfd.readouterr() == ("", "")


def test_float32_boxes_are_taken_as_they_are(tmp_path: Path) -> None:
    truths, detections = random_case(4)
    narrow = [
        replace(d, boxes=d.boxes.astype(np.float32) + np.float32(0.1), scores=d.scores.astype(np.float32))
        for d in detections
    ]
    wide = [replace(d, boxes=d.boxes.astype(np.float64), scores=d.scores.astype(np.float64)) for d in narrow]
    assert summary(evaluate_coco(truths, narrow, 3)) == summary(evaluate_coco(truths, wide, 3))
    check_equal(truths, wide, 3, tmp_path)


@pytest.mark.parametrize("score", [np.nan, np.inf])
def test_scores_must_be_finite(score: float) -> None:
    with pytest.raises(ValueError, match="scores of picture 8"):
        found(8, (1, score, 0, 0, 9, 9))


def test_boxes_must_be_finite() -> None:
    with pytest.raises(ValueError, match="boxes of picture 8"):
        found(8, (1, 0.5, 0, np.nan, 9, 9))


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"expected scores \[1\], got \[2\] for picture 3"):
        PictureDetections(3, np.zeros((1, 4)), np.zeros(2), np.ones(1, dtype=np.int64))
    with pytest.raises(ValueError, match=r"expected boxes \[N, 4\], got \[4\] for picture 3"):
        PictureDetections(3, np.zeros(4), np.zeros(1), np.ones(1, dtype=np.int64))


@pytest.mark.parametrize("label", [0, 3])
def test_labels_must_be_in_range(label: int) -> None:
    with pytest.raises(ValueError, match=rf"label {label} of picture 1 is not in 1\.\.2"):
        evaluate_coco([truth(1)], [found(1, (label, 0.5, 0, 0, 9, 9))], 2)
    with pytest.raises(ValueError, match=rf"label {label} of picture 1 is not in 1\.\.2"):
        evaluate_coco([truth(1, (label, 0, 0, 9, 9))], [found(1)], 2)


@pytest.mark.parametrize(
    ("truths", "detections", "message"),
    [
        pytest.param([1, 2], [1], r"pictures \[2\]", id="one without detections"),
        pytest.param([1], [1, 4], r"pictures \[4\]", id="one without truth"),
        pytest.param([1, 1], [1, 2], "twice", id="truth twice"),
        pytest.param([1, 2], [1, 1], "twice", id="detections twice"),
    ],
)
def test_pictures_must_be_the_same(truths: list[int], detections: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_coco([truth(i) for i in truths], [found(i) for i in detections], 1)

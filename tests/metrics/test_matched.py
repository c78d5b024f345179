from __future__ import annotations

import numpy as np
import pytest

from refinedet_cli.metrics.coco import PictureDetections, PictureTruth, evaluate_coco
from refinedet_cli.metrics.curves import (
    Kind,
    by_kind,
    calibration,
    calibration_error,
    class_curve,
    confusion,
    interpolated_precision,
)
from refinedet_cli.metrics.error_kinds import KINDS, explain_errors
from refinedet_cli.metrics.matched import match_pictures

ANY_SCORE = np.zeros(10)


def truth(*rows: tuple[float, ...], image_id: int = 1, crowd: tuple[bool, ...] | None = None) -> PictureTruth:
    """Rows are (label, x1, y1, x2, y2)."""
    table = np.array(rows, dtype=np.float64).reshape(-1, 5)
    boxes = table[:, 1:]
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    flags = np.array(crowd or [False] * len(table), dtype=np.bool_)
    return PictureTruth(image_id, boxes, table[:, 0].astype(np.int64), areas, flags)


def found(*rows: tuple[float, ...], image_id: int = 1) -> PictureDetections:
    """Rows are (label, score, x1, y1, x2, y2)."""
    table = np.array(rows, dtype=np.float64).reshape(-1, 6)
    return PictureDetections(image_id, table[:, 2:], table[:, 1], table[:, 0].astype(np.int64))


def crowded(seed: int) -> tuple[list[PictureTruth], list[PictureDetections]]:
    """Objects and detections on a coarse grid, so that ties of overlap and score, and duplicates, are common."""
    draw = np.random.default_rng(seed)
    truths, detections = [], []
    for image_id in range(1, 6):
        rows = []
        for count, scored in ((int(draw.integers(0, 7)), False), (int(draw.integers(0, 14)), True)):
            corner = draw.integers(0, 6, (count, 2)) * 15.0
            side = draw.choice([20.0, 30.0, 40.0, 100.0], (count, 2))
            label = draw.integers(1, 4, (count, 1))
            score = draw.integers(1, 8, (count, 1)) / 8
            parts = [label, score, corner, corner + side] if scored else [label, corner, corner + side]
            rows.append([tuple(r) for r in np.concatenate(parts, axis=1).tolist()])
        flags = tuple((draw.random(len(rows[0])) < 0.2).tolist())
        truths.append(truth(*rows[0], image_id=image_id, crowd=flags))
        detections.append(found(*rows[1], image_id=image_id))
    return truths, detections


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize(("iou", "place"), [(0.5, 0), (0.75, 5)])
def test_average_precision_is_that_of_pycocotools(seed, iou, place):
    truths, detections = crowded(seed)
    reference = evaluate_coco(truths, detections, 3).precision[place, :, :, 0, 2]  # [R, K]
    matched = match_pictures(truths, detections, iou=iou)
    for label in (1, 2, 3):
        curve = class_curve(matched, label)
        if curve.average_precision is None:
            assert (reference[:, label - 1] == -1).all()
        else:
            assert curve.average_precision == pytest.approx(reference[:, label - 1].mean(), abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_ap_by_area_is_that_of_pycocotools(seed):
    truths, detections = crowded(seed)
    reference = evaluate_coco(truths, detections, 3).precision[0, :, :, :, 2]  # [R, K, A]

    def area(boxes):
        return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])

    # No box has an area of 32^2 or 96^2, where the ends of ranges would matter.
    kinds = [Kind("small", 0, 32**2), Kind("medium", 32**2, 96**2), Kind("large", 96**2, 1e10)]
    for i, part in enumerate(by_kind(truths, detections, 3, area, kinds), start=1):
        curves = reference[:, :, i]
        present = curves[:, (curves > -1).all(axis=0)]
        expected = present.mean() if present.size else None
        assert part.average_precision == (None if expected is None else pytest.approx(expected, abs=1e-12))


def test_matching_prefers_the_better_score_and_the_larger_overlap():
    matched = match_pictures(
        [truth((1, 0, 0, 10, 10), (1, 2, 0, 12, 10))],
        [found((1, 0.5, 2, 0, 12, 10), (1, 0.9, 1.5, 0, 11.5, 10), (1, 0.4, 0, 0, 10, 10))],
    )
    # The best detection lies nearer to the second object; the exact copy of it is left with the first.
    assert matched.scores.tolist() == [0.9, 0.5, 0.4]
    assert matched.target.tolist() == [1, 0, -1]
    assert matched.objects.found_by.tolist() == [1, 0]


def test_detections_in_a_crowd_do_not_count():
    matched = match_pictures(
        [truth((1, 0, 0, 100, 100), crowd=(True,))], [found((1, 0.9, 0, 0, 20, 20), (1, 0.8, 30, 30, 50, 50))]
    )
    assert matched.ignored.tolist() == [True, True]
    assert not matched.right.any()
    assert class_curve(matched, 1).objects == 0


def test_pictures_must_be_the_same():
    with pytest.raises(ValueError, match="same pictures"):
        match_pictures([truth(image_id=1)], [found(image_id=2)])


def test_interpolated_precision_by_hand():
    # Right, wrong, right of 2 objects: recall up to 0.5 at precision 1 (51 points), then 2/3 (50 points).
    assert interpolated_precision(np.array([1, 1 / 2, 2 / 3]), np.array([0.5, 0.5, 1.0])) == pytest.approx(
        (51 + 50 * 2 / 3) / 101
    )
    assert interpolated_precision(np.zeros(0), np.zeros(0)) == 0.0


def test_the_best_threshold_keeps_all_of_one_score():
    objects = [truth((1, 0, 0, 10, 10), (1, 20, 0, 30, 10))]
    rows = (1, 0.9, 0, 0, 10, 10), (1, 0.5, 20, 0, 30, 10), (1, 0.5, 50, 0, 60, 10), (1, 0.2, 80, 0, 90, 10)
    best = class_curve(match_pictures(objects, [found(*rows)]), 1).best_threshold()
    # At 0.5 both detections of that score stay: precision 2/3, recall 1, F1 0.8; at 0.9 it is 2/3.
    assert best is not None
    assert best == pytest.approx((0.5, 2 / 3, 1.0, 0.8))
    nothing = class_curve(match_pictures(objects, [found((1, 0.9, 50, 50, 60, 60))]), 1)
    assert nothing.best_threshold() is None


def test_calibration_by_hand():
    rows = (1, 0.95, 0, 0, 10, 10), (1, 0.91, 50, 50, 60, 60), (1, 0.10, 70, 70, 80, 80)
    bins = calibration(match_pictures([truth((1, 0, 0, 10, 10))], [found(*rows)]))
    assert [(b.low, b.count, b.precision) for b in bins] == [(0.0, 1, 0.0), (0.9, 2, 0.5)]
    assert calibration_error(bins) == pytest.approx((1 * 0.10 + 2 * (0.93 - 0.5)) / 3)
    assert calibration_error(()) is None


def test_confusion_by_hand():
    objects = truth((1, 0, 0, 10, 10), (2, 20, 0, 30, 10), (1, 40, 0, 50, 10), (2, 60, 0, 90, 30),
                    crowd=(False, False, False, True))  # fmt: skip
    rows = (
        (1, 0.9, 0, 0, 10, 10),  # right
        (1, 0.8, 20, 0, 30, 10),  # a 2 taken for a 1
        (1, 0.7, 80, 80, 90, 90),  # nothing there
        (2, 0.6, 65, 5, 75, 15),  # in the crowd: not counted
        (2, 0.1, 40, 0, 50, 10),  # below its threshold: the third object is missed
    )
    table = confusion([objects], [found(*rows)], 2, np.array([0.0, 0.5, 0.5]))
    assert table.tolist() == [[0, 1, 0], [1, 1, 0], [0, 1, 0]]


def explained(objects, rows, thresholds=ANY_SCORE, classes=2):
    return explain_errors([objects], [found(*rows)], classes, thresholds)


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("class", (2, 0.9, 0, 0, 10, 10)),
        ("place", (1, 0.9, 5, 0, 15, 10)),  # overlap 1/3
        ("both", (2, 0.9, 5, 0, 15, 10)),
        ("background", (1, 0.9, 9, 9, 19, 19)),  # overlap 1/199
    ],
)
def test_each_kind_of_error_alone(kind, row):
    errors = explained(truth((1, 0, 0, 10, 10), (2, 50, 50, 60, 60)), [row, (2, 0.5, 50, 50, 60, 60)])
    counts = {e.kind: e.count for e in errors.kinds}
    missed = 0 if kind in ("class", "place") else 1
    assert counts == {**dict.fromkeys(KINDS, 0), kind: 1, "missed": missed}


def test_a_duplicate_is_the_second_of_an_object():
    errors = explained(truth((1, 0, 0, 10, 10)), [(1, 0.9, 0, 0, 10, 10), (1, 0.8, 0, 0, 10, 9)])
    assert [e.kind for e in errors.kinds if e.count] == ["duplicate"]
    assert errors.average_precision == pytest.approx(1.0)


def test_gains_are_those_of_the_mended_detections():
    # Class 1 has two objects: one found, one taken for class 2 with a score above the right detection of class 2.
    objects = truth((1, 0, 0, 10, 10), (1, 20, 0, 30, 10), (2, 50, 50, 60, 60))
    rows = (1, 0.9, 0, 0, 10, 10), (2, 0.8, 20, 0, 30, 10), (2, 0.6, 50, 50, 60, 60)
    errors = explained(objects, rows)
    # Class 1: recall 1/2 at precision 1. Class 2: the right one second, precision 1/2 at all recalls.
    before = (51 / 101 + 0.5) / 2
    assert errors.average_precision == pytest.approx(before)
    gains = {e.kind: e.gain for e in errors.kinds}
    assert gains["class"] == pytest.approx(1 - before)
    assert gains["background"] == pytest.approx(0)
    assert gains["missed"] == pytest.approx(0)  # the mistaken one does not count as missed


def test_mending_misses_takes_objects_out_of_the_count():
    errors = explained(truth((1, 0, 0, 10, 10), (1, 50, 50, 60, 60)), [(1, 0.9, 0, 0, 10, 10)])
    gains = {e.kind: e.gain for e in errors.kinds}
    assert errors.missed.tolist() == [False, True]
    assert gains["missed"] == pytest.approx(1 - 51 / 101)


def test_mending_everything_else_leaves_nothing_to_gain_when_all_is_right():
    errors = explained(truth((1, 0, 0, 10, 10), (2, 50, 50, 60, 60)),
                       [(1, 0.9, 0, 0, 10, 10), (2, 0.9, 50, 50, 60, 60)])  # fmt: skip
    assert [e.gain for e in errors.kinds] == pytest.approx([0] * 6)


def test_only_counted_detections_are_counted_but_all_can_gain():
    rows = [(1, 0.1, 80, 80, 90, 90), (1, 0.05, 0, 0, 10, 10)]
    errors = explained(truth((1, 0, 0, 10, 10)), rows, thresholds=np.full(10, 0.5))
    background = errors.kinds[KINDS.index("background")]
    assert background.count == 0
    assert background.gain == pytest.approx(0.5)


@pytest.mark.parametrize("row", [(1, 0.3, 0, 0, 10, 10), (2, 0.3, 0, 0, 10, 10), (1, 0.3, 5, 0, 15, 10)])
def test_an_object_that_only_a_low_score_comes_near_counts_as_missed(row):
    low, high = (explained(truth((1, 0, 0, 10, 10)), [row], np.full(10, t)).kinds for t in (0.3, 0.4))
    missed = KINDS.index("missed")
    assert (low[missed].count, high[missed].count) == (0, 1)
    # What mending would gain is of all scores, as AP is.
    assert low[missed].gain == high[missed].gain == pytest.approx(0)


@pytest.mark.parametrize("seed", range(20))
def test_every_wrong_detection_has_one_kind_and_mending_never_hurts(seed):
    truths, detections = crowded(seed)
    errors = explain_errors(truths, detections, 3, ANY_SCORE)
    matched = errors.matched
    wrong = ~matched.right & ~matched.ignored
    assert ((errors.of_detection >= 0) == wrong).all()
    assert sum(e.count for e in errors.kinds[:-1]) == wrong.sum()
    for kind in errors.kinds:
        if kind.kind != "class":  # a class error that becomes right in another class can outrank what was right there
            assert kind.gain is None or kind.gain > -1e-12


def test_no_objects_means_no_numbers():
    errors = explained(truth(), [(1, 0.9, 0, 0, 10, 10)])
    assert errors.average_precision is None
    assert {e.gain for e in errors.kinds} == {None}
    assert errors.kinds[KINDS.index("background")].count == 1

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refinedet_cli.metrics.coco import PictureDetections, PictureTruth
from refinedet_cli.metrics.voc import VOC2007, VOC2012, VocResult, VocRules, average_precision, evaluate_voc

# Tests speak of pixels as VOC's files do: first and last pixel, counted from 1, both inside.
Row = tuple[float, ...]


def truth(image_id: int, *rows: Row, crowd: tuple[bool, ...] | None = None) -> PictureTruth:
    """Rows are (label, xmin, ymin, xmax, ymax)."""
    table = np.array(rows, dtype=np.float64).reshape(-1, 5)
    boxes = table[:, 1:] - [1, 1, 0, 0]
    none = np.zeros(len(table), dtype=np.bool_)
    flags = none if crowd is None else np.array(crowd)
    return PictureTruth(image_id, boxes, table[:, 0].astype(np.int64), np.ones(len(table)), flags)


def found(image_id: int, *rows: Row) -> PictureDetections:
    """Rows are (label, score, xmin, ymin, xmax, ymax)."""
    table = np.array(rows, dtype=np.float64).reshape(-1, 6)
    return PictureDetections(image_id, table[:, 2:] - [1, 1, 0, 0], table[:, 1], table[:, 0].astype(np.int64))


def score(
    truths: list[PictureTruth],
    detections: list[PictureDetections],
    classes: int = 1,
    rules: VocRules = VOC2012,
    difficult: dict[int, tuple[bool, ...]] | None = None,
) -> VocResult:
    """``difficult`` is by image id; no object of the others is."""
    given = difficult or {}
    flags = [np.array(given.get(t.image_id, [False] * len(t.labels)), dtype=np.bool_) for t in truths]
    return evaluate_voc(truths, detections, classes, difficult=flags, rules=rules)


def close(actual: object, expected: object) -> None:
    np.testing.assert_allclose(np.array(actual, dtype=np.float64), np.array(expected), rtol=0, atol=1e-12)


def square(x: int) -> Row:
    return (x, 1, x + 9, 10)


FOUR = [truth(1, *((1, *square(x)) for x in (1, 101, 201, 301)))]


def test_hand_computed_curve() -> None:
    # Four objects; by falling score: hit, miss, hit, second find of the first object, hit. The fourth is never found.
    shots = (square(1), square(501), square(101), square(1), square(201))
    detections = [found(1, *((1, 0.9 - 0.1 * i, *box) for i, box in enumerate(shots)))]
    only = score(FOUR, detections).per_class[0]
    close(only.recall, [1 / 4, 1 / 4, 2 / 4, 2 / 4, 3 / 4])
    close(only.precision, [1, 1 / 2, 2 / 3, 2 / 4, 3 / 5])
    close(only.scores, [0.9, 0.8, 0.7, 0.6, 0.5])
    assert (only.objects, only.detections, only.right, only.wrong, only.passed_over) == (4, 5, 3, 2, 0)
    # Made monotone: 1 up to recall 1/4, 2/3 up to 1/2, 3/5 up to 3/4, 0 beyond.
    close(only.AP, (1 + 2 / 3 + 3 / 5) / 4)
    # Of the eleven recalls 0 to 0.2 are within 1/4, 0.3 to 0.5 within 1/2, 0.6 and 0.7 within 3/4, the rest beyond.
    close(score(FOUR, detections, rules=VOC2007).mAP, (3 * 1 + 3 * 2 / 3 + 2 * 3 / 5) / 11)


def test_precision_is_made_monotone() -> None:
    # A miss, then two hits of two objects: precision rises from 1/2 to 2/3, and counts as 2/3 from the start.
    truths = [truth(1, (1, *square(1)), (1, *square(101)))]
    rows = [(1, 0.9, *square(501)), (1, 0.8, *square(1)), (1, 0.7, *square(101))]
    only = score(truths, [found(1, *rows)]).per_class[0]
    close(only.precision, [0, 1 / 2, 2 / 3])
    close(only.AP, 2 / 3)
    close(score(truths, [found(1, *rows)], rules=VOC2007).mAP, 2 / 3)


def test_eleven_points_and_area_of_perfect_detections() -> None:
    detections = [found(1, *((1, 0.5, *square(x)) for x in (1, 101, 201, 301)))]
    close([score(FOUR, detections, rules=rules).mAP for rules in (VOC2007, VOC2012)], [1, 1])


def test_a_recall_of_three_tenths_falls_short_of_its_point_as_in_the_devkit() -> None:
    # 0:0.1:1 in floating point has 0.30000000000000004 for its fourth; of 3 found of 10, points 0, 0.1 and 0.2 count.
    ten = [truth(1, *((1, *square(100 * i + 1)) for i in range(10)))]
    detections = [found(1, *((1, 0.5, *square(100 * i + 1)) for i in range(3)))]
    close(score(ten, detections, rules=VOC2007).mAP, 3 / 11)
    close(score(ten, detections, rules=VOC2012).mAP, 3 / 10)


@pytest.mark.parametrize(
    ("xmax", "pixels", "overlap", "hit"),
    [
        # The object covers pixels 1 to 10 in both directions. Counted as pixels, 1 to 5 is 5 of 10: exactly a half.
        pytest.param(5, "inclusive", "at-least", True, id="exactly half, devkit"),
        pytest.param(5, "inclusive", "above", False, id="exactly half, paper"),
        pytest.param(5.001, "inclusive", "above", True, id="just above half, paper"),
        pytest.param(4.999, "inclusive", "at-least", False, id="just below half"),
        # Without the + 1 it is 4 of 9, and half is reached at 5.5.
        pytest.param(5, "continuous", "at-least", False, id="4 of 9"),
        pytest.param(5.5, "continuous", "at-least", True, id="exactly half without + 1"),
        pytest.param(5.5, "continuous", "above", False, id="exactly half without + 1, paper"),
    ],
)
def test_overlap_exactly_at_the_threshold(xmax: float, pixels: str, overlap: str, hit: bool) -> None:
    rules = replace(VOC2012, pixels=pixels, overlap=overlap)  # type: ignore[arg-type]
    result = score([truth(1, (1, 1, 1, 10, 10))], [found(1, (1, 0.5, 1, 1, xmax, 10))], rules=rules)
    assert (result.mAP, result.per_class[0].right) == ((1.0, 1) if hit else (0.0, 0))
    assert result.rules == rules


def test_the_rules_of_the_two_years() -> None:
    assert VocRules(average="11-point", pixels="inclusive", overlap="at-least") == VOC2007
    assert VocRules(average="area", pixels="inclusive", overlap="at-least") == VOC2012


def test_boxes_without_width_find_nothing() -> None:
    detections = [found(1, (1, 0.9, 5, 5, 4, 9), (1, 0.8, 9, 9, 2, 2))]
    for pixels in ("inclusive", "continuous"):
        assert score([truth(1, (1, 1, 1, 10, 10))], detections, rules=replace(VOC2012, pixels=pixels)).mAP == 0.0


def test_a_second_find_is_wrong_even_where_another_object_is_free() -> None:
    # Two objects that share 8 of 10 columns. Both detections lie nearest to the first: VOC does not pass the second one
    # on, although it overlaps the other object by 7/12 (the COCO metric would match it).
    truths = [truth(1, (1, 1, 1, 10, 10), (1, 3, 1, 12, 10))]
    detections = [found(1, (1, 0.9, 1, 1, 10, 10), (1, 0.8, 1, 1, 9, 10))]
    only = score(truths, detections).per_class[0]
    assert (only.right, only.wrong) == (1, 1)
    close(only.AP, 0.5)


def test_of_equal_overlaps_the_first_object_is_taken() -> None:
    # Pixels 3 to 8 overlap both objects alike (2/3). Taking the first, the exact one after it is a second find.
    truths = [truth(1, (1, 1, 1, 8, 1), (1, 3, 1, 10, 1))]
    near = (1, 0.9, 2, 1, 9, 1)
    assert score(truths, [found(1, near, (1, 0.8, 1, 1, 8, 1))]).per_class[0].right == 1
    assert score(truths, [found(1, near, (1, 0.8, 3, 1, 10, 1))]).per_class[0].right == 2


def test_difficult_objects_are_neither_found_nor_missed() -> None:
    # One ordinary and one difficult object. Two detections on the difficult one, the best and the third, do not count.
    truths = [truth(1, (1, *square(1)), (1, *square(101)))]
    rows = [(1, 0.9, *square(101)), (1, 0.8, *square(301)), (1, 0.7, *square(101)), (1, 0.6, *square(1))]
    only = score(truths, [found(1, *rows)], difficult={1: (False, True)}).per_class[0]
    assert (only.objects, only.difficult, only.right, only.wrong, only.passed_over) == (1, 1, 1, 1, 2)
    close(only.precision, [0, 0, 0, 1 / 2])
    close(only.recall, [0, 0, 0, 1])
    close(only.AP, 1 / 2)


def test_a_detection_nearest_to_a_difficult_object_does_not_find_the_other() -> None:
    truths = [truth(1, (1, 1, 1, 10, 10), (1, 3, 1, 12, 10))]
    detections = [found(1, (1, 0.9, 3, 1, 12, 10))]  # overlaps the ordinary one by 8/12
    result = score(truths, detections, difficult={1: (False, True)})
    assert (result.mAP, result.per_class[0].passed_over) == (0.0, 1)


def test_crowds_are_difficult() -> None:
    truths = [truth(1, (1, *square(1)), (1, *square(101)), crowd=(False, True))]
    result = score(truths, [found(1, (1, 0.9, *square(101)), (1, 0.5, *square(1)))])
    assert (result.mAP, result.per_class[0].objects, result.per_class[0].difficult) == (1.0, 1, 1)
    both = score(truths, [found(1)], difficult={1: (False, True)}).per_class[0]
    assert (both.objects, both.difficult) == (1, 1)


def test_classes_without_objects_have_no_number_and_do_not_count() -> None:
    truths = [truth(1, (1, *square(1)), (3, *square(1)))]
    detections = [found(1, (1, 0.9, *square(1)), (2, 0.9, *square(1)))]
    result = score(truths, detections, classes=4, difficult={1: (False, True)})
    assert [c.AP for c in result.per_class] == [1.0, None, None, None]
    assert [(c.label, c.objects, c.difficult, c.detections) for c in result.per_class] == [
        (1, 1, 0, 1),
        (2, 0, 0, 1),
        (3, 0, 1, 0),
        (4, 0, 0, 0),
    ]
    assert result.mAP == 1.0
    assert np.isnan(result.per_class[1].recall).all()
    assert result.per_class[1].precision.tolist() == [0.0]


def test_no_detections_score_zero_and_no_objects_have_no_number() -> None:
    assert score(FOUR, [found(1)]).mAP == score(FOUR, [found(1)], rules=VOC2007).mAP == 0.0
    bare = score([truth(1)], [found(1, (1, 0.5, *square(1)))])
    assert (bare.mAP, bare.per_class[0].AP, bare.pictures) == (None, None, 1)
    assert score([], []).mAP is None


def test_equal_scores_keep_the_order_of_pictures_and_rows() -> None:
    # A wrong and a right detection of one score: the lower image id comes first, and in a picture the earlier row.
    truths = [truth(2, (1, *square(1))), truth(1)]
    hit, miss = (1, 0.5, *square(1)), (1, 0.5, *square(301))
    close(score(truths, [found(1, miss), found(2, hit)]).mAP, 1 / 2)
    swapped = [replace(t, image_id=3 - t.image_id) for t in truths]
    close(score(swapped, [found(2, miss), found(1, hit)]).mAP, 1)
    close([score(truths, [found(2, *rows), found(1)]).mAP for rows in ((hit, miss), (miss, hit))], [1, 1 / 2])


def test_all_detections_count_not_only_a_hundred() -> None:
    misses = [(1, 0.9, *square(1000 + 20 * i)) for i in range(150)]
    result = score([truth(1, (1, *square(1)))], [found(1, *misses, (1, 0.1, *square(1)))])
    close(result.mAP, 1 / 151)


def test_shapes_and_labels_are_checked() -> None:
    with pytest.raises(ValueError, match=r"expected difficult \[4\], got \[1\] for picture 1"):
        score(FOUR, [found(1)], difficult={1: (True,)})
    with pytest.raises(ValueError, match=r"label 2 of picture 1 is not in 1\.\.1"):
        score(FOUR, [found(1, (2, 0.5, *square(1)))])
    with pytest.raises(ValueError, match=r"pictures \[2\]"):
        score(FOUR, [found(1), found(2)])


def test_average_precision_of_several_sets_at_once() -> None:
    found_, reported = np.array([[1, 2], [0, 0], [1, 1]]), np.array([[1, 4], [0, 0], [3, 3]])
    values = average_precision(found_, reported, np.array([2, 0, 1]), "area")
    np.testing.assert_array_equal(values, [(1 + 0.5) / 2, np.nan, 1 / 3])


# A reference that walks through the detections one by one, on the numbers of the annotation file.


def reference_overlap(a: Row, b: Row, extra: int) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0]) + extra
    height = min(a[3], b[3]) - max(a[1], b[1]) + extra
    if width <= 0 or height <= 0:
        return 0.0
    sizes = [(box[2] - box[0] + extra) * (box[3] - box[1] + extra) for box in (a, b)]
    return width * height / (sum(sizes) - width * height)


def reference_ap(
    objects: list[tuple[int, Row, bool]], detections: list[tuple[int, Row, float]], rules: VocRules
) -> float | None:
    """Objects are (picture, box, difficult), detections (picture, box, score) in the order of the file."""
    wanted = sum(not difficult for _, _, difficult in objects)
    if not wanted:
        return None
    taken: set[int] = set()
    right = wrong = 0
    curve: list[tuple[float, float]] = []
    for picture, box, _ in sorted(detections, key=lambda d: -d[2]):
        best, nearest = 0.0, None
        for i, (where, there, _) in enumerate(objects):
            value = reference_overlap(box, there, 1 if rules.pixels == "inclusive" else 0)
            if where == picture and value > best:
                best, nearest = value, i
        if nearest is None or best < 0.5 or (best == 0.5 and rules.overlap == "above") or nearest in taken:
            wrong += 1
        elif objects[nearest][2]:
            continue
        else:
            taken.add(nearest)
            right += 1
        curve.append((right / wanted, right / (right + wrong)))
    if rules.average == "11-point":
        return sum(max((p for r, p in curve if r >= 0.1 * i), default=0.0) for i in range(11)) / 11
    steps = sorted({0.0, *(r for r, _ in curve)})
    return sum((b - a) * max(p for r, p in curve if r >= b) for a, b in pairwise(steps))


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[tuple[int, Row, bool]], list[tuple[int, Row, float]]]:
    """Small boxes on a small grid, so that ties of overlap, exact halves and second finds are common."""
    corner, side = st.integers(1, 5), st.integers(0, 5)

    def box() -> Row:
        x, y = draw(corner), draw(corner)
        return (x, y, x + draw(side), y + draw(side))

    pictures = st.integers(1, 3)
    objects = [(draw(pictures), box(), draw(st.booleans())) for _ in range(draw(st.integers(0, 6)))]
    scores = st.sampled_from([0.1, 0.3, 0.5, 0.7, 0.9])
    strays = [(draw(pictures), box(), draw(scores)) for _ in range(draw(st.integers(0, 6)))]
    again = [(*draw(st.sampled_from(objects))[:2], draw(scores)) for _ in range(draw(st.integers(0, 6))) if objects]
    return objects, strays + again


@settings(max_examples=120, deadline=None)
@given(
    case=cases(),
    average=st.sampled_from(["11-point", "area"]),
    pixels=st.sampled_from(["inclusive", "continuous"]),
    overlap=st.sampled_from(["at-least", "above"]),
)
def test_equal_to_the_reference(case, average, pixels, overlap) -> None:
    objects, detections = case
    rules = VocRules(average=average, pixels=pixels, overlap=overlap)
    # In the file the detections of a picture stand together, as they do in ours.
    detections = sorted(detections, key=lambda d: d[0])
    truths, reported, flags = [], [], {}
    for picture in (3, 1, 2):
        mine = [(box, hard) for where, box, hard in objects if where == picture]
        truths.append(truth(picture, *((1, *box) for box, _ in mine)))
        reported.append(found(picture, *((1, s, *box) for where, box, s in detections if where == picture)))
        flags[picture] = tuple(hard for _, hard in mine)
    ours = score(truths, reported, rules=rules, difficult=flags)
    expected = reference_ap(objects, detections, rules)
    if expected is None:
        assert ours.mAP is None
    else:
        close(ours.mAP, expected)

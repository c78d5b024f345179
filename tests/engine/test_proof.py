"""The proof, against tables worked out by hand."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from refinedet_cli.core.config import PostprocessConfig
from refinedet_cli.core.structures import Detections
from refinedet_cli.engine.proof import TOLERANCES, Accuracy, Agreement, Tolerance, compare, judge

FP32 = TOLERANCES["fp32"]
STRICT = Tolerance(above=0.3, iou=0.5, score=0.01, unmatched=0.0, ap=0.01)
Row = tuple[float, int, tuple[float, float, float, float]]


def found(*rows: Row) -> Detections:
    """Rows of score, label and box, best first."""
    return Detections(
        torch.tensor([box for _, _, box in rows], dtype=torch.float32).reshape(-1, 4),
        torch.tensor([score for score, _, _ in rows], dtype=torch.float32),
        torch.tensor([label for _, label, _ in rows], dtype=torch.int64),
    )


def square(left: float, top: float = 0.0, side: float = 10.0) -> tuple[float, float, float, float]:
    return (left, top, left + side, top + side)


def agreement(reference: Detections, other: Detections, tolerance: Tolerance = STRICT) -> Agreement:
    """Compare one picture; which detector comes first must not matter."""
    seen, swapped = (compare([("one", a, b)], tolerance) for a, b in ((reference, other), (other, reference)))
    assert seen == swapped
    return seen


A, B, C = (0.9, 1, square(0)), (0.8, 2, square(50)), (0.7, 1, square(100))


def test_equal_detections_agree_in_everything():
    seen = agreement(found(A, B, C), found(A, B, C))
    assert seen == Agreement(pictures=1, boxes=6, unmatched=0, least_iou=1.0, worst="one")
    assert (seen.box_shift, seen.score_shift, seen.unmatched_share) == (0, 0, 0)


def test_differences_of_pairs_by_hand():
    # Two of ten pixels aside: 80 / 120; one pixel taller: 100 / 110.
    other = found((0.905, 1, (2, 0, 12, 10)), (0.793, 2, (50, 0, 60, 11)), C)
    seen = agreement(found(A, B, C), other)
    assert (seen.boxes, seen.unmatched) == (6, 0)
    assert seen.least_iou == pytest.approx(80 / 120)
    assert seen.box_shift == 2
    assert seen.score_shift == pytest.approx(0.007, abs=1e-6)


@pytest.mark.parametrize(("iou", "unmatched"), [(2 / 3 - 1e-9, 0), (2 / 3, 0), (2 / 3 + 1e-9, 2)])
def test_a_pair_needs_the_tolerated_overlap(iou, unmatched):
    # 80 / 120 is the same float64 as 2 / 3.
    seen = agreement(found(A), found((0.9, 1, (2, 0, 12, 10))), STRICT._replace(iou=iou))
    assert seen.unmatched == unmatched
    assert (seen.least_iou is None) == bool(unmatched)


def test_classes_never_pair():
    seen = agreement(found(A), found((0.9, 2, square(0))))
    assert (seen.boxes, seen.unmatched, seen.least_iou) == (2, 2, None)
    assert (seen.box_shift, seen.score_shift) == (0, 0)


def test_without_overlap_nothing_pairs_even_where_none_is_asked_for():
    seen = agreement(found(A), found((0.9, 2, square(0))), STRICT._replace(iou=0.0))
    assert seen.unmatched == 2


def test_the_largest_overlap_pairs_first_and_only_once():
    # Best first would give the shifted box to A, and leave the next without any.
    reference = found((0.9, 1, square(0)), (0.8, 1, square(2)))
    other = found((0.9, 1, square(1.5)), (0.8, 1, square(-3)))
    seen = agreement(reference, other)
    # 1.5 with 2: 9.5 / 10.5; then 0 with -3: 7 / 13.
    assert (seen.boxes, seen.unmatched) == (4, 0)
    assert seen.least_iou == pytest.approx(7 / 13)
    assert seen.score_shift == pytest.approx(0.1)
    assert seen.box_shift == 3


def test_two_boxes_do_not_share_a_counterpart():
    seen = agreement(found(A, (0.5, 1, square(0.5))), found(A))
    assert (seen.boxes, seen.unmatched, seen.least_iou) == (3, 1, 1.0)


@pytest.mark.parametrize(
    ("scores", "boxes", "unmatched", "shift"),
    [
        ((0.2501, 0.2499), 1, 0, 0.0002),  # a score that crosses the line is a difference of scores alone
        ((0.9, 0.01), 1, 0, 0.89),
        ((0.25, 0.25), 0, 0, 0.0),  # the line itself is not above it
        ((0.2, 0.1), 0, 0, 0.0),
        ((0.26, 0.26), 2, 0, 0.0),
    ],
)
def test_only_boxes_above_the_line_count(scores, boxes, unmatched, shift):
    # A quarter is the same in float32 and float64.
    seen = agreement(*(found((score, 1, square(0))) for score in scores), STRICT._replace(above=0.25))
    assert (seen.boxes, seen.unmatched) == (boxes, unmatched)
    assert seen.score_shift == pytest.approx(shift, abs=1e-6)
    assert (seen.least_iou is None) == (boxes == 0)


def test_unmatched_boxes_of_both_sides_count():
    reference = found(A, B, C, (0.2, 1, square(300)))
    other = found(A, (0.6, 3, square(50)), (0.5, 1, square(200)), (0.4, 1, square(220)), (0.1, 2, square(400)))
    seen = agreement(reference, other)
    assert (seen.boxes, seen.unmatched) == (7, 5)
    assert seen.unmatched_share == pytest.approx(5 / 7)


def test_empty_sides():
    assert agreement(found(), found()) == Agreement(pictures=1, worst="one")
    seen = agreement(found(A, B), found())
    assert (seen.boxes, seen.unmatched, seen.least_iou) == (2, 2, None)
    assert compare([], STRICT) == Agreement()
    assert Agreement().unmatched_share == 0


def test_pictures_add_up():
    pictures = [
        ("same", found(A, B), found(A, B)),
        ("empty", found(), found()),
        ("moved", found(A), found((0.9, 1, square(1)))),
        ("lost", found(A, C), found(A)),
    ]
    seen = compare(iter(pictures), STRICT)
    assert (seen.pictures, seen.boxes, seen.unmatched, seen.box_shift) == (4, 9, 1, 1)
    assert seen.least_iou == pytest.approx(9 / 11)
    assert seen.worst == "lost"
    # The order of pictures decides nothing but which of equals is named.
    for order in itertools.permutations(pictures):
        assert compare(order, STRICT) == seen


def test_the_worst_picture_lost_most_then_differs_most():
    shifted = ("shifted", found(A), found((0.5, 1, square(0))))
    little = ("little", found(A), found((0.89, 1, square(0))))
    one_lost = ("one lost", found(A, C), found(A))
    two_lost = ("two lost", found(A, B, C), found(A))
    assert compare([little, shifted, little], STRICT).worst == "shifted"
    assert compare([shifted, one_lost, little], STRICT).worst == "one lost"
    assert compare([one_lost, two_lost, shifted], STRICT).worst == "two lost"
    assert compare([("first", found(A), found(A)), ("second", found(A), found(A))], STRICT).worst == "first"


# --- judging

GOOD = Agreement(pictures=2, boxes=100, unmatched=0, least_iou=0.9, box_shift=3.0, score_shift=0.005, worst="cat.jpg")
LOOSE = Tolerance(above=0.3, iou=0.5, score=0.01, unmatched=0.02, ap=0.01)


def test_what_is_within_holds():
    proof = judge(GOOD, Accuracy("data", 0.5, 0.5, True), LOOSE)
    assert proof.holds
    assert proof.failures == ()
    assert (proof.agreement, proof.accuracy, proof.tolerance) == (GOOD, Accuracy("data", 0.5, 0.5, True), LOOSE)


def test_nothing_proven_is_a_failure():
    proof = judge(Agreement(pictures=1_234), None, LOOSE)
    assert not proof.holds
    (failure,) = proof.failures
    assert failure.startswith("nothing was proven: no box scores above 0.3 in 1,234 pictures")


def up(value: float) -> float:
    return math.nextafter(value, math.inf)


@pytest.mark.parametrize(
    ("within", "beyond", "words"),
    [
        (
            replace(GOOD, boxes=100, unmatched=2),
            replace(GOOD, boxes=100, unmatched=3),
            ("3 of 100 boxes", "IoU 0.5", "cat.jpg"),
        ),
        (
            replace(GOOD, boxes=100, unmatched=2),
            replace(GOOD, boxes=99, unmatched=2),
            ("2 of 99 boxes", "IoU 0.5", "cat.jpg"),
        ),
        (replace(GOOD, score_shift=0.01), replace(GOOD, score_shift=up(0.01)), ("0.01", "cat.jpg")),
        (replace(GOOD, score_shift=0.01), replace(GOOD, score_shift=0.25), ("0.25, more than 0.01", "cat.jpg")),
    ],
)
def test_each_tolerance_fails_by_a_hair(within, beyond, words):
    assert judge(within, None, LOOSE).holds
    proof = judge(beyond, None, LOOSE)
    assert not proof.holds
    (failure,) = proof.failures
    for word in words:
        assert word in failure


def test_ap_may_rise_and_fall_by_the_tolerance():
    tolerance = LOOSE._replace(ap=0.25)
    assert judge(GOOD, Accuracy("data", 0.5, 0.25, True), tolerance).holds
    assert judge(GOOD, Accuracy("data", 0.25, 0.9, False), tolerance).holds
    proof = judge(GOOD, Accuracy("data", 0.5, 0.2499999, True), tolerance)
    assert proof.failures == ("AP falls by 0.2500, more than 0.25",)
    assert Accuracy("data", 0.5, 0.25, True).change == -0.25
    nothing = Accuracy("data", None, None, False)
    assert nothing.change is None
    assert judge(GOOD, nothing, tolerance).holds


def test_all_failures_are_told():
    broken = replace(GOOD, unmatched=50, score_shift=0.5)
    assert len(judge(broken, Accuracy("data", 0.5, 0.1, True), LOOSE).failures) == 3


def test_a_difference_that_is_no_number_does_not_hold():
    for wrong in (math.nan, math.inf):
        for score in (0.9, 0.01):
            reference = found(C, (score, 1, square(0)))
            assert not judge(agreement(reference, found(C, (wrong, 1, square(0))), LOOSE), None, LOOSE).holds
    seen = compare([("one", found(A), found((0.9, 1, (math.nan, 0, 10, 10))))], LOOSE)
    assert not judge(seen, None, LOOSE).holds


@pytest.mark.parametrize("precision", TOLERANCES)
def test_equal_detectors_hold_at_every_precision(precision):
    tolerance = TOLERANCES[precision]
    assert judge(compare([("one", found(A, B), found(A, B))], tolerance), None, tolerance).holds
    lost = compare([("one", found(A, B), found(B))], tolerance)
    assert not judge(lost, None, tolerance).holds


def test_what_rounds_more_is_tolerated_more():
    fp32, fp16, int8 = (TOLERANCES[name] for name in ("fp32", "fp16", "int8"))
    assert fp32.iou > fp16.iou > int8.iou
    for name in ("score", "unmatched", "ap"):
        assert getattr(fp32, name) < getattr(fp16, name) < getattr(int8, name)
    assert fp32.unmatched == 0


LIMITS = PostprocessConfig(nms_iou=0.45, keep=3)


def _row(*entries: tuple[tuple[float, ...], float]) -> Detections:
    boxes, scores = zip(*entries, strict=True)
    return Detections(torch.tensor(boxes), torch.tensor(scores), torch.ones(len(scores), dtype=torch.int64))


def test_a_box_at_the_threshold_of_nms_is_a_tie_and_so_is_what_hangs_on_it():
    # The second overlaps the first by 45 / 100: one engine keeps it, and it suppresses the third.
    first, second, third = ((0, 0, 100, 100), 0.9), ((0, 0, 100, 45.0), 0.8), ((0, 10, 100, 50.0), 0.7)
    one, other = _row(first, second), _row(first, third)
    seen = compare([("a", one, other)], FP32, LIMITS)
    assert (seen.unmatched, seen.ties, seen.unmatched_share) == (2, 2, 0)
    assert compare([("a", one, other)], FP32).ties == 0
    clear = _row(first, ((0, 0, 100, 44.9), 0.8))
    assert compare([("a", clear, other)], FP32, LIMITS).ties == 0


def test_of_two_that_overlap_and_score_alike_either_may_stay():
    near = (1, (0.0, 0.0, 10.0, 10.0)), (1, (1.0, 0.0, 11.0, 10.0))
    one, other = (found((0.9, *box)) for box in near)
    seen = compare([("a", one, other)], FP32, LIMITS)
    assert (seen.unmatched, seen.ties) == (2, 2)
    # Not if one is clearly better, if they would not suppress each other, or if they are of two classes.
    better, apart, other_class = found((0.91, *near[1])), found((0.9, 1, square(8))), found((0.9, 2, near[1][1]))
    for second in (better, apart, other_class):
        assert compare([("a", one, second)], FP32, LIMITS).ties == 0
    # Nor if the one that lacks it has no such rival.
    assert compare([("a", one, found())], FP32, LIMITS).ties == 0


def test_a_box_that_scores_like_the_last_of_a_full_list_is_a_tie():
    shared = [((10 * i, 0, 10 * i + 9, 9.0), 0.9 - i / 10) for i in range(2)]
    last, next_one, better = ((50, 0, 59, 9.0), 0.5), ((70, 0, 79, 9.0), 0.500001), ((90, 0, 99, 9.0), 0.51)
    assert compare([("a", _row(*shared, last), _row(*shared, next_one))], FP32, LIMITS).ties == 2
    assert compare([("a", _row(*shared, last), _row(*shared, better))], FP32, LIMITS).ties == 1
    assert compare([("a", _row(*shared, last), _row(*shared))], FP32, LIMITS).ties == 0


def test_slivers_that_coincide_are_equal_whatever_their_overlap():
    thin, thinner = _row(((0, 0, 0.004, 5.0), 0.9)), _row(((0, 0, 0.001, 5.0), 0.9))
    assert compare([("a", thin, thinner)], FP32).unmatched == 0
    assert compare([("a", _row(((0, 0, 0.04, 5.0), 0.9)), thinner)], FP32).unmatched == 2

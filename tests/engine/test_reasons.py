from __future__ import annotations

import numpy as np
import pytest

from refinedet_cli.engine.reasons import find_reasons
from refinedet_cli.metrics.coco import PictureDetections, PictureTruth


def picture(
    image_id: int, objects: list[tuple[float, ...]], found: list[tuple[float, ...]]
) -> tuple[PictureTruth, PictureDetections]:
    """Objects are (label, x1, y1, x2, y2), detections (label, score, x1, y1, x2, y2)."""
    wanted = np.array(objects, dtype=np.float64).reshape(-1, 5)
    seen = np.array(found, dtype=np.float64).reshape(-1, 6)
    areas = (wanted[:, 3] - wanted[:, 1]) * (wanted[:, 4] - wanted[:, 2])
    return (
        PictureTruth(image_id, wanted[:, 1:], wanted[:, 0].astype(np.int64), areas, np.zeros(len(wanted), bool)),
        PictureDetections(image_id, seen[:, 2:], seen[:, 1], seen[:, 0].astype(np.int64)),
    )


def explained(*pictures: tuple[PictureTruth, PictureDetections], names=("cat", "dog")):
    truths, detections = zip(*pictures, strict=True)
    return find_reasons(truths, detections, names)


def test_errors_are_counted_from_the_best_threshold_of_each_class():
    reasons = explained(
        picture(1, [(1, 0, 0, 50, 50)], [(1, 0.9, 0, 0, 50, 50), (1, 0.2, 80, 80, 120, 120)]),
        picture(2, [(2, 0, 0, 50, 50)], [(2, 0.3, 0, 0, 50, 50), (2, 0.25, 80, 80, 120, 120)]),
    )
    assert [t and t.score for t in reasons.thresholds] == [0.9, 0.3]
    assert {k.kind: k.count for k in reasons.errors.kinds}["background"] == 0
    assert reasons.counted().tolist() == [True, True, False, False]
    assert reasons.confusion.tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_a_class_that_is_never_found_has_no_threshold_and_is_named():
    reasons = explained(picture(1, [(1, 0, 0, 50, 50), (2, 60, 0, 90, 40)], [(1, 0.9, 0, 0, 50, 50)]))
    assert reasons.thresholds[1] is None
    [line] = [f for f in reasons.findings if f.startswith("Hardly")]
    assert line == "Hardly anything is found of dog (1 object): that alone takes 0.500 off the AP50."


def test_the_costliest_kind_of_error_comes_first():
    reasons = explained(
        picture(1, [(1, 0, 0, 50, 50), (1, 60, 0, 110, 50)], [(1, 0.9, 0, 0, 50, 50), (2, 0.8, 60, 0, 110, 50)]),
        picture(2, [(2, 0, 0, 50, 50)], [(2, 0.7, 0, 0, 50, 50)]),
    )
    # cat: recall 1/2 at precision 1; dog: the mistaken cat ranks first. Mended, both are 1.
    gain = 1 - (51 / 101 + 0.5) / 2
    assert reasons.findings[0] == (
        "Over all scores, most is lost to objects well placed but given the wrong class: "
        f"without them AP50 would be {gain:.3f} higher."
    )


def test_the_commonest_confusion_is_named_from_three_on():
    def mistaken(count: int):
        rows = [(1, 60.0 * i, 0, 60.0 * i + 50, 50) for i in range(count)]
        return picture(1, [*rows, (2, 0, 100, 50, 150)],
                       [*((2, 0.9, *row[1:]) for row in rows), (2, 0.8, 0, 100, 50, 150)])  # fmt: skip

    assert not [f for f in explained(mistaken(2)).findings if "taken for" in f]
    [line] = [f for f in explained(mistaken(3)).findings if "taken for" in f]
    assert line == "cat is taken for dog most often: 3 of 3 objects at the best thresholds."


def of_two_sizes(small: int, large: int, *more: tuple[PictureTruth, PictureDetections]):
    """So many objects of 12 px that nobody finds, and so many of 300 px that are found, one a picture."""
    unfound = [(1, 20.0 * i, 0, 20.0 * i + 12, 12) for i in range(small)]
    found = [picture(i, [(1, 0, 100, 300, 400)], [(1, 0.9, 0, 100, 300, 400)]) for i in range(1, large + 1)]
    return explained(picture(0, unfound, []), *found, *more)


def test_a_weak_size_is_named_with_its_share():
    [line] = [f for f in of_two_sizes(60, 20).findings if f.startswith("Objects of")]
    assert line.startswith("Objects of below 16 px (75 % of all) have an AP50 of 0.000, those of 192 px and up 1.000:")


@pytest.mark.parametrize(("small", "large"), [(19, 60), (60, 19)])
def test_a_size_with_few_objects_gives_no_advice(small, large):
    assert not [f for f in of_two_sizes(small, large).findings if f.startswith("Objects of")]


def test_a_few_objects_beside_two_weak_sizes_are_no_example():
    # The four of 20 px are all found; what is said is of the two sizes that have enough objects.
    few = [(1, 60.0 * i, 30, 60.0 * i + 20, 50) for i in range(4)]
    extra = picture(99, few, [(1, 0.95, *row[1:]) for row in few])
    [line] = [f for f in of_two_sizes(60, 20, extra).findings if f.startswith("Objects of")]
    assert "those of 192 px and up" in line
    assert "(71 % of all)" in line


@pytest.mark.parametrize("found", [[], [(1, 0.5, 0, 0, 10, 10)]])
def test_without_objects_there_is_nothing_to_say(found):
    reasons = explained(picture(1, [], found))
    assert reasons.findings == ()
    assert reasons.errors.average_precision is None
    assert reasons.confusion.sum() == 0


def test_perfect_detections_leave_nothing_to_mend():
    rows = [(1, 0, 0, 50, 50), (2, 60, 0, 90, 40)]
    reasons = explained(picture(1, rows, [(row[0], 0.9, *row[1:]) for row in rows]))
    assert [k.count for k in reasons.errors.kinds] == [0] * 6
    assert not [f for f in reasons.findings if "lost" in f or "Hardly" in f]


def test_best_thresholds_are_told_of_classes_with_enough_objects():
    def of(label: int, count: int, score: float):
        rows = [(label, 60.0 * i, 0, 60.0 * i + 50, 50) for i in range(count)]
        return picture(label, rows, [(label, score, *row[1:]) for row in rows])

    pictures = [of(1, 20, 0.9), of(2, 30, 0.4), of(3, 19, 0.1)]
    findings = explained(*pictures, names=("cat", "dog", "cow")).findings
    assert [f for f in findings if "runs from 0.40 to 0.90 between classes" in f]
    assert not [f for f in explained(*pictures[1:], names=("cat", "dog", "cow")).findings if "best F1" in f]

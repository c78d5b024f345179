from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from refinedet_cli.metrics.coco import PictureDetections, PictureTruth, evaluate_coco, match_coco
from refinedet_cli.metrics.intervals import (
    Estimate,
    Rounds,
    differences,
    draw_pictures,
    estimates,
    resample_coco,
    resample_voc,
)
from refinedet_cli.metrics.voc import VOC2007, VOC2012, VocRules, evaluate_voc

Case = tuple[list[PictureTruth], list[PictureDetections], list[np.ndarray]]


def random_case(seed: int, *, ties: bool = True, pictures: int = 8) -> Case:
    """Objects of classes 1 and 2 (never 3), jittered copies of them and strays; crowds, difficult ones, bare pictures.

    Ids fall, so that places by id are not those of the lists. Class 1 of one picture has over 100 detections.
    """
    draw = np.random.default_rng(seed)
    truths, detections, difficult = [], [], []
    for i in range(pictures):
        count = int(draw.integers(0, 6))
        corner = draw.integers(0, 100, (count, 2)).astype(np.float64)
        boxes = np.concatenate([corner, corner + draw.choice([10.0, 20.0, 40.0], (count, 2))], axis=1)
        labels = draw.integers(1, 3, count)
        crowd = draw.random(count) < 0.15
        truths.append(PictureTruth(50 - i, boxes, labels, np.full(count, 400.0), crowd))
        difficult.append(draw.random(count) < 0.2)
        copies = np.repeat(np.arange(count), draw.integers(0, 3, count)) if count else np.zeros(0, np.int64)
        stray = draw.uniform(0, 100, (120 if i == 3 else 4, 4))
        stray[:, 2:] += stray[:, :2] + 1
        near = boxes[copies] + draw.choice([0.0, 1.0, -2.0, 4.0], (len(copies), 4))
        everything = np.concatenate([near, stray])
        kinds = np.concatenate([labels[copies], np.ones(len(stray), np.int64) if i == 3 else draw.integers(1, 4, 4)])
        scores = (
            draw.choice([0.2, 0.5, 0.8], len(everything)) if ties else draw.permutation(len(everything)) * 1.0 + i / 9
        )
        detections.append(PictureDetections(50 - i, everything, scores, kinds))
    return truths, detections, difficult


def numbers_of(case: Case) -> tuple[list[float], list[list[float]]]:
    """What `evaluate_coco` says: AP, AP50, AP75, and AP and AP50 of each of three classes; NaN for None."""
    result = evaluate_coco(case[0], case[1], 3)
    plain = [np.nan if v is None else v for v in (result.AP, result.AP50, result.AP75)]
    return plain, [[np.nan if v is None else v for v in (c.AP, c.AP50)] for c in result.per_class]


def drawn_case(case: Case, counts: np.ndarray) -> Case:
    """The pictures as often as they were drawn, copies being pictures of their own that follow each other by id."""
    truths, detections, difficult = [], [], []
    by_id = sorted(zip(*case, strict=True), key=lambda row: row[0].image_id)
    for (truth, found, hard), count in zip(by_id, counts, strict=True):
        for copy in range(count):
            image_id = truth.image_id * 100 + copy
            truths.append(replace(truth, image_id=image_id))
            detections.append(replace(found, image_id=image_id))
            difficult.append(hard)
    return truths, detections, difficult


@pytest.mark.parametrize("seed", range(12))
def test_the_pictures_as_they_are_give_the_coco_numbers_to_the_bit(seed: int) -> None:
    case = random_case(seed)
    rounds = resample_coco(*case[:2], 3, np.zeros((0, 8), dtype=np.int64))
    overall, classes = numbers_of(case)
    np.testing.assert_array_equal(rounds.overall, [overall])
    np.testing.assert_array_equal(rounds.classes, [classes])
    assert (rounds.names, rounds.class_names) == (("AP", "AP50", "AP75"), ("AP", "AP50"))


@pytest.mark.parametrize("seed", range(3))
def test_a_drawing_has_the_coco_numbers_of_the_drawn_pictures(seed: int) -> None:
    case = random_case(seed, ties=False)
    drawn = draw_pictures(8, 6, seed)
    rounds = resample_coco(*case[:2], 3, drawn)
    for row, counts in enumerate(drawn, start=1):
        overall, classes = numbers_of(drawn_case(case, counts))
        np.testing.assert_array_equal(rounds.overall[row], overall)
        np.testing.assert_array_equal(rounds.classes[row], classes)
    assert len(set(rounds.overall[:, 0])) > 4


@pytest.mark.parametrize("rules", [VOC2007, VOC2012, VocRules(average="area", pixels="continuous", overlap="above")])
def test_voc_numbers_of_the_pictures_as_they_are_and_of_drawings(rules: VocRules) -> None:
    for seed in range(4):
        case = random_case(seed, ties=False)
        drawn = np.concatenate([np.ones((1, 8), dtype=np.int64), draw_pictures(8, 6, seed)])
        rounds = resample_voc(*case[:2], 3, drawn, difficult=case[2], rules=rules)
        for row, counts in enumerate(drawn, start=1):
            truths, detections, difficult = drawn_case(case, counts)
            expected = evaluate_voc(truths, detections, 3, difficult=difficult, rules=rules)
            values = [np.nan if c.AP is None else c.AP for c in expected.per_class]
            mean = np.nan if expected.mAP is None else expected.mAP
            # A step of two is one step of double height, and not two steps to the last bit.
            np.testing.assert_allclose(rounds.classes[row, :, 0], values, rtol=0, atol=1e-12)
            np.testing.assert_allclose(rounds.overall[row, 0], mean, rtol=0, atol=1e-12)
        np.testing.assert_array_equal(rounds.overall[0], rounds.overall[1])
        plain = evaluate_voc(*case[:2], 3, difficult=case[2], rules=rules)
        assert rounds.overall[0, 0] == plain.mAP
        assert [v for v in rounds.classes[0, :, 0] if not np.isnan(v)] == [c.AP for c in plain.per_class if c.objects]


def test_outcomes_add_up() -> None:
    truths, detections, _ = random_case(0)
    for label, matched in enumerate(match_coco(truths, detections, 3), start=1):
        in_picture = [int((t.labels[~t.crowd] == label).sum()) for t in reversed(truths)]
        assert matched.objects.tolist() == in_picture
        kept = [min(100, int((d.labels == label).sum())) for d in reversed(detections)]
        assert np.bincount(matched.picture, minlength=8).tolist() == kept
        assert (np.diff(matched.scores) <= 0).all()
        assert matched.right.shape == matched.counted.shape == (10, sum(kept))
        assert not (matched.right & ~matched.counted).any()


def test_drawings_are_fair_and_decided_by_the_seed() -> None:
    drawn = draw_pictures(40, 500, 3)
    assert drawn.shape == (500, 40)
    assert (drawn.sum(axis=1) == 40).all()
    assert 0.8 < drawn.mean(axis=0).min() <= drawn.mean(axis=0).max() < 1.2
    np.testing.assert_array_equal(drawn, draw_pictures(40, 500, 3))
    np.testing.assert_array_equal(drawn[:7], draw_pictures(40, 7, 3))
    assert (drawn != draw_pictures(40, 500, 4)).any()
    assert draw_pictures(0, 2, 0).shape == (2, 0)


def test_how_many_are_scored_at_a_time_does_not_matter() -> None:
    case = random_case(1)
    drawn = draw_pictures(8, 130, 0)  # more than two chunks
    all_at_once = resample_coco(*case[:2], 3, drawn)
    for row in (0, 63, 64, 129):
        alone = resample_coco(*case[:2], 3, drawn[row : row + 1])
        np.testing.assert_array_equal(alone.overall[1], all_at_once.overall[row + 1])
        np.testing.assert_array_equal(alone.classes[1], all_at_once.classes[row + 1])


def test_the_order_of_pictures_does_not_matter() -> None:
    truths, detections, difficult = random_case(2)
    order = np.random.default_rng(0).permutation(8)
    drawn = draw_pictures(8, 5, 0)
    shuffled = resample_coco([truths[i] for i in order], [detections[i] for i in order], 3, drawn)
    np.testing.assert_array_equal(shuffled.overall, resample_coco(truths, detections, 3, drawn).overall)
    mixed = ([truths[i] for i in order], [detections[i] for i in reversed(order)], 3, drawn)
    voc = resample_voc(*mixed, difficult=[difficult[i] for i in order], rules=VOC2007)
    plain = resample_voc(truths, detections, 3, drawn, difficult=difficult, rules=VOC2007)
    np.testing.assert_array_equal(voc.overall, plain.overall)


def rounds_of(overall: np.ndarray, classes: np.ndarray | None = None) -> Rounds:
    """Rounds of one number, and of one number of each class."""
    table = np.zeros((len(overall), 0)) if classes is None else classes
    return Rounds(("AP",), ("AP",), np.array(overall)[:, None], table[:, :, None])


def test_an_interval_holds_the_middle_95_percent() -> None:
    drawn = np.random.default_rng(0).permutation(1001) / 1000  # 0, 0.001, ..., 1
    (only,) = estimates(rounds_of(np.array([0.5, *drawn]))).overall
    assert (only.name, only.value, only.rounds) == ("AP", 0.5, 1001)
    np.testing.assert_allclose([only.low, only.high], [0.025, 0.975], rtol=0, atol=1e-12)


def test_an_interval_is_corrected_for_drawings_that_lie_to_one_side() -> None:
    drawn = np.random.default_rng(0).permutation(1001) / 1000
    (only,) = estimates(rounds_of(np.array([0.3, *drawn]))).overall
    # 30 % lie below, 0.5244 deviations from the middle: the quantiles move by twice that, to 1.96 + 1.0488 deviations
    # below the middle and 1.96 - 1.0488 above it.
    np.testing.assert_allclose([only.low, only.high], [0.00131, 0.8189], rtol=0, atol=1e-3)
    (above,) = estimates(rounds_of(np.array([-1.0, *drawn]))).overall  # no telling how far: not corrected
    np.testing.assert_allclose([above.low, above.high], [0.025, 0.975], rtol=0, atol=1e-12)


def test_drawings_without_a_number_are_left_out_and_counted() -> None:
    nothing = np.full(4, np.nan)
    classes = np.column_stack([[0.5, 0.2, np.nan, 0.4], nothing, [0.5, np.nan, np.nan, np.nan]])
    summed = estimates(rounds_of(nothing, classes))
    assert summed.overall == (Estimate("AP", None, None, None, 0),)
    ((first,), (second,), (third,)) = summed.per_class
    assert (first.value, first.rounds) == (0.5, 2)
    np.testing.assert_allclose([first.low, first.high], [0.205, 0.395], rtol=0, atol=1e-12)
    assert second == Estimate("AP", None, None, None, 0)
    assert third == Estimate("AP", 0.5, None, None, 0)
    assert summed.rounds == 3


def test_a_class_in_one_picture_is_missing_from_a_third_of_the_drawings() -> None:
    truths, detections, _ = random_case(1)
    kept = [replace(t, labels=np.where((t.labels == 2) & (t.image_id != 48), 1, t.labels)) for t in truths]
    objects = [int((t.labels[~t.crowd] == 2).sum()) for t in kept]
    assert np.count_nonzero(objects) == 1
    summed = estimates(resample_coco(kept, detections, 3, draw_pictures(8, 400, 0)))
    rounds = [numbers[0].rounds for numbers in summed.per_class]
    assert rounds[0] == 400
    assert 0.60 < rounds[1] / 400 < 0.71  # 1 - (7/8)^8 = 0.656
    assert summed.per_class[2][0] == Estimate("AP", None, None, None, 0)


@pytest.mark.parametrize(
    ("low", "high", "excludes"),
    [(0.1, 0.2, True), (-0.2, -0.1, True), (-0.1, 0.1, False), (0.0, 0.1, False), (-0.1, 0.0, False)],
)
def test_excluding_zero(low: float, high: float, excludes: bool) -> None:
    assert Estimate("AP", 0.1, low, high, 100).excludes_zero is excludes
    assert not Estimate("AP", None, None, None, 0).excludes_zero


def test_a_set_does_not_differ_from_itself() -> None:
    case = random_case(3)
    rounds = resample_coco(*case[:2], 3, draw_pictures(8, 120, 0))
    summed = differences(rounds, rounds)
    for number in (*summed.overall, *summed.per_class[0], *summed.per_class[1]):
        assert (number.value, number.low, number.high, number.excludes_zero) == (0.0, 0.0, 0.0, False)


def test_a_difference_turns_its_sign_when_the_sets_change_places() -> None:
    truths, detections, _ = random_case(3)
    fewer = [replace(d, scores=d.scores[::-1].copy()) for d in detections]
    drawn = draw_pictures(8, 150, 0)
    one, other = resample_coco(truths, detections, 3, drawn), resample_coco(truths, fewer, 3, drawn)
    there, back = differences(one, other).overall[0], differences(other, one).overall[0]
    assert there.value
    assert back.value == -there.value
    np.testing.assert_allclose([there.low, there.high], [-back.high, -back.low], rtol=0, atol=1e-12)  # type: ignore[operator]
    assert there.value == one.overall[0, 0] - other.overall[0, 0]


def toy(hits: np.ndarray) -> Case:
    """One object a picture, found exactly or not at all: AP by area is the part that is found."""
    box, label, area, no = np.array([[0.0, 0, 10, 10]]), np.ones(1, np.int64), np.full(1, 100.0), np.zeros(1, np.bool_)
    truths = [PictureTruth(i, box, label, area, no) for i in range(len(hits))]
    detections = [PictureDetections(i, box[:k], np.full(k, 0.5), label[:k]) for i, k in enumerate(hits.tolist())]
    return truths, detections, [no] * len(hits)


def test_intervals_cover_a_known_answer_as_often_as_they_promise() -> None:
    draw = np.random.default_rng(0)
    covered, widths = [], []
    for seed in range(80):
        truths, detections, difficult = toy((draw.random(100) < 0.7).astype(int))
        drawn = draw_pictures(100, 300, seed)
        rounds = resample_voc(truths, detections, 1, drawn, difficult=difficult, rules=VOC2012)
        (number,) = estimates(rounds).overall
        assert number.low is not None
        assert number.high is not None
        covered.append(number.low <= 0.7 <= number.high)
        widths.append(number.high - number.low)
    assert 0.89 <= np.mean(covered) <= 0.99
    # Of a share: 2 * 1.96 * sqrt(0.7 * 0.3 / 100).
    assert abs(np.mean(widths) - 0.180) < 0.01


def test_a_paired_difference_is_surer_than_its_parts() -> None:
    # The second set finds what the first finds, and five more of a hundred.
    hits = np.arange(100) % 2
    more = hits.copy()
    more[np.flatnonzero(hits == 0)[:5]] = 1
    drawn = draw_pictures(100, 400, 0)
    few, many = (resample_voc(*toy(h)[:2], 1, drawn, difficult=toy(h)[2], rules=VOC2012) for h in (hits, more))
    (difference,) = differences(many, few).overall
    assert difference.value == pytest.approx(0.05)
    assert difference.excludes_zero
    alone = estimates(many).overall[0]
    assert alone.low is not None
    assert alone.low < 0.5  # by itself its interval reaches down to what the first set scores


def test_what_does_not_fit_is_refused() -> None:
    case = random_case(0)
    with pytest.raises(ValueError, match=r"expected drawn \[R, 8\], got \[3, 7\]"):
        resample_coco(*case[:2], 3, draw_pictures(7, 3, 0))
    drawn = draw_pictures(8, 3, 0)
    voc = resample_voc(*case[:2], 3, drawn, difficult=case[2], rules=VOC2007)
    with pytest.raises(ValueError, match="expected the same numbers"):
        differences(voc, resample_coco(*case[:2], 3, drawn))


def test_no_pictures_have_no_numbers() -> None:
    summed = estimates(resample_coco([], [], 2, draw_pictures(0, 2, 0)))
    assert [number.value for number in summed.overall] == [None] * 3

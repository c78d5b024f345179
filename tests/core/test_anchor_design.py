"""Anchors fitted to objects, and when they are proposed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from refinedet_cli.core import anchor_design
from refinedet_cli.core.anchor_coverage import ObjectSet, best_ious
from refinedet_cli.core.anchor_design import Fit, Gain, design, draw_sample, gain_interval, measure_fit
from refinedet_cli.core.anchor_search import DEFAULT_LIMITS, Limits
from refinedet_cli.core.config import AnchorConfig

SIZE = (128, 128)
START = AnchorConfig.from_sizes(sizes=(16, 32, 64, 96), ratios=(1, 2, 0.5), strides=(8, 16, 32, 64))
ANCHORS = 3 * (256 + 64 + 16 + 4)


def draw(seed: int, width: float, height: float, count: int = 60, label: int = 1) -> ObjectSet:
    """Objects of about one size anywhere in pictures of three objects each."""
    generator = np.random.default_rng(seed)
    size = np.array([width, height]) * np.exp(generator.normal(0, 0.1, (count, 2)))
    corner = generator.uniform(0, 1, (count, 2)) * (128 - size)
    boxes = np.concatenate([corner, corner + size], axis=1)
    labels = np.full(count, label, dtype=np.int64)
    return ObjectSet(boxes, labels, np.arange(count) // 3, (count + 2) // 3)


def check_sound(found: AnchorConfig, budget: int, limits: Limits = DEFAULT_LIMITS) -> None:
    cells = [(128 // s) ** 2 for s in found.strides]
    assert sum(n * len(level) for n, level in zip(cells, found.shapes, strict=True)) <= budget
    for stride, level in zip(found.strides, found.shapes, strict=True):
        assert 1 <= len(level) <= limits.per_cell
        assert list(level) == sorted(level, key=lambda shape: shape[0] * shape[1])
        for w, h in level:
            assert (round(w, 1), round(h, 1)) == (w, h)
            assert max(w / h, h / w) <= limits.flattest * 1.02
            assert limits.smallest * stride * 0.98 <= (w * h) ** 0.5 <= limits.largest * stride * 1.02


def test_flat_objects_get_flat_anchors():
    train, held_out = draw(0, 52, 13), draw(1, 52, 13)
    proposal = design(train, held_out, START, SIZE, classes=2)
    assert proposal.accepted
    assert proposal.anchors == proposal.found
    assert proposal.held_out_before.matched < 0.5
    assert proposal.held_out_after.matched > 0.9
    assert proposal.gain.gain == pytest.approx(proposal.held_out_after.matched - proposal.held_out_before.matched)
    assert 0 < proposal.gain.low < proposal.gain.gain < proposal.gain.high
    assert proposal.anchors_after <= proposal.anchors_before == ANCHORS
    assert proposal.sample == 60 * 8
    assert proposal.evaluations > 1000
    check_sound(proposal.found, ANCHORS)
    fit = measure_fit(held_out, best_ious(held_out.boxes, proposal.anchors, SIZE))
    assert fit == proposal.held_out_after


def test_equal_seeds_give_equal_proposals():
    train, held_out = draw(0, 60, 14), draw(1, 60, 14)
    first, second, other = (design(train, held_out, START, SIZE, classes=2, seed=seed) for seed in (5, 5, 6))
    assert first == second
    assert first.found != other.found


def test_anchors_that_do_not_win_on_held_out_objects_are_not_proposed():
    proposal = design(draw(0, 62, 13), draw(1, 16, 16), START, SIZE, classes=2)
    assert proposal.train_after.matched > proposal.train_before.matched
    assert proposal.held_out_after.matched < proposal.held_out_before.matched
    assert not proposal.accepted
    assert proposal.anchors == START
    assert proposal.found != START


def test_a_smaller_budget_and_other_limits_are_kept():
    budget, limits = 256 + 2 * 64 + 16 + 4, Limits(smallest=2, largest=4, flattest=2, per_cell=4)
    start = replace(START, shapes=tuple(level[:1] for level in START.shapes))
    proposal = design(draw(0, 40, 30), draw(1, 40, 30), start, SIZE, classes=2, budget=budget, limits=limits)
    check_sound(proposal.found, budget, limits)


def test_anchors_that_add_nothing_are_saved():
    proposal = design(draw(0, 90, 90), draw(1, 90, 90), START, SIZE, classes=2)
    assert proposal.train_after.matched == proposal.held_out_after.matched == 1
    assert proposal.anchors_after < ANCHORS / 2


def test_the_search_never_loses_on_the_objects_it_sees():
    train = draw(0, 30, 30)
    proposal = design(train, train, START, SIZE, classes=2)
    assert proposal.train_after.matched >= proposal.train_before.matched


@pytest.mark.parametrize(
    ("anchors", "box"),
    [
        pytest.param(START, [3.0, 4.0, 40.0, 20.0], id="inside"),
        pytest.param(START, [-100.0, -100.0, 300.0, 300.0], id="larger than the picture"),
        pytest.param(START, [500.0, 500.0, 540.0, 510.0], id="outside"),
        pytest.param(AnchorConfig(strides=(64,), shapes=(((50, 50),),)), [3.0, 4.0, 40.0, 20.0], id="one anchor"),
    ],
)
def test_one_object_is_enough(anchors: AnchorConfig, box: list[float]):
    one = ObjectSet(np.array([box]), np.array([1]), np.array([0]), 1)
    proposal = design(one, one, anchors, SIZE, classes=2, limits=Limits(per_cell=1))
    assert (proposal.gain.low, proposal.gain.high) == (-1, 1)
    assert proposal.accepted == (proposal.held_out_after.matched > proposal.held_out_before.matched)


def test_what_cannot_be_fitted_is_refused():
    good = draw(0, 30, 30)
    empty = ObjectSet(good.boxes[:0], good.labels[:0], good.picture[:0], 3)
    flat = good._replace(boxes=good.boxes[:, [0, 1, 0, 3]])
    for train, held_out, options, message in (
        (empty, good, {}, "no training objects"),
        (good, empty, {}, "no held-out objects"),
        (flat, good, {}, "no training object has an area"),
        (good, good._replace(labels=good.labels + 1), {}, "held-out object has label 2, expected less than 2"),
        (good, good, {"budget": 339}, "340 anchors already, more than the budget of 339"),
        (good, good, {"limits": Limits(smallest=7)}, "smallest < largest"),
    ):
        with pytest.raises(ValueError, match=message):
            design(train, held_out, START, SIZE, classes=2, **options)


def test_a_fit_by_hand():
    # Classes 1 to 5 of ten objects with 10, 9, 8, 7, 2 matched; class 6 has too few to count. The worst quarter of five
    # classes is two.
    matched = np.concatenate([np.arange(10) < n for n in (10, 9, 8, 7, 2)] + [np.zeros(9, dtype=bool)])
    labels = np.repeat([1, 2, 3, 4, 5, 6], [10] * 5 + [9])
    side = np.arange(59, 0, -1.0)
    boxes = np.stack([side * 0, side * 0, side, side], axis=1)
    objects = ObjectSet(boxes, labels, np.zeros(59, dtype=np.int64), 1)
    fit = measure_fit(objects, np.where(matched, 0.5, 0.49))
    assert fit == Fit(pytest.approx(36 / 59), pytest.approx((0.7 + 0.2) / 2), pytest.approx(0.0), 59)
    few = ObjectSet(boxes[:2], labels[:2], np.zeros(2, dtype=np.int64), 1)
    assert measure_fit(few, np.array([0.6, 0.2])) == Fit(0.5, 0.5, 0.0, 2)


def test_the_interval_resamples_pictures():
    # Half of 100 pictures gain their one object: the interval is that of a proportion.
    objects = ObjectSet(np.tile([0, 0, 9, 9.0], (100, 1)), np.ones(100, np.int64), np.arange(100) * 2, 200)
    before, after = np.zeros(100), np.where(np.arange(100) % 2, 0.5, 0.49)
    gain = gain_interval(objects, before, after, generator=np.random.default_rng(0))
    assert gain.gain == 0.5
    assert (gain.low, gain.high) == (pytest.approx(0.4, abs=0.03), pytest.approx(0.6, abs=0.03))
    # The same objects in two pictures know less; in one, nothing.
    two = objects._replace(picture=np.arange(100) // 50)
    assert gain_interval(two, before, np.arange(100) // 50 / 2, generator=np.random.default_rng(0)) == Gain(0.5, 0, 1)
    one = objects._replace(picture=np.zeros(100, dtype=np.int64))
    assert gain_interval(one, before, after, generator=np.random.default_rng(0)) == Gain(0.5, -1, 1)


@pytest.mark.parametrize(
    ("after", "low", "wins"),
    [
        pytest.param(Fit(0.6, 0.3, 0.2, 9), -0.01, True, id="better, unsure, no loss in the tail"),
        pytest.param(Fit(0.6, 0.29, 0.2, 9), -0.01, False, id="better, unsure, worse classes"),
        pytest.param(Fit(0.6, 0.3, 0.19, 9), -0.01, False, id="better, unsure, worse small objects"),
        pytest.param(Fit(0.6, 0.1, 0.1, 9), 0.01, True, id="surely better"),
        pytest.param(Fit(0.5, 0.4, 0.3, 9), 0.0, False, id="equal"),
        pytest.param(Fit(0.4, 0.4, 0.3, 9), -0.2, False, id="worse"),
    ],
)
def test_what_wins(after: Fit, low: float, wins: bool):
    before = Fit(0.5, 0.3, 0.2, 9)
    assert anchor_design._wins(before, after, Gain(after.matched - before.matched, low, 1.0)) is wins


def test_few_objects_are_copied_within_the_picture():
    objects = draw(0, 30, 20, count=20)
    flat = objects._replace(boxes=np.concatenate([objects.boxes[:19], [[5, 5, 5, 9]]]))
    sample = draw_sample(flat, SIZE, np.random.default_rng(0))
    assert sample.boxes.shape == (19 * 8, 4)
    assert (sample.boxes[:19] == objects.boxes[:19]).all()
    assert (sample.boxes >= -1e-9).all()
    assert (sample.boxes <= 128 + 1e-9).all()
    assert (sample.boxes[:, 2:] > sample.boxes[:, :2]).all()
    assert len(np.unique(sample.boxes, axis=0)) == 19 * 8
    assert sample.groups.all()
    assert sample.groups.shape == (19 * 8, 1)
    assert sample.smallest.sum() == pytest.approx(19 * 8 / 5, abs=1)


def test_of_many_objects_some_are_drawn(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(anchor_design, "_SAMPLE", 40)
    objects = draw(0, 30, 20, count=100)
    sample = draw_sample(objects, SIZE, np.random.default_rng(0))
    assert len(np.unique(sample.boxes, axis=0)) == 40
    assert {tuple(box) for box in sample.boxes} <= {tuple(box) for box in objects.boxes}

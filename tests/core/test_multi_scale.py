"""Schedules, limits and voting, by hand and against plain loops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from refinedet_cli.core.config import PostprocessConfig, PreprocessConfig
from refinedet_cli.core.multi_scale import (
    ScalePass,
    ScaleSchedule,
    mirrored,
    named_schedule,
    pool,
    soft_vote,
    vote,
    within_limits,
)
from refinedet_cli.core.structures import Detections
from refinedet_cli.errors import ConfigError

POST = PostprocessConfig()


def square(side: int) -> PreprocessConfig:
    return PreprocessConfig(height=side, width=side)


def detections(*rows: tuple[tuple[float, float, float, float], float, int]) -> Detections:
    return Detections(
        boxes=torch.tensor([box for box, _, _ in rows]).reshape(-1, 4).float(),
        scores=torch.tensor([score for _, score, _ in rows]).float(),
        labels=torch.tensor([label for _, _, label in rows], dtype=torch.int64),
    )


# --- schedules

# Long side, short side, longer side above, shorter side below; the last column names what VOC leaves out.
PUBLISHED = {
    320: [
        (320, 320, None, None, ""),
        (320, 192, None, None, ""),
        (192, 192, 32, None, ""),
        (384, 384, None, 160, ""),
        (448, 448, None, 128, ""),
        (512, 512, None, 96, ""),
        (576, 576, None, 64, ""),
        (640, 640, None, 48, "coco"),
        (704, 704, None, 32, ""),
    ],
    512: [
        (512, 512, None, None, ""),
        (512, 384, None, None, ""),
        (256, 256, None, None, ""),
        (384, 384, None, None, ""),
        (640, 640, None, 224, "coco"),
        (768, 768, None, 192, ""),
        (896, 896, None, 128, ""),
        (1024, 1024, None, 96, "coco"),
        (1152, 1152, None, 64, "coco"),
    ],
}


@pytest.mark.parametrize(
    ("name", "side", "count"), [("voc", 320, 16), ("coco", 320, 18), ("voc", 512, 12), ("coco", 512, 18)]
)
def test_published_schedules(name, side, count):
    schedule = named_schedule(name, square(side))
    found = [(p.size, p.short_side or p.size, p.max_side_above, p.min_side_below) for p in schedule.passes]
    assert found == [row[:4] for row in PUBLISHED[side] if name == "coco" or row[4] == ""]
    assert all(p.mirror for p in schedule.passes)
    assert schedule.count == count
    assert schedule.pixels == sum(2 * size * short for size, short, _, _ in found)
    assert (schedule.name, schedule.voting_iou, schedule.picture_side) == (name, 0.45, None)
    assert schedule.voting == {"voc": "average", "coco": "soft"}[name]


@pytest.mark.parametrize(
    ("side", "sizes"),
    [
        (384, [(384, 384), (384, 256), (256, 256), (448, 448), (512, 512), (640, 640), (704, 704), (832, 832)]),
        (448, [(448, 448), (448, 320), (256, 256), (320, 320), (704, 704), (768, 768)]),
        (64, [(64, 64), (128, 128)]),
    ],
)
def test_other_inputs_take_the_nearer_table_rounded_to_64(side, sizes):
    schedule = named_schedule("voc", square(side))
    assert [(p.size, p.short_side or p.size) for p in schedule.passes] == sizes


@pytest.mark.parametrize("name", ["voc", "coco"])
def test_rounding_never_makes_two_equal_passes_or_loosens_with_size(name):
    for side in range(64, 1100, 64):
        passes = named_schedule(name, square(side)).passes
        assert len({(p.size, p.short_side) for p in passes}) == len(passes)
        limits = [p.min_side_below for p in sorted(passes, key=lambda p: p.size) if p.min_side_below is not None]
        assert limits == sorted(limits, reverse=True)
        assert (passes[0].size, passes[0].short_side) == (side, None)


def test_an_input_that_is_not_square_has_no_published_schedule():
    with pytest.raises(ConfigError, match="512 x 320 px") as caught:
        named_schedule("voc", PreprocessConfig(height=320, width=512))
    assert "FILE.toml" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"size": 300}, "size of a pass .* not 300"),
        ({"size": 0}, "not 0"),
        ({"size": 8192}, "to 4096, not 8192"),
        ({"size": 320, "short_side": 100}, "short_side .* not 100"),
        ({"size": 320, "short_side": 384}, "above its size 320, not 384"),
        ({"size": 320, "max_side_above": 0.0}, "max_side_above .* not 0"),
        ({"size": 320, "min_side_below": -1.0}, "min_side_below .* not -1"),
    ],
)
def test_impossible_passes_are_refused_by_value(settings, words):
    with pytest.raises(ConfigError, match=words):
        ScalePass(**settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"passes": ()}, "mine has no passes"),
        ({"voting_iou": 0.0}, "voting_iou .* not 0"),
        ({"voting_iou": 1.5}, "voting_iou .* not 1.5"),
        ({"picture_side": 0}, "picture_side .* not 0"),
    ],
)
def test_impossible_schedules_are_refused_by_value(settings, words):
    with pytest.raises(ConfigError, match=words):
        ScaleSchedule(**{"name": "mine", "passes": (ScalePass(size=64),), **settings})


@pytest.mark.parametrize(
    ("picture", "expected"),
    [((300, 500), (192, 320)), ((500, 300), (320, 192)), ((400, 400), (320, 192))],
    ids=["landscape", "portrait", "square picture"],
)
def test_the_longer_side_of_the_input_lies_along_that_of_the_picture(picture, expected):
    assert ScalePass(size=320, short_side=192).input_size(*picture) == expected
    assert ScalePass(size=320).input_size(*picture) == (320, 320)


def test_counts_of_passes_with_and_without_mirror():
    schedule = ScaleSchedule(name="x", passes=(ScalePass(size=64), ScalePass(size=128, short_side=64, mirror=False)))
    assert (schedule.count, schedule.pixels) == (3, 2 * 64 * 64 + 128 * 64)


# --- what a pass finds


def test_mirrored_boxes_by_hand_and_back():
    found = detections(((10, 5, 30, 25), 0.9, 1), ((0, 0, 100, 50), 0.5, 2))
    turned = mirrored(found, 100)
    assert turned.boxes.tolist() == [[70, 5, 90, 25], [0, 0, 100, 50]]
    assert_close(mirrored(turned, 100).boxes, found.boxes, rtol=0, atol=0)
    assert turned.labels.tolist() == [1, 2]


def test_limits_are_exclusive_and_count_one_pixel_more():
    # Sides plus 1: 32 x 16, 33 x 16, 64 x 64 and 63 x 100.
    found = detections(
        ((0, 0, 31, 15), 0.9, 1), ((0, 0, 32, 15), 0.8, 1), ((0, 0, 63, 63), 0.7, 1), ((0, 0, 62, 99), 0.6, 1)
    )

    def kept(scale: float = 1.0, **limits: float) -> list[float]:
        scores = within_limits(found, ScalePass(size=64, **limits), scale).scores
        return [round(score, 1) for score in scores.tolist()]

    assert kept() == [0.9, 0.8, 0.7, 0.6]
    assert kept(max_side_above=32) == [0.8, 0.7, 0.6]
    assert kept(min_side_below=64) == [0.9, 0.8, 0.6]
    assert kept(min_side_below=64, max_side_above=32) == [0.8, 0.6]
    assert kept(min_side_below=32, scale=2.0) == [0.9, 0.8, 0.6]
    assert kept(max_side_above=64, scale=0.5) == [0.8, 0.7, 0.6]
    assert len(within_limits(detections(), ScalePass(size=64, max_side_above=1, min_side_below=9))) == 0


# --- voting


def plain_iou(a: list[float], b: list[float]) -> float:
    width = max(min(a[2], b[2]) - max(a[0], b[0]) + 1, 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]) + 1, 0)
    common = width * height
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)]
    return common / (sum(areas) - common)


def plain_vote(rows: list[tuple[list[float], float]], iou: float, floor: float | None) -> list[tuple[float, ...]]:
    """Vote box by box; a floor makes it the soft one. Rows come out as (score, left, top, right, bottom), sorted."""
    left = sorted(rows, key=lambda row: -row[1])
    voted = []
    while left:
        best = left[0][0]
        members = [row for row in left if plain_iou(best, row[0]) >= iou]
        left = [row for row in left if plain_iou(best, row[0]) < iou]
        total = sum(score for _, score in members)
        mean = [sum(box[k] * score for box, score in members) / total for k in range(4)]
        voted.append((max(score for _, score in members), *mean))
        for box, score in members if floor is not None else ():
            lowered = score * (1 - plain_iou(best, box))
            if lowered >= floor and lowered > 0:
                voted.append((lowered, *box))
    return sorted(voted)


def random_boxes(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes in a few heaps on a grid, some of them equal, so that overlaps repeat and hit the threshold."""
    draw = np.random.default_rng(seed)
    heaps = draw.integers(0, 60, (max(1, count // 8), 2))
    low = heaps[draw.integers(0, len(heaps), count)] + draw.integers(0, 6, (count, 2))
    size = draw.integers(0, 24, (count, 2))
    boxes = np.concatenate([low, low + size], axis=1).astype(np.float64)
    boxes[count // 2 :: 5] = boxes[:1]
    return boxes, draw.uniform(0.01, 1, count)


@pytest.mark.parametrize("floor", [None, 0.0, 0.01, 0.3], ids=["average", "soft 0", "soft 0.01", "soft 0.3"])
@pytest.mark.parametrize("iou", [0.2, 0.45, 0.5, 1.0])
def test_voting_equals_a_plain_loop(iou, floor):
    merged = 0
    for seed, count in enumerate((0, 1, 2, 3, 10, 40, 120)):
        boxes, scores = random_boxes(seed, count)
        found = vote(boxes, scores, iou) if floor is None else soft_vote(boxes, scores, iou, floor)
        rows = sorted((score, *box) for score, box in zip(found.scores.tolist(), found.boxes.tolist(), strict=True))
        expected = plain_vote(list(zip(boxes.tolist(), scores.tolist(), strict=True)), iou, floor)
        assert len(rows) == len(expected)
        np.testing.assert_allclose(np.reshape(rows, (-1, 5)), np.reshape(expected, (-1, 5)), rtol=1e-12, atol=1e-12)
        merged += count - len(vote(boxes, scores, iou).scores)
    assert merged > 0


def test_two_boxes_by_hand():
    # 11 x 11 pixels each, 9 x 11 in common: overlap 99 / 143.
    boxes, scores = np.array([[2.0, 0, 12, 10], [0, 0, 10, 10]]), np.array([0.2, 0.6])
    found = vote(boxes, scores, 0.45)
    np.testing.assert_allclose(found.boxes, [[0.5, 0, 10.5, 10]])
    assert found.scores.tolist() == [0.6]
    found = soft_vote(boxes, scores, 0.45, 0.01)
    np.testing.assert_allclose(found.boxes, [[0.5, 0, 10.5, 10], [2, 0, 12, 10]])
    np.testing.assert_allclose(found.scores, [0.6, 0.2 * 44 / 143])
    assert len(soft_vote(boxes, scores, 0.45, 0.0616).scores) == 1
    assert len(vote(boxes, scores, 0.7).scores) == 2


def test_a_pair_at_the_limit_votes_together():
    # Rows of three pixels, two in common of four.
    boxes, scores = np.array([[0.0, 0, 2, 0], [1, 0, 3, 0]]), np.array([0.5, 0.5])
    assert vote(boxes, scores, 0.5).boxes.tolist() == [[0.5, 0, 2.5, 0]]
    assert len(vote(boxes, scores, 0.5001).scores) == 2


def test_a_box_joins_the_best_it_overlaps_and_no_chain_forms():
    # The middle one joins the first; the last overlaps only the middle one, and stays alone.
    boxes = np.array([[0.0, 0, 9, 9], [4, 0, 13, 9], [8, 0, 17, 9]])
    found = vote(boxes, np.array([0.9, 0.5, 0.8]), 0.4)
    assert found.scores.tolist() == [0.9, 0.8]
    np.testing.assert_allclose(found.boxes[1], boxes[2])


SOFT = ScaleSchedule(name="soft", passes=(ScalePass(size=64),), voting="soft")
AVERAGE = replace(SOFT, voting="average")


def test_classes_vote_apart_and_the_best_come_first():
    one = detections(((0, 0, 10, 10), 0.75, 2), ((0, 0, 10, 10), 0.5, 1))
    two = detections(((0, 0, 10, 14), 0.25, 2), ((30, 30, 40, 40), 1.0, 1))
    found = pool([one, two], AVERAGE, POST)
    assert found.labels.tolist() == [1, 2, 1]
    assert found.scores.tolist() == [1.0, 0.75, 0.5]
    assert found.boxes.tolist() == [[30, 30, 40, 40], [0, 0, 10, 11], [0, 0, 10, 10]]
    assert found.boxes.dtype == found.scores.dtype == torch.float32


def test_soft_voting_takes_its_floor_from_the_config_and_keeps_no_zero():
    twice = [detections(((0, 0, 10, 10), 0.5, 1)), detections(((2, 0, 12, 10), 0.25, 1))]
    lowered = 0.25 * 44 / 143
    found = pool(twice, SOFT, POST)
    assert found.scores.tolist() == pytest.approx([0.5, lowered])
    assert len(pool(twice, SOFT, replace(POST, score_threshold=0.08))) == 1
    assert len(pool([twice[0], twice[0]], SOFT, replace(POST, score_threshold=0.0))) == 1
    assert len(pool(twice, AVERAGE, POST)) == 1


def test_pool_cuts_to_the_best_of_all_classes():
    rows = [((20.0 * i, 0.0, 20.0 * i + 5, 5.0), (i + 1) / 10, 1 + i % 3) for i in range(9)]
    found = pool([detections(*rows[:4]), detections(*rows[4:])], AVERAGE, replace(POST, keep=4))
    assert found.scores.tolist() == pytest.approx([0.9, 0.8, 0.7, 0.6])
    assert found.labels.tolist() == [3, 2, 1, 3]


@pytest.mark.parametrize("schedule", [SOFT, AVERAGE])
def test_nothing_found_is_nothing(schedule):
    for found in ([], [detections()], [detections(), detections()]):
        nothing = pool(found, schedule, POST)
        assert (len(nothing), tuple(nothing.boxes.shape), nothing.labels.dtype) == (0, (0, 4), torch.int64)


def test_voted_boxes_stay_within_the_hull_of_the_passes():
    boxes, scores = random_boxes(7, 80)
    labels = torch.from_numpy(np.random.default_rng(1).integers(1, 4, 80))
    found = pool([Detections(torch.from_numpy(boxes).float(), torch.from_numpy(scores).float(), labels)], SOFT, POST)
    assert 0 < len(found) <= 160
    assert (found.scores.diff() <= 0).all()
    assert (found.boxes >= float(boxes.min())).all()
    assert (found.boxes <= float(boxes.max())).all()

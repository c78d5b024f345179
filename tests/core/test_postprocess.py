"""Candidates, suppression and clipping, against brute force with exact fractions and against torchvision."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torchvision.ops import nms

from refinedet_cli.core import postprocess
from refinedet_cli.core.config import PostprocessConfig
from refinedet_cli.core.postprocess import (
    greedy_keep,
    pixel_iou,
    soften,
    suppress,
    to_detections,
    top_candidates,
    try_suppress,
)
from refinedet_cli.core.presets import POSTPROCESS_PRESETS
from refinedet_cli.core.structures import BatchDetections, Candidates, Detections


def exact_iou(a: list[float], b: list[float]) -> Fraction:
    ax0, ay0, ax1, ay1 = map(Fraction, a)
    bx0, by0, bx1, by1 = map(Fraction, b)
    common = max(min(ax1, bx1) - max(ax0, bx0), 0) * max(min(ay1, by1) - max(ay0, by0), 0)
    union = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - common
    return common / union if union else Fraction(0)


def brute_force(boxes: Tensor, scores: Tensor, labels: Tensor, limit: float) -> list[bool]:
    """Take candidates best first; each stays unless one of its label that stayed overlaps it by more."""
    kept: list[int] = []
    rows, classes = boxes.tolist(), labels.tolist()
    for i, score in enumerate(scores.tolist()):
        if score > 0 and not any(
            classes[j] == classes[i] and exact_iou(rows[i], rows[j]) > Fraction(str(limit)) for j in kept
        ):
            kept.append(i)
    return [i in kept for i in range(len(rows))]


def random_row(generator: torch.Generator, places: int, classes: int, *, ties: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes on a coarse grid, so that overlaps are exact, repeat, hit thresholds, and some boxes have no area."""
    low = torch.randint(0, 8, (places, 2), generator=generator)
    size = torch.randint(0, 6, (places, 2), generator=generator)
    boxes = torch.cat([low, low + size], dim=1) / 8
    scores = torch.rand(places, generator=generator)
    if ties:
        scores = (scores * 4).round() / 4
    empty = int(torch.randint(0, places + 1, (), generator=generator)) // 3
    scores = scores.sort(descending=True).values
    scores[places - empty :] = 0
    return boxes, scores, torch.randint(1, classes + 1, (places,), generator=generator)


def as_candidates(*rows: tuple[Tensor, Tensor, Tensor]) -> Candidates:
    """One group per picture."""
    return Candidates(*(torch.stack(column)[:, None] for column in zip(*rows, strict=True)))


@pytest.mark.parametrize("limit", [0.0, 0.25, 0.45, 0.5, 1.0])
@pytest.mark.parametrize("ties", [False, True], ids=["", "ties"])
def test_greedy_equals_brute_force(limit, ties):
    generator = torch.Generator().manual_seed(0)
    suppressed = 0
    for places in (1, 2, 3, 8, 20, 60):
        rows = [random_row(generator, places, classes, ties=ties) for classes in (1, 1, 2, 3, 3)]
        found = greedy_keep(*(torch.stack(column) for column in zip(*rows, strict=True)), limit)
        for row, mask in zip(rows, found, strict=True):
            assert mask.tolist() == brute_force(*row, limit)
            suppressed += int((row[1] > 0).sum() - mask.sum())
    assert (suppressed == 0) == (limit == 1.0)


def test_a_long_chain_takes_every_other_box():
    # Each box overlaps only its neighbours by more than a half: 0.75 of a side moved by a quarter.
    places = 60
    left = torch.arange(places) / 4
    boxes = torch.stack([left, torch.zeros(places), left + 1, torch.ones(places)], dim=1)
    scores = torch.linspace(1, 0.5, places)
    kept = greedy_keep(boxes[None], scores[None], torch.ones(1, places, dtype=torch.int64), 0.5)
    assert kept[0].tolist() == [i % 2 == 0 for i in range(places)]


def test_a_pair_at_the_limit_survives():
    boxes = torch.tensor([[[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.5]]])
    scores, labels = torch.tensor([[0.9, 0.8]]), torch.ones(1, 2, dtype=torch.int64)
    assert greedy_keep(boxes, scores, labels, 0.5).tolist() == [[True, True]]
    assert greedy_keep(boxes, scores, labels, 0.4999).tolist() == [[True, False]]


def test_classes_do_not_suppress_each_other():
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(1, 3, 4)
    scores, labels = torch.tensor([[0.9, 0.8, 0.7]]), torch.tensor([[1, 2, 1]])
    assert greedy_keep(boxes, scores, labels, 0.5).tolist() == [[True, True, False]]


def test_suppress_equals_brute_force_and_the_best_of_it():
    generator = torch.Generator().manual_seed(1)
    for keep in (1, 5, 200):
        config = PostprocessConfig(nms_iou=0.45, keep=keep)
        rows = [random_row(generator, 40, 3, ties=False) for _ in range(4)]
        found = suppress(as_candidates(*rows), config)
        assert found.boxes.shape == (4, min(keep, 40), 4)
        for i, (boxes, scores, labels) in enumerate(rows):
            expected = torch.tensor(brute_force(boxes, scores, labels, 0.45)).nonzero()[:keep, 0]
            count = len(expected)
            assert int(found.counts[i]) == count
            assert_close(found.boxes[i, :count], boxes[expected], rtol=0, atol=0)
            assert_close(found.scores[i, :count], scores[expected], rtol=0, atol=0)
            assert_close(found.labels[i, :count], labels[expected], rtol=0, atol=0)
            for rest in (found.boxes, found.scores, found.labels):
                assert not rest[i, count:].any()


@pytest.mark.parametrize("name", POSTPROCESS_PRESETS)
def test_equals_torchvision_class_by_class(name):
    config = POSTPROCESS_PRESETS[name]()
    generator = torch.Generator().manual_seed(2)
    anchors, classes = 700, 4
    scores = torch.rand(2, anchors, classes, generator=generator) ** 4
    low = torch.rand(2, anchors, 2, generator=generator)
    every_box = torch.cat([low, low + 0.05 + 0.3 * torch.rand(2, anchors, 2, generator=generator)], dim=2)
    best = top_candidates(scores, config)
    boxes = torch.stack([every_box[i][best.anchors[i]] for i in range(2)])
    found = suppress(Candidates(boxes, best.scores, best.labels), config)
    for i in range(2):
        entering = [
            (float(scores[i, a, c]), c + 1, a)
            for c in range(classes)
            for a in range(anchors)
            if scores[i, a, c] > config.score_threshold
        ]
        if config.candidates_per == "picture":
            entering = sorted(entering, reverse=True)[: config.candidates]
        expected = []
        for c in range(1, classes + 1):
            of_class = [e for e in entering if e[1] == c]
            kept = nms(every_box[i, [e[2] for e in of_class]], torch.tensor([e[0] for e in of_class]), config.nms_iou)
            expected += [(of_class[k][0], c, tuple(every_box[i, of_class[k][2]].tolist())) for k in kept.tolist()]
        expected = sorted(expected, reverse=True)[: config.keep]
        count = int(found.counts[i])
        columns = (found.scores[i, :count], found.labels[i, :count], found.boxes[i, :count])
        rows = [(s, c, tuple(b)) for s, c, b in zip(*(t.tolist() for t in columns), strict=True)]
        assert set(rows) == set(expected)
        assert [row[0] for row in rows] == [row[0] for row in expected]
        assert count == config.keep or config.candidates_per == "picture"


def test_presets_hold_the_published_numbers():
    paper, caffe = (POSTPROCESS_PRESETS[name]() for name in ("paper", "caffe"))
    assert (paper.candidates, paper.candidates_per, paper.nms_iou, paper.keep) == (400, "picture", 0.45, 200)
    assert (caffe.candidates, caffe.candidates_per, caffe.nms_iou, caffe.keep) == (1000, "class", 0.45, 500)
    assert {p.score_threshold for p in (paper, caffe)} == {p.arm_filter for p in (paper, caffe)} == {0.01}


SCORES = torch.tensor([[[0.9, 0.1], [0.5, 0.8], [0.25, 0.3]]])  # three anchors, two classes


def test_candidates_of_a_picture_by_hand():
    best = top_candidates(SCORES, PostprocessConfig(score_threshold=0.25, candidates=5))
    assert best.scores.tolist() == [[[pytest.approx(v) for v in (0.9, 0.8, 0.5, 0.3, 0.0)]]]
    assert best.anchors[..., :4].tolist() == [[[0, 1, 1, 2]]]
    assert best.labels[..., :4].tolist() == [[[1, 2, 1, 2]]]


def test_candidates_of_each_class_by_hand():
    best = top_candidates(SCORES, PostprocessConfig(score_threshold=0.25, candidates=2, candidates_per="class"))
    assert_close(best.scores, torch.tensor([[[0.9, 0.5], [0.8, 0.3]]]), rtol=0, atol=0)
    assert best.anchors.tolist() == [[[0, 1], [1, 2]]]
    assert best.labels.tolist() == [[[1, 1], [2, 2]]]


@pytest.mark.parametrize("per", ["picture", "class"])
def test_the_score_threshold_is_exclusive(per):
    scores = torch.tensor([[[0.5], [0.25], [0.125]]])
    best = top_candidates(scores, PostprocessConfig(score_threshold=0.25, candidates_per=per))
    assert best.scores.tolist() == [[[0.5, 0.0, 0.0]]]


def test_fewer_anchors_than_candidates():
    assert top_candidates(SCORES, PostprocessConfig(candidates=400)).scores.shape == (1, 1, 6)
    assert top_candidates(SCORES, PostprocessConfig(candidates=400, candidates_per="class")).scores.shape == (1, 2, 3)


def test_shapes_do_not_depend_on_values():
    generator = torch.Generator().manual_seed(3)
    config = PostprocessConfig(keep=30)
    full = as_candidates(*(random_row(generator, 20, 2, ties=False) for _ in range(2)))
    none = full._replace(scores=torch.zeros_like(full.scores))
    for found in (suppress(full, config), suppress(none, config)):
        assert [tuple(t.shape) for t in found] == [(2, 20, 4), (2, 20), (2, 20), (2,)]
    assert suppress(none, config).counts.tolist() == [0, 0]


def test_groups_are_pooled_and_worked_off_in_turns(monkeypatch):
    generator = torch.Generator().manual_seed(4)
    boxes, scores, labels = (
        torch.stack(column)
        for column in zip(*(random_row(generator, 12, 1, ties=False) for _ in range(6)), strict=True)
    )
    labels = torch.arange(1, 4)[:, None].expand(2, 3, 12)
    candidates = Candidates(boxes.view(2, 3, 12, 4), scores.view(2, 3, 12), labels)
    config = PostprocessConfig(keep=7)
    at_once = suppress(candidates, config)
    monkeypatch.setattr(postprocess, "_MAX_PAIRS", 2 * 12**2)
    for found, expected in zip(try_suppress(candidates, config).found, at_once, strict=True):
        assert_close(found, expected, rtol=0, atol=0)
    for i in range(2):
        pooled = sorted(
            (
                float(candidates.scores[i, g, k])
                for g in range(3)
                for k, stays in enumerate(
                    brute_force(candidates.boxes[i, g], candidates.scores[i, g], labels[i, g], config.nms_iou)
                )
                if stays
            ),
            reverse=True,
        )
        assert at_once.scores[i, : int(at_once.counts[i])].tolist() == pooled[:7]


@pytest.mark.parametrize("ties", [False, True], ids=["", "ties"])
def test_both_forms_keep_the_same(ties):
    """10,000 rows on a coarse grid, where overlaps hit the limits exactly; brute force judges a part of them."""
    generator = torch.Generator().manual_seed(6)
    suppressed = 0
    for limit in (0.25, 0.3, 0.45, 0.5, 0.6):
        rows = [random_row(generator, 30, 3, ties=ties) for _ in range(1000)]
        candidates, config = as_candidates(*rows), PostprocessConfig(nms_iou=limit, keep=30)
        found, attempt = suppress(candidates, config), try_suppress(candidates, config)
        assert attempt.settled
        for mine, other in zip(found, attempt.found, strict=True):
            assert_close(mine, other, rtol=0, atol=0)
        for i in range(0, 1000, 25):
            expected = brute_force(*rows[i], limit)
            assert int(found.counts[i]) == sum(expected)
        suppressed += int((candidates.scores > 0).sum() - found.counts.sum())
    assert suppressed > 5_000


def test_what_has_not_settled_says_so():
    places = 60
    left = torch.arange(places) / 4
    boxes = torch.stack([left, torch.zeros(places), left + 1, torch.ones(places)], dim=1)
    row = (boxes, torch.linspace(1, 0.5, places), torch.ones(places, dtype=torch.int64))
    config = PostprocessConfig(nms_iou=0.5, keep=places)
    assert not try_suppress(as_candidates(row), config).settled
    enough = try_suppress(as_candidates(row), config, rounds=places)
    assert enough.settled
    for mine, other in zip(enough.found, suppress(as_candidates(row), config), strict=True):
        assert_close(mine, other, rtol=0, atol=0)


def test_suppression_is_idempotent():
    config = PostprocessConfig(keep=40)
    row = random_row(torch.Generator().manual_seed(5), 40, 2, ties=True)
    once = suppress(as_candidates(row), config)
    twice = suppress(Candidates(once.boxes[:, None], once.scores[:, None], once.labels[:, None]), config)
    assert sorted(map(tuple, twice.boxes[0].tolist())) == sorted(map(tuple, once.boxes[0].tolist()))
    assert_close(twice.scores, once.scores, rtol=0, atol=0)
    assert 0 < int(once.counts) < 40


def a_batch(*rows: tuple[float, int, tuple[float, float, float, float]], places: int = 6) -> BatchDetections:
    boxes, scores, labels = torch.zeros(1, places, 4), torch.zeros(1, places), torch.zeros(1, places, dtype=torch.int64)
    for i, (score, label, box) in enumerate(rows):
        boxes[0, i], scores[0, i], labels[0, i] = torch.tensor(box), score, label
    return BatchDetections(boxes, scores, labels, torch.tensor([len(rows)]))


def test_detections_are_clipped_to_the_picture():
    batch = a_batch(
        (0.9, 1, (0.25, 0.5, 0.75, 1.0)),
        (0.8, 2, (-0.5, -0.25, 0.5, 2.0)),
        (0.7, 1, (1.0, 0.0, 1.5, 1.0)),  # right of the picture
        (0.6, 3, (-1.0, -1.0, 0.0, 0.5)),  # left of it
        (0.5, 3, (0.2, 0.2, 0.2, 0.8)),  # without width
        (0.4, 2, (0.0, 0.0, 1.0, 1.0)),
    )
    (found,) = to_detections(batch, [(100, 200)])
    assert_close(
        found.boxes,
        torch.tensor([[50.0, 50, 150, 100], [0, 0, 100, 100], [0, 0, 200, 100]]),
        rtol=0,
        atol=0,
    )
    assert_close(found.scores, torch.tensor([0.9, 0.8, 0.4]), rtol=0, atol=0)
    assert found.labels.tolist() == [1, 2, 2]


def test_each_picture_has_its_own_size_and_count():
    one, none = a_batch((0.9, 1, (0.0, 0.0, 1.0, 1.0))), a_batch()
    batch = BatchDetections(*(torch.cat(pair) for pair in zip(one, none, strict=True)))
    first, second = to_detections(batch, [(10, 20), (30, 40)])
    assert first.boxes.tolist() == [[0, 0, 20, 10]]
    assert (len(second), tuple(second.boxes.shape)) == (0, (0, 4))
    with pytest.raises(ValueError, match="argument"):
        to_detections(batch, [(10, 20)])


def test_a_stricter_limit_keeps_fewer():
    row = random_row(torch.Generator().manual_seed(6), 60, 1, ties=False)
    counts = [
        int(suppress(as_candidates(row), replace(PostprocessConfig(), nms_iou=limit)).counts)
        for limit in (0.0, 0.3, 0.6, 1.0)
    ]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


# --- soft-NMS


def pixel_overlap(a: list[float], b: list[float]) -> float:
    common = max(min(a[2], b[2]) - max(a[0], b[0]) + 1, 0) * max(min(a[3], b[3]) - max(a[1], b[1]) + 1, 0)
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)]
    return common / (areas[0] + areas[1] - common)


def plain_soften(found: Detections, iou: float, floor: float) -> list[tuple[float, int, tuple[float, ...]]]:
    """Class by class, take the best one left and lower those still waiting; rows (score, label, box), best first."""
    rows = []
    for label in sorted(set(found.labels.tolist())):
        waiting = [
            [score, i]
            for i, (score, of) in enumerate(zip(found.scores.tolist(), found.labels.tolist(), strict=True))
            if of == label
        ]
        while waiting:
            best = max(waiting, key=lambda pair: (pair[0], -pair[1]))
            waiting.remove(best)
            rows.append((best[0], best[1], label))
            for pair in waiting:
                overlap = pixel_overlap(found.boxes[best[1]].tolist(), found.boxes[pair[1]].tolist())
                if overlap > iou:
                    pair[0] *= 1 - overlap
            waiting = [pair for pair in waiting if pair[0] >= floor]
    rows.sort(key=lambda row: (-row[0], row[1]))
    return [(score, label, tuple(found.boxes[i].tolist())) for score, i, label in rows if score > 0]


def heaped(seed: int, count: int) -> Detections:
    """Boxes in heaps on a grid: overlaps repeat and hit thresholds, and some boxes are equal."""
    generator = torch.Generator().manual_seed(seed)
    heaps = torch.randint(0, 80, (max(1, count // 6), 2), generator=generator)
    low = heaps[torch.randint(0, len(heaps), (count,), generator=generator)]
    low = low + torch.randint(0, 5, (count, 2), generator=generator)
    size = torch.randint(1, 16, (count, 2), generator=generator)
    scores = torch.rand(count, generator=generator).clamp(min=0.01).sort(descending=True).values
    labels = torch.randint(1, 4, (count,), generator=generator)
    boxes = torch.cat([low, low + size], dim=1).float()
    boxes[count // 2 :: 5], labels[count // 2 :: 5] = boxes[:1].clone(), labels[:1].clone()
    return Detections(boxes, scores, labels)


@pytest.mark.parametrize("floor", [0.0, 0.01, 0.2])
@pytest.mark.parametrize("iou", [0.0, 0.3, 0.5])
def test_soft_nms_equals_a_plain_loop_exactly(iou, floor):
    dropped = lowered = 0
    for seed, count in enumerate((0, 1, 2, 5, 30, 150)):
        before = heaped(seed, count)
        before = before.above(max(floor, 1e-6))
        found = soften(before, iou, floor)
        expected = plain_soften(before, iou, floor)
        assert found.labels.tolist() == [label for _, label, _ in expected]
        assert [tuple(box) for box in found.boxes.tolist()] == [box for _, _, box in expected]
        assert found.scores.tolist() == torch.tensor([score for score, _, _ in expected]).tolist()
        assert (found.scores.diff() <= 0).all()
        dropped += len(before) - len(found)
        lowered += int((before.scores.sum() - found.scores.sum()) > 0)
    assert dropped > 0
    assert lowered > 0


def rows_of_three(*rows: tuple[float, float, int]) -> Detections:
    """Boxes of three pixels by one, as (left, score, label)."""
    boxes = torch.tensor([[left, 0, left + 2, 0] for left, _, _ in rows])
    labels = torch.tensor([label for _, _, label in rows])
    return Detections(boxes, torch.tensor([score for _, score, _ in rows]), labels)


def test_soft_nms_by_hand():
    # Two of four pixels in common: half the score goes, and a third box of the class overtakes.
    found = soften(rows_of_three((0.0, 0.8, 1), (1.0, 0.6, 1), (20.0, 0.5, 1), (1.0, 0.4, 2)), 0.3, 0.01)
    assert_close(found.scores, torch.tensor([0.8, 0.5, 0.4, 0.3]), rtol=0, atol=0)
    assert found.boxes[:, 0].tolist() == [0, 20, 1, 1]
    assert found.labels.tolist() == [1, 1, 2, 1]


def test_soft_nms_leaves_a_pair_at_the_limit():
    pair = rows_of_three((0.0, 0.8, 1), (1.0, 0.6, 1))
    assert_close(soften(pair, 0.5, 0.01).scores, pair.scores, rtol=0, atol=0)
    assert soften(pair, 0.4999, 0.01).scores.tolist() == pytest.approx([0.8, 0.3])


def test_soft_nms_drops_what_falls_below_the_threshold_alone():
    # The second falls to 0.3, and lowers the third, which does not overlap the first by more than 0.3, by half.
    chain = rows_of_three((0.0, 0.8, 1), (1.0, 0.6, 1), (2.0, 0.28, 1))
    assert soften(chain, 0.3, 0.01).scores.tolist() == pytest.approx([0.8, 0.3, 0.14])
    assert soften(chain, 0.3, 0.2).scores.tolist() == pytest.approx([0.8, 0.3])
    assert soften(chain, 0.3, 0.31).scores.tolist() == pytest.approx([0.8])


def test_soft_nms_leaves_its_input_alone():
    found = heaped(3, 40)
    before = found.scores.clone()
    soften(found, 0.3, 0.01)
    assert_close(found.scores, before, rtol=0, atol=0)


def test_overlap_in_pixels_by_hand():
    boxes = np.array([[0.0, 0, 2, 0], [1, 0, 3, 0], [3, 0, 5, 0], [2.5, 0, 4.5, 0]])
    assert pixel_iou(boxes[0], boxes).tolist() == [1, 0.5, 0, 0.5 / 5.5]
    overlap = pixel_iou(boxes[:, None], boxes)
    np.testing.assert_array_equal(overlap, overlap.T)

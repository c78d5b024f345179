"""Assignment of objects to anchors, against a slow reference that follows the rules one pair at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from refinedet_cli.core.matching import NO_OVERLAP, match
from refinedet_cli.core.structures import Target, Targets

THRESHOLD = 0.5


def targets_of(*counts: int) -> Targets:
    """B pictures with so many objects each; what they look like does not matter here."""
    return Targets.pack([Target(torch.rand(n, 4), torch.ones(n, dtype=torch.int64)) for n in counts])


def reference(ious: np.ndarray, threshold: float) -> tuple[list[int], list[float]]:
    """Match one picture: ious[object][anchor] to the object of each anchor (or -1) and its best overlap."""
    objects, anchors = ious.shape
    overlap = [[float(v) if v >= NO_OVERLAP else 0.0 for v in row] for row in ious]
    result = [-1] * anchors
    free = list(range(objects))
    while pair := best_free_pair(overlap, result, free):
        result[pair[1]] = pair[0]
        free.remove(pair[0])
    highest = [0.0] * anchors
    for a in range(anchors):
        first = -1
        for o in range(objects):
            if overlap[o][a] > highest[a]:
                highest[a], first = overlap[o][a], o
        if result[a] == -1 and highest[a] >= threshold:
            result[a] = first
    return result, highest


def best_free_pair(overlap: list[list[float]], result: list[int], free: list[int]) -> tuple[int, int] | None:
    best, pair = 0.0, None
    for a, owner in enumerate(result):
        for o in free:
            if owner == -1 and overlap[o][a] > best:
                best, pair = overlap[o][a], (o, a)
    return pair


def draw_ious(generator: np.random.Generator, objects: int, anchors: int) -> np.ndarray:
    """Overlaps with many ties, zeros and hardly-anythings, or without."""
    kind = generator.integers(0, 4)
    if kind == 0:
        return generator.random((objects, anchors)).astype(np.float32)
    if kind == 1:
        steps = int(generator.integers(1, 6))
        return (generator.integers(0, steps + 1, (objects, anchors)) / steps).astype(np.float32)
    if kind == 2:
        choices = np.array([0, 1e-7, 1e-6, 0.25, 0.5, 0.50001, 0.75], dtype=np.float32)
        return generator.choice(choices, (objects, anchors))
    sparse = generator.random((objects, anchors)) < 0.2
    return (generator.random((objects, anchors)) * sparse).astype(np.float32)


def test_random_batches_equal_the_reference():
    generator = np.random.default_rng(0)
    checked = 0
    for _ in range(300):
        anchors = int(generator.integers(1, 13))
        counts = [int(n) for n in generator.integers(0, 7, generator.integers(1, 4))]
        ious = [draw_ious(generator, n, anchors) for n in counts]
        threshold = float(generator.choice([0.25, 0.5, 0.75, 1.0]))
        found = match(torch.from_numpy(np.concatenate(ious)), targets_of(*counts), threshold)
        offset = 0
        for picture, (n, overlap) in enumerate(zip(counts, ious, strict=True)):
            expected, highest = reference(overlap, threshold)
            assert found.target[picture].tolist() == [o + offset if o >= 0 else -1 for o in expected]
            assert found.best_iou[picture].tolist() == highest
            offset += n
            checked += 1
    assert checked > 500


def test_greedy_takes_the_highest_pair_first():
    # Object 1 takes anchor 0, which object 0 likes best too; object 0 falls back to anchor 1.
    ious = torch.tensor([[0.6, 0.3, 0.0], [0.7, 0.2, 0.0]])
    found = match(ious, targets_of(2), THRESHOLD)
    assert found.target.tolist() == [[1, 0, -1]]
    assert found.best_iou[0].tolist() == pytest.approx([0.7, 0.3, 0.0])


def test_objects_with_one_best_anchor_are_both_kept():
    ious = torch.tensor([[0.9, 0.1], [0.9, 0.1]])
    assert match(ious, targets_of(2), THRESHOLD).target.tolist() == [[0, 1]]


def test_a_chain_of_displacements_settles_as_the_greedy_order_does():
    ious = torch.tensor([[0.9, 0.8, 0.0, 0.0], [0.0, 0.85, 0.7, 0.0], [0.0, 0.0, 0.75, 0.6]])
    assert match(ious, targets_of(3), THRESHOLD).target.tolist() == [[0, 1, 2, 2]]
    ious = torch.tensor([[0.8, 0.7, 0.0, 0.0], [0.9, 0.75, 0.0, 0.0], [0.0, 0.72, 0.4, 0.0]])
    # 1-0 (0.9), 2-1 (0.72) and nothing is left that object 0 overlaps.
    assert match(ious, targets_of(3), THRESHOLD).target.tolist() == [[1, 2, -1, -1]]


def test_ties_go_to_the_earlier_anchor_then_to_the_earlier_object():
    assert match(torch.full((2, 3), 0.75), targets_of(2), THRESHOLD).target.tolist() == [[0, 1, 0]]
    assert match(torch.full((2, 1), 0.75), targets_of(2), THRESHOLD).target.tolist() == [[0]]


def test_an_own_anchor_needs_no_threshold_and_beats_it():
    # Anchor 0 overlaps object 0 by more than the threshold, but is all that object 1 can get.
    ious = torch.tensor([[0.6, 0.9], [0.01, 0.0]])
    assert match(ious, targets_of(2), THRESHOLD).target.tolist() == [[1, 0]]


def test_the_threshold_is_inclusive():
    below = float(np.nextafter(np.float32(0.5), np.float32(0)))
    ious = torch.tensor([[0.9, 0.5, below]])
    assert match(ious, targets_of(1), 0.5).target.tolist() == [[0, 0, -1]]


def test_an_object_that_overlaps_nothing_stays_unmatched():
    ious = torch.tensor([[0.0, 0.0], [1e-7, 9e-7], [0.3, 0.0]])
    found = match(ious, targets_of(3), THRESHOLD)
    assert found.target.tolist() == [[2, -1]]
    assert found.best_iou.tolist() == [[pytest.approx(0.3), 0.0]]


def test_more_objects_than_anchors():
    found = match(torch.tensor([[0.2, 0.1], [0.3, 0.2], [0.4, 0.3]]), targets_of(3), THRESHOLD)
    assert found.target.tolist() == [[2, 1]]


def test_pictures_do_not_touch_each_other():
    ious = torch.tensor([[0.9, 0.2], [0.9, 0.2]])
    found = match(ious, targets_of(1, 0, 1), THRESHOLD)
    assert found.target.tolist() == [[0, -1], [-1, -1], [1, -1]]
    assert found.best_iou[1].tolist() == [0.0, 0.0]


def test_no_object_at_all():
    found = match(torch.zeros(0, 5), targets_of(0, 0), THRESHOLD)
    assert found.target.tolist() == [[-1] * 5] * 2
    assert found.best_iou.tolist() == [[0.0] * 5] * 2


def test_input_is_left_as_it_was():
    ious = torch.tensor([[1e-7, 0.9]])
    match(ious, targets_of(1), THRESHOLD)
    assert ious.tolist() == torch.tensor([[1e-7, 0.9]]).tolist()

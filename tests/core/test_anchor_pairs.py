"""Pairs of objects and anchors, against all of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from refinedet_cli.core.anchor_pairs import (
    expand,
    find_pairs,
    list_slots,
    make_grid,
    nearest_overlap,
    overlaps,
    round_boxes,
)
from refinedet_cli.core.boxes import pair_iou
from refinedet_cli.core.config import AnchorConfig

ANCHORS = AnchorConfig(shapes=(((3, 5), (20, 9)), ((16, 16),), ((70, 20),), ((64, 64), (10, 90))))
SIZE = (64, 128)


def random_boxes(count: int) -> np.ndarray:
    generator = np.random.default_rng(0)
    centre, size = generator.uniform(0, 128, (count, 2)), np.exp(generator.uniform(-2, 5, (count, 2)))
    return np.concatenate([centre - size / 2, centre + size / 2], axis=1)


@pytest.mark.parametrize("least", [0.0, 1e-6, 0.1, 0.5, 0.9])
def test_all_pairs_that_reach_an_overlap_are_found_once(least: float):
    grid, objects = make_grid(ANCHORS, SIZE), round_boxes(random_boxes(100), SIZE)
    ious = pair_iou(objects.corners.T[:, None], grid.corners.T[None]).numpy()
    expected = set(zip(*np.nonzero((ious >= max(least, np.float32(1e-6))) & (ious > 0)), strict=True))
    expected = {(r, a) for r, a in expected if r % 2}
    rows = np.arange(1, 100, 2)
    pairs = find_pairs(objects, rows, np.full(len(rows), least), grid)
    found = list(zip(pairs.row, pairs.anchor, strict=True))
    assert len(found) == len(set(found))
    assert set(found) == expected
    assert (pairs.iou == ious[pairs.row, pairs.anchor]).all()


def test_the_nearest_cell_is_the_best():
    grid, objects = make_grid(ANCHORS, SIZE), round_boxes(random_boxes(300), SIZE)
    best = pair_iou(objects.corners.T[:, None], grid.corners.T[None]).amax(dim=1).double()
    torch.testing.assert_close(torch.from_numpy(nearest_overlap(objects, grid.slots)), best, rtol=1e-4, atol=1e-6)
    assert (torch.from_numpy(nearest_overlap(objects, grid.slots, grid.slack)) <= best).all()


def test_slots_number_the_anchors_as_tiled():
    grid = make_grid(ANCHORS, SIZE)
    assert grid.anchors == 128 * 2 + 32 + 8 + 2 * 2
    box = np.array([[0.0, 0.0, 1.0, 1.0]])
    for slot in list_slots(ANCHORS, SIZE):
        anchor = slot.first + ((slot.rows - 1) * slot.columns + slot.columns - 1) * slot.step
        left, top, right, bottom = (grid.corners[:, anchor] * torch.tensor([128, 64, 128, 64.0])).tolist()
        assert (right - left, bottom - top) == pytest.approx((slot.width, slot.height), abs=1e-3)
        assert ((left + right) / 2, (top + bottom) / 2) == pytest.approx(
            (128 - slot.stride / 2, 64 - slot.stride / 2), abs=1e-3
        )
    nothing = np.empty(0, dtype=np.int64)
    assert len(overlaps(round_boxes(box, SIZE), nothing, nothing, grid)) == 0


def test_expand():
    which, place = expand(np.array([2, 0, 3]))
    assert which.tolist() == [0, 0, 2, 2, 2]
    assert place.tolist() == [0, 1, 0, 1, 2]

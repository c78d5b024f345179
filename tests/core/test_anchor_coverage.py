"""Which anchors objects get, against the matching of training on every pair."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refinedet_cli.core import anchor_coverage
from refinedet_cli.core.anchor_coverage import Coverage, ObjectSet, best_ious, coverage
from refinedet_cli.core.anchors import tile_anchors
from refinedet_cli.core.boxes import cxcywh_to_xyxy, pair_iou
from refinedet_cli.core.config import AnchorConfig
from refinedet_cli.core.matching import NO_OVERLAP, match
from refinedet_cli.core.presets import paper_anchors
from refinedet_cli.core.structures import Targets

SMALL = AnchorConfig.from_sizes(sizes=(8, 16, 32, 64), ratios=(1, 2, 0.5), strides=(8, 16, 32, 64))
ONE_LEVEL = AnchorConfig(strides=(16,), shapes=(((16, 16), (32, 16)),))


def objects_of(*pictures: list[list[float]]) -> ObjectSet:
    boxes = np.array([box for boxes in pictures for box in boxes], dtype=np.float64).reshape(-1, 4)
    picture = np.repeat(np.arange(len(pictures)), [len(boxes) for boxes in pictures])
    return ObjectSet(boxes, np.ones(len(boxes), dtype=np.int64), picture, len(pictures))


def draw_objects(generator: np.random.Generator, height: int, width: int) -> ObjectSet:
    """Pictures that are empty, crowded, full of copies, of specks, or of boxes on the grid; some reach out."""
    pictures = []
    for _ in range(int(generator.integers(1, 4))):
        count = int(generator.choice([0, 1, 3, 10, 40]))
        centre = generator.uniform(-5, 1.05 * max(height, width), (count, 2))
        size = np.exp(generator.uniform(np.log(0.05), np.log(150), (count, 2)))
        kind = generator.integers(6)
        if kind == 1:
            centre, size = np.round(centre / 4) * 4, np.round(size / 8) * 8  # Exact ties, and boxes without area.
        elif kind == 2:
            centre[:] = generator.uniform(0, 64, 2)
        elif kind == 3:
            centre[:], size[:] = generator.uniform(0, 64, 2), size[:1]
        elif kind == 4:
            centre, size = generator.uniform(0, 20, (count, 2)), generator.uniform(1, 6, (count, 2))
        boxes = np.concatenate([centre - size / 2, centre + size / 2], axis=1)
        if kind == 5:
            boxes = np.clip(np.round(boxes), 0, [width, height, width, height])
        pictures.append(boxes.tolist())
    return objects_of(*pictures)


def draw_anchors(generator: np.random.Generator) -> AnchorConfig:
    kind = generator.integers(3)
    if kind < 2:
        return (SMALL, paper_anchors())[kind]
    shapes = tuple(
        tuple(tuple(np.exp(generator.uniform(np.log(2), np.log(8 * s), 2)).tolist()) for _ in range(n))
        for s, n in zip((8, 16, 32, 64), generator.integers(1, 4, 4), strict=True)
    )
    return AnchorConfig(shapes=shapes)


def check_against_training(objects: ObjectSet, anchors: AnchorConfig, size: tuple[int, int], threshold: float) -> None:
    """Compare every column with what follows from `match` on all pairs."""
    height, width = size
    found = coverage(objects, anchors, size, positive_iou=threshold)
    boxes = torch.from_numpy((objects.boxes / [width, height, width, height]).astype(np.float32))
    targets = Targets(
        boxes, torch.from_numpy(objects.labels), torch.from_numpy(objects.picture), max(objects.pictures, 1)
    )
    ious = pair_iou(boxes[:, None], cxcywh_to_xyxy(tile_anchors(anchors, height, width))[None])
    target = match(ious, targets, threshold).target.numpy()
    ious = torch.where(ious < NO_OVERLAP, ious.new_zeros(()), ious).numpy()
    places = [
        (level, shape)
        for level, (stride, shapes) in enumerate(zip(anchors.strides, anchors.shapes, strict=True))
        for _ in range((height // stride) * (width // stride))
        for shape in range(len(shapes))
    ]
    use = [[0] * len(shapes) for shapes in anchors.shapes]
    for level, shape in (places[a] for a in np.nonzero(target >= 0)[1]):
        use[level][shape] += 1
    assert found.anchor_use == tuple(map(tuple, use))
    for row, overlaps in enumerate(ious):
        got = np.flatnonzero(target[objects.picture[row]] == row)
        best = float(overlaps.max())
        assert found.positives[row] == len(got)
        assert found.unmatched[row] == (len(got) == 0)
        assert found.forced[row] == (len(got) == 1 and overlaps[got[0]] < np.float32(threshold))
        assert found.best_iou[row] == best
        expected = places[int(overlaps.argmax())] if best > 0 else (-1, -1)
        assert (found.best_level[row], found.best_shape[row]) == expected
    np.testing.assert_allclose(
        best_ious(objects.boxes, anchors, size) * (found.best_iou > 0), found.best_iou, rtol=1e-3, atol=1e-5
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1))
def test_equals_training_on_all_pairs(seed: int):
    generator = np.random.default_rng(seed)
    size = [(64, 64), (64, 128), (128, 128), (192, 64)][generator.integers(4)]
    objects, anchors = draw_objects(generator, *size), draw_anchors(generator)
    check_against_training(objects, anchors, size, float(generator.choice([0.5, 0.5, 0.3, 0.7])))


def test_blocks_and_portions_change_nothing(monkeypatch: pytest.MonkeyPatch):
    generator = np.random.default_rng(3)
    monkeypatch.setattr(anchor_coverage, "_BLOCK_OBJECTS", 5)
    monkeypatch.setattr(anchor_coverage, "_BLOCK_PAIRS", 7)
    monkeypatch.setattr(anchor_coverage, "_BLOCK_TABLE", 1)
    for _ in range(30):
        check_against_training(draw_objects(generator, 64, 128), SMALL, (64, 128), 0.5)


def row(found: Coverage, index: int) -> tuple[float, int, int, int, bool, bool]:
    return (
        round(float(found.best_iou[index]), 4),
        int(found.best_level[index]),
        int(found.best_shape[index]),
        int(found.positives[index]),
        bool(found.forced[index]),
        bool(found.unmatched[index]),
    )


def test_a_table_by_hand():
    # One level of 2 x 2 cells with centres 8 and 24; each has a square of 16 and a 32 x 16.
    objects = objects_of(
        [[0, 0, 16, 16]],  # The first square itself, and half of the 32 x 16 around it.
        [],
        [[0, 0, 32, 16]],  # 24 x 16 of the wide anchors of both cells; the squares have half of it.
        [[2, 2, 6, 6]],  # 16 of 256: only its own.
        [[0, 0, 16, 16], [0, 0, 16, 16]],  # The second gets the anchor that the first would have beside the square.
    )
    found = coverage(objects, ONE_LEVEL, (32, 32))
    assert row(found, 0) == (1.0, 0, 0, 2, False, False)
    assert row(found, 1) == (0.6, 0, 1, 4, False, False)
    assert row(found, 2) == (0.0625, 0, 0, 1, True, False)
    assert row(found, 3) == (1.0, 0, 0, 1, False, False)
    assert row(found, 4) == (1.0, 0, 0, 1, False, False)
    assert found.anchor_use == ((5, 4),)
    assert found.positives_per_level.tolist() == [9]
    assert found.anchors_per_level.tolist() == [8]
    assert found.share(0.5) == 0.8


def test_nothing_overlaps_what_is_outside_or_without_area():
    found = coverage(objects_of([[500, 500, 540, 540], [10, 10, 10, 20], [4, 4, 4, 4]]), SMALL, (64, 64))
    for index in range(3):
        assert row(found, index) == (0.0, -1, -1, 0, False, True)
    assert best_ious(np.array([[500, 500, 540, 540], [10, 10, 10, 20.0]]), SMALL, (64, 64)).tolist() == [0, 0]


def test_no_objects():
    found = coverage(objects_of([], []), SMALL, (64, 64))
    assert len(found.best_iou) == len(found.positives) == 0
    assert found.anchor_use == ((0,) * 3,) * 4
    assert np.isnan(found.share(0.5))


def test_more_copies_of_an_object_than_it_has_anchors():
    objects = objects_of([[30, 30, 31, 31]] * 300)
    check_against_training(objects, SMALL, (64, 64), 0.5)
    assert coverage(objects, SMALL, (64, 64)).unmatched.sum() > 200


def test_wrong_arrays_are_refused():
    good = objects_of([[0, 0, 8, 8]], [[0, 0, 8, 8]])
    for change, message in (
        ({"boxes": good.boxes[:, :3]}, r"expected boxes \[N, 4\]"),
        ({"labels": good.labels[:1]}, r"got \[2, 4\], \[1\]"),
        ({"boxes": np.array([[0, 0, 8, 8], [0, np.nan, 8, 8]])}, "box 1 is"),
        ({"boxes": np.array([[9, 0, 8, 8], [0, 0, 8, 8.0]])}, "box 0 is"),
        ({"boxes": np.array([[0, 0, 1e30, 8], [0, 0, 8, 8.0]])}, "box 0 is"),
        ({"labels": np.array([1, 0])}, "object 1 has label 0"),
        ({"picture": np.array([1, 0])}, "ascend"),
        ({"pictures": 1}, r"within 0\.\.0"),
    ):
        with pytest.raises(ValueError, match=message):
            coverage(good._replace(**change), SMALL, (64, 64))
    with pytest.raises(ValueError, match="positive_iou"):
        coverage(good, SMALL, (64, 64), positive_iou=0)
    with pytest.raises(ValueError, match="positive on both sides"):
        coverage(good, SMALL, (64, 0))

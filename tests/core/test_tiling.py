"""Windows that cover pictures, and one result of many looks."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refinedet_cli.core.boxes import pair_iou
from refinedet_cli.core.preprocess import Window
from refinedet_cli.core.structures import Detections
from refinedet_cli.core.tiling import Tiling, merge, moved
from refinedet_cli.errors import ConfigError

IOU = 0.45


def detections(*rows: tuple[float, ...]) -> Detections:
    """Detections of rows (left, top, right, bottom, score, label)."""
    table = torch.tensor(rows, dtype=torch.float64).reshape(-1, 6)
    return Detections(table[:, :4].float(), table[:, 4].float(), table[:, 5].long())


def rows(found: Detections) -> list[tuple[float, ...]]:
    return [
        (*box, round(score, 4), label)
        for box, score, label in zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
    ]


# --- windows


@settings(max_examples=40)
@given(
    size=st.integers(32, 90),
    overlap=st.sampled_from([0.0, 0.1, 0.2, 0.33, 0.5]),
    height=st.integers(1, 300),
    width=st.integers(1, 300),
)
def test_windows_cover_every_pixel_and_none_beside(size, overlap, height, width):
    tiling = Tiling(size=size, overlap=overlap)
    windows = tiling.windows(height, width)
    covered = np.zeros((height, width), dtype=int)
    for left, top, right, bottom in windows:
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        assert (right - left, bottom - top) == (min(size, width), min(size, height))
        covered[top:bottom, left:right] += 1
    assert covered.min() == 1 or len(windows) > 1
    assert covered.min() >= 1
    assert len(set(windows)) == len(windows)
    for axis in (0, 1):
        starts = sorted({window[axis] for window in windows})
        assert all(first + size - second >= tiling.shared for first, second in itertools.pairwise(starts))
    # One tile less in a row would leave pixels out or share fewer of them.
    step = size - tiling.shared
    for axis, length in ((0, width), (1, height)):
        assert len({window[axis] for window in windows}) == max(1, -(-(length - size) // step) + 1)


def test_the_last_tile_is_moved_inwards():
    assert Tiling(size=100, overlap=0.2).windows(100, 250) == [
        Window(0, 0, 100, 100),
        Window(80, 0, 180, 100),
        Window(150, 0, 250, 100),
    ]
    assert [w.left for w in Tiling(size=100, overlap=0.2).windows(100, 260)] == [0, 80, 160]


def test_a_picture_that_is_no_larger_than_a_tile_is_one_window():
    assert Tiling(size=64).looks(64, 50) == [Window(0, 0, 50, 64)]
    assert Tiling(size=64).looks(64, 65) == [Window(0, 0, 64, 64), Window(1, 0, 65, 64), Window(0, 0, 65, 64)]
    assert Tiling(size=64, whole=False).looks(64, 65) == [Window(0, 0, 64, 64), Window(1, 0, 65, 64)]


@settings(max_examples=40)
@given(height=st.integers(1, 400), width=st.integers(1, 400), whole=st.booleans())
def test_looks_are_counted(height, width, whole):
    tiling = Tiling(size=64, whole=whole)
    assert tiling.count(height, width) == len(tiling.looks(height, width))


@pytest.mark.parametrize("wrong", [{"size": 31}, {"size": 64, "overlap": 0.51}, {"size": 64, "overlap": -0.1}])
def test_values_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ConfigError, match=str(wrong.get("overlap", "31"))):
        Tiling(**wrong)


def test_pictures_without_pixels_are_refused():
    with pytest.raises(ValueError, match="0 x 5"):
        Tiling(size=64).windows(0, 5)


def test_boxes_are_moved_and_enlarged():
    found = detections((1, 2, 3, 5, 0.5, 1))
    assert rows(moved(found, Window(100, 200, 300, 400))) == [(101, 202, 103, 205, 0.5, 1)]
    assert rows(moved(found, Window(0, 0, 900, 900), 3)) == [(3, 6, 9, 15, 0.5, 1)]


# --- a detector that is never wrong


def perfect(objects: Detections, window: Window, generator: np.random.Generator) -> Detections:
    """What a detector that finds everything says of a window: all objects, as far as they are inside, in any score."""
    corners = torch.tensor(window, dtype=torch.float32)
    low, high = torch.maximum(objects.boxes[:, :2], corners[:2]), torch.minimum(objects.boxes[:, 2:], corners[2:])
    seen = (high - low >= 2).all(dim=1)
    scores = torch.from_numpy(generator.uniform(0.1, 0.99, int(seen.sum()))).float()
    order = scores.argsort(descending=True)
    boxes = torch.cat([low, high], dim=1)[seen]
    return Detections(boxes[order], scores[order], objects.labels[seen][order])


def look(objects: Detections, tiling: Tiling, size: tuple[int, int], seed: int) -> list[Detections]:
    generator = np.random.default_rng(seed)
    return [perfect(objects, window, generator) for window in tiling.looks(*size)]


def scattered(size: tuple[int, int], largest: int, count: int, seed: int, classes: int = 2) -> Detections:
    """Random whole-pixel objects, of which no two of a class overlap by more than 0.2; some at the very borders."""
    generator = np.random.default_rng(seed)
    height, width = size
    kept: list[torch.Tensor] = []
    labels: list[int] = []
    for _ in range(count):
        sides = generator.integers(4, np.minimum(largest, [width, height]) + 1)
        low = generator.integers(0, np.array([width, height]) - sides + 1)
        box = torch.tensor([*low, *(low + sides)], dtype=torch.float32)
        label = int(generator.integers(1, classes + 1))
        if all(name != label or pair_iou(box, other) <= 0.2 for name, other in zip(labels, kept, strict=True)):
            kept.append(box)
            labels.append(label)
    return Detections(torch.stack(kept), torch.ones(len(kept)), torch.tensor(labels))


def exact(found: Detections) -> list[tuple[float, ...]]:
    return sorted((*box, label) for *box, _, label in rows(found))


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("overlap", [0.2, 0.35, 0.5])
@pytest.mark.parametrize("seed", range(6))
def test_each_object_smaller_than_the_overlap_is_reported_once_and_exactly(seed, overlap, whole):
    tiling = Tiling(size=100, overlap=overlap, whole=whole)
    size = [(430, 389), (250, 555), (100, 333), (101, 101)][seed % 4]
    objects = scattered(size, tiling.shared, 40, seed)
    found = merge(look(objects, tiling, size, seed), tiling.looks(*size), size, IOU)
    assert exact(found) == exact(objects)
    assert (found.scores.diff() <= 0).all()


@pytest.mark.parametrize("seed", range(6))
def test_with_the_whole_picture_objects_of_any_size_are_reported_once(seed):
    tiling, size = Tiling(size=100, overlap=0.2), (380, 410)
    objects = scattered(size, 300, 25, seed)
    found = merge(look(objects, tiling, size, seed), tiling.looks(*size), size, IOU)
    assert exact(found) == exact(objects)


def test_an_object_takes_the_best_score_that_a_look_gave_it():
    tiling, size = Tiling(size=100, overlap=0.2), (100, 180)
    # Larger than the overlap, and cut in both tiles.
    found = [detections((55, 10, 100, 50, 0.9, 1)), detections((80, 10, 125, 50, 0.3, 1)), detections()]
    # Neither is what the other's tile would see of it, so both stay without the whole.
    assert len(merge(found, tiling.looks(*size), size, IOU)) == 2
    found[2] = detections((55, 10, 125, 50, 0.6, 1))
    assert rows(merge(found, tiling.looks(*size), size, IOU)) == [(55, 10, 125, 50, 0.9, 1)]


def test_what_ends_at_a_border_is_left_to_the_tile_that_sees_behind_it():
    tiling, size = Tiling(size=100, overlap=0.2), (100, 180)
    sliver = detections((90, 10, 100, 50, 0.9, 1))
    assert len(merge([sliver, detections(), detections()], tiling.looks(*size), size, IOU)) == 0
    # At the border of the picture nothing is behind it.
    edge = detections((90, 0, 98, 50, 0.9, 1))
    assert rows(merge([edge, detections(), detections()], tiling.looks(*size), size, IOU)) == rows(edge)


def test_a_child_in_front_of_its_mother_stays():
    tiling, size = Tiling(size=100, overlap=0.2), (100, 180)
    mother, child = (20, 0, 170, 100, 0.9, 1), (84, 40, 96, 90, 0.5, 1)
    found = [detections(child), detections(child), detections(mother)]
    assert rows(merge(found, tiling.looks(*size), size, IOU)) == [mother, child]


def test_classes_are_kept_apart():
    tiling, size = Tiling(size=100, overlap=0.2), (100, 180)
    found = [detections((82, 10, 96, 50, 0.5, 1)), detections((82, 10, 96, 50, 0.4, 2)), detections()]
    assert len(merge(found, tiling.looks(*size), size, IOU)) == 2


def test_boxes_of_one_look_are_not_compared():
    tiling, size = Tiling(size=100, overlap=0.2), (100, 180)
    pair = detections((10, 10, 50, 50, 0.5, 1), (10, 10, 50, 49, 0.4, 1))
    assert rows(merge([pair, detections(), detections()], tiling.looks(*size), size, IOU)) == rows(pair)


def test_one_window_changes_nothing():
    found = detections((0, 0, 5, 5, 0.5, 1), (0, 0, 5, 5, 0.4, 1))
    assert merge([found], [Window(0, 0, 9, 9)], (9, 9), IOU) is found


def test_nothing_found_is_nothing():
    tiling = Tiling(size=64)
    windows = tiling.looks(100, 100)
    found = merge([detections()] * len(windows), windows, (100, 100), IOU)
    assert len(found) == 0
    assert found.boxes.shape == (0, 4)


# --- the rule, spelt out


def well_inside(box, window, size):
    """Whether a box keeps away from the borders of a window behind which the picture goes on."""
    height, width = size
    across, down = max(1.0, 0.02 * (window.right - window.left)), max(1.0, 0.02 * (window.bottom - window.top))
    return (
        (window.left == 0 or box[0] >= window.left + across)
        and (window.top == 0 or box[1] >= window.top + down)
        and (window.right == width or box[2] <= window.right - across)
        and (window.bottom == height or box[3] <= window.bottom - down)
    )


def clip(box, window):
    return [max(box[0], window.left), max(box[1], window.top), min(box[2], window.right), min(box[3], window.bottom)]


def plain_iou(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    area = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return width * height / (area - width * height)


def brute(found: list[Detections], windows: list[Window], size: tuple[int, int]) -> list[tuple[float, ...]]:
    """The rule of the module's text, pair by pair."""
    tiles = [window for window in windows if window != (0, 0, size[1], size[0])]
    entries = []
    for look, (of_look, window) in enumerate(zip(found, windows, strict=True)):
        table = torch.cat([of_look.boxes, of_look.scores[:, None], of_look.labels[:, None]], dim=1).double()
        for *box, score, label in table.tolist():
            cut = not well_inside(box, window, size)
            if not (cut and any(well_inside(box, tile, size) for tile in tiles)):
                area = (box[2] - box[0]) * (box[3] - box[1])
                entries.append(((cut, -area if cut else -score, look), box, score, label, look, cut))
    kept: list[list] = []
    for _, box, score, label, look, cut in sorted(entries, key=lambda entry: entry[0]):
        agree = [
            plain_iou(box, clip(other[0], windows[look]) if cut else other[0])
            if other[2] == label and other[3] != look
            else 0.0
            for other in kept
        ]
        if agree and max(agree) > IOU:
            winner = kept[agree.index(max(agree))]
            winner[1] = max(winner[1], score)
        else:
            kept.append([box, score, label, look])
    kept.sort(key=lambda entry: -entry[1])
    return [(*(round(v, 3) for v in box), round(score, 4), label) for box, score, label, _ in kept]


def noisy(tiling: Tiling, size: tuple[int, int], seed: int) -> list[Detections]:
    """What a mediocre detector says: parts, shifted boxes, doubles and things that are not there."""
    generator = np.random.default_rng(seed)
    objects = scattered(size, 140, 30, seed)
    found = []
    for window in tiling.looks(*size):
        seen = perfect(objects, window, generator)
        twice = Detections(*(torch.cat([c, c]) for c in (seen.boxes, seen.scores, seen.labels)))
        boxes = twice.boxes + torch.from_numpy(generator.normal(0, 3, twice.boxes.shape)).float()
        corners = torch.tensor(window, dtype=torch.float32)
        boxes = torch.cat([torch.maximum(boxes[:, :2], corners[:2]), torch.minimum(boxes[:, 2:], corners[2:])], dim=1)
        scores = torch.from_numpy(generator.uniform(0.01, 0.99, len(boxes))).float()
        good = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        order = scores[good].argsort(descending=True)
        found.append(Detections(boxes[good][order], scores[good][order], twice.labels[good][order]))
    return found


@pytest.mark.parametrize("seed", range(8))
def test_it_is_the_rule_pair_by_pair(seed):
    tiling, size = Tiling(size=100, overlap=[0.0, 0.2, 0.5][seed % 3], whole=seed % 2 == 0), (240, 310)
    found = noisy(tiling, size, seed)
    windows = tiling.looks(*size)
    merged = merge(found, windows, size, IOU)
    expected = brute(found, windows, size)
    assert 0 < len(merged) < sum(map(len, found))
    assert [(*(round(v, 3) for v in row[:4]), *row[4:]) for row in rows(merged)] == expected


def test_order_of_the_looks_decides_ties_alone():
    tiling, size = Tiling(size=100, overlap=0.2), (240, 310)
    found, windows = noisy(tiling, size, 5), tiling.looks(240, 310)
    backward = merge(found[::-1], windows[::-1], size, IOU)
    assert rows(backward) == rows(merge(found, windows, size, IOU))


def test_many_boxes_need_no_table_of_all_pairs():
    # For 30,000 boxes that would be 8 GB.
    tiling, size = replace(Tiling(size=100), whole=False), (3000, 3000)
    generator = np.random.default_rng(0)
    found = []
    for window in tiling.windows(*size):
        low = torch.from_numpy(generator.uniform(0, 80, (25, 2))).float() + torch.tensor(window[:2])
        scores = torch.linspace(0.9, 0.1, 25)
        found.append(Detections(torch.cat([low, low + 20], dim=1), scores, torch.ones(25, dtype=torch.int64)))
    assert sum(map(len, found)) > 30_000
    merged = merge(found, tiling.windows(*size), size, IOU)
    assert 0 < len(merged) < sum(map(len, found))

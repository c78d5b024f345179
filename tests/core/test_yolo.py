"""YOLO: its loss by hand and by plain loops, which box learns what, its boxes, and that it learns at all."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from refinedet_cli.core import yolo
from refinedet_cli.core.build import build
from refinedet_cli.core.config import (
    AnchorConfig,
    Classes,
    DetectorConfig,
    GridConfig,
    LossConfig,
    NetworkConfig,
    PostprocessConfig,
    PreprocessConfig,
    from_dict,
    to_dict,
)
from refinedet_cli.core.layers import conv_relu
from refinedet_cli.core.postprocess import suppress, to_detections
from refinedet_cli.core.presets import get_preset, yolo320_mobilenetv2
from refinedet_cli.core.structures import LossParts, Target, Targets
from refinedet_cli.core.yolo import Criterion, Decoder, RawOutput, choose_responsible, place_objects, to_boxes
from refinedet_cli.errors import ConfigError
from refinedet_cli.metrics.coco import PictureDetections, PictureTruth, evaluate_coco

TWO = Classes(names=("sofa", "dog"), category_ids=(1, 2))


def config_of(classes: Classes = TWO, backbone: str = "mobilenet_v2", side: int = 64, **grid: object) -> DetectorConfig:
    return DetectorConfig(
        family="yolo",
        preset="mine",
        classes=classes,
        network=NetworkConfig(backbone=backbone, arm=False, tcb=False),
        grid=replace(GridConfig(stride=32, channels=32, norm="group"), **grid),
        preprocess=PreprocessConfig(height=side, width=side, mean=(127.5,) * 3, std=(127.5,) * 3),
    )


def packed(*pictures: list[tuple[tuple[float, float, float, float], int]]) -> Targets:
    """Pictures as lists of boxes (xyxy, norm) and labels."""
    return Targets.pack(
        [
            Target(torch.tensor([b for b, _ in p]).view(-1, 4), torch.tensor([n for _, n in p], dtype=torch.int64))
            for p in pictures
        ]
    )


def plain(classes: list[float] | None = None, boxes: list[list[float]] | None = None, pictures: int = 1) -> RawOutput:
    """A 2 x 2 grid of two boxes and two classes; every confidence is 0.1, but for the first cell's if it is given."""
    raw = RawOutput(torch.zeros(pictures, 2, 2, 2), torch.zeros(pictures, 2, 2, 2, 5))
    raw.boxes[..., 4] = 0.1
    if classes is not None and boxes is not None:
        raw.classes[0, 0, 0], raw.boxes[0, 0, 0] = torch.tensor(classes), torch.tensor(boxes)
    return raw


def numbers(loss: LossParts) -> dict[str, float]:
    return {name: float(value) for name, value in loss.parts.items()}


# The loss by hand.

# Centre (0.25, 0.25): the middle of the first cell; its side 0.25 has the root 0.5.
OBJECT = ((0.125, 0.125, 0.375, 0.375), 2)
# The first box is four times too high: IoU 1/4. The second lies 0.2 to the left: IoU 1/9.
IN_CELL = ([0.3, 0.8], [[0.5, 0.5, 0.5, 1.0, 0.2], [0.1, 0.5, 0.5, 0.5, 0.6]])


def test_the_loss_of_one_object_by_hand():
    found = Criterion(config_of())(plain(*IN_CELL), packed([OBJECT]))
    assert numbers(found) == pytest.approx(
        {
            "box": (1.0 - 0.5) ** 2,
            "object": (0.2 - 0.25) ** 2,
            "no_object": 0.6**2 + 6 * 0.1**2,
            "class": 0.3**2 + 0.2**2,
        }
    )
    assert float(found.total) == pytest.approx(5 * 0.25 + 0.0025 + 0.5 * 0.42 + 0.13)
    assert {name: float(n) for name, n in found.positives.items()} == {"objects": 1, "left_out": 0}


def test_a_picture_without_objects_adds_its_confidences_and_counts_as_a_picture():
    found = Criterion(config_of())(plain(*IN_CELL, pictures=2), packed([OBJECT], []))
    assert float(found.total) == pytest.approx((5 * 0.25 + 0.0025 + 0.5 * (0.42 + 0.08) + 0.13) / 2)
    alone = Criterion(config_of())(plain(pictures=3), packed([], [], []))
    assert numbers(alone) == pytest.approx({"box": 0, "object": 0, "no_object": 0.08, "class": 0})
    assert float(alone.total) == pytest.approx(0.04)


def test_weights_of_the_loss_are_settings():
    criterion = Criterion(config_of(coord_weight=2.0, no_object_weight=0.0))
    assert float(criterion(plain(*IN_CELL), packed([OBJECT])).total) == pytest.approx(2 * 0.25 + 0.0025 + 0.13)


def test_a_perfect_prediction_costs_nothing_but_idle_confidence():
    raw = plain([0.0, 1.0], [[0.5, 0.5, 0.5, 0.5, 1.0], [0.0] * 5])
    raw.boxes[0, :, :, :, 4] = 0
    raw.boxes[0, 0, 0, 0, 4] = 1
    assert float(Criterion(config_of())(raw, packed([OBJECT])).total) == pytest.approx(0, abs=1e-12)


# The loss by plain loops.


def iou_of(a: Sequence[float], b: Sequence[float]) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union if union else 0.0


def slow_owner(targets: Targets, picture: int, row: int, column: int, rows: int, columns: int) -> int | None:
    owner, largest = None, 0.0
    for i in range(len(targets.labels)):
        left, top, right, bottom = targets.boxes[i].tolist()
        x, y = (left + right) / 2 * columns, (top + bottom) / 2 * rows
        at = (min(int(x), columns - 1), min(int(y), rows - 1))
        area = (right - left) * (bottom - top)
        if int(targets.image[i]) == picture and at == (column, row) and area > largest:
            owner, largest = i, area
    return owner


def slow_responsible(
    predicted: list[list[float]], truth: list[float], row: int, column: int, rows: int, columns: int
) -> tuple[int, float]:
    left, top, right, bottom = truth
    chosen, best_iou, least_error = -1, 0.0, math.inf
    for j, (px, py, pw, ph, _) in enumerate(predicted):
        x, y, w, h = (column + px) / columns, (row + py) / rows, pw**2, ph**2
        iou = iou_of((x - w / 2, y - h / 2, x + w / 2, y + h / 2), truth)
        middle = (x - (left + right) / 2) ** 2 + (y - (top + bottom) / 2) ** 2
        error = middle + (w - right + left) ** 2 + (h - bottom + top) ** 2
        if iou > best_iou:
            best_iou, chosen = iou, j
        elif best_iou == 0 and error < least_error:
            least_error, chosen = error, j
    return chosen, best_iou


def slow_loss(raw: RawOutput, targets: Targets, grid: GridConfig) -> dict[str, float]:
    _, rows, columns, boxes, _ = raw.boxes.shape
    parts = dict.fromkeys(("box", "object", "no_object", "class"), 0.0)
    for picture, row, column in itertools.product(range(targets.batch), range(rows), range(columns)):
        predicted = raw.boxes[picture, row, column].tolist()
        owner, chosen = slow_owner(targets, picture, row, column, rows, columns), -1
        if owner is not None:
            truth = left, top, right, bottom = targets.boxes[owner].tolist()
            chosen, iou = slow_responsible(predicted, truth, row, column, rows, columns)
            x, y = (left + right) / 2 * columns - column, (top + bottom) / 2 * rows - row
            wanted = (x, y, math.sqrt(right - left), math.sqrt(bottom - top))
            parts["box"] += sum((p - w) ** 2 for p, w in zip(predicted[chosen], wanted, strict=False))
            parts["object"] += (predicted[chosen][4] - iou) ** 2
            for c, p in enumerate(raw.classes[picture, row, column].tolist()):
                parts["class"] += (p - (c + 1 == int(targets.labels[owner]))) ** 2
        parts["no_object"] += sum(predicted[j][4] ** 2 for j in range(boxes) if j != chosen)
    parts = {name: value / targets.batch for name, value in parts.items()}
    weighted = grid.coord_weight * parts["box"] + grid.no_object_weight * parts["no_object"]
    return {**parts, "total": weighted + parts["object"] + parts["class"]}


@pytest.mark.parametrize("seed", range(12))
def test_the_loss_equals_plain_loops(seed):
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    pictures, rows, columns, boxes, classes = 3, 1 + seed % 4, 1 + seed % 3, 1 + seed % 3, 4
    # Half of the seeds predict boxes that lie far off, so that none overlaps and the errors decide.
    shift = torch.tensor([0.0 if seed % 2 else 4.0, 0.0, 0.0, 0.0, 0.0])
    raw = RawOutput(
        drawn(pictures, rows, columns, classes) * 2 - 0.5, drawn(pictures, rows, columns, boxes, 5) * 2 - 0.7 + shift
    )
    listed = []
    for count in (0, 7, 12):
        centre, side = drawn(count, 2), drawn(count, 2) * 0.5 + 0.01
        labels = torch.randint(1, classes + 1, (count,), generator=generator)
        listed.append(Target(torch.cat([centre - side / 2, centre + side / 2], dim=1), labels))
    targets = Targets.pack(listed)
    config = config_of(Classes(names=tuple("abcd"), category_ids=(1, 2, 3, 4)), boxes=boxes)
    found = Criterion(config)(raw, targets)
    assert {**numbers(found), "total": float(found.total)} == pytest.approx(slow_loss(raw, targets, config.grid))
    assert float(found.positives["objects"] + found.positives["left_out"]) == 19
    assert float(found.positives["left_out"]) > 0


# Cells and their objects.


def placed(targets: Targets, rows: int, columns: int) -> list[tuple[int, int, int, int]]:
    found = place_objects(targets, rows, columns)
    return list(zip(*(t.tolist() for t in found), strict=True))


@pytest.mark.parametrize(
    ("centre", "cell"),
    [
        pytest.param((0.0, 0.0), (0, 0), id="corner"),
        pytest.param((0.4999, 0.5), (1, 1), id="on the edge between rows"),
        pytest.param((0.5, 0.2499), (0, 2), id="on the edge between columns"),
        pytest.param((1.0, 0.3), (0, 3), id="right edge"),
        pytest.param((0.3, 1.0), (1, 1), id="lower edge"),
        pytest.param((1.0, 1.0), (1, 3), id="last corner"),
        pytest.param((1.0 + 1e-6, -1e-6), (0, 3), id="outside by rounding"),
    ],
)
def test_an_object_belongs_to_the_cell_of_its_centre(centre, cell):
    x, y = centre
    found = placed(packed([((x - 0.125, y - 0.125, x + 0.125, y + 0.125), 1)]), 2, 4)
    assert [(row, column) for _, _, row, column in found] == [cell]


def test_an_object_on_the_last_edge_is_learnt_at_the_end_of_the_last_cell():
    raw = plain()
    raw.boxes[0, 1, 1, 0] = torch.tensor([1.0, 1.0, 0.5, 0.5, 1.0])
    raw.classes[0, 1, 1, 0] = 1
    found = Criterion(config_of())(raw, packed([((0.875, 0.875, 1.125, 1.125), 1)]))
    assert numbers(found) == pytest.approx({"box": 0, "object": 0, "no_object": 0.07, "class": 0}, abs=1e-7)


def test_of_two_objects_in_a_cell_the_larger_stays_and_the_other_is_counted():
    small, large = ((0.2, 0.2, 0.3, 0.3), 1), ((0.1, 0.1, 0.4, 0.4), 2)
    for pair, kept in (([small, large], 1), ([large, small], 0)):
        assert placed(packed(pair), 2, 2) == [(kept, 0, 0, 0)]
        found = Criterion(config_of())(plain(), packed(pair))
        assert {name: float(n) for name, n in found.positives.items()} == {"objects": 1, "left_out": 1}
        alone = Criterion(config_of())(plain(), packed([large]))
        assert float(found.total) == float(alone.total)


def test_of_equal_objects_in_a_cell_the_earlier_stays():
    # Sides that are whole in binary, so that the areas are equal to the last bit.
    wide, high = ((0.0, 0.125, 0.5, 0.375), 1), ((0.125, 0.0, 0.375, 0.5), 2)
    assert placed(packed([wide, high]), 2, 2) == [(0, 0, 0, 0)]
    assert placed(packed([high, wide]), 2, 2) == [(0, 0, 0, 0)]


def test_cells_of_other_pictures_are_other_cells():
    assert placed(packed([OBJECT], [], [OBJECT, OBJECT]), 2, 2) == [(0, 0, 0, 0), (1, 2, 0, 0)]


# Responsible boxes.


@pytest.mark.parametrize(
    ("boxes", "chosen", "iou"),
    [
        pytest.param([(0.5, 0.5, 0.2, 0.2), (0.5, 0.5, 0.3, 0.4)], 1, 0.75, id="highest IoU"),
        # Far worse by its errors, but it overlaps.
        pytest.param([(0.95, 0.5, 0.3, 0.4), (0.5, 0.5, 4.0, 4.0)], 1, 0.01, id="any overlap beats none"),
        pytest.param([(0.5, 0.5, 0.4, 0.2), (0.5, 0.5, 0.2, 0.4)], 0, 0.5, id="equal IoU: the earlier"),
        pytest.param([(2.0, 0.5, 0.1, 0.1), (1.5, 0.5, 0.1, 0.1)], 1, 0.0, id="no overlap: the lowest error"),
        pytest.param([(1.5, 0.5, 0.4, 0.4), (-0.5, 0.5, 0.4, 0.4)], 0, 0.0, id="equal errors: the earlier"),
        pytest.param([(0.5, 0.5, 0.0, 0.0), (0.5, 0.5, 0.3, 0.0)], 1, 0.0, id="no area is no overlap"),
    ],
)
def test_the_responsible_box(boxes, chosen, iou):
    found = choose_responsible(torch.tensor([boxes]), torch.tensor([[0.3, 0.3, 0.7, 0.7]]))
    assert found[0].tolist() == [chosen]
    assert found[1].tolist() == pytest.approx([iou], abs=1e-6)


# Gradients.


def test_gradients_flow_only_where_they_should():
    raw = plain(*IN_CELL)
    classes, boxes = (t.clone().requires_grad_() for t in raw)
    Criterion(config_of())(RawOutput(classes, boxes), packed([OBJECT])).total.backward()
    # Classes of the object's cell alone; place, size and IoU of its responsible box alone.
    expected = torch.zeros_like(raw.classes)
    expected[0, 0, 0] = 2 * torch.tensor([0.3, 0.8 - 1])
    assert_close(classes.grad, expected)
    expected = torch.zeros_like(raw.boxes)
    expected[..., 4] = 2 * 0.5 * 0.1
    expected[0, 0, 0, 1, 4] = 2 * 0.5 * 0.6
    # No gradient goes through the IoU that the confidence learns: the height's is that of its root alone.
    expected[0, 0, 0, 0] = torch.tensor([0, 0, 0, 5 * 2 * 0.5, 2 * (0.2 - 0.25)])
    assert_close(boxes.grad, expected)


def test_a_negative_root_is_pulled_to_the_positive_one():
    raw = plain([0.0, 1.0], [[0.5, 0.5, -0.5, -0.5, 1.0], [9.0, 9.0, 0.1, 0.1, 0.0]])
    boxes = raw.boxes.clone().requires_grad_()
    found = Criterion(config_of())(raw._replace(boxes=boxes), packed([OBJECT]))
    # Its square is the right size, so it is responsible and its IoU is 1; the roots themselves are compared.
    assert float(found.parts["object"]) == pytest.approx(0, abs=1e-12)
    assert float(found.parts["box"]) == pytest.approx(2.0)
    found.total.backward()
    assert bool((boxes.grad[0, 0, 0, 0, 2:4] < 0).all())


@pytest.mark.parametrize("size", [0.0, 1e9, 1e30, -1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("objects", [0, 3])
def test_loss_and_gradient_are_finite(size, dtype, objects):
    generator = torch.Generator().manual_seed(0)
    signs = [torch.randn(s, generator=generator).sign() for s in ((2, 2, 2, 2), (2, 2, 2, 2, 5))]
    raw = RawOutput(*((size * t).to(dtype).requires_grad_() for t in signs))
    pictures = [[((0.1, 0.1, 0.3, 0.2), 1), ((0.6, 0.6, 0.6 + 1e-6, 1.0), 2), ((0.1, 0.7, 0.2, 0.9), 1)][:objects], []]
    loss = Criterion(config_of())(raw, packed(*pictures))
    assert bool(loss.total.isfinite())
    loss.total.backward()
    assert all(bool(t.grad.isfinite().all()) for t in raw)
    found = Decoder(config_of())(RawOutput(*(t.detach() for t in raw)))
    assert bool(found.boxes.isfinite().all())
    assert bool(suppress(found, PostprocessConfig()).boxes.isfinite().all())


def test_a_batch_in_shares_is_the_batch():
    generator = torch.Generator().manual_seed(1)
    raw = RawOutput(torch.randn(3, 2, 2, 2, generator=generator), torch.randn(3, 2, 2, 2, 5, generator=generator))
    pictures = [[OBJECT], [], [((0.6, 0.1, 0.9, 0.3), 1), ((0.6, 0.1, 0.8, 0.3), 1)]]
    criterion = Criterion(config_of())
    whole = criterion(raw, packed(*pictures))
    shares = [
        criterion(
            RawOutput(*(t[a:b] for t in raw)), packed(*pictures[a:b]), over_all=lambda n, own=b - a: n + (3 - own)
        )
        for a, b in ((0, 1), (1, 3), (3, 3))
        if b > a
    ]
    # A process may have no picture at all.
    none = Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), 0)
    shares.append(criterion(RawOutput(*(t[:0] for t in raw)), none, over_all=lambda n: n + 3))
    assert_close(sum(s.total for s in shares), whole.total)
    for name, value in (*whole.parts.items(), *whole.positives.items()):
        assert_close(sum({**s.parts, **s.positives}[name] for s in shares), value)


# Decoding.


def test_boxes_by_hand():
    raw = RawOutput(torch.zeros(1, 2, 4, 2), torch.zeros(1, 2, 4, 2, 5))
    raw.boxes[0, 1, 2, 0] = torch.tensor([0.5, 0.25, 0.5, -0.7, 0.9])
    raw.boxes[0, 1, 2, 1] = torch.tensor([0.0, 1.0, 0.2, 0.3, 0.5])
    raw.classes[0, 1, 2] = torch.tensor([0.5, 0.8])
    found = Decoder(config_of())(raw)
    assert found.scores.shape == (1, 1, 32)  # 16 boxes of two classes
    assert found.scores[0, 0, :5].tolist() == pytest.approx([0.72, 0.45, 0.4, 0.25, 0.0])
    assert found.labels[0, 0, :4].tolist() == [2, 1, 2, 1]
    # Third of four columns, second of two rows.
    x, y = 2.5 / 4, 1.25 / 2
    first = [x - 0.125, y - 0.245, x + 0.125, y + 0.245]
    second = [0.5 - 0.02, 1.0 - 0.045, 0.5 + 0.02, 1.0 + 0.045]
    assert_close(found.boxes[0, 0, :4], torch.tensor([first, first, second, second]))


@pytest.mark.parametrize(
    ("confidence", "classes", "scores"),
    [
        pytest.param(-0.5, [-0.5, 0.5], [0.0, 0.0], id="two below 0 make no score above it"),
        pytest.param(1.5, [0.5, 2.0], [1.0, 0.5], id="nothing scores above 1"),
        pytest.param(0.125, [0.08, 0.07], [0.0, 0.0], id="at the threshold or below"),
    ],
)
def test_scores_are_limited(confidence, classes, scores):
    raw = RawOutput(torch.tensor([[[classes]]]), torch.tensor([[[[[0.5, 0.5, 0.5, 0.5, confidence]]]]]))
    assert Decoder(config_of())(raw).scores[0, 0].tolist() == pytest.approx(scores)


@pytest.mark.parametrize("per", ["picture", "class"])
def test_candidates_are_the_best_of_all_boxes(per):
    generator = torch.Generator().manual_seed(3)
    raw = RawOutput(torch.rand(2, 3, 5, 2, generator=generator), torch.rand(2, 3, 5, 2, 5, generator=generator))
    config = config_of()
    config = replace(config, postprocess=replace(config.postprocess, candidates=20, candidates_per=per))
    found = Decoder(config)(raw)
    assert found.scores.shape == ((2, 1, 20) if per == "picture" else (2, 2, 20))
    for picture in range(2):
        entries = []
        for row, column, j, c in itertools.product(range(3), range(5), range(2), range(2)):
            x, y, w, h, confidence = raw.boxes[picture, row, column, j].tolist()
            x, y, w, h = (column + x) / 5, (row + y) / 3, w * w, h * h
            score = confidence * float(raw.classes[picture, row, column, c])
            if score > 0.01:
                entries.append((score, c + 1, (x - w / 2, y - h / 2, x + w / 2, y + h / 2)))
        entries.sort(reverse=True)
        groups = [entries] if per == "picture" else [[e for e in entries if e[1] == label] for label in (1, 2)]
        for group, expected in enumerate(groups):
            assert_close(found.scores[picture, group], torch.tensor([e[0] for e in expected[:20]]))
            assert found.labels[picture, group].tolist() == [e[1] for e in expected[:20]]
            assert_close(found.boxes[picture, group], torch.tensor([e[2] for e in expected[:20]]))


def test_boxes_are_clipped_before_suppression_where_that_is_asked_for():
    raw = RawOutput(torch.ones(1, 1, 1, 2), torch.tensor([[[[[0.9, 0.2, 0.7, 0.7, 0.9]]]]]))
    config = config_of()
    for clip_first, wanted in ((False, [0.655, -0.045, 1.145, 0.445]), (True, [0.655, 0.0, 1.0, 0.445])):
        config = replace(config, postprocess=replace(config.postprocess, clip_first=clip_first))
        assert_close(Decoder(config)(raw).boxes[0, 0, 0], torch.tensor(wanted))


def test_what_the_loss_calls_perfect_is_decoded_to_the_objects():
    generator = torch.Generator().manual_seed(4)
    rows, columns = 3, 4
    raw = RawOutput(torch.zeros(1, rows, columns, 2), torch.zeros(1, rows, columns, 2, 5))
    objects = []
    for row, column in itertools.product(range(rows), range(columns)):
        u, v, w, h = torch.rand(4, generator=generator).tolist()
        x, y, w, h = (column + u) / columns, (row + v) / rows, 0.05 + w / 5, 0.05 + h / 5
        objects.append(((x - w / 2, y - h / 2, x + w / 2, y + h / 2), 1 + (row + column) % 2))
        raw.boxes[0, row, column, 1] = torch.tensor([u, v, math.sqrt(w), math.sqrt(h), 1])
        raw.classes[0, row, column, (row + column) % 2] = 1
    targets = packed(objects)
    assert float(Criterion(config_of())(raw, targets).total) == pytest.approx(0, abs=1e-9)
    found = Decoder(config_of())(raw)
    found = [t[0, 0, : len(objects)] for t in found]
    assert found[1].tolist() == [1.0] * len(objects)
    nearest = (found[0][:, None] - targets.boxes[None]).abs().amax(dim=2).min(dim=1)
    assert float(nearest.values.max()) < 1e-5
    assert sorted(nearest.indices.tolist()) == list(range(len(objects)))
    assert found[2].tolist() == targets.labels[nearest.indices].tolist()


def test_low_precision_outputs_are_read_in_float32():
    generator = torch.Generator().manual_seed(5)
    low = RawOutput(*(torch.randn(s, generator=generator).bfloat16() for s in ((2, 2, 2, 2), (2, 2, 2, 2, 5))))
    same = RawOutput(*(t.float() for t in low))
    targets = packed([OBJECT], [])
    assert_close(Criterion(config_of())(low, targets).total, Criterion(config_of())(same, targets).total)
    for found, expected in zip(Decoder(config_of())(low), Decoder(config_of())(same), strict=True):
        assert_close(found, expected, rtol=0, atol=0)


def test_boxes_stay_finite_however_large_their_prediction():
    largest = torch.finfo(torch.float32).max
    boxes = to_boxes(torch.full((1, 4), largest), torch.zeros(1, 2), torch.tensor([7.0, 7.0]))
    assert_close(boxes, torch.tensor([[1000 / 7, 1000 / 7, 1000.0, 1000.0]]))


# The network.


@pytest.mark.parametrize(
    ("backbone", "stride"), [("vgg16", 32), ("vgg16", 64), ("mobilenet_v2", 32), ("resnet18", 64), ("resnet50", 32)]
)
def test_every_backbone_gives_a_grid_and_nothing_idle(backbone, stride):
    config = config_of(backbone=backbone, stride=stride, boxes=3, layers=2, norm="none")
    with torch.device("meta"):
        network = build(config).network.train()
        raw = network(torch.empty(2, 3, 192, 128))
    assert tuple(raw.classes.shape) == (2, 192 // stride, 128 // stride, 2)
    assert tuple(raw.boxes.shape) == (2, 192 // stride, 128 // stride, 3, 5)
    sum(t.sum() for t in raw).backward()
    assert [n for n, p in network.named_parameters() if p.grad is None] == []


def test_the_paper_s_output():
    config = get_preset("yolo448_vgg16", Classes(names=tuple("abcdefghijklmnopqrst"), category_ids=tuple(range(20))))
    assert config.detector.grid == GridConfig(stride=64, boxes=2, layers=4, channels=1024)
    assert (config.detector.grid.coord_weight, config.detector.grid.no_object_weight) == (5.0, 0.5)
    with torch.device("meta"):
        raw = build(config.detector).network(torch.empty(1, 3, 448, 448))
    assert raw.classes[0].numel() + raw.boxes[0].numel() == 7 * 7 * (5 * 2 + 20)
    steps = config.train.epochs * (16551 // 64)
    assert steps == pytest.approx(34_830)
    assert [m * config.train.epochs for m in config.train.milestones] == pytest.approx([75, 105])


def test_the_light_preset_differs_from_that_of_refinedet_in_its_family_alone():
    ours, theirs = yolo320_mobilenetv2(TWO), get_preset("refinedet320_mobilenetv2", TWO)
    assert ours.train == theirs.train
    assert ours.detector.preprocess == theirs.detector.preprocess
    assert ours.detector.postprocess == theirs.detector.postprocess
    assert ours.detector.network.backbone == theirs.detector.network.backbone
    with torch.device("meta"):
        raw = build(ours.detector).network(torch.empty(1, 3, 320, 320))
    assert tuple(raw.boxes.shape) == (1, 10, 10, 2, 5)


def fresh(config: DetectorConfig, seed: int = 0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(config)


def test_fresh_boxes_are_plain_and_their_loss_is_small():
    detector = fresh(config_of())
    with torch.no_grad():
        raw = detector.network.eval()(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert float((raw.boxes - torch.tensor([0.5, 0.5, 0.5, 0.5, 0])).abs().max()) < 0.5
    assert len(raw.boxes.flatten(0, 3).unique(dim=0)) == 16
    assert float(detector.criterion(raw, packed([OBJECT], [])).total) < 5


def test_every_parameter_of_a_light_network_is_pulled():
    detector = fresh(config_of())
    raw = detector.network.train()(torch.rand(2, 3, 128, 64, generator=torch.Generator().manual_seed(0)))
    detector.criterion(raw, packed([OBJECT], [((0.5, 0.5, 0.9, 0.9), 1)])).total.backward()
    for name, parameter in detector.network.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        assert bool(parameter.grad.any()), name


# It learns.


def scenes(count: int, side: int = 64) -> tuple[Tensor, list[Target]]:
    """Pictures of one or two patches, red ones of class 1 and blue ones of class 2, on dull ground."""
    generator = np.random.default_rng(0)
    images, targets = [], []
    for i in range(count):
        pixels = generator.uniform(-0.2, 0.2, (3, side, side))
        boxes, labels = [], []
        for place in generator.permutation(4)[: 1 + i % 2]:
            width, height = generator.integers(14, 28, 2)
            x, y = (int(v) * side // 2 + 2 for v in divmod(place, 2))
            label = int(generator.integers(1, 3))
            pixels[:, y : y + height, x : x + width] = -0.8
            pixels[0 if label == 1 else 2, y : y + height, x : x + width] = 0.9
            boxes.append([x / side, y / side, (x + width) / side, (y + height) / side])
            labels.append(label)
        images.append(pixels)
        targets.append(Target(torch.tensor(boxes), torch.tensor(labels)))
    return torch.from_numpy(np.stack(images)).float(), targets


class SmallBackbone(nn.Module):
    """Five strided convolutions: a network that learns in seconds."""

    channels = (32, 64, 64, 64)

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 32, 32, 64, 64)
        self.layers = nn.ModuleList(conv_relu(i, o, 3, stride=2, norm="group") for i, o in itertools.pairwise(widths))

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = [images]
        for layer in self.layers:
            maps.append(layer(maps[-1]))
        return maps[3:]


def test_it_learns_eight_pictures_by_heart(monkeypatch):
    monkeypatch.setattr(yolo, "build_backbone", lambda _: SmallBackbone())
    images, targets = scenes(8)
    detector = fresh(config_of(layers=2))
    network = detector.network
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    packed_targets = Targets.pack(targets)
    first = last = 0.0
    for _ in range(120):
        loss = detector.criterion(network(images), packed_targets)
        optimizer.zero_grad()
        loss.total.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 10.0)
        optimizer.step()
        last = float(loss.total.detach())
        first = first or last
    assert last < first / 10
    with torch.no_grad():
        found = to_detections(suppress(detector.forward(images), detector.config.postprocess), [(64, 64)] * 8)
    truths = [
        PictureTruth(
            i,
            (t.boxes * 64).double().numpy(),
            t.labels.numpy(),
            ((t.boxes[:, 2] - t.boxes[:, 0]) * (t.boxes[:, 3] - t.boxes[:, 1]) * 64 * 64).double().numpy(),
            np.zeros(len(t.labels), bool),
        )
        for i, t in enumerate(targets)
    ]
    seen = [
        PictureDetections(i, d.boxes.double().numpy(), d.scores.double().numpy(), d.labels.numpy())
        for i, d in enumerate(found)
    ]
    assert evaluate_coco(truths, seen, 2).AP50 > 0.8


# Settings.


def test_settings_go_to_json_and_back():
    config = config_of(stride=64, boxes=3, layers=1, coord_weight=1.5, no_object_weight=0.25)
    document = to_dict(config)
    assert document["anchors"] is None
    assert from_dict(DetectorConfig, document) == config


def test_configs_from_before_there_were_grids_still_load():
    document = to_dict(get_preset("tiny", TWO).detector)
    assert document.pop("grid") is None
    assert from_dict(DetectorConfig, document) == get_preset("tiny", TWO).detector


ANCHORS = AnchorConfig.from_sizes(sizes=(8, 16, 32, 64), ratios=(1,), strides=(8, 16, 32, 64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"anchors": ANCHORS}, "anchors must be left out: a yolo has none"),
        ({"grid": None}, "setting 'grid' is missing: a yolo needs it"),
        ({"loss": LossConfig(neg_ratio=2.0)}, "loss.neg_ratio is of detectors with anchors"),
        ({"network": NetworkConfig(backbone="vgg16", tcb=False)}, "network.arm must be false"),
        (
            {"network": NetworkConfig(backbone="vgg16", arm=False, tcb=False, tcb_channels=64)},
            "network.tcb_channels is of transfer connection blocks",
        ),
        (
            {"network": NetworkConfig(backbone="vgg16", arm=False, tcb=False, head_init="prior")},
            "network.head_init must be left out",
        ),
        ({"preprocess": PreprocessConfig(height=96)}, "preprocess.height must be a positive multiple of 64, not 96"),
        ({"family": "refinedet"}, "setting 'anchors' is missing: a refinedet needs it"),
        ({"family": "ssd", "anchors": ANCHORS}, "grid must be left out: a ssd has none"),
    ],
)
def test_combinations_that_do_not_fit(change, message):
    with pytest.raises(ConfigError) as caught:
        replace(config_of(), **change)
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stride", 16), ("boxes", 0), ("layers", 0), ("channels", 0), ("channels", 40), ("norm", "layer"),
        ("coord_weight", -1), ("no_object_weight", -1), ("coord_weight", math.nan), ("boxes", 1.5),
    ],
)  # fmt: skip
def test_grids_that_do_not_fit_name_their_setting(name, value):
    document = to_dict(config_of())
    document["grid"][name] = value
    with pytest.raises(ConfigError) as caught:
        from_dict(DetectorConfig, document)
    assert f"grid.{name}" in caught.value.message


def test_who_asks_for_what_a_family_has_not_is_told():
    with pytest.raises(ConfigError, match="mine is a yolo, which has no anchors"):
        config_of().require_anchors()
    with pytest.raises(ConfigError, match="tiny is a refinedet, which has no grid"):
        get_preset("tiny", TWO).detector.require_grid()

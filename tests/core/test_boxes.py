"""Formats, overlap and offsets, against numbers worked out by hand and against properties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torchvision.ops import box_iou

from refinedet_cli.core.boxes import MIN_SIDE, cxcywh_to_xyxy, decode, encode, pair_iou, xyxy_to_cxcywh

VARIANCES = (0.1, 0.2)

# The same examples at every run, and no verdict on a busy machine's speed.
steady = settings(derandomize=True, deadline=None)
unit = st.floats(0, 1, width=32, allow_subnormal=False)
side = st.floats(2**-10, 1, width=32)


@st.composite
def xyxy(draw: st.DrawFn, sides: st.SearchStrategy[float] = unit) -> list[float]:
    x, y = draw(unit), draw(unit)
    return [x, y, x + draw(sides), y + draw(sides)]


@st.composite
def cxcywh(draw: st.DrawFn) -> list[float]:
    return [draw(unit), draw(unit), draw(side), draw(side)]


def test_formats_by_hand():
    xyxy_boxes = torch.tensor([[1.0, 2.0, 5.0, 4.0], [-1.0, 0.0, 1.0, 0.0]])
    cxcywh_boxes = torch.tensor([[3.0, 3.0, 4.0, 2.0], [0.0, 0.0, 2.0, 0.0]])
    assert_close(xyxy_to_cxcywh(xyxy_boxes), cxcywh_boxes, rtol=0, atol=0)
    assert_close(cxcywh_to_xyxy(cxcywh_boxes), xyxy_boxes, rtol=0, atol=0)
    assert cxcywh_to_xyxy(torch.zeros(2, 0, 4)).shape == (2, 0, 4)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((0, 0, 2, 2), (0, 0, 2, 2), 1.0),
        ((0, 0, 2, 2), (1, 1, 3, 3), 1 / 7),
        ((0, 0, 4, 4), (1, 1, 3, 2), 2 / 16),
        ((0, 0, 2, 1), (0, 0, 1, 2), 1 / 3),
        ((0, 0, 1, 1), (1, 0, 2, 1), 0.0),  # an edge in common
        ((0, 0, 1, 1), (1, 1, 2, 2), 0.0),  # a corner in common
        ((0, 0, 1, 1), (5, 0, 6, 1), 0.0),
        ((0, 0, 1, 1), (0, 5, 1, 6), 0.0),
        ((-3, -3, -1, -1), (-2, -3, 0, -1), 1 / 3),
        ((1, 1, 1, 1), (1, 1, 1, 1), 0.0),  # without area
        ((1, 1, 1, 3), (0, 0, 2, 2), 0.0),
        ((0, 0, 1e-6, 1e-6), (0, 0, 1e-6, 1e-6), 1.0),
    ],
)
def test_iou_by_hand(first, second, expected):
    iou = pair_iou(torch.tensor(first, dtype=torch.float32), torch.tensor(second, dtype=torch.float32))
    assert_close(iou, torch.tensor(expected), rtol=1e-6, atol=0)


@steady
@given(xyxy(), xyxy())
def test_iou_is_symmetric_and_in_range(first, second):
    a, b = torch.tensor(first), torch.tensor(second)
    forth, back = pair_iou(a, b), pair_iou(b, a)
    assert_close(forth, back, rtol=0, atol=0)
    assert 0 <= float(forth) <= 1


def test_iou_equals_torchvision_and_broadcasts():
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(2, 40, 2, 2, generator=generator, dtype=torch.float64).sort(dim=2).values.reshape(2, 40, 4)
    table = pair_iou(corners[0, :, None], corners[1])
    assert_close(table, box_iou(corners[0], corners[1]))
    assert_close(pair_iou(corners[0], corners[1]), table.diagonal(), rtol=0, atol=0)


def test_encode_by_hand():
    anchor = torch.tensor([0.5, 0.5, 0.2, 0.4])
    box = cxcywh_to_xyxy(torch.tensor([0.54, 0.46, 0.2 * math.e, 0.4 / math.e]))
    assert_close(encode(box, anchor, VARIANCES), torch.tensor([2.0, -1.0, 5.0, -5.0]), rtol=1e-5, atol=1e-5)


def test_decode_by_hand():
    anchor = torch.tensor([0.5, 0.5, 0.2, 0.4])
    decoded = decode(torch.tensor([2.0, -1.0, 5.0, -5.0]), anchor, VARIANCES)
    assert_close(decoded, torch.tensor([0.54, 0.46, 0.2 * math.e, 0.4 / math.e]))
    assert_close(decode(torch.zeros(4), anchor, VARIANCES), anchor, rtol=0, atol=0)


@steady
@given(xyxy(side), cxcywh(), st.sampled_from([VARIANCES, (1.0, 1.0), (0.05, 0.4)]))
def test_decode_undoes_encode(box, anchor, variances):
    boxes, anchors = torch.tensor(box, dtype=torch.float64), torch.tensor(anchor, dtype=torch.float64)
    back = cxcywh_to_xyxy(decode(encode(boxes, anchors, variances), anchors, variances))
    assert_close(back, boxes, rtol=0, atol=1e-9)


@steady
@given(cxcywh(), st.tuples(*[st.floats(-3, 3)] * 2), st.tuples(*[st.floats(-10, 10)] * 2))
def test_encode_undoes_decode(anchor, centre, size):
    anchors, offsets = torch.tensor(anchor, dtype=torch.float64), torch.tensor([*centre, *size], dtype=torch.float64)
    back = encode(cxcywh_to_xyxy(decode(offsets, anchors, VARIANCES)), anchors, VARIANCES)
    assert_close(back, offsets, rtol=0, atol=1e-6)


@pytest.mark.parametrize("huge", [1e4, 1e9])
def test_two_decodes_of_absurd_offsets_stay_finite(huge):
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0])] * 4)
    anchors = torch.tensor([0.5, 0.5, 0.8, 1.1314])
    first = decode(signs * huge, anchors, VARIANCES)
    second = decode(signs * huge, first, VARIANCES)
    target = encode(torch.tensor([0.1, 0.1, 0.9, 0.9]), second, VARIANCES)
    overlap = pair_iou(cxcywh_to_xyxy(second), torch.tensor([0.1, 0.1, 0.9, 0.9]))
    for values in (first, second, target, overlap):
        assert bool(values.isfinite().all())
    assert bool((first[:, 2:] > 0).all())
    assert bool((second[:, 2:] > 0).all())
    # The limit: a thousandfold.
    assert_close(first[-1, 2:] / anchors[2:], torch.tensor([1000.0, 1000.0]), rtol=1e-4, atol=0)


def test_a_box_without_size_has_finite_offsets():
    offsets = encode(torch.tensor([0.5, 0.5, 0.5, 0.5]), torch.tensor([0.5, 0.5, 0.1, 0.1]), VARIANCES)
    assert bool(offsets.isfinite().all())
    assert_close(offsets[2:], torch.full((2,), math.log(MIN_SIDE / 0.1) / 0.2), rtol=1e-5, atol=0)

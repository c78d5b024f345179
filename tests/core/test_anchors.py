"""Where anchors lie, against grids written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from refinedet_cli.core.anchors import anchors_per_cell, level_sizes, tile_anchors
from refinedet_cli.core.config import AnchorConfig
from refinedet_cli.core.presets import paper_anchors, ssd300_anchors

WIDE, TALL = math.sqrt(2), 1 / math.sqrt(2)


def one_level(stride: int) -> AnchorConfig:
    return AnchorConfig.from_sizes(sizes=(32,), ratios=(1, 2, 0.5), strides=(stride,))


def test_one_cell_by_hand():
    expected = [
        [0.5, 0.5, 0.5, 0.5],
        [0.5, 0.5, 0.5 * WIDE, 0.5 * TALL],
        [0.5, 0.5, 0.5 * TALL, 0.5 * WIDE],
    ]
    assert_close(tile_anchors(one_level(64), 64, 64), torch.tensor(expected))


def test_four_cells_by_hand():
    expected = [
        [x, y, w, h]
        for y in (0.25, 0.75)
        for x in (0.25, 0.75)
        for w, h in ((0.25, 0.25), (0.25 * WIDE, 0.25 * TALL), (0.25 * TALL, 0.25 * WIDE))
    ]
    assert_close(tile_anchors(one_level(64), 128, 128), torch.tensor(expected))


def test_a_row_of_two_cells_is_normalised_by_each_side():
    anchors = tile_anchors(one_level(64), 64, 128)
    expected = [
        [x, 0.5, w, h]
        for x in (0.25, 0.75)
        for w, h in ((0.25, 0.5), (0.25 * WIDE, 0.5 * TALL), (0.25 * TALL, 0.5 * WIDE))
    ]
    assert_close(anchors, torch.tensor(expected))
    transposed = tile_anchors(one_level(64), 128, 64)
    assert_close(transposed[[0, 3]][:, [1, 0, 3, 2]], anchors[[0, 3]], rtol=0, atol=0)


def test_levels_follow_each_other_finest_first():
    config = AnchorConfig(strides=(32, 64), shapes=(((10, 20),), ((30, 40), (50, 60))))
    assert anchors_per_cell(config) == (1, 2)
    size = 1 / 64
    expected = [
        *([x, y, 10 * size, 20 * size] for y in (0.25, 0.75) for x in (0.25, 0.75)),
        [0.5, 0.5, 30 * size, 40 * size],
        [0.5, 0.5, 50 * size, 60 * size],
    ]
    assert_close(tile_anchors(config, 64, 64), torch.tensor(expected))


@pytest.mark.parametrize(("side", "expected"), [(320, 6375), (512, 16320)])
def test_counts_of_the_paper(side, expected):
    assert len(tile_anchors(paper_anchors(), side, side)) == expected


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 320), (192, 128), (640, 448)])
def test_counts_of_other_sizes(height, width):
    anchors = tile_anchors(paper_anchors(), height, width)
    assert len(anchors) * 4096 == 3 * height * width * 85
    assert level_sizes(paper_anchors(), height, width) == [(height // s, width // s) for s in (8, 16, 32, 64)]


def test_the_paper_s_levels_at_320():
    anchors = tile_anchors(paper_anchors(), 320, 320)
    starts = [0, 4800, 6000, 6300]
    assert_close(anchors[starts][:, 2] * 320, torch.tensor([32.0, 64.0, 128.0, 256.0]))
    assert_close(anchors[starts][:, 0] * 320, torch.tensor([4.0, 8.0, 16.0, 32.0]))
    # Neighbours in a row, then the next row.
    assert_close(anchors[3] - anchors[0], torch.tensor([8 / 320, 0, 0, 0]))
    assert_close(anchors[120] - anchors[0], torch.tensor([0, 8 / 320, 0, 0]), rtol=0, atol=1e-7)


def test_anchors_keep_their_pixels_whatever_the_input():
    small, large = (tile_anchors(paper_anchors(), s, s) for s in (320, 512))
    assert_close(small[-3:, 2:] * 320, large[-3:, 2:] * 512)


def test_anchors_are_not_clipped():
    anchors = tile_anchors(paper_anchors(), 320, 320)
    assert float(anchors[:, 2:].max()) == pytest.approx(1.1314, abs=5e-5)
    assert float((anchors[:, 0] - anchors[:, 2] / 2).min()) < 0
    assert float((anchors[:, 1] + anchors[:, 3] / 2).max()) > 1


@pytest.mark.parametrize(("height", "width"), [(0, 64), (64, 0), (-64, 64)])
def test_sizes_that_are_none(height, width):
    with pytest.raises(ValueError, match=f"positive on both sides, got {height} x {width}"):
        tile_anchors(paper_anchors(), height, width)


def test_cells_cover_an_input_that_the_strides_do_not_divide():
    assert level_sizes(ssd300_anchors(), 300, 290) == [(38, 37), (19, 19), (10, 10), (5, 5), (3, 3), (1, 1)]
    anchors = tile_anchors(ssd300_anchors(), 300, 300)
    assert_close(anchors[37 * 4, :2], torch.tensor([300 / 300, 4 / 300]))
    assert_close(anchors[-1, :2], torch.tensor([0.5, 0.5]))

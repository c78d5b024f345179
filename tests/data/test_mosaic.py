"""Quarters of an input: they tile it, and boxes land where their pixels do."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from refinedet_cli.data.mosaic import EDGE, Panel, draw_panels


@settings(max_examples=60, deadline=None)
@given(st.integers(8, 700), st.integers(8, 700), st.integers(0, 2**32 - 1))
def test_four_quarters_cover_every_pixel_once(height, width, seed):
    covered = np.zeros((height, width), dtype=int)
    panels = draw_panels((height, width), np.random.default_rng(seed))
    assert len(panels) == 4
    for panel in panels:
        covered[panel.top : panel.bottom, panel.left : panel.right] += 1
        assert panel.size == (panel.bottom - panel.top, panel.right - panel.left)
        assert panel.size[0] >= np.floor(EDGE * height)
        assert panel.size[1] >= np.floor(EDGE * width)
    assert (covered == 1).all()


def test_the_meeting_point_moves():
    generator = np.random.default_rng(0)
    points = {(p.bottom, p.right) for p in (draw_panels((100, 100), generator)[0] for _ in range(50))}
    assert len(points) > 40


def test_boxes_are_placed_by_hand():
    # The right half of the lower third of an input of 30 rows and 40 columns.
    panel = Panel(20, 20, 40, 30)
    boxes = np.array([[0.0, 0.0, 1.0, 1.0], [0.5, 0.2, 0.75, 0.6]])
    np.testing.assert_allclose(panel.place(boxes, (30, 40)), [[0.5, 2 / 3, 1.0, 1.0], [0.75, 22 / 30, 0.875, 26 / 30]])
    assert panel.place(np.empty((0, 4)), (30, 40)).shape == (0, 4)

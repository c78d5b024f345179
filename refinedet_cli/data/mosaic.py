"""Four pictures in one: more objects a step, smaller, and beside what they were never seen with.

Source: the idea is that of YOLOv4 (arXiv:2004.10934). Differs: each quarter holds a view of its own, cropped and
resized to fit, so that no part of the input is empty.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# The quarters meet at a point this far from the edges at least, as a fraction of the side.
EDGE = 0.3


class Panel(NamedTuple):
    """A quarter of the input, px-in."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.bottom - self.top, self.right - self.left

    def place(self, boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Turn boxes of the quarter into boxes of the input of this height and width; float64[N, 4], xyxy, norm."""
        height, width = size
        scale = np.array([self.right - self.left, self.bottom - self.top] * 2)
        placed: np.ndarray = (boxes * scale + (self.left, self.top) * 2) / ((width, height) * 2)
        return placed


def draw_panels(size: tuple[int, int], generator: np.random.Generator) -> list[Panel]:
    """Cut an input of some height and width, px-in, into four quarters that meet at a random point."""
    height, width = size
    row, column = (round(side * generator.uniform(EDGE, 1 - EDGE)) for side in size)
    rows, columns = [(0, row), (row, height)], [(0, column), (column, width)]
    return [Panel(left, top, right, bottom) for top, bottom in rows for left, right in columns]

"""The objects that a grid cannot learn, because a larger one has its centre in the same cell."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from refinedet_cli.core.config import DetectorConfig
from refinedet_cli.core.structures import Targets
from refinedet_cli.core.words import counted
from refinedet_cli.core.yolo import place_objects
from refinedet_cli.engine.anchors import percent


class SharedCells(NamedTuple):
    """How many objects have no cell of their own.

    Attributes:
        preset: of the detector.
        input_size: (height, width), px-in.
        grid: (rows, columns).
        objects: all that were looked at.
        left_out: of these, those in the cell of a larger one.
    """

    preset: str
    input_size: tuple[int, int]
    grid: tuple[int, int]
    objects: int
    left_out: int

    def __str__(self) -> str:
        height, width = self.input_size
        rows, columns = self.grid
        share = percent(self.left_out / self.objects) if self.objects else "0.0 %"
        return (
            f"{self.left_out:,} of {counted(self.objects, 'box', 'boxes')} ({share}) with the centre in the cell of "
            f"a larger one, of the {columns} x {rows} cells of {self.preset} at {width} x {height}: not learnt"
        )


def grid_size(detector: DetectorConfig) -> tuple[int, int]:
    """Count the rows and columns of a detector's grid at its input size."""
    stride, size = detector.require_grid().stride, detector.preprocess
    return size.height // stride, size.width // stride


def sharing(boxes: NDArray[np.float64], picture: NDArray[np.int64], detector: DetectorConfig) -> NDArray[np.bool_]:
    """Find the objects that training leaves out.

    Args:
        boxes: float64[N, 4], xyxy, px-in.
        picture: int64[N], the picture of each.
        detector: its grid and input size.

    Returns:
        bool[N].
    """
    rows, columns = grid_size(detector)
    size = detector.preprocess
    sides = torch.tensor([size.width, size.height] * 2, dtype=torch.float64)
    norm = (torch.from_numpy(boxes) / sides).float()
    images = torch.from_numpy(picture)
    placed = place_objects(Targets(norm, torch.ones_like(images), images, len(images)), rows, columns)
    left_out = np.ones(len(boxes), dtype=bool)
    left_out[placed.objects.numpy()] = False
    return left_out

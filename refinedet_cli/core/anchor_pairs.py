"""Pairs of objects and anchors that overlap, found without comparing all of them.

The anchors of one shape lie on a regular grid, and overlap falls with the distance of the centres along either axis. So
the best cell for an object is the nearest one, and the cells that reach a given overlap are among a few rows and
columns. Geometry runs in float64 with some slack; the overlaps of the pairs that it finds are computed as training
computes them, in float32, so that ties fall the same way.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from refinedet_cli.core.anchors import level_sizes, tile_anchors
from refinedet_cli.core.boxes import cxcywh_to_xyxy, pair_iou
from refinedet_cli.core.config import AnchorConfig
from refinedet_cli.core.matching import NO_OVERLAP

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# How far float32 may move a corner, as a fraction of the input's side (of the anchor's, where that is longer).
_ROUNDING = 2e-6


class Slot(NamedTuple):
    """One shape on the grid of one level; cell (row, column) is anchor ``first + (row * columns + column) * step``."""

    level: int
    shape: int
    stride: int
    rows: int
    columns: int
    width: float
    height: float
    first: int
    step: int


class Grid(NamedTuple):
    """The anchors of an input.

    Attributes:
        slots: one for each level and shape.
        corners: float32[4, A], xyxy, norm, as planes; those of training.
        slack: how far float32 may move a side, px-in.
    """

    slots: tuple[Slot, ...]
    corners: Tensor
    slack: float

    @property
    def anchors(self) -> int:
        """A, of one picture."""
        return self.corners.shape[1]


class Objects(NamedTuple):
    """Boxes as training sees them, rounded to float32.

    Attributes:
        corners: float32[4, N], xyxy, norm, as planes.
        centre_x, centre_y, width, height: float64[N], px-in, of exactly these boxes.
    """

    corners: Tensor
    centre_x: Floats
    centre_y: Floats
    width: Floats
    height: Floats


class Pairs(NamedTuple):
    """Pairs of an object and an anchor: int64[P], int64[P] and their overlap, float32[P]."""

    row: Ints
    anchor: Ints
    iou: NDArray[np.float32]


def list_slots(anchors: AnchorConfig, input_size: tuple[int, int]) -> tuple[Slot, ...]:
    """List level and shape in the order of the anchors; ``input_size`` is (height, width), px-in.

    Raises:
        ValueError: the input does not fit the strides.
    """
    slots = []
    first = 0
    grids = level_sizes(anchors, *input_size)
    for level, ((rows, columns), stride, shapes) in enumerate(zip(grids, anchors.strides, anchors.shapes, strict=True)):
        slots += [
            Slot(level, k, stride, rows, columns, width, height, first + k, len(shapes))
            for k, (width, height) in enumerate(shapes)
        ]
        first += rows * columns * len(shapes)
    return tuple(slots)


def make_grid(anchors: AnchorConfig, input_size: tuple[int, int]) -> Grid:
    """Tile the anchors; ``input_size`` is (height, width), px-in."""
    slots = list_slots(anchors, input_size)
    corners = cxcywh_to_xyxy(tile_anchors(anchors, *input_size)).T.contiguous()
    longest = max(*input_size, *(max(s.width, s.height) for s in slots))
    return Grid(slots, corners, _ROUNDING * longest)


def exact_boxes(boxes: Floats) -> Objects:
    """Take boxes float64[N, 4], xyxy, px-in, as they are, without ``corners``: enough for the closed form."""
    centre, size = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    return Objects(torch.empty(4, 0), centre[:, 0], centre[:, 1], size[:, 0], size[:, 1])


def round_boxes(boxes: Floats, input_size: tuple[int, int]) -> Objects:
    """Round boxes float64[N, 4], xyxy, px-in, as training has them; all later geometry starts from these."""
    height, width = input_size
    sides = np.array([width, height, width, height], dtype=np.float64)
    rounded = (boxes / sides).astype(np.float32)
    corners = torch.from_numpy(np.ascontiguousarray(rounded.T))
    return exact_boxes(rounded.astype(np.float64) * sides)._replace(corners=corners)


def nearest_overlap(objects: Objects, slots: tuple[Slot, ...], slack: float = 0.0) -> Floats:
    """Compute the highest overlap of each object with any anchor, in closed form.

    Args:
        objects: N of them; their ``corners`` are not read.
        slots: of the grid.
        slack: how much worse than they are to take the common width and height, px-in.

    Returns:
        float64[N], in [0, 1]; with the slack of the grid, never above the highest overlap in float32.
    """
    best = np.zeros(len(objects.width))
    area = objects.width * objects.height
    for slot in slots:
        x, y = objects.centre_x, objects.centre_y
        dx = np.abs(x - (np.clip(x // slot.stride, 0, slot.columns - 1) + 0.5) * slot.stride)
        dy = np.abs(y - (np.clip(y // slot.stride, 0, slot.rows - 1) + 0.5) * slot.stride)
        wide = np.minimum(np.minimum(objects.width, slot.width), (objects.width + slot.width) / 2 - dx) - slack
        high = np.minimum(np.minimum(objects.height, slot.height), (objects.height + slot.height) / 2 - dy) - slack
        common = wide.clip(min=0) * high.clip(min=0)
        np.maximum(best, common / (area + (slot.width + slack) * (slot.height + slack) - common), out=best)
    # The last digits of float32 are no matter of sides.
    return best if slack == 0 else best * (1 - 1e-6)


def find_pairs(objects: Objects, rows: Ints, least: Floats, grid: Grid) -> Pairs:
    """Find all anchors that overlap some objects by at least so much, in float32, and at all.

    Args:
        objects: of any pictures.
        rows: int64[n], which of them.
        least: float64[n], for each.
        grid: the anchors.

    Returns:
        `Pairs` in no particular order, none twice, complete.

    Overlap of at least t of areas a and b needs a common area of t / (1 + t) * (a + b). With the most that the shapes
    can share along one axis, that bounds the distance along the other.
    """
    found_rows, found_anchors = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    slack = grid.slack
    width, height = objects.width[rows], objects.height[rows]
    area = width * height
    for slot in grid.slots:
        smallest = max(slot.width - slack, 0.0) * max(slot.height - slack, 0.0)
        needed = least / (1 + least) * (area + smallest) * (1 - 1e-6)
        wide, high = np.minimum(width, slot.width) + slack, np.minimum(height, slot.height) + slack
        fits = np.flatnonzero((wide * high >= needed) & (area > 0))
        row, needed, wide, high = rows[fits], needed[fits], wide[fits], high[fits]
        reach_x = (width[fits] + slot.width) / 2 + slack - needed / high
        reach_y = (height[fits] + slot.height) / 2 + slack - needed / wide
        left, columns = _cells(objects.centre_x[row], reach_x, slot.stride, slot.columns)
        top, lines = _cells(objects.centre_y[row], reach_y, slot.stride, slot.rows)
        which, place = expand(columns * lines)
        line, column = np.divmod(place, columns[which])
        found_rows.append(row[which])
        found_anchors.append(slot.first + ((top[which] + line) * slot.columns + left[which] + column) * slot.step)
    row, anchor = np.concatenate(found_rows), np.concatenate(found_anchors)
    iou = overlaps(objects, row, anchor, grid)
    lowest = np.zeros(len(objects.width))
    lowest[rows] = least
    kept = (iou >= lowest[row]) & (iou > 0)
    return Pairs(row[kept], anchor[kept], iou[kept])


def overlaps(objects: Objects, row: Ints, anchor: Ints, grid: Grid) -> NDArray[np.float32]:
    """Compute the overlap float32[P] of pairs of rows and anchors int64[P], bit for bit that of training.

    What `matching.match` takes for no overlap is 0.
    """
    first = objects.corners[:, torch.from_numpy(row)]
    second = grid.corners[:, torch.from_numpy(anchor)]
    iou = pair_iou(first.T, second.T)
    ious: NDArray[np.float32] = torch.where(iou < NO_OVERLAP, iou.new_zeros(()), iou).numpy()
    return ious


def expand(counts: Ints) -> tuple[Ints, Ints]:
    """For counts (2, 0, 3): whose entry each is (0, 0, 2, 2, 2), and its place there (0, 1, 0, 1, 2)."""
    which = np.repeat(np.arange(len(counts)), counts)
    return which, np.arange(len(which)) - (np.cumsum(counts) - counts)[which]


def _cells(centre: Floats, reach: Floats, stride: int, cells: int) -> tuple[Ints, Ints]:
    """The first cell whose centre is within reach, and how many are."""
    first = np.ceil((centre - reach) / stride - 0.5).clip(0, cells)
    last = np.floor((centre + reach) / stride - 0.5).clip(-1, cells - 1)
    return first.astype(np.int64), (last - first + 1).clip(min=0).astype(np.int64)

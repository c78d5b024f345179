"""What other cures than other anchors would do: a larger input, an input shaped like the pictures, tiles."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np

from refinedet_cli.core.anchor_coverage import ObjectSet, best_ious, check_objects
from refinedet_cli.core.anchor_design import Fit, measure_fit
from refinedet_cli.core.anchor_pairs import Floats
from refinedet_cli.core.config import AnchorConfig

Cure = Literal["now", "larger", "shaped", "tiles", "tiles+whole"]

_LARGER = (1.2, 1.4, 1.6)
# An input shaped like the pictures may cost this much of the present one, in pixels.
_SHAPED_COST = (0.9, 1.3)
# A piece of an object in a tile stands for the object from this share of its area on.
_PIECE = 0.5


class Alternative(NamedTuple):
    """One way to look at the same pictures with the same anchors.

    Attributes:
        cure: "now" is the input as it is; "larger" scales both sides; "shaped" has the pictures' mean aspect ratio;
            "tiles" cuts pictures in four quarters, each resized to the whole input; "tiles+whole" adds the picture.
        input_size: (height, width), px-in.
        passes: of the network over one picture.
        cost: pixels that the network sees in a picture, relative to now; multiply-adds are proportional.
        fit: of the anchors to the objects.
    """

    cure: Cure
    input_size: tuple[int, int]
    passes: int
    cost: float
    fit: Fit


def alternatives(
    objects: ObjectSet, anchors: AnchorConfig, input_size: tuple[int, int], *, aspect: float | None = None
) -> tuple[Alternative, ...]:
    """Measure how anchors would fit if pictures were shown to the network in another way.

    In tiles, an object counts by its pieces: a piece of at least half of the object's area must overlap an anchor. One
    that no tile shows by half is not matched there.

    Args:
        objects: N > 0 of them, at the scale of ``input_size``.
        anchors: they keep their size in px-in whatever the input.
        input_size: (height, width), px-in.
        aspect: mean width / height of the pictures before resizing; None leaves "shaped" out.

    Returns:
        "now" first, then larger inputs by size, then "shaped" unless it equals now, then the tiles.

    Raises:
        ValueError: there are no objects, their arrays do not belong together, the aspect is not positive, or the input
            does not fit the strides.
    """
    check_objects(objects)
    if not len(objects.boxes):
        raise ValueError("there are no objects to compare inputs on")
    if aspect is not None and not (aspect > 0 and math.isfinite(aspect)):
        raise ValueError(f"aspect must be positive, got {aspect}")
    height, width = input_size
    whole = best_ious(objects.boxes, anchors, input_size)
    tiles = _best_in_tiles(objects.boxes, anchors, input_size)
    sizes: list[tuple[Cure, tuple[int, int]]] = [("larger", s) for s in _larger(input_size, max(anchors.strides))]
    if aspect is not None:
        shaped = _shaped(input_size, max(anchors.strides), aspect)
        sizes += [("shaped", shaped)] if shaped != input_size else []
    rows = [Alternative("now", input_size, 1, 1.0, measure_fit(objects, whole))]
    for cure, (rows_in, columns_in) in sizes:
        scale = np.array([columns_in / width, rows_in / height] * 2)
        fit = measure_fit(objects, best_ious(objects.boxes * scale, anchors, (rows_in, columns_in)))
        rows.append(Alternative(cure, (rows_in, columns_in), 1, rows_in * columns_in / (height * width), fit))
    rows.append(Alternative("tiles", input_size, 4, 4.0, measure_fit(objects, tiles)))
    both = measure_fit(objects, np.maximum(whole, tiles))
    return (*rows, Alternative("tiles+whole", input_size, 5, 5.0, both))


def _larger(input_size: tuple[int, int], multiple: int) -> list[tuple[int, int]]:
    height, width = input_size
    sizes = {(round(height * f / multiple) * multiple, round(width * f / multiple) * multiple) for f in _LARGER}
    return sorted(size for size in sizes if size[0] > height and size[1] > width)


def _shaped(input_size: tuple[int, int], multiple: int, aspect: float) -> tuple[int, int]:
    """The size of nearly the same cost whose aspect is nearest; among equals the cheaper."""
    area = input_size[0] * input_size[1] / multiple**2
    least, most = _SHAPED_COST
    sides = range(1, math.floor(most * area) + 1)
    fitting = [(rows, columns) for rows in sides for columns in sides if least * area <= rows * columns <= most * area]
    rows, columns = min(fitting, key=lambda s: (abs(math.log(s[1] / s[0] / aspect)), s[0] * s[1]))
    return rows * multiple, columns * multiple


def _best_in_tiles(boxes: Floats, anchors: AnchorConfig, input_size: tuple[int, int]) -> Floats:
    """Highest overlap float64[N] of any piece that stands for its object with any anchor of its tile."""
    half = np.array([input_size[1], input_size[0]]) / 2
    area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    best = np.zeros(len(boxes))
    for corner in ((0.0, 0.0), (half[0], 0.0), (0.0, half[1]), (half[0], half[1])):
        low, high = np.array(corner), np.array(corner) + half
        piece = np.concatenate([np.clip(boxes[:, :2], low, high), np.clip(boxes[:, 2:], low, high)], axis=1)
        stands = (piece[:, 2:] - piece[:, :2]).prod(axis=1) >= _PIECE * area
        # A tile of half the side becomes the whole input, so pieces come out twice as large.
        enlarged = (piece - np.tile(low, 2)) * 2
        best[stands] = np.maximum(best[stands], best_ious(enlarged[stands], anchors, input_size))
    return best

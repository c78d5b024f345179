"""Tiling: the predictor that looks at large pictures in overlapping tiles, and what it says of their cost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from refinedet_cli.core.config import Classes, DetectorConfig
from refinedet_cli.core.multi_scale import ScaleSchedule
from refinedet_cli.core.preprocess import Window
from refinedet_cli.core.structures import Detections
from refinedet_cli.core.tiling import Tiling, merge, moved
from refinedet_cli.core.words import counted
from refinedet_cli.engine.predict import AnyPredictor, default_batch, picture_sizes
from refinedet_cli.engine.stages import stage
from refinedet_cli.errors import UsageError

# A look at a larger window than this is one at a reduced copy: resizing takes 24 bytes a pixel.
_MOST_PIXELS = 50_000_000
# Pixels that are reduced together.
_STRIP_PIXELS = 4_000_000

Pixels = NDArray[np.uint8]


class _Look(NamedTuple):
    """A window of one of the pictures, its pixels, and how much they are reduced."""

    picture: int
    window: Window
    pixels: Pixels
    factor: int


class Looks(NamedTuple):
    """How much was looked at: pictures, those of them that were cut into tiles, and windows of them."""

    pictures: int = 0
    cut: int = 0
    windows: int = 0


def looks_at(tiles: Tiling, sizes: Iterable[tuple[int, int]]) -> Looks:
    """Count what there is to look at in pictures of these heights and widths, px-img."""
    counts = [tiles.count(*size) for size in sizes]
    return Looks(len(counts), sum(count > 1 for count in counts), sum(counts))


class TiledPredictor:
    """A detector that looks at pictures in tiles; it can stand wherever the one that it wraps can.

    Args:
        inner: what looks at each tile, in one pass or many.
        tiles: size and overlap of the tiles.
        batch: looks that are computed together, whichever pictures they belong to; None fits the device.

    Attributes:
        inner, tiles: as given.
        done: what it has looked at so far.
    """

    def __init__(self, inner: AnyPredictor, tiles: Tiling, *, batch: int | None = None) -> None:
        self.inner = inner
        self.tiles = tiles
        self.done = Looks()
        self._batch = batch or default_batch(inner.device)

    @property
    def config(self) -> DetectorConfig:
        """That of the wrapped detector."""
        return self.inner.config

    @property
    def classes(self) -> Classes:
        """The classes that labels stand for."""
        return self.inner.classes

    @property
    def path(self) -> Path:
        """The file the weights came from."""
        return self.inner.path

    @property
    def provenance(self) -> dict[str, Any]:
        """What that file says of how the weights were made."""
        return self.inner.provenance

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.inner.device

    @property
    def precision(self) -> str:
        """The number format of the network."""
        return self.inner.precision

    @property
    def engine(self) -> str:
        """The library that computes, with its version."""
        return self.inner.engine

    @property
    def schedule(self) -> ScaleSchedule | None:
        """The passes over each tile; None where it is looked at once."""
        return self.inner.schedule

    @property
    def input_size(self) -> None:
        """None: tiles are cut from the picture as large as it is."""

    def predict(self, images: Sequence[Pixels]) -> list[Detections]:
        """Find the objects in pictures of any sizes.

        Args:
            images: B pictures uint8[H, W, 3], RGB; B may be 0. Beside them, memory holds one batch of tiles, a copy of
                at most 50 megapixels, and what was found.

        Returns:
            one `Detections` per picture, in order, on the CPU; those of the wrapped detector where a picture is no
            larger than a tile. There is no limit on their number but the wrapped detector's for each look.

        Raises:
            ValueError: a picture is not uint8[H, W, 3].
        """
        sizes = picture_sizes(images)
        found: list[list[Detections]] = [[] for _ in images]
        windows: list[list[Window]] = [[] for _ in images]
        looks = self._looks(images, sizes)
        self.done = Looks(*map(sum, zip(self.done, looks_at(self.tiles, sizes), strict=True)))
        while batch := list(islice(looks, self._batch)):
            seen = self.inner.predict([look.pixels for look in batch])
            for look, detections in zip(batch, seen, strict=True):
                found[look.picture].append(moved(detections, look.window, look.factor))
                windows[look.picture].append(look.window)
        iou = self.config.postprocess.nms_iou
        with stage("post-processing"):
            return [merge(*of_picture, iou) for of_picture in zip(found, windows, sizes, strict=True)]

    def _looks(self, images: Sequence[Pixels], sizes: Sequence[tuple[int, int]]) -> Iterator[_Look]:
        for i, (image, size) in enumerate(zip(images, sizes, strict=True)):
            for window in self.tiles.looks(*size):
                pixels = image[window.top : window.bottom, window.left : window.right]
                factor = _factor(pixels.shape[0], pixels.shape[1])
                yield _Look(i, window, reduced(pixels, factor), factor)


def _factor(height: int, width: int) -> int:
    """The least whole factor that leaves no more than `_MOST_PIXELS`, if the sides can be divided by it."""
    factor = 1
    while (height // factor) * (width // factor) > _MOST_PIXELS:
        factor += 1
    return min(factor, height, width)


def reduced(pixels: Pixels, factor: int) -> Pixels:
    """Reduce a picture by a whole factor, a few rows at a time.

    Args:
        pixels: uint8[H, W, 3].
        factor: sides of the squares whose mean becomes one pixel, at least 1.

    Returns:
        uint8[H // factor, W // factor, 3]; rows and columns that do not fill a square are left out. The picture itself
        where the factor is 1.
    """
    if factor == 1:
        return pixels
    height, width = pixels.shape[0] // factor, pixels.shape[1] // factor
    small = np.empty((height, width, 3), dtype=np.uint8)
    rows = max(1, _STRIP_PIXELS // (factor * pixels.shape[1]))
    for start in range(0, height, rows):
        strip = pixels[start * factor : min(start + rows, height) * factor, : width * factor]
        squares = strip.reshape(-1, factor, width, factor, 3)
        sums = squares.sum(axis=3, dtype=np.uint32).sum(axis=1)
        small[start : start + rows] = (sums + factor * factor // 2) // (factor * factor)
    return small


def with_tiles(predictor: AnyPredictor, tiles: Tiling | None, batch: int | None = None) -> AnyPredictor:
    """Make a detector look at tiles; without any it is handed back as it is. ``batch`` is that of `TiledPredictor`."""
    return predictor if tiles is None else TiledPredictor(predictor, tiles, batch=batch)


def tiling_of(predictor: AnyPredictor) -> Tiling | None:
    """How a detector cuts pictures into tiles; None where it does not."""
    return predictor.tiles if isinstance(predictor, TiledPredictor) else None


def make_tiling(size: int | None, overlap: float | None) -> Tiling | None:
    """Make of the options --tile and --tile-overlap what they ask for; None where there are to be no tiles.

    Raises:
        UsageError: there is an overlap, and no tile.
        ConfigError: a value is out of its range.
    """
    if size is None:
        if overlap is not None:
            raise UsageError("--tile-overlap is about tiles, and there are none", "add --tile with their size in px")
        return None
    return Tiling(size=size) if overlap is None else Tiling(size=size, overlap=overlap)


def remark_on_tiles(predictor: AnyPredictor, sizes: Iterable[tuple[int, int]] | None = None) -> str | None:
    """Say in one line what tiling does to pictures and costs; None where there is none, or there are no pictures.

    Args:
        predictor: tiled or not.
        sizes: heights and widths of the pictures, px-img; None tells of those that it has looked at so far.
    """
    if not isinstance(predictor, TiledPredictor):
        return None
    tiles = predictor.tiles
    pictures, cut, windows = predictor.done if sizes is None else looks_at(tiles, sizes)
    if not pictures:
        return None
    if not cut:
        return f"--tile {tiles.size} changes nothing: no picture is larger than {tiles.size} x {tiles.size} px"
    whole = ", and the whole picture" if tiles.whole else ""
    small = pictures - cut
    are = "is" if small == 1 else "are"
    rest = f"; {small:,} of the pictures {are} no larger than a tile" if small else ""
    return (
        f"tiles of {tiles.size} px that overlap by {tiles.shared} px{whole}: {windows:,} looks at "
        f"{counted(pictures, 'picture')}, {windows / pictures:.3g} times the cost{rest}"
    )

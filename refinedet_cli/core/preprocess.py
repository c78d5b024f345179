"""The one resize and normalisation, for training, detection, evaluation and export.

The resize is two matrix products with triangle weights. It equals antialiased bilinear interpolation, and unlike a
library's resize it gives the same numbers in every engine that can multiply matrices.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from refinedet_cli.core.config import PreprocessConfig


class Window(NamedTuple):
    """The part of a picture that becomes the network input, in whole pixels; it may reach beyond the picture."""

    left: int
    top: int
    right: int
    bottom: int


def preprocess(
    image: Tensor,
    config: PreprocessConfig,
    window: Window | None = None,
    mirror: bool = False,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Turn a picture into network input.

    Args:
        image: uint8[H, W, 3], RGB.
        config: input size, mean and std on the 0..255 scale, channel order.
        window: what to take instead of the whole picture; what lies beyond the picture becomes the mean colour.
        mirror: flip left and right.
        size: height and width to make instead of the config's, for a picture that is a part of the input.

    Returns:
        float32[3, height, width], normalised.

    Raises:
        ValueError: the picture is not uint8[H, W, 3] with positive sides.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != torch.uint8 or not image.numel():
        raise ValueError(f"expected a picture uint8[H, W, 3], got {image.dtype}{list(image.shape)}")
    height, width = image.shape[0], image.shape[1]
    left, top, right, bottom = window or Window(0, 0, width, height)
    # Whole pictures come in few sizes; windows hardly ever repeat, and would only fill the cache.
    weights = _cached_weights if window is None else resize_weights
    output_height, output_width = size or (config.height, config.width)
    rows = weights(top, bottom, height, output_height)
    columns = weights(left, right, width, output_width)
    if mirror:
        columns = columns.flip(0)
    # Only what the window covers is touched.
    inside = image[slice(*_existing(top, bottom, height)), slice(*_existing(left, right, width))]
    return _resized(inside, rows, columns, config)


def preprocess_batch(images: Tensor, config: PreprocessConfig) -> Tensor:
    """Turn pictures of one size into network input, in operations that a graph can hold for every size.

    Args:
        images: uint8[B, H, W, 3], RGB; H and W may be symbolic.
        config: as for `preprocess`.

    Returns:
        float32[B, 3, height, width], normalised; each picture is as `preprocess` makes it.
    """
    height, width = images.shape[1], images.shape[2]
    rows = resize_weights(0, height, height, config.height)
    columns = resize_weights(0, width, width, config.width)
    return _resized(images, rows, columns, config)


def _resized(pixels: Tensor, rows: Tensor, columns: Tensor, config: PreprocessConfig) -> Tensor:
    """Resize and normalise uint8[..., h, w, 3] to float32[..., 3, height, width]."""
    # The mean goes first, so that what is beyond a picture weighs nothing.
    planes = (pixels.float() - torch.tensor(config.mean)).movedim(-1, -3)
    planes = rows @ (planes @ columns.T) / torch.tensor(config.std)[:, None, None]
    return planes.flip(-3) if config.channel_order == "bgr" else planes


def resize_weights(start: int, stop: int, length: int, outputs: int) -> Tensor:
    """Weights that resize pixels [start, stop) of a side of ``length`` pixels to ``outputs`` pixels.

    Args:
        start: first pixel of the window, may be negative.
        stop: end of the window, may exceed ``length``.
        length: pixels there are.
        outputs: pixels wanted.

    Returns:
        float32[outputs, pixels of the window that exist]. Rows sum to 1 where the window lies inside; weights of
        pixels that do not exist are left out after normalisation.
    """
    size = stop - start
    # A plain max would tie a graph to one side of the comparison.
    support: Any = torch.sym_max(outputs, size)
    j = torch.arange(outputs, dtype=torch.int64)[:, None]
    i = torch.arange(size, dtype=torch.int64)
    weights = (2 * support - ((2 * j + 1) * size - (2 * i + 1) * outputs).abs()).clamp(min=0).double()
    weights /= weights.sum(dim=1, keepdim=True)
    if start or stop is not length:
        first, last = _existing(start, stop, length)
        weights = weights[:, first - start : last - start]
    fine: Tensor = weights.float()
    return fine.contiguous()


def _existing(start: int, stop: int, length: int) -> tuple[int, int]:
    """Cut [start, stop) to the pixels that there are, which may be none; both ends are at least 0 and ``start``."""
    first = max(start, 0)
    return first, max(first, min(stop, length))


_cached_weights = lru_cache(maxsize=16)(resize_weights)

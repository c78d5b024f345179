"""The one resize and normalisation, for training, detection, evaluation and export.

The resize is two matrix products with triangle weights. It equals antialiased bilinear interpolation, and unlike a
library's resize it gives the same numbers in every engine that can multiply matrices. Most weights are 0: outside of
graphs, only the band around the diagonal is multiplied.
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
    make = _cached_side if window is None else _make_side
    output_height, output_width = size or (config.height, config.width)
    rows = make(top, bottom, height, output_height, image.device)
    columns = make(left, right, width, output_width, image.device)
    # Only what the window covers is touched.
    inside = image[slice(*_existing(top, bottom, height)), slice(*_existing(left, right, width))]
    planes = _resize(inside, rows, columns)
    # What is beyond the picture weighs nothing so far, and becomes the mean colour.
    mean, std = _constants(config, image.device)
    planes = (planes - mean * (columns.reach[:, None, None] * rows.reach)) / std
    if mirror:
        planes = planes.flip(0)
    if config.channel_order == "bgr":
        planes = planes.flip(1)
    return planes.permute(1, 2, 0)


def _resize(pixels: Tensor, rows: _Side, columns: _Side) -> Tensor:
    """Resize uint8[h, w, 3] to float32[width, 3, height]: transposed, so that no product needs a copy."""
    height, width = pixels.shape[0], pixels.shape[1]
    lines = pixels.reshape(height, width * 3)
    half = pixels.new_empty((width * 3, len(rows.weights)), dtype=torch.float32)
    for chosen, read in rows.bands:
        # A band of the picture at a time fits into the processor's cache.
        torch.mm(lines[read].float().T, rows.weights[chosen, read].T, out=half[:, chosen])
    half = half.view(width, 3 * len(rows.weights))
    whole = half.new_empty((len(columns.weights), half.shape[1]))
    for chosen, read in columns.bands:
        torch.mm(columns.weights[chosen, read], half[read], out=whole[chosen])
    return whole.view(len(columns.weights), 3, len(rows.weights))


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
    planes = (images.float() - torch.tensor(config.mean)).movedim(-1, -3)
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


class _Side(NamedTuple):
    """How one side is resized.

    Attributes:
        weights: as `resize_weights` gives them.
        bands: slices of outputs, and of the pixels that have weight in them; all outputs, in order.
        reach: float32[outputs], the sum of each output's weights: below 1 beyond the picture.
    """

    weights: Tensor
    bands: tuple[tuple[slice, slice], ...]
    reach: Tensor


# Outputs of a band: fewer multiply fewer zeros, more make fewer products.
_BAND = 16


def _make_side(start: int, stop: int, length: int, outputs: int, device: torch.device) -> _Side:
    """Prepare to resize pixels [start, stop) of a side; arguments are those of `resize_weights`."""
    weights = resize_weights(start, stop, length, outputs).to(device)
    size, support = stop - start, max(outputs, stop - start)
    first, last = (edge - start for edge in _existing(start, stop, length))
    bands = []
    # On an accelerator the zeros cost less than the launch of one more product.
    band = _BAND if device.type == "cpu" else outputs
    for low in range(0, outputs, band):
        high = min(low + band, outputs)
        # Pixel i has weight in output j where |(2 j + 1) size - (2 i + 1) outputs| < 2 support.
        below, above = (2 * low + 1) * size - 2 * support, (2 * high - 1) * size + 2 * support
        begin = (below - outputs) // (2 * outputs) + 1
        end = -((outputs - above) // (2 * outputs))
        begin, end = (min(max(edge, first), last) - first for edge in (begin, end))
        bands.append((slice(low, high), slice(begin, end)))
    return _Side(weights, tuple(bands), weights.sum(dim=1))


_cached_side = lru_cache(maxsize=16)(_make_side)


@lru_cache(maxsize=4)
def _constants(config: PreprocessConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, float32[3, 1]."""
    mean, std = (torch.tensor(values, device=device)[:, None] for values in (config.mean, config.std))
    return mean, std

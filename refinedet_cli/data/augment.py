"""Random changes of training pictures, as in the official code: photometric, expand, IoU-constrained crop, mirror.

Expanding and cropping only choose a window of the picture, so that pixels are resized once; colours are changed in 8
bits, as there, by lookup tables.

Source: spec of SSD-style augmentation in the official Caffe code (annotated_data_layer, im_transforms, sampler).
Differs: the resize is always the one of `core.preprocess`, there is no JPEG re-encoding between the steps, and a crop
must show the centre of a box (a picture without boxes teaches nothing, since negatives are mined in proportion to
positives).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image

from refinedet_cli.core.config import AugmentConfig
from refinedet_cli.core.preprocess import Window

CROP_MIN_IOUS = (0.1, 0.3, 0.5, 0.7, 0.9, 0.0)
CROP_TRIALS = 50
CROP_MAX_ASPECT = 2.0


class View(NamedTuple):
    """What of a picture goes into the network.

    Attributes:
        window: the part to take, px-img; may reach beyond the picture.
        mirror: whether to flip it.
    """

    window: Window
    mirror: bool


def draw_view(
    height: int, width: int, boxes: np.ndarray, config: AugmentConfig, generator: np.random.Generator
) -> View:
    """Choose an expansion, a crop and a flip.

    Args:
        height: of the picture, px-img.
        width: of the picture, px-img.
        boxes: float[N, 4], xyxy, px-img.
        config: probabilities and ranges.
        generator: the only source of randomness.

    Returns:
        `View` whose window has at least one pixel on each side.
    """
    window = Window(0, 0, width, height)
    if generator.random() < config.expand_probability:
        ratio = generator.uniform(1.0, config.expand_max)
        canvas_width, canvas_height = round(width * ratio), round(height * ratio)
        left = -int(generator.integers(0, canvas_width - width + 1))
        top = -int(generator.integers(0, canvas_height - height + 1))
        window = Window(left, top, left + canvas_width, top + canvas_height)
    if len(boxes) and generator.random() < config.crop_probability:
        crops = _draw_crops(window, boxes, config.crop_min_scale, generator)
        choice = int(generator.integers(0, len(crops) + 1))
        window = window if choice == 0 else crops[choice - 1]
    return View(window, bool(generator.random() < config.mirror_probability))


def _draw_crops(canvas: Window, boxes: np.ndarray, min_scale: float, generator: np.random.Generator) -> list[Window]:
    """Draw the first acceptable crop for each IoU constraint that one can be found for."""
    tries = (len(CROP_MIN_IOUS), CROP_TRIALS)
    scale = generator.uniform(min_scale, 1.0, tries)
    low = np.maximum(1 / CROP_MAX_ASPECT, scale**2)
    high = np.minimum(CROP_MAX_ASPECT, 1 / scale**2)
    aspect = low + generator.random(tries) * (high - low)
    full_width, full_height = canvas.right - canvas.left, canvas.bottom - canvas.top
    widths = np.maximum(1, np.round(scale * np.sqrt(aspect) * full_width))
    heights = np.maximum(1, np.round(scale / np.sqrt(aspect) * full_height))
    left = canvas.left + np.floor(generator.random(tries) * (full_width - widths + 1))
    top = canvas.top + np.floor(generator.random(tries) * (full_height - heights + 1))
    crops = np.stack([left, top, left + widths, top + heights], axis=-1)  # [6, 50, 4]
    best = _iou(crops[:, :, None], boxes).max(axis=2)  # [6, 50]
    shows_one = _centres_inside(boxes, crops[:, :, None]).any(axis=2)
    accepted = (best >= np.asarray(CROP_MIN_IOUS)[:, None]) & shows_one
    return [
        Window(*(int(v) for v in crops[i, int(accepted[i].argmax())]))
        for i in range(len(CROP_MIN_IOUS))
        if accepted[i].any()
    ]


def _iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    low = np.maximum(first[..., :2], second[..., :2])
    high = np.minimum(first[..., 2:], second[..., 2:])
    intersection = (high - low).clip(min=0).prod(axis=-1)
    areas = [(b[..., 2:] - b[..., :2]).prod(axis=-1) for b in (first, second)]
    result: np.ndarray = intersection / (areas[0] + areas[1] - intersection)
    return result


def _centres_inside(boxes: np.ndarray, windows: np.ndarray) -> np.ndarray:
    centres = (boxes[..., :2] + boxes[..., 2:]) / 2
    result: np.ndarray = ((centres >= windows[..., :2]) & (centres < windows[..., 2:])).all(axis=-1)
    return result


def view_boxes(boxes: np.ndarray, view: View) -> tuple[np.ndarray, np.ndarray]:
    """Move boxes into a view.

    Args:
        boxes: float[N, 4], xyxy, px-img.
        view: the window and whether it is flipped.

    Returns:
        float64[M, 4], xyxy, norm, clipped to [0, 1], of the boxes whose centre lies in the window, and int64[M], which
        ones.
    """
    left, top, right, bottom = view.window
    kept = np.flatnonzero(_centres_inside(boxes, np.asarray(view.window)))
    moved = (boxes[kept] - (left, top, left, top)) / ((right - left, bottom - top) * 2)
    moved = moved.clip(0, 1)
    if view.mirror:
        moved[:, [0, 2]] = 1 - moved[:, [2, 0]]
    return moved, kept


def distort_colours(image: np.ndarray, config: AugmentConfig, generator: np.random.Generator) -> np.ndarray:
    """Change brightness, contrast, saturation and hue, each with a chance of one half.

    Args:
        image: uint8[H, W, 3], RGB.
        config: ranges.
        generator: the only source of randomness.

    Returns:
        uint8[H, W, 3], RGB; contrast comes before or after saturation and hue, by a coin.
    """
    coins = generator.random(5) < 0.5
    levels = np.arange(256, dtype=np.float64)
    brightness = levels + generator.uniform(-config.brightness, config.brightness) * coins[0]
    contrast = levels * (1 + generator.uniform(-config.contrast, config.contrast) * coins[1])
    saturation = levels * (1 + generator.uniform(-config.saturation, config.saturation) * coins[2])
    # Pillow's hue circle has 256 steps; like OpenCV's in the official code it saturates at its ends instead of
    # wrapping.
    hue = levels + generator.uniform(-config.hue, config.hue) * 256 / 360 * coins[3]
    brightness, contrast, saturation, hue = (
        np.round(t).clip(0, 255).astype(np.uint8) for t in (brightness, contrast, saturation, hue)
    )
    contrast_first = coins[4]
    image = (contrast[brightness] if contrast_first else brightness)[image]
    if (coins[2] and config.saturation) or (coins[3] and config.hue):
        # Lookup tables of bands in turn: hue, saturation, value.
        tables = [*hue.tolist(), *saturation.tolist(), *range(256)]
        image = np.array(Image.fromarray(image).convert("HSV").point(tables).convert("RGB"))
    return image if contrast_first else contrast[image]

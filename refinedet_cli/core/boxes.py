"""Box formats, overlap, and the offset coding of SSD and RefineDet; the vocabulary is that of `structures`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# A predicted size beyond this factor of its anchor is no longer told apart: exp() stays finite in float32, and so does
# everything computed from the box. The official code has no such limit and aborts on overflow.
MAX_LOG_SCALE = math.log(1000.0)
# The smallest side of a decoded box, as a fraction of the picture; keeps the logarithm of `encode` finite.
MIN_SIDE = 1e-6


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Turn cxcywh boxes float[..., 4] into xyxy boxes of the same shape and unit."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Turn xyxy boxes float[..., 4] into cxcywh boxes of the same shape and unit."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def pair_iou(first: Tensor, second: Tensor) -> Tensor:
    """Compute the overlap of boxes, broadcasting their leading dimensions.

    Args:
        first: float[..., 4], xyxy.
        second: float[..., 4], xyxy in the same unit, broadcastable with ``first``.

    Returns:
        float[...], intersection over union in [0, 1]; 0 where both boxes are without area. No +1 is added to sides.

    The coordinates are handled as separate planes: stacking them costs ten times the memory traffic.
    """
    ax0, ay0, ax1, ay1 = first.unbind(-1)
    bx0, by0, bx1, by1 = second.unbind(-1)
    width = (torch.minimum(ax1, bx1) - torch.maximum(ax0, bx0)).clamp(min=0)
    height = (torch.minimum(ay1, by1) - torch.maximum(ay0, by0)).clamp(min=0)
    intersection = width * height
    union = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - intersection
    return intersection / union.clamp(min=torch.finfo(union.dtype).tiny)


def encode(boxes: Tensor, anchors: Tensor, variances: tuple[float, float]) -> Tensor:
    """Express boxes as offsets from anchors.

    Args:
        boxes: float[..., 4], xyxy, norm, with positive sides.
        anchors: float[..., 4], cxcywh, norm, with positive sides, broadcastable with ``boxes``.
        variances: divisors of the centre and of the size offsets.

    Returns:
        float[..., 4], (dx, dy, dw, dh), unitless.

    Source: SSD (arXiv:1512.02325), Sec. 2.2; variances as in the official RefineDet code.
    """
    target = xyxy_to_cxcywh(boxes)
    centre = (target[..., :2] - anchors[..., :2]) / (anchors[..., 2:] * variances[0])
    size = torch.log(target[..., 2:].clamp(min=MIN_SIDE) / anchors[..., 2:].clamp(min=MIN_SIDE)) / variances[1]
    return torch.cat([centre, size], dim=-1)


def decode(offsets: Tensor, anchors: Tensor, variances: tuple[float, float]) -> Tensor:
    """Apply offsets to anchors.

    Args:
        offsets: float[..., 4], (dx, dy, dw, dh), unitless.
        anchors: float[..., 4], cxcywh, norm, broadcastable with ``offsets``.
        variances: divisors of the centre and of the size offsets.

    Returns:
        float[..., 4], **cxcywh**, norm, not clipped, so that a second step can start from it. For offsets from
        ``encode(b, a, v)``, ``cxcywh_to_xyxy`` of the result equals ``b`` up to rounding.

    Source: as `encode`. Differs: the size offset is limited to a factor of 1000, so that a diverging
        network gives absurd boxes but never infinite ones.
    """
    centre = anchors[..., :2] + offsets[..., :2] * variances[0] * anchors[..., 2:]
    scale = (offsets[..., 2:] * variances[1]).clamp(-MAX_LOG_SCALE, MAX_LOG_SCALE)
    return torch.cat([centre, anchors[..., 2:] * scale.exp()], dim=-1)

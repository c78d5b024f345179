"""Assign objects to anchors, for a whole batch at once.

Overlaps are kept packed, one row per object of the batch, so that a crowded picture does not make every other picture
pay for padding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from refinedet_cli.core.structures import Targets

# Overlaps below this count as none (official code).
NO_OVERLAP = 1e-6


class Matches(NamedTuple):
    """Which object each anchor is responsible for.

    Attributes:
        target: int64[B, A], row of the packed targets, or -1. An object that overlaps any anchor of its picture has
            at least one anchor of its own.
        best_iou: float32[B, A], highest overlap with any object of the picture.
    """

    target: Tensor
    best_iou: Tensor


def match(ious: Tensor, targets: Targets, positive_iou: float) -> Matches:
    """Give each object its own best anchor, then each remaining anchor its best object if they overlap enough.

    The first pass is the greedy one of the official code: of all free pairs of a picture the one with the highest
    overlap is taken, until no object is left that overlaps a free anchor; equal overlaps go to the earlier anchor, then
    to the earlier object. It runs in rounds that take every pair which is the best of both its anchor and its object,
    which gives the same pairs: such a pair is taken before anything that could compete with it.

    Args:
        ious: float32[N, A], overlap of each packed object with each anchor of its picture.
        targets: the objects; only ``image`` and ``batch`` are read.
        positive_iou: second-pass threshold, inclusive; equal overlaps go to the earlier object.

    Returns:
        `Matches`.

    Source: MatchBBox of the official code, PER_PREDICTION.
    """
    count, anchors = ious.shape
    image, batch = targets.image, targets.batch
    device = ious.device
    target = torch.full((batch, anchors), -1, dtype=torch.int64, device=device)
    best_iou = torch.zeros(batch, anchors, device=device)
    if count == 0:
        return Matches(target, best_iou)
    ious = torch.where(ious < NO_OVERLAP, ious.new_zeros(()), ious)
    picture = image[:, None].expand(count, anchors)
    best_iou.scatter_reduce_(0, picture, ious, "amax")
    # The second pass first: the earliest of the objects that reach the best overlap of the anchor.
    rows = torch.arange(count, device=device)
    is_best = (ious == best_iou[image]) & (ious >= positive_iou)
    first = torch.full((batch, anchors), count, dtype=torch.int64, device=device)
    first.scatter_reduce_(0, picture, torch.where(is_best, rows[:, None], count), "amin")
    target = torch.where(first < count, first, target)
    _take_own_anchors(ious, targets, target)
    return Matches(target, best_iou)


def _take_own_anchors(ious: Tensor, targets: Targets, target: Tensor) -> None:
    """Run the greedy one-to-one pass, writing the pairs over the anchors' entries in ``target``."""
    image = targets.image
    rows = torch.arange(len(image), device=ious.device)  # objects still without an anchor
    free = torch.ones_like(target, dtype=torch.bool)
    while True:
        remaining = ious[rows] * free[image[rows]]  # [n, A]
        value, anchor = remaining.max(dim=1)
        alive = value > 0
        rows, value, anchor = rows[alive], value[alive], anchor[alive]
        if not len(rows):
            return
        owner = image[rows]
        # An object wins the anchor it proposes for if none of its picture's free objects overlaps that anchor more,
        # and among equals if it comes first.
        rival = (owner[:, None] == owner) * ious[rows[:, None], anchor]  # [n of rival, n of proposal]
        highest = rival.max(dim=0)
        wins = (highest.values == value) & (highest.indices == torch.arange(len(rows), device=rows.device))
        target[owner[wins], anchor[wins]] = rows[wins]
        free[owner[wins], anchor[wins]] = False
        rows = rows[~wins]
